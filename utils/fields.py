"""Reading records, which somebody may have written by hand.

Public: ``field``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import InputError

T = TypeVar("T")
NAMES = {dict: "object", str: "text", float: "number"}


def field(content: Mapping[str, Any], name: str, kind: type[T], *, where: Path) -> T | None:
    """``content[name]``, None where it is not there or null; whole numbers are floats too.
    InputError, naming the file, for a value of another kind."""
    value = content.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    if value is None or isinstance(value, kind):
        return value
    raise InputError(f"{where}: '{name}' is no {NAMES[kind]}; restore the file")
