"""Tables of text, and published beside own numbers, as Markdown, CSV and LaTeX.

Public: ``NOT_RUN``, ``NONE``, ``Number``, ``Measured``, ``difference``, ``shown``, ``Table``,
``Comparison``, ``comparison_table``, ``markdown_table``, ``markdown``, ``latex``,
``latex_document``, ``escape``, ``write_tables``, ``check_table_output``.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from utils.cli import BESIDE
from utils.errors import InputError
from utils.files import write_bytes

NOT_RUN = "not run"
NONE = "none"  # run, but there was nothing to measure


@dataclass(frozen=True)
class Number:
    """A published number, as it was printed, and its deviation ("" where none was)."""

    text: str
    deviation: str = ""

    def __str__(self) -> str:
        return f"{self.text} ± {self.deviation}" if self.deviation else self.text


@dataclass(frozen=True)
class Measured:
    """A number of ours and its median absolute deviation (None: it has none)."""

    value: float
    deviation: float | None = None


def shown(number: float, digits: int) -> str:
    """At the most ``digits`` decimals, whole numbers without any."""
    return (
        f"{number:.{digits}f}".rstrip("0").rstrip(".")
        if number % 1 == 0
        else (f"{number:.{digits}f}")
    )


def difference(ours: Measured, published: Number) -> str:
    """(ours - published) / published deviation, one decimal; "" where that was not printed, or is
    0."""
    if not published.text or not published.deviation or float(published.deviation) == 0:
        return ""
    deviations = (ours.value - float(published.text)) / float(published.deviation)
    return f"{round(deviations, 1) + 0:.1f}"  # + 0: no minus before a zero


@dataclass(frozen=True)
class Table:
    """Text in rows and columns. ``data`` is what the CSV holds, where that is not the same."""

    name: str  # of its files
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    data: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None


@dataclass(frozen=True)
class Comparison:
    """One setting for one type of prompt. ``ours`` misses what was not run, and has None where
    there was nothing to measure; ``prompts`` says how many of ours counted."""

    setting: str
    kind: str
    published: Mapping[str, Number] = field(default_factory=dict)
    ours: Mapping[str, Measured | None] = field(default_factory=dict)
    prompts: str = ""


def comparison_table(
    name: str,
    title: str,
    rows: Sequence[Comparison],
    measures: Mapping[str, tuple[str, int]],
    notes: Sequence[str] = (),
) -> Table:
    """Up to three lines a row, the first of them named: published, ours, difference. ``measures``:
    name -> (heading, decimals). The CSV has one line a row, the published columns named and written
    as in ``metrics/paper_tables.csv``."""
    text: list[list[str]] = []
    data: list[list[str]] = []
    for row in rows:
        line = [row.setting, row.kind]
        published = [row.published.get(measure, Number("")) for measure in measures]
        ours = [_ours(row.ours, measure, digits) for measure, (_, digits) in measures.items()]
        apart = [
            difference(found, number) if (found := row.ours.get(measure)) else ""
            for measure, number in zip(measures, published, strict=True)
        ]
        if row.published:
            text.append([*line, "", "published", *map(str, published)])
        named = ["", ""] if row.published else line
        text.append([*named, row.prompts, "ours", *(" ± ".join(filter(None, o)) for o in ours)])
        if row.published:
            text.append(["", "", "", "difference", *apart])
        cells = [*line]
        for number in published:
            cells += [number.text, number.deviation]
        for own, gap in zip(ours, apart, strict=True):
            cells += [*own, gap]
        data.append([*cells, row.prompts])
    header = ["setting", "type"]
    for measure in measures:
        header += [measure, f"{measure}_dev"]
    for measure in measures:
        header += [f"ours_{measure}", f"ours_{measure}_dev", f"difference_{measure}"]
    columns = [
        "setting",
        "type",
        "prompts",
        "number",
        *(heading for heading, _ in measures.values()),
    ]
    return Table(name, title, columns, text, notes, ([*header, "prompts"], data))


def _ours(ours: Mapping[str, Measured | None], measure: str, digits: int) -> tuple[str, str]:
    measured = ours.get(measure)
    if measured is None:
        return NONE if measure in ours else NOT_RUN, ""
    deviation = measured.deviation
    return shown(measured.value, digits), "" if deviation is None else shown(deviation, digits)


# Forms.


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table alone."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def markdown(table: Table) -> str:
    """A Markdown table, its title above and its notes below."""
    notes = "\n".join(f"- {note}" for note in table.notes)
    text = f"## {table.title}\n\n{markdown_table(table.columns, table.rows)}\n{notes}"
    return text.rstrip() + "\n"


def csv_text(table: Table) -> str:
    """Comma-separated, as the published values are."""
    columns, rows = table.data or (table.columns, table.rows)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([columns, *rows])
    return buffer.getvalue()


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_\allowbreak{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "-": "-{}",  # no ligatures: --rows must not become a dash
    "/": r"/\allowbreak{}",
    "=": r"=\allowbreak{}",
    ",": r",\allowbreak{}",
    "±": r"$\pm$",
}


def escape(text: str) -> str:
    """Text for LaTeX, letter by letter. What is neither ASCII nor known here becomes '?', since
    which letters a font has is not known."""
    return "".join(_LATEX.get(c, c if c.isascii() and c.isprintable() else "?") for c in text)


# Lines of a table touch its rules without them.
_STRUTS = r"\rule[-1.1ex]{0pt}{3.7ex}"
_GAP = r"\noalign{\vskip 0.5ex}"


def latex(table: Table) -> str:
    """A longtable, which breaks over pages, with its notes below. It needs the packages longtable
    and textcomp, and three or four runs of LaTeX until its columns are as wide as they must be."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(escape, cells)) + r" \\"

    rows = table.rows or [[NONE, *[""] * (len(table.columns) - 1)]]  # no page of rules alone
    lines = [
        rf"\section*{{{escape(table.title)}}}",
        rf"\begin{{longtable}}{{{'l' * len(table.columns)}}}",
        r"\hline",
        _STRUTS + line(table.columns),
        r"\hline",
        _GAP,
        r"\endhead",
        _GAP,
        r"\hline",
        r"\endfoot",
        # a line without a name belongs to the one above: no page ends between them
        *(
            line(row) + ("*" if following and not following[0] else "")
            for row, following in zip_longest(rows, rows[1:])
        ),
        r"\end{longtable}",
    ]
    if table.notes:
        lines += [r"\begin{itemize}", *(rf"\item {escape(n)}" for n in table.notes)]
        lines += [r"\end{itemize}"]
    return "\n".join(lines) + "\n"


def latex_document(names: Sequence[str]) -> str:
    """A document that takes in the tables beside it; ``pdflatex`` makes it in three or four runs,
    from the basic packages."""
    return "\n".join(
        [
            "% Run pdflatex until it no longer says that table widths have changed: 3 or 4 times.",
            r"\documentclass[a4paper,landscape]{article}",
            r"\usepackage[T1]{fontenc}",
            r"\usepackage{textcomp}",
            r"\usepackage{longtable}",
            r"\usepackage[margin=12mm]{geometry}",
            r"\begin{document}",
            r"\footnotesize\setlength{\tabcolsep}{3pt}\sloppy",
            *(rf"\input{{{name}}}" for name in names),
            r"\end{document}",
            "",
        ]
    )


def write_tables(tables: Sequence[Table], folder: Path) -> None:
    """Each table as ``.md``, ``.csv`` and ``.tex``; all of them as ``tables.md`` and
    ``tables.tex``."""
    for table in tables:
        write_bytes(folder / f"{table.name}.md", markdown(table).encode())
        write_bytes(folder / f"{table.name}.csv", csv_text(table).encode())
        write_bytes(folder / f"{table.name}.tex", latex(table).encode())
    write_bytes(folder / "tables.md", "\n".join(map(markdown, tables)).encode())
    names = [table.name for table in tables]
    write_bytes(folder / "tables.tex", latex_document(names).encode())


def check_table_output(output: Path, columns: Sequence[str]) -> None:
    """InputError where a table, which is made anew each time, would replace more than an earlier
    one, known by the first two of its columns: the table of a run, which has a record, or any
    other file."""
    beside = [output.with_suffix(ending) for ending in BESIDE]
    taken = [path for path in (output, *beside) if path.exists()]
    if output.with_suffix(".json") in taken:
        raise InputError(f"-o {output}: is the table of a run; name another file")
    first, second = columns[:2]
    ours = output.is_file() and output.read_bytes().startswith(f"{first};{second};".encode())
    if taken and not ours:
        raise InputError(
            f"-o {output}: {taken[0]} exists already, and not as such a table; name "
            "another file, or delete it"
        )
