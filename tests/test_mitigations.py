"""Script 4's --mitigation as a command: every method, its options, what leaves pictures alone."""

import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import workspace
from guidance_minima import with_minima
from PIL import Image
from workspace import SAMPLING, SCRIPTS, Warm

from utils import mitigations
from utils.errors import InputError
from utils.files import Prompt
from utils.mitigations import METHODS, HeldBackGuidance, RandomWords, Wanda
from utils.stable_diffusion import Model, encode_unconditional, initial_noise, sample_latents

MODEL = ("--version=model", "--dataset=memorized.csv")
# What a method needs to work in three steps, and to matter on a model with random weights.
OPTIONS = {
    "embedding_adjustment": "target=0.001,iterations=2",
    "guidance_static": "until=400",
    "wanda": "share=0.1,steps=2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace's model and prompts; every test writes under names of its own."""
    folder = tmp_path_factory.mktemp("mitigations")
    workspace.save_model(folder / "model")
    (folder / "memorized.csv").write_text(workspace.MEMORIZED, encoding="utf-8")
    (folder / "holdout.csv").write_text(workspace.HOLDOUT, encoding="utf-8")
    return folder


Generate = Callable[..., dict[str, bytes]]


@pytest.fixture(scope="module")
def generate(warm: Warm, folder: Path) -> Generate:
    """Runs script 4 with a method into a folder; its pictures by name."""

    def run(method: str | None, name: str, *more: str) -> dict[str, bytes]:
        options = [f"--mitigation={method}"] if method else ["--original_images"]
        if method in OPTIONS and not any(part.startswith("--mitigation_opt") for part in more):
            options.append(f"--mitigation_options={OPTIONS[method]}")
        done = warm.run(4, *MODEL, *SAMPLING, *options, *more, f"-o={name}", cwd=folder)
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert done.stdout.endswith(f"with {method}.\n" if method else "blocked.\n")
        return {path.name: path.read_bytes() for path in sorted((folder / name).glob("*.jpg"))}

    return run


@pytest.fixture(scope="module")
def plain(generate: Generate) -> dict[str, bytes]:
    return generate(None, "plain")


@pytest.fixture(scope="module")
def usual(generate: Generate) -> Callable[[str], dict[str, bytes]]:
    """A method's pictures of all prompts in the folder all/METHOD, made once."""
    made: dict[str, dict[str, bytes]] = {}

    def pictures(method: str) -> dict[str, bytes]:
        if method not in made:
            made[method] = generate(method, f"all/{method}")
        return made[method]

    return pictures


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "config.json").read_text(encoding="utf-8"))


def differ(pictures: dict[str, bytes], others: dict[str, bytes]) -> list[str]:
    return [name for name in pictures if pictures[name] != others[name]]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_changes_pictures_of_the_same_names(
    method: str, usual: Callable[[str], dict[str, bytes]], plain: dict[str, bytes], folder: Path
) -> None:
    pictures = usual(method)
    assert pictures.keys() == plain.keys() and len(plain) == 12
    assert len(differ(pictures, plain)) >= 10
    settings = record(folder, f"all/{method}")["settings"]
    assert (settings["mode"], settings["mitigation"]) == ("mitigation", method)
    assert settings["mitigation_options"].keys() == METHODS[method].options.keys()
    for given in filter(None, OPTIONS.get(method, "").split(",")):
        key, _, value = given.partition("=")
        assert settings["mitigation_options"][key] == float(value)
    draws = method.startswith(("random", "repeated", "embedding_noise"))
    assert (settings["random_seed"] == 0) == draws


@pytest.mark.parametrize(
    "method", ["embedding_adjustment", "attention_scaling", "random_tokens", "guidance_dynamic"]
)
def test_rows_and_batches_leave_pictures_as_they_are(
    method: str,
    usual: Callable[[str], dict[str, bytes]],
    plain: dict[str, bytes],
    generate: Generate,
    folder: Path,
) -> None:
    assert len(usual(method)) == 12
    some = generate(method, f"rows/{method}", "--rows=2,5", "-b=5")
    assert len(some) == 4
    for name in some:
        paths = (folder / where / method / name for where in ("all", "rows"))
        one, other = (np.asarray(Image.open(path), int) for path in paths)
        # Rounding moves a pixel by 1 before compression, and a JPEG block by some more.
        difference = np.abs(one - other)
        assert difference.max() <= 6 and np.mean(difference > 2) <= 0.05, name
        without = np.abs(one - np.asarray(Image.open(io.BytesIO(plain[name])), int))
        assert without.max() > 6 or np.mean(without > 2) > 0.05, "the limit lets no method pass"


@pytest.mark.parametrize("method", ["embedding_adjustment", "embedding_noise", "wanda"])
def test_a_run_goes_on_to_the_same_bytes(
    method: str, usual: Callable[[str], dict[str, bytes]], generate: Generate, folder: Path
) -> None:
    first, name = usual(method), f"all/{method}"
    for picture in ("img_0002_01.jpg", "img_0005_00.jpg"):
        (folder / name / picture).unlink()
    path = folder / name / "config.json"
    path.write_text(path.read_text().replace('"finished": true', '"finished": false'))
    assert generate(method, name, "--continue_run") == first


def test_another_random_seed_draws_others(generate: Generate, folder: Path) -> None:
    generate("random_numbers", "seeds/0", "--rows=0,5", "--steps=2")
    generate("random_numbers", "seeds/1", "--rows=5", "--steps=2", "--random_seed=1")
    captions = [record(folder, f"seeds/{seed}")["captions"] for seed in (0, 1)]
    assert captions[0].keys() == {"0", "5"} and captions[1].keys() == {"5"}
    assert captions[0]["5"] != captions[1]["5"]
    for caption in captions[0]["5"], captions[1]["5"]:
        words = [word for word in caption.split() if not word.isdigit()]
        assert " ".join(words) == "grey cat on a red chair" and len(caption.split()) == 10


def test_rows_of_the_same_caption_draw_differently(
    usual: Callable[[str], dict[str, bytes]], generate: Generate, folder: Path
) -> None:
    noisy = usual("embedding_noise")
    assert noisy["img_0001_00.jpg"] != noisy["img_0004_00.jpg"]
    other = generate("embedding_noise", "seeds/noise", "--rows=1", "--random_seed=1")
    assert other["img_0001_00.jpg"] != noisy["img_0001_00.jpg"]
    usual("random_numbers")
    captions = record(folder, "all/random_numbers")["captions"]
    assert captions["1"] != captions["4"]


def test_wanda_is_of_the_memorized_prompts_whichever_are_generated(
    generate: Generate, folder: Path
) -> None:
    """Not of --rows; and with --unmemorized_prompts and a base of captions too."""
    options = "--mitigation_options=share=0.1,steps=2,base=holdout.csv"
    whole = generate("wanda", "wanda/whole", options, "--unmemorized_prompts=holdout.csv")
    some = generate("wanda", "wanda/some", options, "--unmemorized_prompts=holdout.csv", "--rows=3")
    assert len(whole) == 12 and len(some) == 2
    found = [record(folder, f"wanda/{name}")["wanda"] for name in ("whole", "some")]
    assert found[0] == found[1] and found[0]["memorized_prompts"] == 6
    assert 0 < found[0]["masked_weights"] <= 0.2 * found[0]["of_weights"]
    inputs = record(folder, "wanda/some")["inputs"]
    assert set(inputs) == {"memorized.csv", "holdout.csv"}
    verbatim = generate("wanda", "wanda/vm", "--memorization_type=VM", "--rows=0")
    assert len(verbatim) == 2
    assert record(folder, "wanda/vm")["wanda"]["memorized_prompts"] == 4


# Options.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attention_scaling", None),
        ("random_tokens", "count=2"),
        ("embedding_noise", "std=0.5"),
        ("guidance_static", "until=400"),
        ("guidance_dynamic", None),
        ("guidance_opposite", "until=400"),
        ("wanda", "share=0.1,steps=2"),
    ],
)
def test_a_picture_does_not_depend_on_how_many_there_are(
    small_model: Callable[..., Model], name: str, options: str | None
) -> None:
    """Each image of a prompt, made with 1, 4 and 10 images."""
    model = small_model("sd1")
    captions = {0: "A lighthouse", 1: "grey cat"}
    unconditional = encode_unconditional(model)
    noises = initial_noise(model, 10, 2)

    def made(noise: torch.Tensor) -> torch.Tensor:
        sampling = {"steps": 4, "guidance_scale": 7.0}
        mitigation = mitigations.begin(
            mitigations.parse(name, options),
            model,
            captions,
            unconditional,
            noise,
            memorized=[Prompt(row, caption) for row, caption in captions.items()],
            **sampling,
        )
        # Dynamic guidance begins behind a minimum.
        dips = (
            with_minima(model, {captions[0]: 501}) if name == "guidance_dynamic" else nullcontext()
        )
        with mitigation.around([0] * len(noise)), dips:
            return sample_latents(
                model,
                mitigation.encode(0).repeat(len(noise)),
                unconditional,
                noise,
                schedule=mitigation.schedule(),
                **sampling,
            )

    of_ten = made(noises)
    for count in (1, 4):
        assert torch.allclose(made(noises[:count]), of_ten[:count], atol=1e-4), count


def test_options_replace_the_published_settings_and_nothing_else() -> None:
    assert mitigations.parse("wanda", None) == Wanda(share=0.01, steps=10, base=None)
    assert mitigations.parse("wanda", "steps=3,base=a.csv") == Wanda(0.01, 3, Path("a.csv"))
    assert mitigations.parse("repeated_words", "count=1") == RandomWords("words", 1)
    assert mitigations.parse("guidance_opposite", "until=650") == HeldBackGuidance(650, True)
    scaling = mitigations.parse("attention_scaling", "drop_eos=true")
    assert scaling is not None and asdict(scaling) == {"factor": 1.25, "drop_eos": True}
    adjustment = mitigations.parse("embedding_adjustment", None)
    assert adjustment is not None and list(asdict(adjustment).values()) == [1.5, 10, 0.05, 0.01]
    assert mitigations.parse(None, None) is None
    assert mitigations.described(None, None) == {}


@pytest.mark.parametrize("method", METHODS)
def test_every_option_says_what_is_wrong_with_a_value(method: str) -> None:
    for option in METHODS[method].options:
        for value in ("", "nan", "-1e99", "1e99") if option != "base" else ("",):
            with pytest.raises(InputError, match=f"--mitigation_options {option}={value}: "):
                mitigations.parse(method, f"{option}={value}")


BAD = [
    ("a method nobody knows", ["--mitigation=magic"], ["'magic'", "wanda"]),
    ("an option that is another's", ["--mitigation=wanda", "+count=1"], ["share, steps, base"]),
    ("an option twice", ["--mitigation=random_tokens", "+count=1,count=2"], ["count=VALUE, once"]),
    ("no value", ["--mitigation=random_tokens", "+count"], ["count=VALUE, once"]),
    ("a bad value", ["--mitigation=wanda", "+share=2"], ["share: 2 is not within above 0 to 1"]),
    ("no such base", ["--mitigation=wanda", "+steps=3,base=x.csv"], ["x.csv: no such file"]),
    ("options for none", ["--mitigation=guidance_dynamic", "+a=1"], ["has no options"]),
    ("options alone", ["--original_images", "+share=0.1"], ["without --mitigation"]),
    ("two modes", ["--mitigation=wanda", "--original_images"], ["not allowed with"]),
    ("fewer steps", ["--mitigation=wanda"], ["first 10 denoising steps, --steps is 3", "steps=3"]),
    (
        "no guidance to hold back",
        ["--mitigation=guidance_static", "--guidance_scale=1"],
        ["--guidance_scale 1 is no guidance"],
    ),
    (
        "a factor without neurons",
        ["--mitigation=attention_scaling", "--scaling_factor=0.5"],
        ["--scaling_factor 0.5 has no effect with --mitigation"],
    ),
    (
        "a seed for nothing",
        ["--mitigation=attention_scaling", "--random_seed=1"],
        ["--random_seed 1 has no effect with --mitigation"],
    ),
]


@pytest.mark.parametrize(("words", "options", "says"), BAD, ids=[case[0] for case in BAD])
def test_bad_input_is_refused_in_one_line_and_changes_nothing(
    words: str, options: list[str], says: list[str], warm: Warm, folder: Path
) -> None:
    given = [option.replace("+", "--mitigation_options=", 1) for option in options]
    done = warm.run(4, *MODEL, *SAMPLING, *given, "-o=bad/images", cwd=folder)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{SCRIPTS[4].name}: ") and done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in says), done.stderr
    assert not (folder / "bad").exists()


def test_a_dry_run_names_the_method_and_its_cost_without_torch(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "torch.py").write_text("raise AssertionError('torch was imported')\n")
    monkeypatch.setenv("PYTHONPATH", str(guard))
    options = ("--mitigation=wanda", "--mitigation_options=steps=2", *SAMPLING)
    done = workspace.run(4, *MODEL, *options, "-o=dry/images", "--dry_run", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "{'share': 0.01, 'steps': 2, 'base': None}" in done.stdout
    assert not (folder / "dry").exists()


def test_what_a_method_costs_on_top() -> None:
    def cost(name: str, options: str | None = None) -> float:
        settings = mitigations.parse(name, options)
        return mitigations.extra_unet_rows(settings, images=40, memorized=20, base=0)

    assert cost("attention_scaling") == cost("guidance_dynamic") == 0
    assert cost("embedding_adjustment") == 40 * 31  # e_u once, ten times e_c and twice back
    assert cost("wanda", "steps=5") == 2 * 5 * 21
    wanda = mitigations.parse("wanda", "steps=5")
    assert mitigations.extra_unet_rows(wanda, images=40, memorized=20, base=7) == 2 * 5 * 27
