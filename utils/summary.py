"""What a result file, or a column of scores, says in numbers.

Public: ``summarize_results``, ``summarize_scan``, ``in_words``, ``summarize_scores``,
``bootstrap_median``, ``format_summary``.
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


def in_words(summary: Mapping[str, Any]) -> list[str]:
    """The lines that a run of script 3 ends with."""
    prompts, memorized, rows = (summary[k] for k in ("prompts", "memorized", "undecided_rows"))
    undecided = f", {len(rows)} undecided" if rows else ""
    not_memorized = prompts - memorized - len(rows)
    lines = [f"{prompts} prompts: {memorized} memorized, {not_memorized} not{undecided}."]
    if rows:
        lines.append(
            "Undecided, since a noise difference or score is not finite: rows "
            f"{', '.join(map(str, rows))}. They count as neither."
        )
    medians = {kind: m for kind, m in summary.get("median_neurons", {}).items() if m is not None}
    if medians:
        every = medians.pop("all")
        of_kinds = ", ".join(f"{kind} {median:g}" for kind, median in medians.items())
        of_kinds = f" ({of_kinds})" if of_kinds else ""
        lines.append(f"Refined neurons of a memorized prompt, median: {every:g}{of_kinds}.")
    return lines


def summarize_scores(
    scores: Sequence[float | None],
    types: Sequence[str],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """One score for each prompt (None: missing) -> ``median``, ``mad``, ``n``, ``missing`` and
    ``interval`` for "all" and for each type that occurs ("VM", "TM").

    ``mad`` is the median absolute deviation from the median, unscaled. ``interval`` is the 95%
    percentile bootstrap of the median over prompts, from a generator of its own; None for fewer
    than two scores. Missing prompts are counted and enter nothing else.
    """
    groups = {"all": list(scores)}
    for kind in sorted({kind for kind in types if kind}, reverse=True):  # VM before TM
        groups[kind] = [s for s, own in zip(scores, types, strict=True) if own == kind]
    return {
        name: _summarize([s for s in group if s is not None], len(group), resamples, seed)
        for name, group in groups.items()
    }


def _summarize(known: Sequence[float], prompts: int, resamples: int, seed: int) -> dict[str, Any]:
    middle = median(known) if known else None
    return {
        "median": middle,
        "mad": None if middle is None else median(abs(score - middle) for score in known),
        "n": len(known),
        "missing": prompts - len(known),
        "interval": bootstrap_median(known, resamples=resamples, seed=seed),
    }


def bootstrap_median(
    scores: Sequence[float], *, resamples: int, seed: int, level: float = 0.95
) -> list[float] | None:
    """Percentile bootstrap of the median: [low, high], None for fewer than two scores.

    The scores are sorted first: their order changes nothing.
    """
    if len(scores) < 2:
        return None
    import numpy as np

    values = np.sort(np.asarray(scores, dtype=np.float64))
    generator = np.random.default_rng(seed)
    at_once = max(1, 2_000_000 // len(values))  # keeps memory flat
    medians = [
        np.median(values[generator.integers(0, len(values), (count, len(values)))], axis=1)
        for count in [at_once] * (resamples // at_once) + [resamples % at_once]
        if count
    ]
    ends = ((1 - level) / 2, (1 + level) / 2)
    return [float(end) for end in np.quantile(np.concatenate(medians), ends)]


def format_summary(title: str, summaries: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The one table that a metric prints: score name -> ``summarize_scores`` -> lines of text."""
    width = max(len(title), *map(len, summaries))
    lines = [
        f"{title:<{width}}  {'type':<4} {'median':>8} {'MAD':>8} {'n':>6} {'missing':>8}  95% "
        "interval"
    ]
    for name, groups in summaries.items():
        for kind, found in groups.items():
            numbers = [
                "-" if found[key] is None else f"{found[key]:.4f}" for key in ("median", "mad")
            ]
            interval = found["interval"]
            shown = "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
            lines.append(
                f"{name:<{width}}  {kind:<4} {numbers[0]:>8} {numbers[1]:>8} {found['n']:>6} "
                f"{found['missing']:>8}  {shown}"
            )
    return "\n".join(lines)
