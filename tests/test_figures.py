"""The paper's figures: from the right numbers, readable in grey, and named where inputs miss."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from paper_folder import METRICS, SCORES, PaperFolder, change
from PIL import Image

from utils import figures
from utils.figure_passes import Passes
from utils.neuron_sets import read_results, size
from utils.paper_figures import PaperFigures
from utils.paper_runs import NotRunError
from utils.paper_settings import (
    BLOCKED,
    FACTORS,
    SETTINGS,
    UNBLOCKED,
    most_frequent,
    pruning,
)
from utils.stable_diffusion import Model

ROOT = Path(__file__).resolve().parent.parent
PICTURE = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
NAMES = [f"method {n}" for n in range(16)]
DRAWN: dict[str, Callable[[], Figure]] = {
    "score distributions": lambda: figures.score_distributions(
        {"not memorized": [0.1, 0.2, 0.3], "memorized": [0.4, 0.5]}, {"a": 0.35, "b": 0.3}
    ),
    "neurons per prompt": lambda: figures.neurons_per_prompt({"VM": [1, 2, 2], "TM": [5, 9]}),
    "neurons per layer": lambda: figures.neurons_per_layer({"VM": [1, 0.5], "TM": [2, 3]}),
    "score against neurons": lambda: figures.score_against_neurons(
        {"row 0 VM": [1, 0.5, 0.2], "row 2 TM": [1, 0.3]}, 0.31
    ),
    "noise differences": lambda: figures.noise_differences(
        {"memorized": np.stack([PICTURE] * 3), "other": np.stack([PICTURE] * 2)}
    ),
    "picture grid": lambda: figures.picture_grid(
        ["row 0"], ["training image", "located off"], [[Image.new("RGB", (8, 8)), None]]
    ),
    "ROC": lambda: figures.roc_curves(
        {"ours": (np.array([0.5, 0.6]), np.array([0.1, 0.55])), "b": (np.ones(2), np.zeros(2))}
    ),
    "trade-off": lambda: figures.trade_off({n: (i / 16, 0.3) for i, n in enumerate(NAMES)}),
    "factor": lambda: figures.against_factor({"VM": {1.0: 1, 0.0: 0.1}, "TM": {1.0: 1, 0.0: 0.2}}),
    "most frequent": lambda: figures.against_frequent({"a": {0: 0.5, 5: 0.4}, "b": {0: 1, 5: 1}}),
    "shared": lambda: figures.shared_neurons({1: 10, 3: 2}),
    "none shared": lambda: figures.shared_neurons({}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_grey_named_and_saved_alike(name: str, tmp_path: Path) -> None:
    """No colour at all, so nothing is lost in grey; every axis with numbers has a label; curves
    with one legend differ in marker or line style; the same data give the same bytes."""
    figure = DRAWN[name]()
    for axes in figure.axes:
        if axes.get_images():
            assert all(image.get_cmap().name == "gray" for image in axes.get_images()) or (
                name == "picture grid"
            )
            continue
        if name == "picture grid":
            continue  # the gap of a missing picture
        assert not axes.xaxis.get_ticklocs().size or axes.get_xlabel()
        assert not axes.yaxis.get_ticklocs().size or axes.get_ylabel()
        styles = []
        for line in axes.get_lines():
            red, green, blue = to_rgb(line.get_color())
            assert red == green == blue
            if not line.get_label().startswith("_"):
                face = line.get_markerfacecolor()
                styles.append((line.get_marker(), line.get_linestyle(), line.get_color(), face))
        assert len(set(styles)) == len(styles)
        hatches = [bars.patches[0].get_hatch() for bars in axes.containers if bars]
        assert len(set(hatches)) == len(hatches)
    for place in ("one", "two"):
        figures.save(DRAWN[name](), tmp_path / place, "figure")
    for ending in ("png", "pdf"):
        first, second = (tmp_path / p / f"figure.{ending}" for p in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
    assert Image.open(tmp_path / "one/figure.png").width > 200


def test_grids_name_their_columns_once() -> None:
    for name, columns in {
        "noise differences": ["seed row 0", "seed row 1", "seed row 2"],
        "picture grid": ["training image", "located off"],
    }.items():
        titles = [axes.get_title() for axes in DRAWN[name]().axes]
        assert titles[: len(columns)] == columns
        assert not any(titles[len(columns) :])


# The numbers behind them.


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperFolder:
    monkeypatch.chdir(tmp_path)
    return PaperFolder(tmp_path)


def paper(place: PaperFolder, counts: list[int] | None = None) -> PaperFigures:
    plan = [f"python 4_generate_images.py --block_top_k_neurons={k}" for k in counts or []]
    plan.append("python 4_generate_images.py --mitigation_options=share=0.1")
    return PaperFigures(place.runs(), plan, Path("originals"), device="cpu")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[object, ...]]:
    """What each drawing function is called with."""
    calls: dict[str, tuple[object, ...]] = {}
    for name in ("neurons_per_prompt", "neurons_per_layer", "shared_neurons", "trade_off"):
        monkeypatch.setattr(figures, name, lambda *data, name=name: calls.update({name: data}))
    for name in ("against_factor", "against_frequent", "picture_grid"):
        monkeypatch.setattr(figures, name, lambda *data, name=name: calls.update({name: data}))
    return calls


def test_located_neurons(place: PaperFolder, drawn: dict[str, tuple[object, ...]]) -> None:
    results = [r for r in read_results(place.neurons()) if size(r.refined or [])]
    made = paper(place)
    made.neurons_per_prompt()
    assert drawn["neurons_per_prompt"] == ({"VM": [3, 2], "TM": [3]},)
    made.neurons_per_layer()
    assert drawn["neurons_per_layer"] == ({"VM": [1.5, 0.5, 0.5], "TM": [1, 0, 2]},)
    made.shared_neurons()
    prompts = Counter((l, i) for r in results for l, s in enumerate(r.refined or []) for i in s)
    assert drawn["shared_neurons"] == (Counter(prompts.values()),)


def test_a_factor_is_compared_on_the_prompts_that_it_has(
    place: PaperFolder, drawn: dict[str, tuple[object, ...]]
) -> None:
    place.neurons()
    place.whole(UNBLOCKED)
    place.whole()
    for factor in FACTORS:
        setting = SETTINGS["4"][f"scaling factor {factor:g}"][0]
        change(place.pictures(setting, rows=3) / "config.json", "settings", "rows", to=[0, 2])
        for extra in place.runs().folder(setting.run).glob("img_0001_*"):
            extra.unlink()
        for metric in ("sscd_gen", "sscd_orig"):
            place.metric(metric, setting, {0: 0.9, 2: 0.8}, rows=[0, 2])
    paper(place).scaling_factor()
    (series,) = drawn["against_factor"]
    assert isinstance(series, dict)
    # Row 0 alone is VM there: its 0.5, not the median of both VM prompts.
    assert series["SSCD_Gen, VM"] == {1.0: 0.5, 0.0: 0.5, **dict.fromkeys(map(float, FACTORS), 0.9)}
    assert series["SSCD_Orig, TM"][1.0] == 0.125 and series["SSCD_Orig, TM"][-1.0] == 0.8


def test_a_type_without_prompts_in_the_ablation_is_left_out(
    place: PaperFolder, drawn: dict[str, tuple[object, ...]]
) -> None:
    place.neurons()
    place.whole(UNBLOCKED)
    place.whole()
    for factor in FACTORS:
        setting = SETTINGS["4"][f"scaling factor {factor:g}"][0]
        change(place.pictures(setting, rows=2) / "config.json", "settings", "rows", to=[0, 1])
        for metric in ("sscd_gen", "sscd_orig"):
            place.metric(metric, setting, {0: 0.9, 1: 0.8}, rows=[0, 1])
    paper(place).scaling_factor()
    (series,) = drawn["against_factor"]
    assert isinstance(series, dict)
    assert series.keys() == {"SSCD_Gen, VM", "SSCD_Orig, VM"}


def test_frequent_neurons_and_methods(
    place: PaperFolder, drawn: dict[str, tuple[object, ...]]
) -> None:
    place.neurons()
    other = SETTINGS["1"]["attention scaling (Ren et al.)"][0]
    for setting in (UNBLOCKED, BLOCKED, other, most_frequent(5)):
        place.whole(setting)
    made = paper(place, [5])
    made.trade_off()
    (points,) = drawn["trade_off"]
    assert points == dict.fromkeys(
        (
            "all neurons active",
            "attention scaling (Ren et al.)",
            "memorization neurons (NeMo)",
        ),
        (0.1875, 0.1875),  # the median of 0.5, 0.25, 0.125 and 0
    )
    with pytest.raises(NotRunError, match="holdout"):
        made.most_frequent_neurons()
    record = place.runs().metric_path("alignment", other.run).with_suffix(".json")
    change(place.folder / record, "model", to={"another network": {"sha256": "def"}})
    paper(place, [5]).trade_off()  # whose points would not be of one scale
    (points,) = drawn["trade_off"]
    assert isinstance(points, dict)
    assert points.keys() == {"all neurons active", "memorization neurons (NeMo)"}


def test_the_trade_off_of_random_neurons_is_the_mean_of_its_draws(
    place: PaperFolder, drawn: dict[str, tuple[object, ...]]
) -> None:
    place.neurons()
    first, _, third = SETTINGS["1"]["random neurons"][:3]
    for setting in (UNBLOCKED, BLOCKED, first):
        place.whole(setting)
    place.pictures(third)
    for metric in METRICS:
        place.metric(metric, third, {row: score + 0.5 for row, score in SCORES.items()})
    paper(place).trade_off()
    assert drawn["trade_off"][0]["random neurons"] == (0.4375, 0.4375)


def test_the_grid_shows_what_was_run(
    place: PaperFolder, drawn: dict[str, tuple[object, ...]]
) -> None:
    place.neurons()
    other = SETTINGS["1"]["Wanda pruning (Chavhan et al.)"][0]
    for setting in (UNBLOCKED, BLOCKED, other, pruning(0.1)[1]):
        place.pictures(setting)
    with pytest.raises(NotRunError, match="originals"):
        paper(place).picture_grid()
    (place.folder / "originals").mkdir()
    Image.new("RGB", (9, 9)).save(place.folder / "originals/0001_first_image.jpg")
    paper(place).picture_grid()
    rows, columns, pictures = drawn["picture_grid"]
    assert rows == ["row 0 VM", "row 1 VM", "row 2 TM"]
    assert columns == ["training image", "all neurons on", "located off", "wanda", "wanda_0.1"]
    assert isinstance(pictures, list)
    assert [line[0] is None for line in pictures] == [True, False, True]
    assert all(picture is not None for line in pictures for picture in line[1:])
    damaged = place.folder / "originals/0001_first_image.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    with pytest.raises(NotRunError, match=r"0001_first_image\.jpg: not a picture"):
        paper(place).picture_grid()


def test_passes_score_as_their_definition(small_model: Callable[..., Model]) -> None:
    """Against weights with the neurons' rows at zero, on the same noises."""
    from utils.localization import UndecidedError
    from utils.noise_difference import NoiseSettings, noise_difference
    from utils.ssim import ssim
    from utils.stable_diffusion import encode_prompt, initial_noise

    model = small_model("sd1")
    settings = {
        "dtype": "float32",
        "samples_per_prompt": 3,
        "seed": 1,
        "pairwise_ssim_threshold": 0.0,
        "scaling_factor": 0.0,
        "protocol": "published",
        "num_inference_steps": 50,
        "guidance_scale": 1.0,
        "exchanged_guidance": False,
    }
    passes = Passes(model.source, settings, device="cpu")
    neurons = [[1, 3], [], [0], *([[]] * (len(model.value_layers) - 3))]
    found = passes.scores("a cat", neurons)
    strict = Passes(model.source, {**settings, "pairwise_ssim_threshold": 1.0}, device="cpu")
    with pytest.raises(UndecidedError, match="not memorized on this device"):
        strict.scores("a cat", neurons)
    noise = initial_noise(model, 3, 1)

    def difference() -> torch.Tensor:
        text = encode_prompt(model, "a cat")
        return noise_difference(model, text, None, noise, NoiseSettings())

    unblocked = difference()
    expected = [1.0]
    layers = list(model.value_layers.values())
    saved = [layer.weight.clone() for layer in layers]
    try:
        for layer, columns in enumerate(neurons):
            for column in columns:
                layers[layer].weight.data[column] = 0
                expected.append(ssim(unblocked, difference()).max().item())
        assert found == pytest.approx(expected, abs=1e-5)
        assert len(found) == 4 and found[0] == 1.0
        blocked = passes.pictures("a cat", neurons)
        assert np.allclose(blocked, difference().mean(dim=1).numpy(), atol=1e-5)
    finally:
        for layer, weight in zip(layers, saved, strict=True):
            layer.weight.data.copy_(weight)


# The script.


def run(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "metrics/make_figures.py"), *options],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_makes_what_it_can_and_names_the_rest(place: PaperFolder) -> None:
    place.neurons()
    options = ("--version=tiny", "-p=prompts.csv", "--holdout=holdout.csv")
    done = run(*options, "--only=neurons_per_layer,roc_curves", "-o=figures", cwd=place.folder)
    assert done.returncode == 1, done.stderr
    made = sorted(path.name for path in (place.folder / "figures").iterdir())
    assert made == ["neurons_per_layer.pdf", "neurons_per_layer.png"]
    line = next(line for line in done.stdout.splitlines() if line.startswith("roc_curves"))
    assert "not made" in line
    assert "Command: python metrics/compute_detection.py --memorized=" in line
    done = run(*options, "--only=neurons_per_layer", "-o=figures", cwd=place.folder)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("words", "options", "says"),
    [
        ("no such model", ["--version=nonsense"], "--version nonsense"),
        ("no prompt file", ["--version=tiny", "-p=none.csv"], "none.csv: no such file"),
        ("no such figure", ["--version=tiny", "--only=best"], "--only: 'best' is none of"),
        ("no figure at all", ["--version=tiny", "--only="], "--only: '' is none of"),
        ("no such device", ["--version=tiny", "--device=tpu"], "--device tpu"),
    ],
)
def test_bad_input(words: str, options: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("Caption\none\n")
    files = ["-p=p.csv"] if "-p=none.csv" not in options else []
    done = run(*options, *files, cwd=tmp_path)
    assert done.returncode == 2, words
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]
