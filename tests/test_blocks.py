"""--blocks: other value layers than those of down and mid blocks, in all scripts alike; and
--threshold_stds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import workspace
from workspace import LOCATED, NOISE, SAMPLING, Warm

from utils.errors import InputError
from utils.neuron_sets import read_results, size
from utils.stable_diffusion import Model, load_model
from utils.thresholds import published_threshold
from utils.value_layers import STAGES, find_value_layers
from utils.versions import resolve, stored_layer_widths

ALL = "--blocks=down,mid,up"
FIND = ("--version=model", "--dataset=memorized.csv", *NOISE, *LOCATED)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """The workspace with statistics and results of all blocks, in ``all/``."""
    folder = workspace.fresh(tmp_path_factory.mktemp("blocks") / "work")
    done = warm.run(
        1, "--version=model", "--prompts=holdout.csv", ALL, "-o=all/statistics.pt", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    done = warm.run(
        3, *FIND, ALL, "--statistics=all/statistics.pt", "-o=all/result.csv", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "xl"])
def test_layers_of_all_blocks_stand_in_the_order_of_a_pass(
    architecture: str, small_model: Callable[..., Model]
) -> None:
    unet = small_model(architecture).unet
    layers = find_value_layers(unet, STAGES)
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in unet.named_modules()
        if name.endswith("attn2.to_v")
    ]
    model = small_model(architecture)
    from utils.stable_diffusion import encode_prompt, initial_noise, unet_output

    try:
        unet_output(model, initial_noise(model, 1, 0), torch.tensor(1), encode_prompt(model, "a"))
    finally:
        for handle in handles:
            handle.remove()
    assert list(layers) == called
    assert len(find_value_layers(unet, ("up",))) + len(find_value_layers(unet)) == len(layers)


def test_statistics_results_and_pictures_agree_on_the_layers(place: Path, warm: Warm) -> None:
    widths = [width for _, width in stored_layer_widths(place / "model", STAGES)]
    assert len(widths) > len(workspace.WIDTHS)
    means, _ = torch.load(place / "all/statistics.pt", weights_only=True)
    assert [len(mean) for mean in means] == widths
    results = read_results(place / "all/result.csv", widths=widths)
    inner = len(workspace.WIDTHS)
    assert any(any(r.initial[inner:]) for r in results if r.initial), "no up neuron was a candidate"
    for name in ("all/statistics.json", "all/result.json"):
        assert json.loads((place / name).read_text())["model"]["blocks"] == "down,mid,up"
    # Layers that both searches look at have the same statistics.
    usual, _ = torch.load(place / "statistics/statistics_model.pt", weights_only=True)
    for ours, other in zip(usual, means, strict=False):
        assert torch.equal(ours, other)

    pictures = ("--version=model", "--refined_neurons", "-f=all/result.csv", *SAMPLING)
    refused = warm.run(4, *pictures, "-o=all/images", cwd=place)
    assert refused.returncode == 2
    assert "add --blocks=down,mid,up" in refused.stderr
    assert not (place / "all/images").exists()
    assert warm.run(4, *pictures, ALL, "-o=all/images", cwd=place).returncode == 0
    other = warm.run(
        3, *FIND, ALL, "-o=all/other.csv", cwd=place
    )  # with the usual blocks' statistics
    assert other.returncode == 2
    assert "statistics_model.pt: of the value layers of down,mid" in other.stderr
    continued = warm.run(
        3,
        *FIND,
        "--statistics=statistics/statistics_model.pt",
        "-o=all/result.csv",
        "--continue_run",
        cwd=place,
    )
    assert continued.returncode == 2
    assert "blocks = down,mid,up, this one has None" in continued.stderr


def test_searches_agree_where_up_blocks_are_searched(place: Path, warm: Warm) -> None:
    for search in ("plain", "bisect"):
        done = warm.run(
            3,
            *FIND,
            ALL,
            "--statistics=all/statistics.pt",
            f"--search={search}",
            f"-o=all/{search}.csv",
            cwd=place,
        )
        assert done.returncode == 0, done.stderr
        assert (place / f"all/{search}.csv").read_bytes() == (place / "all/result.csv").read_bytes()


def test_blocking_up_neurons_equals_a_model_without_them(
    place: Path, small_model: Callable[..., Model]
) -> None:
    """A located set with up neurons: the script's pictures are those of weights with these rows at
    zero, to rounding before grey levels."""
    import numpy as np
    from PIL import Image

    from utils.stable_diffusion import (
        decode,
        encode_prompt,
        encode_unconditional,
        initial_noise,
        sample_latents,
    )

    inner = len(workspace.WIDTHS)
    results = read_results(place / "all/result.csv")
    chosen = max(results, key=lambda r: size(r.refined[inner:]) if r.refined else 0)
    assert chosen.refined and any(chosen.refined[inner:])
    model = load_model(resolve(str(place / "model"), stages=STAGES), device="cpu", dtype="float32")

    def difference(sample: int, picture: Image.Image) -> float:
        """Of what script 4 saved, in grey levels."""
        saved = Image.open(place / f"all/images/img_{chosen.row:04d}_{sample:02d}.jpg")
        picture.save(place / "expected.jpg", quality=95)
        expected = Image.open(place / "expected.jpg")
        return np.abs(np.asarray(saved, dtype=float) - np.asarray(expected, float)).mean()

    def differences() -> list[float]:
        latents = sample_latents(
            model,
            encode_prompt(model, chosen.caption).repeat(2),
            encode_unconditional(model),
            initial_noise(model, 2, 2),
            steps=3,
            guidance_scale=7.0,
        )
        return [difference(i, picture) for i, picture in enumerate(decode(model, latents))]

    assert min(differences()) > 0.5, "the limit below would let all neurons speak"
    for layer, neurons in zip(model.value_layers.values(), chosen.refined, strict=True):
        layer.weight.data[neurons] = 0
    assert max(differences()) < 0.5


@pytest.mark.parametrize(
    ("words", "script", "options", "says"),
    [
        ("an unknown block", 1, ["--blocks=side"], "'side' is none of down, mid, up"),
        (
            "no effect on a scan",
            3,
            ["--dataset=memorized.csv", "--detect_only", ALL],
            "--blocks has no effect",
        ),
        (
            "no effect without blocking",
            4,
            ["--dataset=memorized.csv", "--original_images", ALL],
            "--blocks",
        ),
        (
            "deviations without a use",
            3,
            ["--dataset=memorized.csv", "--threshold_stds=2", *LOCATED, "--samples_per_prompt=4"],
            "--threshold_stds 2: not used",
        ),
        ("deviations that are no number", 3, ["--threshold_stds=one"], "'one' is not a number"),
    ],
)
def test_bad_input(words: str, script: int, options: list[str], says: str, place: Path) -> None:
    before = workspace.tree(place)
    done = workspace.run(script, "--version=model", *options, "-o=bad/output.csv", cwd=place)
    assert done.returncode == 2, words
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert workspace.tree(place) == before


@pytest.mark.parametrize("stds", [-1.0, 0.0, 2.0])
def test_a_threshold_lies_so_many_deviations_from_the_mean(
    stds: float, place: Path, warm: Warm
) -> None:
    scores = torch.load(place / "statistics/pairwise_ssim_model.pt", weights_only=True)["scores"]
    largest = scores.double().max(dim=1).values
    expected = largest.mean() + stds * largest.std(correction=1)
    output = place / f"stds/{stds:g}.csv"
    done = warm.run(
        3,
        "--version=model",
        "--dataset=memorized.csv",
        *NOISE,
        "--detect_only",
        f"--threshold_stds={stds:g}",
        f"-o={output}",
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    settings = json.loads(output.with_suffix(".json").read_text())["settings"]
    assert settings["pairwise_ssim_threshold"] == pytest.approx(expected.item(), abs=1e-9)


def test_the_published_deviations() -> None:
    settings = {"protocol": "published", "num_inference_steps": 50, "guidance_scale": 1}
    found = [published_threshold(resolve("v1-4"), settings, stds) for stds in (-1, 0, 1, 2)]
    assert found == [0.288, 0.358, 0.428, 0.498]  # paper table 4
    with pytest.raises(InputError, match="blocks up"):
        stored_layer_widths(Path("."), ("up",))
