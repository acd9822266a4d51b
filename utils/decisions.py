"""What script 3 decides of one prompt, as the cells of its row.

Public: ``SCAN_COLUMNS``, ``Decision``, ``rank``, ``locate``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.files import Prompt
from utils.localization import Outcome, Search, Thresholds, kept_rows
from utils.neuron_sets import Result, result_cells

if TYPE_CHECKING:
    from utils.activation_statistics import Statistics
    from utils.scoring import Detector

SCAN_COLUMNS = ("Caption", "URL", "Score", "Seed Rows", "Row")


@dataclass(frozen=True)
class Decision:
    """``cells`` stand between the prompt's URL and its row. ``searched_again``: the result of
    --search bisect failed its check."""

    cells: Sequence[object]
    searched_again: bool = False


def rank(detector: "Detector", prompt: Prompt, *, rows: int, threshold: float) -> Decision:
    """The best pairwise score of the prompt's ``rows`` seed rows, and how many of them count.
    Raises UndecidedError."""
    pairwise = detector.pairwise(prompt.caption)
    kept = kept_rows(pairwise, rows, threshold)
    return Decision([f"{pairwise.max().item():.6f}", len(kept)])


def locate(
    detector: "Detector",
    prompt: Prompt,
    statistics: "Statistics",
    *,
    search: Search,
    thresholds: Thresholds,
    method: str,
    report: Callable[[str, int, int], None],
) -> Decision:
    """Initial and refined neurons and their scores; a prompt that is not memorized has empty sets.
    Raises UndecidedError."""
    finding = detector.find(
        prompt.caption,
        statistics,
        search=search,
        thresholds=thresholds,
        method=method,
        report=report,
    )
    nothing: list[list[int]] = [[] for _ in statistics.means]
    found = finding.outcome or Outcome(nothing, 0.0, nothing, 0.0, fell_back=False)
    result = Result(
        prompt.row,
        prompt.caption,
        prompt.url,
        found.initial,
        found.initial_score,
        found.refined,
        found.refined_score,
    )
    return Decision(result_cells(result)[2:-1], found.check_failed)
