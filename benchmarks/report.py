"""What the benchmark scripts share: options, the machine's description, and how a result is kept.

A result is one table: printed last, saved as CSV, drawn as PNG, and put into RESULTS.md, which is
made anew from all results of the folder.
Public: ``Table``, ``RSS_UNIT``, ``PRECISIONS``, ``add_model_options``, ``add_options``,
``number_list``, ``name_list``, ``add_dtype_option``, ``full_size_dtype``,
``prepare``, ``machine``, ``median_seconds``, ``seconds_of``,
``publish``.
"""

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from utils import cli
from utils.files import read_json, write_json, write_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).resolve().parent / "results"
ORDER = (
    "localization",
    "localization_long",
    "localization_cost",
    "processes",
    "full_size",
    "full_size_search",
    "full_size_search_close",
    "replay",
    "generation",
    "statistics",
    "memory",
    "precision",
    "calibration",
)
PRECISIONS = ("float32", "float16", "bfloat16")
ON_GPU = "_gpu"  # after a table's name
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
TITLE = (
    "# What it costs\n\nMade by the scripts of this folder; each section ends with its command. "
    "They read the outputs of\nscripts 1 and 2 (`make demo` makes them) and write over the tables "
    "that lie here, unless `-o` names\nanother folder.\n"
)


@dataclass(frozen=True)
class Table:
    """A result: cells are text, as they are to be read."""

    name: str  # of its files
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str] = field(default_factory=list)  # what a reader has to know beside it


def number_list(text: str) -> list[int]:
    """``1,2,10`` -> numbers of 1 and more."""
    return [cli.whole_number(1, 10_000_000)(part) for part in text.split(",")]


def name_list(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of an option like ``float32,bfloat16``: some of the names."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(known)}")
        return found

    return names


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """``--dtype`` of a full-size U-Net; ``full_size_dtype`` settles it."""
    parser.add_argument(
        "--dtype",
        choices=PRECISIONS,
        help="precision (default: bfloat16 on CUDA, float32 on a CPU)",
    )


def full_size_dtype(args: argparse.Namespace) -> str:
    """``--dtype``, or the device's."""
    dtype: str = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return dtype


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``--version --dataset`` of a benchmark on a model's own prompts."""
    parser.add_argument(
        "-v",
        "--version",
        default="tiny",
        metavar="NAME|DIR",
        help="model, as in the numbered scripts",
    )
    parser.add_argument(
        "-d", "--dataset", type=Path, metavar="CSV", help="prompts (default: the version's)"
    )


def add_options(
    parser: argparse.ArgumentParser, *, repeats: int | None = 3, device: str = ""
) -> None:
    """``--device --threads --repeats --output``: the same for every benchmark (``repeats`` None:
    nothing is timed; a ``device``: the benchmark chooses it and the threads)."""
    group = parser.add_argument_group("measuring")
    if device:
        parser.set_defaults(device=device, threads=None)
    else:
        group.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: cuda if any)")
        group.add_argument(
            "--threads",
            type=cli.whole_number(1, 1024),
            metavar="INT",
            help="threads of a CPU (default: torch's, all cores)",
        )
    if repeats is not None:
        group.add_argument(
            "--repeats",
            type=cli.whole_number(1, 1000),
            default=repeats,
            metavar="INT",
            help="how often everything is timed; medians count",
        )
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help="folder of tables and pictures (from a GPU: ..._gpu); RESULTS.md is written beside it",
    )


def prepare(args: argparse.Namespace) -> None:
    """Checks the device, sets the number of threads of this process, makes the folder and says
    where it runs."""
    import torch

    args.device = cli.checked_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    print(machine(args.device))


def machine(device: str) -> str:
    """Device, threads and versions, in a line."""
    import torch

    if device.startswith("cuda"):
        where = f"{torch.cuda.get_device_name(device)}"
    else:
        where = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def median_seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """Median time of ``work`` on a device, after one run that does not count."""
    return median([seconds_of(work, device) for _ in range(repeats + 1)][1:])


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Time of ``work`` on a device, to its end."""
    import torch

    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def publish(
    folder: Path, device: str, table: Table, draw: Callable[["Axes"], Any] | None = None
) -> None:
    """Writes a table's CSV, its picture, its part of RESULTS.md, and prints it. What was measured
    on a GPU has a name of its own, so that it stands beside what a CPU takes."""
    if device.startswith("cuda"):
        table = replace(table, name=table.name + ON_GPU, title=table.title + ", on a GPU")
    write_table(folder / f"{table.name}.csv", table.columns, table.rows)
    if draw is not None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        figure.savefig(folder / f"{table.name}.png", dpi=150)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    section = {**asdict(table), "machine": machine(device), "command": command}
    write_json(folder / f"{table.name}.json", {**section, "picture": draw is not None})
    _write_page(folder)
    print(f"\n{_aligned(table)}")


def _aligned(table: Table) -> str:
    widths = [max(map(len, cells)) for cells in zip(table.columns, *table.rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        for cells in (table.columns, *table.rows)
    ]
    return "\n".join([table.title, *lines, *table.remarks])


def _write_page(folder: Path) -> None:
    parts = [TITLE]
    for name in (name + where for name in ORDER for where in ("", ON_GPU)):
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        found = read_json(path)
        lines = ["| " + " | ".join(cells) + " |" for cells in (found["columns"], *found["rows"])]
        lines.insert(1, "|---" * len(found["columns"]) + "|")
        parts += [f"## {found['title']}", "\n".join(lines)]
        parts += list(found["remarks"])
        if found["picture"]:
            parts.append(f"![{found['title']}]({folder.name}/{name}.png)")
        parts.append(f"{found['machine']}. `{found['command']}`\n")
    (folder.parent / "RESULTS.md").write_text("\n\n".join(parts), encoding="utf-8")
