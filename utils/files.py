"""Prompt files, atomic writes and whole-row appends.

Public: ``CAPTION_COLUMN``, ``Prompt``, ``read_table``, ``is_whole_number``, ``read_prompts``,
``sha256_of_file``, ``replacing``, ``write_bytes``, ``write_json``, ``read_json``, ``format_row``,
``append_row``, ``drop_partial_row``, ``read_whole_rows``, ``open_table``, ``write_table``,
``FloatRows``.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import InputError

if TYPE_CHECKING:
    import numpy as np

DELIMITER = ";"
CAPTION_COLUMN = "Caption"
LONGEST_CELL = 10_000_000  # characters; a set of all neurons of SDXL takes some 200,000


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt file. ``row`` is its 0-based position there and its identity
    everywhere."""

    row: int
    caption: str
    url: str = ""
    type: str = ""  # "VM", "TM" or "" where the file does not say


def read_table(path: Path, *, whole_rows: bool = False) -> tuple[list[str], list[dict[str, str]]]:
    """Reads a ``;``-separated file strictly: (column names, one dict a row).

    Cells come back exactly as written ("NA" and "null" are text). Raises InputError for a file that
    is missing, not UTF-8, cut off inside a quoted cell, or has a row with more or fewer cells than
    the header. ``whole_rows`` leaves out a last row that is half-written.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    data = path.read_bytes()
    if whole_rows:
        data = data[: _end_of_whole_rows(data)]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8"
        ) from None
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITER, strict=True)
    try:
        table = [cells for cells in reader if cells]
    except csv.Error as error:
        raise InputError(
            f"{path}: line {reader.line_num}: {error}; the file is cut off or a quote is not closed"
        ) from None
    if not table:
        raise InputError(f"{path}: empty file; it needs a header line and a row for each prompt")
    header, rows = table[0], table[1:]
    doubled = sorted({name for name in header if name and header.count(name) > 1})
    if doubled:
        raise InputError(f"{path}: column '{doubled[0]}' appears twice; keep one of them")
    for row, cells in enumerate(rows):
        if len(cells) != len(header):
            raise InputError(
                f"{path}: row {row} has {len(cells)} cells, the header has {len(header)}; "
                "the file is cut off or a cell with ';' is not quoted"
            )
    return header, [dict(zip(header, cells, strict=True)) for cells in rows]


def is_whole_number(text: str) -> bool:
    """Whether a cell or an option holds a whole number as row numbers are: plain digits, less than
    10^9. (To Python alone a superscript is a digit, too.)"""
    return text.isascii() and text.isdigit() and len(text) < 10


def read_prompts(
    path: Path, *, caption_column: str | None = None, rows: Sequence[int] | None = None
) -> list[Prompt]:
    """Reads a prompt file, all of it or the given 0-based rows, in the file's order.

    Only the caption column is needed ("Caption" unless named); ``URL`` and ``type`` are read where
    they exist. Raises InputError for a missing column, an empty caption among the rows asked for,
    or a row that the file does not have.
    """
    header, table = read_table(path)
    caption_column = caption_column or CAPTION_COLUMN
    if caption_column not in header:
        hint = "" if len(header) > 1 else f"; is the separator '{DELIMITER}'?"
        named = ", ".join(name for name in header if name)
        raise InputError(
            f"{path}: no column '{caption_column}' (columns: {named}){hint}; "
            "name the column with --caption_column, or rename it where there is no such option"
        )
    if not table:
        raise InputError(f"{path}: a header but no rows; add at least one prompt")
    chosen = range(len(table)) if rows is None else sorted(rows)
    if chosen and chosen[-1] >= len(table):
        raise InputError(
            f"{path}: no row {chosen[-1]}, the last one is {len(table) - 1}; mend --rows"
        )
    prompts = []
    for row in chosen:
        cells = table[row]
        if not cells[caption_column].strip():
            raise InputError(
                f"{path}: row {row} has an empty caption; fill it in, or leave the row out of "
                "--rows or of the file"
            )
        prompts.append(
            Prompt(row, cells[caption_column], cells.get("URL", ""), cells.get("type", ""))
        )
    return prompts


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in ``path``'s folder; renames it to ``path`` if the block succeeds.

    The temporary name is fixed, so what a killed run left behind is overwritten, not added to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object atomically, indented, keys in the given order."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; InputError if the file is missing or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it belongs beside the file it describes") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, too deep, too long
        raise InputError(f"{path}: not valid JSON ({error}); restore or remake it") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; restore or remake it")
    return content


def format_row(cells: Sequence[object]) -> str:
    """One ``;``-separated line with its line end, quoted where needed."""
    buffer = io.StringIO(newline="")
    # csv quotes a carriage return only where it is part of the line end; readers need the quotes.
    csv.writer(buffer, delimiter=DELIMITER, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def append_row(path: Path, cells: Sequence[object]) -> None:
    """Appends one whole row and hands it to the operating system before returning."""
    with path.open("ab") as file:
        file.write(format_row(cells).encode())


def _end_of_whole_rows(data: bytes) -> int:
    """Number of bytes up to the last line end outside quotes (a caption may hold line ends
    itself)."""
    quotes, behind = data.count(b'"'), len(data)  # quotes before ``behind``
    while (end := data.rfind(b"\n", 0, behind)) >= 0:
        quotes -= data.count(b'"', end, behind)
        if quotes % 2 == 0:
            return end + 1
        behind = end
    return 0


def drop_partial_row(path: Path) -> None:
    """Cuts off a last row that a killed run left half-written."""
    data = path.read_bytes()
    end = _end_of_whole_rows(data)
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)


def read_whole_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows that an interrupted run has written to its table, none if there is no header yet.
    InputError if they are not rows with these columns."""
    if not path.exists() or not _end_of_whole_rows(path.read_bytes()):
        return []
    header, table = read_table(path, whole_rows=True)
    if header != list(columns):
        raise InputError(
            f"{path}: its columns are {header}, not {list(columns)}; name another output"
        )
    return table


def open_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Makes a table ready for ``append_row``: a new one gets its header, an interrupted one loses a
    half-written last row. Returns the whole rows that are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = read_whole_rows(path, columns)
    if path.exists():
        drop_partial_row(path)
    if not path.exists() or path.stat().st_size == 0:
        append_row(path, columns)
    return table


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a whole table atomically."""
    write_bytes(path, "".join(format_row(cells) for cells in (columns, *rows)).encode())


class FloatRows:
    """A file of raw float32 rows of one width, appended one at a time: what is on disk is what has
    been done, and an interrupted run goes on behind its last whole row. Creates the file and its
    folder."""

    def __init__(self, path: Path, width: int) -> None:
        self._path, self._width = path, width
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            self.count = file.tell() // (4 * width)
            file.truncate(self.count * 4 * width)

    def add(self, row: "np.ndarray") -> None:
        """Appends one row (width,)."""
        with self._path.open("ab") as file:
            file.write(row.astype("<f4").tobytes())
        self.count += 1

    def read(self) -> "np.ndarray":
        """All rows, (count, width) float32, mapped from the file: memory is used where it is
        read."""
        import numpy as np

        return np.memmap(self._path, dtype="<f4", mode="r", shape=(self.count, self._width))
