"""A run of the attack: what is attacked, its pictures, and the table and curve that come of them.

Public: ``published_rates``, ``method_of``, ``check_attackable``, ``with_types``, ``targets_of``,
``budget_list``, ``start_list``, ``picture_folder``, ``pictures_of``, ``COLUMNS``, ``score``,
``cells``, ``read_attack``, ``read_method``, ``summarize``, ``verdict``, ``format_attack``,
``comparison_columns``, ``format_comparison``, ``draw_curve``.
"""

import argparse
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import whole_number
from utils.editing import MODES
from utils.embedding_attack import STARTS
from utils.embeddings import Embedder
from utils.errors import InputError
from utils.fields import field
from utils.files import Prompt, read_json, read_prompts, read_table
from utils.images import image_name, open_picture
from utils.metric_runs import Pictures, generated
from utils.mitigations import METHODS, RandomWords, Settings
from utils.paper_tables import read_published
from utils.prompt_scores import COPY_THRESHOLD
from utils.records import Record
from utils.summary import summarize_scores
from utils.tables import Number
from utils.versions import PROJECT_ROOT, Source

if TYPE_CHECKING:
    import numpy as np

SCORES = ("Max", "Median", "Share Above 0.7")
COLUMNS = ("Row", "Caption", "type", "Start", "Steps", *SCORES)
ATTACK_STEPS = 50  # of the published rates
# An attack counts if it brings back this share of the copies on the unedited model, from starts
# that do not know the prompt, and at the most that share of pictures that nobody trained on.
LEAST_BROUGHT_BACK, MOST_NEVER_TRAINED = 0.9, 0.1
NEMO, WANDA, FINE_TUNING = "NeMo", "Wanda", "adversarial fine-tuning"


@cache
def published_rates() -> dict[str, tuple[float | None, float | None]]:
    """Method -> share of memorized prompts with a copy without the attack and with it, as DoRI
    reports them on SD v1.4; None where that is not known."""
    metrics = PROJECT_ROOT / "metrics"
    published = read_published(metrics / "paper_tables.csv", metrics / "paper_values.csv")

    def rate(numbers: Mapping[str, Number], measure: str) -> float | None:
        return float(numbers[measure].text) if measure in numbers else None

    return {
        method: (rate(numbers, "rate"), rate(numbers, "rate under attack"))
        for (method, _), numbers in published.of("DoRI").items()
    }


def method_of(source: Source, mode: str, factor: float, mitigation: Settings | None) -> str | None:
    """Which of ``published_rates`` is attacked, None where the settings are others than the
    published: each prompt's located neurons silent, Wanda as it comes, or an edited model's folder,
    whose record (written by script 5 beside it) says how it was edited."""
    if mitigation is not None:
        return WANDA if mitigation == METHODS["wanda"].settings else None
    if mode == "refined_neurons":
        return NEMO if factor == 0 else None
    if mode != "original_images" or source.folder is None:
        return None
    folder = Path(os.path.abspath(source.folder))  # "." has no name
    path = folder.with_name(f"{folder.name}.json")
    if not path.is_file():
        return None
    record = read_json(path)
    settings = field(record, "settings", dict, where=path) or {}
    read = field(record, "inputs", dict, where=path) or {}
    # a set that was given as such is not known to be located
    located = settings.get("neurons_of") == "refined_neurons" and any(
        name.endswith(".csv") for name in read
    )
    located = located and settings.get("random_neurons") is None
    if not located or settings.get("scaling_factor") != 0:
        return None
    if settings.get("mode") == "adversarial":
        usual = MODES["adversarial"].options
        as_usual = all(
            settings.get(name) == value
            for name, value in usual.items()
            if value is not None and name not in Record.NOT_COMPARED  # which are rounding
        )
        return FINE_TUNING if as_usual else None
    return NEMO if settings.get("mode") == "zero" else None


def check_attackable(mitigation: Settings | None) -> None:
    """InputError for a method that only changes the text, which the attack does not use."""
    if isinstance(mitigation, RandomWords):
        raise InputError(
            "--mitigation: this method changes the prompt's words, and the attack puts an "
            "embedding in their place; there is nothing to attack"
        )


def with_types(prompts: Sequence[Prompt], path: Path) -> list[Prompt]:
    """Prompts of a result file, which tells no types, with those of a prompt file; as they are
    where its row has another caption. InputError for a file that is none."""
    types = {(prompt.row, prompt.caption): prompt.type for prompt in read_prompts(path)}
    return [replace(p, type=types.get((p.row, p.caption), p.type)) for p in prompts]


# Options.


def budget_list(text: str) -> list[int]:
    """``0,5,50`` -> numbers of steps, rising, each once."""
    parse = whole_number(0, 1_000_000)
    return sorted({parse(part) for part in text.split(",")})


def start_list(text: str) -> list[str]:
    """``prompt,gaussian`` -> those of ``STARTS``, each once."""
    named = text.split(",")
    for name in named:
        if name not in STARTS:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(STARTS)}")
    return [start for start in STARTS if start in named]


# Pictures.


def targets_of(originals: Pictures) -> dict[int, Path]:
    """Row -> the picture that the attack is to bring back: the first of the row's training images,
    by name. InputError for one that is no whole picture."""
    targets = {row: paths[0] for row, paths in originals.paths.items()}
    for path in targets.values():
        open_picture(path)  # found now, and not when its turn comes hours later
    return targets


def picture_folder(output: Path, start: str, budget: int) -> Path:
    """Where the pictures of one start and budget are: a folder like one of script 4, which every
    metric reads."""
    return output.with_suffix("") / f"{start}_{budget:04d}"


def pictures_of(
    output: Path, start: str, budgets: Sequence[int], row: int, samples: int
) -> list[Path]:
    """Every picture of one attack on one prompt."""
    return [
        picture_folder(output, start, budget) / image_name(row, sample)
        for budget in budgets
        for sample in range(samples)
    ]


def score(
    output: Path,
    starts: Sequence[str],
    budgets: Sequence[int],
    prompts: Sequence[Prompt],
    samples: int,
    originals: Pictures,
    embedder: Embedder,
) -> tuple[list[dict[str, Any]], dict[str, list[str]], dict[str, str]]:
    """The table of a run whose pictures are made: (rows with the cells of ``COLUMNS``, folder ->
    missing pictures, picture -> why it does not count). SSCD_Orig is the similarity with the
    nearest of the prompt's training images, as in compute_sscd_orig.py."""
    from utils.prompt_scores import STATISTICS, to_nearest

    corrupt: dict[str, str] = {}
    missing: dict[str, list[str]] = {}
    references = originals.embed(embedder, corrupt)
    rows = [prompt.row for prompt in prompts]
    table = []
    for start in starts:
        for budget in budgets:
            folder = picture_folder(output, start, budget)
            found: dict[int, dict[int, np.ndarray]] = {}
            missing[str(folder)] = [image_name(row, n) for row in rows for n in range(samples)]
            if folder.is_dir():
                pictures = generated(folder, rows, samples)
                missing[str(folder)] = pictures.missing
                found = pictures.embed(embedder, corrupt)
            for prompt in prompts:
                nearest = to_nearest(
                    found.get(prompt.row, {}), list(references.get(prompt.row, {}).values())
                )
                scores = {
                    name: STATISTICS[name](nearest) if nearest.size else None for name in SCORES
                }
                named = {"Row": prompt.row, "Caption": prompt.caption, "type": prompt.type}
                table.append({**named, "Start": start, "Steps": budget, **scores})
    return table, missing, corrupt


def cells(row: Mapping[str, Any]) -> list[object]:
    """A row of the table as it is written."""
    return [
        ("" if row[name] is None else f"{row[name]:.6f}") if name in SCORES else row[name]
        for name in COLUMNS
    ]


COUNT = whole_number(0, 1_000_000_000)


def read_attack(path: Path) -> list[dict[str, Any]]:
    """The table of a run, as ``score`` made it. InputError for a file that is none."""
    header, table = read_table(path)
    if header != list(COLUMNS):
        raise InputError(f"{path}: not a table of metrics/attack.py (columns: {', '.join(header)})")
    rows: list[dict[str, Any]] = []
    for number, of_row in enumerate(table):
        try:
            scores = {name: number_or_none(of_row[name]) for name in SCORES}
            if len({value is None for value in scores.values()}) > 1:
                raise ValueError("only some of its scores are there")
            whole = {name: COUNT(of_row[name]) for name in ("Row", "Steps")}
            rows.append({**of_row, **whole, **scores})
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise InputError(f"{path}: row {number}: {error}; restore the file") from None
    return rows


def read_method(path: Path) -> str | None:
    """Which of ``published_rates`` a run's record says was attacked. InputError for a record that
    is none."""
    record = path.with_suffix(".json")
    settings = field(read_json(record), "settings", dict, where=record) or {}
    return field(settings, "method", str, where=record)


def number_or_none(cell: str) -> float | None:
    """A cell's number, None for an empty one. ValueError for one that is no finite number."""
    value = float(cell) if cell else None
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{cell} is not a finite number")
    return value


# What came out.


def summarize(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each start and budget of a table's rows (cells of ``COLUMNS``; scores None
    where no picture is left): how many of the known prompts have a copy, the mean over
    prompts of the share of their pictures that are one, and medians over prompts of the largest and
    of the median similarity."""
    found = []
    for start, budget in dict.fromkeys((row["Start"], row["Steps"]) for row in table):
        own = [row for row in table if (row["Start"], row["Steps"]) == (start, budget)]
        known = [row for row in own if row["Max"] is not None]
        types = [row["type"] for row in own]
        shares = [row["Share Above 0.7"] for row in known]
        copied = sum(row["Max"] > COPY_THRESHOLD for row in known)
        found.append(
            {
                "start": start,
                "steps": budget,
                "prompts": len(known),
                "copied_prompts": copied,
                "rate": copied / len(known) if known else None,
                "share_of_pictures": sum(shares) / len(shares) if shares else None,
                "sscd_orig_max": summarize_scores([row["Max"] for row in own], types),
                "sscd_orig_median": summarize_scores([row["Median"] for row in own], types),
            }
        )
    return found


def _copies(rows: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """(prompts with a copy, prompts that are known)."""
    known = [row["Max"] > COPY_THRESHOLD for row in rows if row["Max"] is not None]
    return sum(known), len(known)


def verdict(
    control: Sequence[Mapping[str, Any]] | None,
    never_trained: Sequence[Mapping[str, Any]] | None,
    steps: int,
) -> str:
    """Whether an attack of ``steps`` counts, in one line, by the tables of its controls: the
    unedited model, and pictures that were never trained on (None: not run).

    It must bring back ``LEAST_BROUGHT_BACK`` of the unedited model's copies (prompts that give one
    without the attack; all prompts, where that was not looked at) from starts other than the prompt
    itself, which gives a copy without any attack, and at the most ``MOST_NEVER_TRAINED`` of the
    pictures that were never trained on.
    """
    plain = [row for row in control or [] if (row["Start"], row["Steps"]) == ("prompt", 0)]
    copied = {row["Row"] for row in plain if _copies([row])[0]}
    elsewhere = [row for row in control or [] if row["Start"] != "prompt" and row["Steps"] == steps]
    back, of_copies = _copies(row for row in elsewhere if row["Row"] in copied or not plain)
    made, of_never = _copies(row for row in never_trained or [] if row["Steps"] == steps)
    against = []
    if not elsewhere:
        against.append(
            "the unedited model was not attacked with so many steps from another start than the "
            "prompt"
        )
    elif not of_copies:
        against.append("the unedited model has no copies to bring back")
    elif back < LEAST_BROUGHT_BACK * of_copies:
        against.append(f"less than {LEAST_BROUGHT_BACK:.0%} come back on the unedited model")
    if not of_never:
        against.append("pictures that were never trained on were not aimed at with so many steps")
    elif made > MOST_NEVER_TRAINED * of_never:
        against.append(f"more than {MOST_NEVER_TRAINED:.0%} of never-trained pictures come too")
    counts = f"does not count, because {' and '.join(against)}" if against else "counts"
    return (
        f"The attack {counts}: after {steps} steps it brings back {back} of {of_copies} copies on "
        f"the unedited model from starts other than the prompt, and {made} of {of_never} pictures "
        "that were never trained on."
    )


def format_attack(title: str, summary: Sequence[Mapping[str, Any]], method: str | None) -> str:
    """The table that a run prints, the published rates beside ours."""
    lines = [
        f"{title}",
        f"{'start':<10}{'steps':>6}{'prompts':>9}{'copied':>8}{'rate':>7}{'published':>11}"
        f"{'pictures':>10}{'max':>8}{'median':>8}",
    ]
    for entry in summary:
        published = _published(method, entry["steps"]) if entry["start"] == "prompt" else None
        numbers = [
            (_shown(entry["rate"], 2), 7),
            (_shown(published, 2), 11),
            (_shown(entry["share_of_pictures"], 2), 10),
            (_shown(entry["sscd_orig_max"]["all"]["median"], 3), 8),
            (_shown(entry["sscd_orig_median"]["all"]["median"], 3), 8),
        ]
        lines.append(
            f"{entry['start']:<10}{entry['steps']:>6}{entry['prompts']:>9}"
            f"{entry['copied_prompts']:>8}" + "".join(f"{text:>{width}}" for text, width in numbers)
        )
    lines.append(
        f"rate: prompts with a picture above {COPY_THRESHOLD}; pictures: share above it, mean "
        "over prompts; max, median: SSCD_Orig, median over prompts"
    )
    if method is not None:
        lines.append(f"published: {method} on SD v1.4, reported by DoRI (arXiv 2507.16880)")
    return "\n".join(lines)


def comparison_columns(steps: int) -> list[str]:
    """The header of ``format_comparison``."""
    header = ["Run", "Prompts", "Rate", f"Rate, {steps} steps", "SSCD_Orig"]
    header += [f"SSCD_Orig, {steps} steps", "Published as"]
    return [*header, "Published rate", f"Published rate, {ATTACK_STEPS} steps"]


def format_comparison(
    runs: Mapping[str, tuple[Sequence[Mapping[str, Any]], str | None]], start: str, steps: int
) -> list[list[str]]:
    """A header and a row for each run (name -> entries of ``summarize``, published method): rates
    of ``start`` without the attack and after ``steps``, the published ones beside. Empty cells:
    not run, or not published."""
    lines = [comparison_columns(steps)]
    for name, (summary, method) in runs.items():
        known = {entry["steps"]: entry for entry in summary if entry["start"] == start}
        entries = [known[at] for at in (0, steps) if at in known]
        counts = str(max((entry["prompts"] for entry in entries), default=""))
        rates, medians = (
            [_shown(found(known[at]) if at in known else None, 2, "") for at in (0, steps)]
            for found in (lambda e: e["rate"], lambda e: e["sscd_orig_max"]["all"]["median"])
        )
        rates_of_method = published_rates().get(method or "", (None, None))
        if start != "prompt":  # the published attack starts there
            rates_of_method = (None, None)
        published = [_shown(value, 2, "") for value in rates_of_method]
        lines.append([name, counts, *rates, *medians, method or "", *published])
    return lines


def _published(method: str | None, steps: int) -> float | None:
    before, after = published_rates().get(method or "", (None, None))
    return {0: before, ATTACK_STEPS: after}.get(steps)


def _shown(value: float | None, digits: int, missing: str = "-") -> str:
    return missing if value is None else f"{value:.{digits}f}"


# Lines that can be told apart in grey: together 35 of them.
_LINES = ("-", "--", ":", "-.", (0, (5, 1)))
_MARKERS = "os^Dvx*"


def draw_curve(path: Path, title: str, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A PNG of rate and SSCD_Orig against steps, a line for each name -> entries of
    ``summarize`` in rising steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from utils.figures import write_figure

    budgets = sorted({entry["steps"] for curve in curves.values() for entry in curve})
    place = {budget: position for position, budget in enumerate(budgets)}
    figure, axes = pyplot.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    for number, (name, curve) in enumerate(curves.items()):
        style = {
            "label": name,
            "linestyle": _LINES[number % len(_LINES)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "color": f"C{number % 10}",
        }
        steps = [place[entry["steps"]] for entry in curve]
        medians = [entry["sscd_orig_max"]["all"]["median"] for entry in curve]
        for axis, values in zip(axes, ([entry["rate"] for entry in curve], medians), strict=True):
            axis.plot(steps, [float("nan") if v is None else v for v in values], **style)
    axes[0].set(ylabel="share of prompts with a copy", ylim=(-0.04, 1.04))
    axes[1].set(ylabel="SSCD_Orig, median over prompts", ylim=(-0.14, 1.04))
    axes[1].axhline(COPY_THRESHOLD, color="grey", linewidth=0.8)
    for axis in axes:
        axis.set_xticks(range(len(budgets)), [str(budget) for budget in budgets])
        axis.set_xlabel("optimisation steps of the embedding")
        axis.grid(alpha=0.3)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small"
    )
    figure.suptitle(title, fontsize="medium")
    write_figure(figure, path)
    pyplot.close(figure)
