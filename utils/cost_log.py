"""How long each prompt took, kept while a run goes on: times have no place in its table, and a
record that is written at the end would not know of killed runs or of other processes.

Public: ``CostLog``.
"""

import glob
from pathlib import Path
from typing import Any

from utils.files import Prompt, append_row, open_table, read_whole_rows

COLUMNS = ("Row", "Type", "Seconds", "Searched Again")


class CostLog:
    """A file of each process beside ``output`` (``.<output>.cost-<rank>``), one row a prompt that
    was computed. All are read, and removed, when the run is complete."""

    def __init__(self, output: Path, rank: int) -> None:
        self._stem = output.with_name(f".{output.name}.cost-")
        self._path = self._stem.with_name(f"{self._stem.name}{rank}")

    def files(self) -> list[Path]:
        """Those of all processes that are there."""
        return sorted(self._stem.parent.glob(glob.escape(self._stem.name) + "*"))

    def open(self) -> None:
        """Makes this process's file ready, which a killed run may have left."""
        open_table(self._path, COLUMNS)

    def add(self, prompt: Prompt, seconds: float, *, searched_again: bool) -> None:
        """Keeps what one prompt took."""
        append_row(self._path, [prompt.row, prompt.type, f"{seconds:.3f}", int(searched_again)])

    def totals(self) -> tuple[dict[str, Any], list[int]]:
        """(type -> number of prompts and their seconds, rows that were searched again), of all
        processes, since the run first began. Prompts without a type are under "all"."""
        # A prompt whose process was killed before its row was written was computed again.
        last = {
            int(cells["Row"]): cells
            for path in self.files()
            for cells in read_whole_rows(path, COLUMNS)
        }
        kinds: dict[str, list[float]] = {}
        for cells in last.values():
            kinds.setdefault(cells["Type"] or "all", []).append(float(cells["Seconds"]))
        cost = {
            kind: {"prompts": len(each), "seconds": round(sum(each), 3)}
            for kind, each in sorted(kinds.items())
        }
        return cost, sorted(row for row, cells in last.items() if cells["Searched Again"] == "1")

    def remove(self) -> None:
        """Removes the files of all processes."""
        for path in self.files():
            path.unlink()
