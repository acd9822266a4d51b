"""What a result file says in numbers.

Public: ``summarize_results``, ``summarize_scan``.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from utils.neuron_sets import Result, size


def summarize_results(results: Sequence[Result], types: Mapping[int, str]) -> dict[str, Any]:
    """Counts of a localization run and the median number of refined neurons over memorized prompts,
    for all and for each type (``types``: row -> "VM", "TM" or ""). No median of nothing: None."""
    found = [result for result in results if result.memorized]

    def neurons(kind: str | None) -> float | None:
        sizes = [size(r.refined or []) for r in found if kind is None or types[r.row] == kind]
        return median(sizes) if sizes else None

    kinds = sorted({kind for kind in types.values() if kind})
    return {
        "prompts": len(results),
        "memorized": len(found),
        "undecided_rows": [result.row for result in results if result.initial is None],
        "median_neurons": {"all": neurons(None), **{kind: neurons(kind) for kind in kinds}},
    }


def summarize_scan(table: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Counts of a ``--detect_only`` run."""
    return {
        "prompts": len(table),
        "memorized": sum(cells["Seed Rows"] not in ("", "0") for cells in table),
        "undecided_rows": [int(cells["Row"]) for cells in table if not cells["Score"]],
    }
