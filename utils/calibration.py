"""Is a picture nearer to its reference than to one that was never trained on? A calibrated answer.

A fixed similarity such as 0.7 means another thing for every network, kind of picture and number of
generations: the largest of more samples is larger. Here a prompt's largest similarity is compared
with what never-trained references reach in the same way (the null), which gives a p-value by rank;
over many prompts the false discovery rate is controlled (Benjamini and Hochberg 1995). P-values
that share one null depend on each other positively, under which that control still holds (Bates,
Candès, Lei, Romano, Sesia: Testing for outliers with conformal p-values, 2023).
Public: ``Compared``, ``Null``, ``null_of_pictures``, ``null_of_scores``, ``p_value``, ``q_values``,
``discoveries``, ``smallest_null``, ``needed_together``, ``CALIBRATED``, ``calibrate``, ``said``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from utils.errors import InputError

# (numbers of its samples, count of its references) of a prompt -> what each never-trained reference
# reached with such, (m,).
Null = Callable[[Sequence[int], int], np.ndarray]
CALIBRATED = ("P Value", "Q Value", "Decision")
DIGITS = 6  # of a score, as tables hold them: a null from a file ranks like the one in memory
ROUNDING = 1e-9  # relative; p, q and levels are ratios of numbers far smaller than 1e9


@dataclass(frozen=True)
class Compared:
    """Similarities (samples, references) of a prompt's samples of these ``numbers``, rising, with
    its references. The number of a sample says which noise it comes from, the same for all prompts,
    and some noises give pictures that are nearer to anything."""

    numbers: Sequence[int]
    similarities: np.ndarray


def null_of_pictures(never_trained: Sequence[Compared]) -> Null:
    """A null from never-trained prompts. For a prompt with fewer samples or references theirs are
    cut to its own sample numbers and its count of references; what lacks one does not count."""

    def scores(samples: Sequence[int], references: int) -> np.ndarray:
        reached = []
        for known in never_trained:
            at = [place for place, number in enumerate(known.numbers) if number in samples]
            if len(at) == len(samples) and known.similarities.shape[1] >= references:
                reached.append(known.similarities[at, :references].max())
        return np.array(reached)

    return scores


def null_of_scores(largest: Sequence[float], samples: Sequence[int]) -> Null:
    """A null from largest similarities, each over so many samples and at least one reference. It
    serves prompts of one reference and at most as many samples (for fewer it is too high, which
    errs on the safe side)."""
    reached, counts = np.array(largest, dtype=np.float64), np.array(samples)

    def scores(samples: Sequence[int], references: int) -> np.ndarray:
        return reached[counts >= len(samples)] if references == 1 else np.empty(0)

    return scores


def p_value(score: float, null: np.ndarray) -> float:
    """Probability, if the reference was never trained on, to rank among the null (m,) as high as
    this or higher: (1 + those that are not lower) / (m + 1), with six digits of each. A tie counts
    against a finding.
    ValueError for a null without scores, or a score that is not finite."""
    if not len(null) or not (math.isfinite(score) and np.isfinite(null).all()):
        raise ValueError("a p-value needs a finite score and a null of finite scores")
    not_lower = np.count_nonzero(null.round(DIGITS) >= round(float(score), DIGITS))
    return (1 + int(not_lower)) / (len(null) + 1)


def q_values(p: Sequence[float]) -> np.ndarray:
    """Benjamini and Hochberg's adjusted p-values, (n,): the smallest false discovery rate at which
    each is still a discovery. Equal p-values have equal q-values."""
    values = np.asarray(p, dtype=np.float64)
    falling = np.argsort(-values, kind="stable")
    ranks = np.arange(len(values), 0, -1)
    adjusted = np.empty(len(values))
    adjusted[falling] = np.minimum.accumulate(values[falling] * len(values) / ranks)
    return adjusted.clip(max=1)


def discoveries(q: np.ndarray, fdr: float) -> np.ndarray:
    """Which q-values are at most ``fdr``, (n,) bool; rounding does not decide where they are
    equal."""
    return q <= fdr * (1 + ROUNDING)


def smallest_null(fdr: float) -> int:
    """How many never-trained references it takes for any discovery at all: with m of them no
    p-value is below 1 / (m + 1)."""
    return math.ceil(1 / Fraction(str(fdr))) - 1


def needed_together(tested: int, null: int, fdr: float) -> int:
    """How many of the ``tested`` prompts are found at the least, if any is."""
    return math.ceil(Fraction(tested, null + 1) / Fraction(str(fdr)))


def calibrate(
    prompts: Sequence[Compared], null: Null, fdr: float
) -> tuple[list[list[object]], dict[str, Any]]:
    """Cells of ``CALIBRATED`` for each prompt, empty where it has no picture or no reference; and
    what the summary says. InputError for a prompt whose null is too small for ``fdr``."""
    p: dict[int, float] = {}
    sizes = []
    for position, found in enumerate(prompts):
        if not found.similarities.size:
            continue
        references = found.similarities.shape[1]
        reached = null(found.numbers, references)
        if len(reached) < smallest_null(fdr):
            samples = ", ".join(map(str, found.numbers))
            raise InputError(
                f"{len(reached)} never-trained prompts have samples {samples} and {references} "
                f"references, as a prompt that is tested, and --fdr={fdr:g} needs "
                f"{smallest_null(fdr)}; enlarge --null, or raise --fdr"
            )
        sizes.append(len(reached))
        p[position] = p_value(found.similarities.max(), reached)
    q = q_values(list(p.values()))
    decided = discoveries(q, fdr)
    cells: list[list[object]] = [["", "", ""] for _ in prompts]
    for position, level, yes in zip(p, q, decided, strict=True):
        words = "memorized" if yes else "not shown"
        cells[position] = [f"{p[position]:.6f}", f"{level:.6f}", words]
    size = min(sizes, default=0)
    return cells, {
        "fdr": fdr,
        "null": size,
        "smallest_p": 1 / (size + 1),
        "of_prompts": len(prompts),
        "tested": len(p),
        "memorized": int(decided.sum()),
        "needed_together": needed_together(len(p), size, fdr),
    }


def said(found: Mapping[str, Any]) -> list[str]:
    """The calibration in words."""
    return [
        f"calibrated: {found['tested']} of {found['of_prompts']} prompts have pictures and a "
        f"reference; null of {found['null']} never-trained references, smallest p "
        f"{found['smallest_p']:.4f}",
        f"at a false discovery rate of {found['fdr']:g}: {found['memorized']} memorized, "
        f"{found['tested'] - found['memorized']} not shown to be; with such a null "
        f"{found['needed_together']} are found together at the least, or none",
    ]
