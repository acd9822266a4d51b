"""The paper's figures, from data to matplotlib figures. They are readable in grey: what differs in
colour differs in marker, hatch or line style too.

Public: ``score_distributions``, ``neurons_per_prompt``, ``neurons_per_layer``,
``score_against_neurons``, ``noise_differences``, ``picture_grid``, ``roc_curves``, ``trade_off``,
``against_factor``, ``against_frequent``, ``shared_neurons``, ``write_figure``, ``save``.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from utils.detection_metrics import roc
from utils.files import replacing

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

GREYS = ("0.15", "0.6", "0.4", "0.8", "0.0")
HATCHES = ("", "///", "...", "xx", "\\\\")
MARKERS = "osD^vP*X<>phH8d"
LINES = ("-", "--", ":", "-.")
CELL = 1.1  # inches of a picture in a grid
# Endings of files, and what would make the bytes of equal figures differ.
UNDATED = {"png": {"Software": None}, "pdf": {"CreationDate": None}}


def _axes(width: float = 5.5, height: float = 3.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def score_distributions(
    scores: Mapping[str, Sequence[float]],
    thresholds: Mapping[str, float],
    *,
    score: str = "memorization score (largest pairwise SSIM)",
) -> Figure:
    """Histograms over common bins, as shares of each kind of prompt, with named thresholds.
    ``score``: what was measured."""
    import numpy as np

    figure, axes = _axes()
    bins = np.histogram_bin_edges(np.concatenate([list(s) for s in scores.values()]), bins=30)
    for position, (kind, own) in enumerate(scores.items()):
        axes.hist(
            own,
            bins=bins,
            weights=np.full(len(own), 1 / len(own)),
            color=GREYS[position],
            alpha=0.7,
            hatch=HATCHES[position],
            edgecolor="white",
            label=f"{kind} ({len(own)} prompts)",
        )
    for position, (name, value) in enumerate(thresholds.items()):
        line = LINES[position % len(LINES)]
        axes.axvline(value, color="black", linestyle=line, label=f"{name}: {value:.3f}")
    axes.set(xlabel=score, ylabel="share of prompts")
    axes.legend(fontsize="small")
    return figure


def neurons_per_prompt(sizes: Mapping[str, Sequence[int]]) -> Figure:
    """For each type the number of neurons of every memorized prompt, over box and median."""
    import numpy as np

    figure, axes = _axes(width=1.5 + 1.5 * len(sizes))
    axes.boxplot(
        list(sizes.values()),
        tick_labels=[f"{kind} ({len(own)})" for kind, own in sizes.items()],
        showfliers=False,
        medianprops={"color": "black", "linewidth": 2},
    )
    for position, own in enumerate(sizes.values(), start=1):
        # Spread sideways in a fixed order, so that equal counts do not hide each other.
        sideways = position + np.linspace(-0.2, 0.2, len(own))
        axes.plot(
            sideways,
            list(own),
            MARKERS[position - 1],
            color="0.4",
            markerfacecolor="none",
            markersize=4,
        )
    most = max(max(own) for own in sizes.values())
    if most > 50:
        axes.set_yscale("symlog", linthresh=1)  # where nothing stands out a set may be empty
    axes.set_ylim(bottom=0)
    axes.set(xlabel="type of prompt (number of prompts)", ylabel="refined neurons of a prompt")
    return figure


def neurons_per_layer(counts: Mapping[str, Sequence[float]]) -> Figure:
    """For each type the mean number of neurons of a prompt in every layer."""
    figure, axes = _axes()
    width = 0.8 / len(counts)
    for position, (kind, means) in enumerate(counts.items()):
        axes.bar(
            [layer + (position + 0.5) * width - 0.4 for layer in range(len(means))],
            means,
            width=width,
            color=GREYS[position],
            hatch=HATCHES[position],
            edgecolor="white",
            label=kind,
        )
    layers = range(len(next(iter(counts.values()))))
    axes.set_xticks(list(layers))
    axes.set(xlabel="value layer (forward order)", ylabel="refined neurons per prompt (mean)")
    axes.legend()
    return figure


def score_against_neurons(curves: Mapping[str, Sequence[float]], threshold: float) -> Figure:
    """Curve name -> scores with 0, 1, 2 ... neurons blocked."""
    figure, axes = _axes()
    for position, (name, scores) in enumerate(curves.items()):
        axes.plot(
            range(len(scores)),
            scores,
            marker=MARKERS[position % len(MARKERS)],
            linestyle=LINES[position % len(LINES)],
            color=GREYS[position % 3],
            markersize=4,
            label=name,
        )
    axes.axhline(threshold, color="black", linewidth=0.8, label=f"threshold {threshold:.3f}")
    axes.set(xlabel="blocked neurons of the refined set", ylabel="memorization score (SSIM)")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")
    return figure


def noise_differences(rows: Mapping[str, "np.ndarray"]) -> Figure:
    """Name -> (n, H, W) in [0, 1]: a row of n pictures, one a seed."""
    most = max(len(differences) for differences in rows.values())
    figure = Figure(figsize=(CELL * most + 1.2, CELL * len(rows) + 0.7), layout="constrained")
    grid = figure.subplots(len(rows), most, squeeze=False)
    for first, line, (name, differences) in zip(_first(rows), grid, rows.items(), strict=True):
        for position, axes in enumerate(line):
            if position < len(differences):
                axes.imshow(differences[position], cmap="gray", vmin=0, vmax=1)
            _bare(axes)
            if first:
                axes.set_title(f"seed row {position}", fontsize="small")
        line[0].set_ylabel(name, fontsize="small")
    figure.supxlabel("noise difference, mean over channels: black 0, white 1", fontsize="small")
    return figure


def picture_grid(
    rows: Sequence[str], columns: Sequence[str], pictures: Sequence[Sequence["Image.Image | None"]]
) -> Figure:
    """One line of pictures for each of ``rows``; a gap where there is none."""
    figure = Figure(
        figsize=(CELL * len(columns) + 0.6, CELL * len(rows) + 0.9), layout="constrained"
    )
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for first, line, name, own in zip(_first(rows), grid, rows, pictures, strict=True):
        for axes, title, picture in zip(line, columns, own, strict=True):
            if picture is not None:
                axes.imshow(picture)
            _bare(axes)
            if first:
                axes.set_title(title.replace("_", "\n"), fontsize="x-small")
        line[0].set_ylabel(name, fontsize="small")
    return figure


def _first(rows: Collection[str]) -> list[bool]:
    """Whether a line is the one that carries the titles."""
    return [position == 0 for position in range(len(rows))]


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def roc_curves(scores: Mapping[str, tuple["np.ndarray", "np.ndarray"]]) -> Figure:
    """Detector -> scores of memorized and of other prompts; linear and logarithmic."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    least = 1.0
    for axes, scale in zip(figure.subplots(1, 2), ("linear", "log"), strict=True):
        for position, (name, (memorized, others)) in enumerate(scores.items()):
            curve = roc(memorized, others)
            least = min(least, 0.5 / len(others))
            axes.step(
                curve.fpr,
                curve.tpr,
                where="post",
                color=GREYS[position % 3],
                linestyle=LINES[position % len(LINES)],
                linewidth=2,
                label=f"{name} ({len(memorized)} / {len(others)})",
            )
        axes.axvline(0.01, color="0.5", linewidth=0.8, linestyle=":")
        axes.set(
            xscale=scale,
            xlim=(0 if scale == "linear" else least, 1),
            ylim=(0, 1.02),
            xlabel=f"false positive rate (share, {scale})",
            ylabel="true positive rate (share)",
        )
    axes.legend(loc="lower right", fontsize="small", title="memorized / other prompts")
    return figure


def trade_off(methods: Mapping[str, tuple[float, float]]) -> Figure:
    """Method -> (copying, alignment): a marker each, named in a legend."""
    figure, axes = _axes(width=8)
    for position, (name, (copying, alignment)) in enumerate(methods.items()):
        filled = position < len(MARKERS)
        axes.plot(
            copying,
            alignment,
            MARKERS[position % len(MARKERS)],
            color=GREYS[position % 3],
            markerfacecolor=GREYS[position % 3] if filled else "none",
            markersize=9,
            label=name,
        )
    axes.set(
        xlabel="copying: SSCD_Orig (cosine, median over prompts; lower is better)",
        ylabel="alignment: A_CLIP (cosine, median;\nhigher is better)",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="x-small")
    return figure


def against_factor(series: Mapping[str, Mapping[float, float]]) -> Figure:
    """Name -> factor -> similarity, from all on (1) to inverted (-1)."""
    figure, axes = _axes()
    for position, (name, points) in enumerate(series.items()):
        factors = sorted(points, reverse=True)
        axes.plot(
            factors,
            [points[factor] for factor in factors],
            marker=MARKERS[position],
            linestyle=LINES[position % len(LINES)],
            color=GREYS[position % 3],
            label=name,
        )
    axes.invert_xaxis()
    axes.set(
        xlabel="scaling factor of the refined neurons (1: all on, 0: off)",
        ylabel="similarity (cosine, median over prompts)",
        ylim=(min(0.0, axes.get_ylim()[0]), 1.05),
    )
    axes.legend(fontsize="small")
    return figure


def against_frequent(series: Mapping[str, Mapping[int, float]]) -> Figure:
    """Name -> number of blocked neurons -> diversity or alignment."""
    figure, axes = _axes()
    for position, (name, points) in enumerate(series.items()):
        axes.plot(
            sorted(points),
            [points[k] for k in sorted(points)],
            marker=MARKERS[position],
            linestyle=LINES[position % len(LINES)],
            color=GREYS[position % 3],
            label=name,
        )
    axes.set(
        xlabel="blocked neurons: the k located most often",
        ylabel="similarity (cosine, median over prompts)",
    )
    axes.legend(fontsize="small")
    return figure


def shared_neurons(counts: Mapping[int, int]) -> Figure:
    """Number of prompts -> neurons located for so many; where there are none, one bar of 0."""
    figure, axes = _axes()
    most = max(counts, default=1)
    bars = axes.bar(
        range(1, most + 1),
        [counts.get(n, 0) for n in range(1, most + 1)],
        color="0.6",
        edgecolor="black",
    )
    axes.bar_label(bars, fontsize="small")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="prompts that a neuron was located for", ylabel="neurons (count)")
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """A PNG or PDF, by the path's ending, whole or not at all; equal figures give equal bytes."""
    ending = path.suffix.removeprefix(".")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=ending, dpi=150, metadata=UNDATED[ending])


def save(figure: Figure, folder: Path, name: str) -> None:
    """PNG and PDF."""
    for ending in UNDATED:
        write_figure(figure, folder / f"{name}.{ending}")
