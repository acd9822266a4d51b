"""What each of the paper's figures is made of, read from what runs/paper.sh left.

Public: ``PaperFigures``.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from utils import figures
from utils.embeddings import reference_images
from utils.errors import InputError
from utils.files import read_json, read_table
from utils.images import image_name, open_picture
from utils.localization import UndecidedError
from utils.neuron_sets import NeuronSet, Result, counted, size
from utils.paper_plan import counts_of_most_frequent, shares_of_pruning
from utils.paper_runs import ALL, NotRunError, PaperRuns, Setting
from utils.paper_settings import (
    BLOCKED,
    FACTORS,
    HOLDOUT_UNBLOCKED,
    SETTINGS,
    UNBLOCKED,
    methods,
    most_frequent,
)
from utils.paper_tables import DETECTORS, METRICS

if TYPE_CHECKING:
    from utils.figure_passes import Passes

GRID_PROMPTS = 6  # of each type half
CURVES = 3  # prompts of each type whose score is followed


class PaperFigures:
    """Makes the figures of one model's run. Each raises NotRunError where an input is missing."""

    def __init__(
        self, runs: PaperRuns, plan: Sequence[str], originals: Path, *, device: str
    ) -> None:
        """``plan``: the commands of the run; ``originals``: training images; ``device``: for the
        figures that make U-Net passes."""
        self._runs = runs
        self._originals = originals
        self._counts = counts_of_most_frequent(plan)
        self._device = device
        self._methods = methods(shares_of_pruning(plan))

    def kinds(self) -> dict[str, Callable[[], Figure]]:
        """File name -> what makes the figure."""
        return {
            "score_distributions": self.score_distributions,
            "neurons_per_prompt": self.neurons_per_prompt,
            "neurons_per_layer": self.neurons_per_layer,
            "shared_neurons": self.shared_neurons,
            "score_against_neurons": self.score_against_neurons,
            "noise_differences": self.noise_differences,
            "picture_grid": self.picture_grid,
            "roc_curves": self.roc_curves,
            "trade_off": self.trade_off,
            "scaling_factor": self.scaling_factor,
            "most_frequent_neurons": self.most_frequent_neurons,
        }

    # What several figures read.

    def _located(self) -> list[Result]:
        located = [result for result in self._runs.results(BLOCKED) if result.memorized]
        if not located:
            path = self._runs.neurons_path(BLOCKED.neurons)
            raise NotRunError(path, "no prompt in it is memorized")
        return located

    def _of_kind(self, kind: str) -> list[Result]:
        return self._runs.of_kind(kind, self._located())

    def _detection(self, detector: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores of memorized and of other prompts."""
        path = self._runs.metric_path("detection", detector)
        self._runs.detection_record(path, detector)
        scores: dict[str, list[float]] = {"memorized": [], "unmemorized": []}
        for cells in read_table(path)[1]:
            if cells["Score"]:
                scores[cells["Set"]].append(float(cells["Score"]))
        return np.array(scores["memorized"]), np.array(scores["unmemorized"])

    def _median(
        self,
        measure: str,
        setting: Setting,
        kind: str = ALL,
        *,
        rows: Sequence[int] | None = None,
        holdout: bool = False,
    ) -> float:
        """Median over the prompts of a type that are among ``rows`` (None: all)."""
        metric, score = METRICS[measure]
        known = self._runs.scores(metric, score, setting, holdout=holdout).of(kind, rows)
        if not known:
            path = self._runs.metric_path(metric, setting.run)
            raise NotRunError(path, "no prompt has a score")
        return median(known)

    def _rows(self, setting: Setting) -> list[int] | None:
        """The prompts that a setting has pictures of; None: all."""
        rows: list[int] | None = self._runs.pictures_record(setting)["settings"]["rows"]
        return rows

    @cached_property
    def _passes(self) -> "Passes":
        from utils.figure_passes import Passes

        settings = self._runs.search_record(BLOCKED)["settings"]
        return Passes(self._runs.source, settings, device=self._device)

    # The figures.

    def score_distributions(self) -> Figure:
        """Memorized and other prompts, with the threshold and the best one for detection."""
        memorized, others = self._detection("pairwise_ssim")
        path = self._runs.metric_path("detection", "pairwise_ssim")
        best = read_json(path.with_suffix(".json")).get("common_threshold")
        used = self._runs.search_record(BLOCKED)["settings"]["pairwise_ssim_threshold"]
        thresholds = {"threshold (mean + 1 std)": used}
        if best is not None:
            thresholds["best accuracy"] = best
        scores = {"not memorized": others.tolist(), "memorized": memorized.tolist()}
        return figures.score_distributions(scores, thresholds)

    def neurons_per_prompt(self) -> Figure:
        """Box and points for VM and TM."""
        sizes = {
            kind: [size(result.refined or []) for result in self._of_kind(kind)]
            for kind in self._runs.kinds()
        }
        return figures.neurons_per_prompt({kind: own for kind, own in sizes.items() if own})

    def neurons_per_layer(self) -> Figure:
        """Means for VM and TM."""
        means = {}
        for kind in self._runs.kinds():
            counts = [[len(layer) for layer in r.refined or []] for r in self._of_kind(kind)]
            if counts:
                means[kind] = np.mean(counts, axis=0).tolist()
        return figures.neurons_per_layer(means)

    def shared_neurons(self) -> Figure:
        """How many neurons were located for one prompt, two prompts ..."""
        counts = counted(result.refined or [] for result in self._located())
        return figures.shared_neurons(Counter(counts.values()))

    def score_against_neurons(self) -> Figure:
        """Some prompts of each type: those with most neurons."""
        threshold = self._runs.search_record(BLOCKED)["settings"]["pairwise_ssim_threshold"]
        curves = {}
        for kind in self._runs.kinds():
            ranked = sorted(self._of_kind(kind), key=lambda r: (-size(r.refined or []), r.row))
            for result in ranked[:CURVES]:
                name = f"row {result.row} {kind if kind != ALL else ''}".strip()
                try:
                    curves[name] = self._passes.scores(result.caption, result.refined or [])
                except UndecidedError as error:
                    path = self._runs.neurons_path(BLOCKED.neurons)
                    raise NotRunError(path, f"row {result.row}: {error}") from None
        return figures.score_against_neurons(curves, threshold)

    def noise_differences(self) -> Figure:
        """A verbatim prompt (else any), with its neurons on and off, and a hold-out prompt."""
        chosen = max(
            self._of_kind(self._runs.kinds()[0]) or self._located(),
            key=lambda result: (-(result.refined_score or 0), -result.row),
        )
        refined: NeuronSet = chosen.refined or []
        other = self._runs.holdout_prompts[0]
        return figures.noise_differences(
            {
                f"row {chosen.row},\nall on": self._passes.pictures(chosen.caption),
                f"row {chosen.row},\n{size(refined)} off": self._passes.pictures(
                    chosen.caption, refined
                ),
                f"hold-out\nrow {other.row}": self._passes.pictures(other.caption),
            }
        )

    def picture_grid(self) -> Figure:
        """The training image, then one sample of every method that was run."""
        columns, folders = ["training image", "all neurons on", "located off"], []
        for setting in (UNBLOCKED, BLOCKED):
            self._runs.pictures_record(setting)
            folders.append(self._runs.folder(setting.run))
        for setting, *_ in self._methods.values():
            if setting in (UNBLOCKED, BLOCKED):
                continue
            try:
                self._runs.pictures_record(setting)
            except NotRunError:
                continue  # the table names it, and its command
            columns.append(setting.run)
            folders.append(self._runs.folder(setting.run))
        rows = self._grid_rows()
        try:
            originals = reference_images(self._originals)
        except InputError as error:
            raise NotRunError(self._originals, str(error).partition(": ")[2]) from None
        types = self._runs.types()
        pictures = [
            [
                _opened(next(iter(originals.get(row, [])), None)),
                *(_opened(folder / image_name(row, 0)) for folder in folders),
            ]
            for row in rows
        ]
        names = [f"row {row} {types[row]}".strip() for row in rows]
        return figures.picture_grid(names, columns, pictures)

    def _grid_rows(self) -> list[int]:
        kinds = self._runs.kinds()
        each = GRID_PROMPTS // len(kinds)
        chosen = [result.row for kind in kinds for result in self._of_kind(kind)[:each]]
        return list(dict.fromkeys(chosen))  # one of all types may be there already

    def roc_curves(self) -> Figure:
        """Every detector that was run; ours must be."""
        scores = {DETECTORS["pairwise_ssim"]: self._detection("pairwise_ssim")}
        for detector, name in DETECTORS.items():
            try:
                scores[name] = self._detection(detector)
            except NotRunError:
                continue  # the table names it, and its command
        return figures.roc_curves(scores)

    def trade_off(self) -> Figure:
        """Every method that was run, the mean of its draws; the two runs of our own must be."""
        points = {}
        for name, settings in self._methods.items():
            draws = []
            for setting in settings:
                try:
                    draws.append(
                        (self._median("sscd_orig", setting), self._median("a_clip", setting))
                    )
                except NotRunError:
                    if setting in (UNBLOCKED, BLOCKED):
                        raise
            if draws:
                copying, alignment = map(fmean, zip(*draws, strict=True))
                points[name] = (copying, alignment)
        return figures.trade_off(points)

    def scaling_factor(self) -> Figure:
        """SSCD_Gen and SSCD_Orig by type, from all on to inverted, of the prompts that the
        ablation looks at."""
        runs: dict[float, Setting] = {1.0: UNBLOCKED, 0.0: BLOCKED}
        for factor in FACTORS:
            runs[float(factor)] = SETTINGS["4"][f"scaling factor {factor:g}"][0]
        rows = self._rows(runs[float(FACTORS[0])])
        there = {p.type for p in self._runs.prompts if rows is None or p.row in rows}
        series: dict[str, dict[float, float]] = {}
        for measure, name in {"sscd_gen": "SSCD_Gen", "sscd_orig": "SSCD_Orig"}.items():
            for kind in self._runs.kinds():
                if kind not in (ALL, *there):
                    continue  # none of its prompts is among the ablation's
                series[f"{name}, {kind}"] = {
                    factor: self._median(measure, setting, kind, rows=rows)
                    for factor, setting in runs.items()
                }
        return figures.against_factor(series)

    def most_frequent_neurons(self) -> Figure:
        """Diversity and alignment of memorized and hold-out prompts against k."""
        series: dict[str, dict[int, float]] = {}
        for holdout, whose in ((False, "memorized"), (True, "hold-out")):
            unblocked = HOLDOUT_UNBLOCKED if holdout else UNBLOCKED
            for measure, name in {"d_sscd": "D_SSCD", "a_clip": "A_CLIP"}.items():
                runs = {k: most_frequent(k, holdout=holdout) for k in self._counts}
                rows = self._rows(next(iter(runs.values()), unblocked))
                points = {
                    k: self._median(measure, setting, rows=rows, holdout=holdout)
                    for k, setting in {0: unblocked, **runs}.items()
                }
                series[f"{name}, {whose}"] = points
        return figures.against_frequent(series)


def _opened(path: Path | None) -> Any:
    """A small RGB copy; None where there is no such picture. NotRunError for a damaged one."""
    if path is None or not path.is_file():
        return None
    try:
        copy = open_picture(path)
    except InputError as error:
        raise NotRunError(path, str(error).removeprefix(f"{path}: ")) from None
    copy.thumbnail((256, 256))
    return copy
