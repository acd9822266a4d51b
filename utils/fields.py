"""Reading records that somebody may have written by hand.

Public: ``field``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import InputError

T = TypeVar("T")


def field(content: Mapping[str, Any], name: str, kind: type[T], *, where: Path) -> T | None:
    """``content[name]``, None where it is not there or null. InputError, naming the file, for a
    value of another type."""
    value = content.get(name)
    if value is None or isinstance(value, kind):
        return value
    raise InputError(f"{where}: '{name}' is no {_NAMES[kind]}; restore the file")


_NAMES: dict[type, str] = {dict: "object", list: "list", str: "text", int: "whole number"}
