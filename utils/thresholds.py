"""The memorization threshold tau (paper Sec. 3.1): made by script 2, chosen and checked by script
3.

Public: ``PUBLISHED``, ``BELONGS_TO``, ``pairs``, ``summary``, ``threshold_from_file``,
``published_threshold``, ``choose``.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from utils.errors import InputError
from utils.files import read_json
from utils.records import check_bytes, check_same_model, part_of
from utils.versions import Source

# Paper Sec. 4: SD v1-4, no guidance, 50 steps.
PUBLISHED_MEAN, PUBLISHED_STD = 0.358, 0.070
PUBLISHED_ROWS = 10  # seed rows n
PUBLISHED = round(PUBLISHED_MEAN + PUBLISHED_STD, 9)  # 0.428
BELONGS_TO = ("protocol", "num_inference_steps", "guidance_scale", "exchanged_guidance", "dtype")


def pairs(rows: int) -> list[tuple[int, int]]:
    """All (i, j) with i < j < rows: the order of pairwise scores everywhere."""
    return list(itertools.combinations(range(rows), 2))


def summary(scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Pairwise scores (prompts x pairs) -> mean, unbiased standard deviation over prompts and mean
    + 1 std, for the largest pair per prompt (whose value is the threshold) and for all pairs.
    InputError for fewer than two prompts."""
    if len(scores) < 2:
        raise InputError(f"scores of {len(scores)} prompt; a threshold needs at least two")
    largest = [max(row) for row in scores]
    every = [score for row in scores for score in row]

    def reading(values: Sequence[float]) -> dict[str, float]:
        mean, std = fmean(values), stdev(values)
        return {"mean": mean, "std": std, "threshold": mean + std}

    return {
        "threshold": reading(largest)["threshold"],
        "largest_pair_per_prompt": reading(largest),
        "all_pairs": reading(every),
    }


def _options(settings: Mapping[str, Any]) -> str:
    """The options that script 2 needs besides, where they are not its defaults."""
    usual = {"protocol": "published", "num_inference_steps": 50, "guidance_scale": 1.0}
    options = [f" --{name}={settings[name]}" for name in usual if settings[name] != usual[name]]
    exchanged = " --exchanged_guidance" if settings["exchanged_guidance"] else ""
    return "".join(options) + exchanged + f" --dtype={settings['dtype']}"


def threshold_from_file(
    path: Path, source: Source, settings: Mapping[str, Any], stds: float = 1.0
) -> float:
    """tau = mean + ``stds`` standard deviations, from the record of a threshold file. InputError if
    the file is missing or was measured with another model or other settings than these (protocol,
    steps, guidance, precision)."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such threshold file; make it with: python 2_compute_pairwise_ssim.py "
            f"--version={source.name} -o={path}{_options(settings)}"
        )
    record_path = path.with_suffix(".json")
    record = read_json(record_path)
    threshold = record.get("threshold")
    if not record.get("finished") or not isinstance(threshold, float):
        raise InputError(f"{record_path}: no threshold in it; finish script 2 with --continue_run")
    if not math.isfinite(threshold):
        raise InputError(f"{record_path}: the threshold is {threshold}; remake it with script 2")
    check_bytes(path, record, way="remake it with script 2")
    check_same_model(record, source, where=path)
    measured = part_of(record, "settings")
    for field in BELONGS_TO:
        if measured.get(field) != settings[field]:
            raise InputError(
                f"{path}: measured with {field} = {measured.get(field)}, this run has "
                f"{settings[field]}; measure one for this run with script 2"
            )
    if stds == 1:
        return threshold
    reading = part_of(record, "largest_pair_per_prompt")
    mean, std = reading.get("mean"), reading.get("std")
    if not (isinstance(mean, float) and isinstance(std, float) and math.isfinite(mean + std)):
        raise InputError(f"{record_path}: no mean and std in it; remake it with script 2")
    return mean + stds * std


def published_threshold(
    source: Source, settings: Mapping[str, Any], stds: float = 1.0
) -> float | None:
    """0.428 = 0.358 + 0.070 (``stds`` 1) where it applies (v1-4, published protocol, 50 steps, no
    guidance, any dtype), else None."""
    applies = (
        source.name == "v1-4"
        and source.revision is None
        and settings["protocol"] == "published"
        and settings["num_inference_steps"] == 50
        and settings["guidance_scale"] == 1
    )
    # Rounded to the decimals that the sum of two published numbers has.
    return round(PUBLISHED_MEAN + stds * PUBLISHED_STD, 9) if applies else None


def choose(
    *,
    file: Path | None,
    flags: Mapping[str, float | None],
    source: Source,
    settings: Mapping[str, Any],
    stds: float | None = None,
) -> tuple[dict[str, float], str, Path | None]:
    """The thresholds of a localization run: (value for each of ``flags``, where they come from, the
    threshold file that was used).

    A flag that is set wins. The rest is tau: of ``file``, else the published value where it
    applies, else of the version's own threshold file; mean + ``stds`` standard deviations (default
    1). InputError where there is none, or where a file or ``stds`` is given that the flags leave no
    use for.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if len(given) == len(flags):
        if file is not None:
            raise InputError(
                f"--threshold_file {file}: not used, all thresholds are set by flags; leave one out"
            )
        if stds is not None:
            raise InputError(
                f"--threshold_stds {stds:g}: not used, all thresholds are set by flags; leave one "
                "out"
            )
        return given, "flags", None
    stds = 1.0 if stds is None else stds
    tau = published_threshold(source, settings, stds) if file is None else None
    if tau is not None:
        said = f"published value {tau} (v1-4, published protocol, no guidance)"
        rows: object = PUBLISHED_ROWS
    else:
        file = file or source.threshold
        tau = threshold_from_file(file, source, settings, stds)
        said = str(file) if stds == 1 else f"{file}, mean {stds:+g} std = {tau:.4f}"
        rows = part_of(read_json(file.with_suffix(".json")), "settings").get("samples_per_prompt")
    if rows != settings["samples_per_prompt"]:
        said += (
            f". Warning: measured with {rows} seed rows, this run has "
            f"{settings['samples_per_prompt']}; tau is a mean of the largest of n (n - 1) / 2 "
            "pairs and grows with n"
        )
    return {name: given.get(name, tau) for name in flags}, said, file
