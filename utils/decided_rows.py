"""The rows of a table that one or several processes decide: kept as they come, written in order.

A process on its own appends to the table itself. Of several, each appends to a part file beside it
(``.<table>.part-<rank>``); when all have finished, the first writes the table in the order of the
prompts. So what was decided is kept whenever a process dies, and whoever goes on, one process or
many, ends with the same bytes.
Public: ``DecidedRows``, ``part_files``.
"""

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import InputError
from utils.files import Prompt, append_row, open_table, read_whole_rows, write_table
from utils.team import Team

if TYPE_CHECKING:
    from tqdm import tqdm

Cells = list[str]
OF_PROMPT = ("Row", "Caption", "URL", "type")


def part_files(table: Path) -> list[Path]:
    """Part files of a table that are there."""
    return sorted(table.parent.glob(glob.escape(f".{table.name}.part-") + "*"))


class DecidedRows:
    """The table at ``path`` with these columns, one row a prompt: ``Row``, ``Caption`` and, if they
    are to be there, ``URL`` and ``type`` are the prompt's, the others are what is decided."""

    def __init__(self, path: Path, columns: Sequence[str], prompts: Sequence[Prompt]) -> None:
        self.path, self.columns, self.prompts = path, list(columns), prompts
        self._decided = [name for name in columns if name not in OF_PROMPT]
        self._known: dict[int, Cells] = {}

    def parts(self) -> list[Path]:
        """Part files that are there."""
        return part_files(self.path)

    def check(self) -> None:
        """InputError unless the table holds whole rows of the first prompts, and the parts rows of
        these prompts."""
        rows = [str(prompt.row) for prompt in self.prompts]
        found = sorted(cells["Row"] for cells in read_whole_rows(self.path, self.columns))
        if found != sorted(rows[: len(found)]):
            raise InputError(
                f"{self.path}: its {len(found)} rows are not those of the first prompts; restore "
                "it, or name another output with -o"
            )
        ours = set(rows)
        for part in self.parts():
            for cells in read_whole_rows(part, self.columns):
                if cells["Row"] not in ours:
                    raise InputError(
                        f"{part}: row {cells['Row']} is not of this run; delete that file"
                    )

    def open(self, team: Team) -> None:
        """Reads what was decided before; the first process first gathers it in one part file, so
        that the others read a file which nobody writes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        gathered = self.path.with_name(f".{self.path.name}.part-done")

        def gather() -> str:
            table = open_table(self.path, self.columns)
            self._take(table)
            parts = self.parts()
            for part in parts:
                self._take(read_whole_rows(part, self.columns))
            if parts or team.size > 1:
                written = {int(cells["Row"]) for cells in table}
                self._write(gathered, [row for row in self._known if row not in written])
            for part in parts:
                if part != gathered:
                    part.unlink()
            return str(len(table))

        self._written = int(team.agree("gathered", gather))
        if not team.first:
            for path in (self.path, gathered):
                self._take(read_whole_rows(path, self.columns))
        self._part = self.path.with_name(f".{self.path.name}.part-{team.rank}")
        self._alone = team.size == 1
        if self._alone:
            self._append_in_order()

    def _take(self, table: Sequence[dict[str, str]]) -> None:
        for cells in table:
            self._known[int(cells["Row"])] = [cells[name] for name in self.columns]

    def _write(self, path: Path, rows: Sequence[int]) -> None:
        write_table(path, self.columns, [self._known[row] for row in rows])

    def __len__(self) -> int:
        """Rows decided so far, as this process knows."""
        return len(self._known)

    def known(self, row: int) -> bool:
        """Whether the row of this prompt was decided before."""
        return row in self._known

    def captions(self) -> dict[str, Cells]:
        """Caption -> what was decided of it (all cells that are not the prompt's)."""
        named = [dict(zip(self.columns, cells, strict=True)) for cells in self._known.values()]
        return {cells["Caption"]: [cells[name] for name in self._decided] for cells in named}

    def add(self, prompt: Prompt, decided: Sequence[object]) -> None:
        """Keeps one prompt's row, on the disk before this returns."""
        named = {"Row": str(prompt.row), "Caption": prompt.caption}
        named |= {"URL": prompt.url, "type": prompt.type}
        named |= dict(zip(self._decided, map(str, decided), strict=True))
        cells = [named[name] for name in self.columns]
        self._known[prompt.row] = cells
        if self._alone:
            self._append_in_order()
            return
        if not self._part.exists():
            append_row(self._part, self.columns)
        append_row(self._part, cells)

    def _append_in_order(self) -> None:
        while self._written < len(self.prompts):
            row = self.prompts[self._written].row
            if row not in self._known:
                return
            append_row(self.path, self._known[row])
            self._written += 1

    def decide(
        self,
        team: Team,
        decision: "Callable[[Prompt, tqdm[Any]], Sequence[object]]",
        *,
        undecided: Sequence[object],
        by_caption: bool = True,
    ) -> bool:
        """Decides all rows that are not known yet, together with the other processes, and puts the
        table together; False for a process whose work this ends, all but the first.

        ``decision`` gives a prompt's cells, and has the progress bar; where it raises
        UndecidedError, which is said, they are ``undecided``. Equal captions are decided once a
        process, unless a decision depends on the row, too: ``by_caption`` False.
        """
        from tqdm import tqdm

        from utils.localization import UndecidedError

        known = self.captions() if by_caption else {}
        before = len(self)
        with tqdm(
            total=len(self.prompts),
            initial=before,
            unit="prompt",
            mininterval=0.5,
            miniters=0,
            disable=not team.first,
        ) as progress:
            for unit in team.deal(len(self.prompts)):
                prompt = self.prompts[unit]
                if self.known(prompt.row):
                    continue
                cells = known.get(prompt.caption)
                if cells is None:
                    try:
                        cells = [str(cell) for cell in decision(prompt, progress)]
                    except UndecidedError as error:
                        progress.write(f"row {prompt.row}: undecided, {error}")
                        cells = [str(cell) for cell in undecided]
                    if by_caption:
                        known[prompt.caption] = cells
                self.add(prompt, cells)
                progress.update(before + team.done() - progress.n)
        team.finish()
        if team.first:
            self.close()
        return team.first

    def close(self) -> None:
        """Puts the table together and removes the parts: for the first process, when all have
        finished. InputError if a row is missing: another process wrote where this one cannot
        see."""
        parts = self.parts()
        for part in parts:
            self._take(read_whole_rows(part, self.columns))
        missing = [prompt.row for prompt in self.prompts if prompt.row not in self._known]
        if missing:
            raise InputError(
                f"{self.path}: {len(missing)} of {len(self.prompts)} rows are missing, the first "
                f"is {missing[0]}; all processes must see {self.path.parent} as one folder; then "
                "--continue_run decides them"
            )
        if parts:
            self._write(self.path, [prompt.row for prompt in self.prompts])
        for part in parts:
            part.unlink()
