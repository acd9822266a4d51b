"""The scores of pictures (SSCD_Gen, SSCD_Orig, diversity, alignment), each against a computation
written here from its definition; missing and corrupt pictures; the cache."""

import csv
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import metric_models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from utils import embeddings, metric_runs, prompt_scores, summary
from utils.errors import InputError
from utils.files import write_table
from utils.neuron_sets import RESULT_COLUMNS, NeuronSet, Result, result_cells

ROOT = Path(__file__).resolve().parent.parent
TYPES = ("VM", "TM", "VM", "TM", "VM")
SAMPLES = 3
CLOSE = 2e-6  # scores are written with six digits


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "metrics" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *flags: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs a metric script in this process; returns its summary. ``-o`` must be among the flags."""
    argv = [f"{name}.py", *map(str, flags), "--device=cpu", "--workers=0"]
    monkeypatch.setattr(sys, "argv", argv)
    module = script(name)
    args = module.parse_args()
    assert module.main(args) == 0
    return json.loads(args.output.with_suffix(".json").read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=";"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return metric_models.save_torchscript(tmp_path_factory.mktemp("weights") / "sscd.pt")


def test_embeddings_are_float32_and_of_one_kind_of_device(weights: Path) -> None:
    space = embeddings.sscd_space("nemo", weights)
    parts: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [part.allow_tf32 for part in parts]
    try:
        for part in parts:
            part.allow_tf32 = True
        space.load("cpu")
        assert not any(part.allow_tf32 for part in parts)
    finally:
        for part, value in zip(parts, before, strict=True):
            part.allow_tf32 = value
    assert space.key("cuda:1") == space.key("cuda") != space.key("cpu")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return metric_models.save_open_clip(tmp_path_factory.mktemp("weights") / "clip")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Five prompts, blocked and unblocked pictures, training images in both ways of naming."""
    lines = [f"{i};caption number {i};https://example.org/{i};{t}\n" for i, t in enumerate(TYPES)]
    (tmp_path / "prompts.csv").write_text(";Caption;URL;type\n" + "".join(lines))
    pictures = {
        f"img_{r:04d}_{s:02d}.jpg": (r, s) for r in range(len(TYPES)) for s in range(SAMPLES)
    }
    metric_models.save_pictures(tmp_path / "blocked", {n: ("b", *k) for n, k in pictures.items()})
    metric_models.save_pictures(tmp_path / "unblocked", {n: ("u", *k) for n, k in pictures.items()})
    originals: dict[str, object] = {f"{r:04d}_first_image.jpg": ("o", r, 0) for r in range(4)}
    originals["0002_second_image.jpg"] = ("o", 2, 1)
    originals["img_0004_00.jpg"] = ("u", 4, 1)  # the same picture as an unblocked sample
    metric_models.save_pictures(tmp_path / "originals", originals)
    return tmp_path


# What a protocol's embedding is, in numpy.


def embedding(path: Path, weights: Path, protocol: str = "nemo") -> np.ndarray:
    """Decode, resize with Pillow, normalize, mean of 4 x 4 fields, mix: float64."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    if protocol == "wen":
        width, height = image.size
        scale = 256 / min(width, height)
        image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
        left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
        image = image.crop((left, top, left + 224, top + 224))
        mean, std = np.full(3, 0.5), np.full(3, 0.5)
    else:
        side = {"nemo": 320, "membench": 288}[protocol]
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    pixels = (np.asarray(image) / 255 - mean) / std
    side = pixels.shape[0] // 4
    fields = pixels.reshape(4, side, 4, side, 3).mean(axis=(1, 3))  # (4, 4, 3)
    matrix = torch.jit.load(str(weights)).state_dict()["mix.weight"].numpy()
    return matrix.astype(np.float64) @ fields.transpose(2, 0, 1).ravel()


def cos(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def vectors(folder: Path, weights: Path, row: int, protocol: str = "nemo") -> list[np.ndarray]:
    return [
        embedding(folder / f"img_{row:04d}_{s:02d}.jpg", weights, protocol) for s in range(SAMPLES)
    ]


def common(place: Path, weights: Path, name: str) -> list[str]:
    return [
        f"-f={place / 'blocked'}",
        f"-p={place / 'prompts.csv'}",
        f"--sscd_weights={weights}",
        f"-o={place / name}.csv",
    ]


def column(place: Path, name: str, score: str) -> list[float | None]:
    cells = [row[score] for row in rows_of(place / f"{name}.csv")]
    return [float(cell) if cell else None for cell in cells]


def assert_summary(found: dict[str, Any], scores: list[float | None], types: Any = TYPES) -> None:
    for kind in ("all", "VM", "TM"):
        own = [s for s, t in zip(scores, types, strict=True) if kind in ("all", t)]
        known = [s for s in own if s is not None]
        assert found[kind]["n"] == len(known)
        assert found[kind]["missing"] == len(own) - len(known)
        assert found[kind]["median"] == pytest.approx(np.median(known), abs=CLOSE)
        mad = stats.median_abs_deviation(known)
        assert found[kind]["mad"] == pytest.approx(mad, abs=CLOSE)
        low, high = found[kind]["interval"]
        assert min(known) - CLOSE <= low <= found[kind]["median"] <= high <= max(known) + CLOSE


# Each score from its definition.


@pytest.mark.parametrize("protocol", ["nemo", "wen", "membench"])
def test_sscd_gen_is_the_median_over_seeds(
    place: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    flags = [*common(place, weights, "gen"), f"--sscd_protocol={protocol}"]
    found = run("compute_sscd_gen", *flags, f"-r={place / 'unblocked'}", monkeypatch=monkeypatch)
    expected = []
    for row in range(len(TYPES)):
        first = vectors(place / "blocked", weights, row, protocol)
        second = vectors(place / "unblocked", weights, row, protocol)
        expected.append(float(np.median([cos(a, b) for a, b in zip(first, second, strict=True)])))
    assert column(place, "gen", "Median") == pytest.approx(expected, abs=CLOSE)
    assert_summary(found["scores"]["Median"], list(expected))


def test_sscd_orig_is_the_nearest_training_image_of_the_best_sample(
    place: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*common(place, weights, "orig"), f"-f={place / 'unblocked'}"]
    found = run("compute_sscd_orig", *flags, f"-r={place / 'originals'}", monkeypatch=monkeypatch)
    files = [sorted((place / "originals").glob(f"*{row:04d}_*")) for row in range(len(TYPES))]
    assert [len(some) for some in files] == [1, 1, 2, 1, 1]
    similar = []
    for row, some in enumerate(files):
        originals = [embedding(path, weights) for path in some]
        samples = vectors(place / "unblocked", weights, row)
        similar.append([max(cos(sample, o) for o in originals) for sample in samples])
    expected = [max(values) for values in similar]
    assert column(place, "orig", "Max") == pytest.approx(expected, abs=CLOSE)
    assert column(place, "orig", "Median") == pytest.approx(
        [np.median(s) for s in similar], abs=CLOSE
    )
    assert expected[-1] == pytest.approx(1) and column(place, "orig", "Max")[-1] == 1
    assert_summary(found["scores"]["Max"], list(expected))
    copies = found["copies"]["nemo"]["all"]
    assert copies == {
        "prompts": sum(value > 0.7 for value in expected),
        "of_prompts": 5,
        "pictures": sum(value > 0.7 for values in similar for value in values),
        "of_pictures": 15,
    }


def test_one_table_holds_all_protocols(
    place: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*common(place, weights, "orig"), "--sscd_protocol=all"]
    found = run("compute_sscd_orig", *flags, f"-r={place / 'originals'}", monkeypatch=monkeypatch)
    assert list(found["scores"]) == [
        *("nemo Max", "nemo Median", "wen Max", "wen Median"),
        *("membench Max", "membench Top-3 Mean", "membench Share Above 0.5"),
    ]
    assert set(found["copies"]) == {"nemo", "wen", "membench"}
    said = capsys.readouterr().out
    assert all(f"\n{name} " in said for name in found["scores"])
    assert all(f"copies above 0.7 ({protocol}): all " in said for protocol in found["copies"])
    for protocol in ("nemo", "wen", "membench"):
        originals = embedding(place / "originals" / "0003_first_image.jpg", weights, protocol)
        own = [cos(v, originals) for v in vectors(place / "blocked", weights, 3, protocol)]
        assert column(place, "orig", f"{protocol} Max")[3] == pytest.approx(max(own), abs=CLOSE)
        if protocol == "membench":
            top = column(place, "orig", "membench Top-3 Mean")[3]
            share = column(place, "orig", "membench Share Above 0.5")[3]
            assert top == pytest.approx(np.mean(own), abs=CLOSE)
            assert share == pytest.approx(np.mean(np.array(own) > 0.5), abs=CLOSE)


def test_diversity_is_the_median_over_pairs_of_samples(
    place: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run("compute_diversity", *common(place, weights, "d"), monkeypatch=monkeypatch)
    expected = []
    for row in range(len(TYPES)):
        pairs = itertools.combinations(vectors(place / "blocked", weights, row), 2)
        expected.append(float(np.median([cos(a, b) for a, b in pairs])))
    assert column(place, "d", "Median") == pytest.approx(expected, abs=CLOSE)
    assert_summary(found["scores"]["Median"], list(expected))


def test_alignment_and_clip_diversity_against_open_clip_called_directly(
    place: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    where = f"local-dir:{clip_folder}"
    network, _, transform = open_clip.create_model_and_transforms(where)
    network.eval()
    expected, alike = [], []
    for row in range(len(TYPES)):
        with torch.no_grad():
            text = network.encode_text(open_clip.get_tokenizer(where)([f"caption number {row}"]))
            images = [
                network.encode_image(transform(Image.open(path).convert("RGB"))[None])[0].numpy()
                for path in sorted((place / "blocked").glob(f"img_{row:04d}_*"))
            ]
        expected.append(float(np.median([cos(image, text[0].numpy()) for image in images])))
        pairs = itertools.combinations(images, 2)
        alike.append(float(np.median([cos(a, b) for a, b in pairs])))
    flags = [f"-f={place / 'blocked'}", f"-p={place / 'prompts.csv'}"]
    flags.append(f"--clip_model={clip_folder}")
    out = f"-o={place / 'a.csv'}"
    found = run("compute_prompt_alignment", *flags, out, monkeypatch=monkeypatch)
    assert column(place, "a", "Median") == pytest.approx(expected, abs=CLOSE)
    assert_summary(found["scores"]["Median"], list(expected))
    run("compute_diversity", *flags, "-m=clip", f"-o={place / 'd.csv'}", monkeypatch=monkeypatch)
    assert column(place, "d", "Median") == pytest.approx(alike, abs=CLOSE)


def test_the_openai_weights_of_clip_get_their_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """open_clip's ViT-B-32 has GELU, the tag openai was trained with QuickGELU: a mismatch is only
    a warning there and would shift every A_CLIP."""
    import open_clip

    asked: dict[str, Any] = {}

    def create(name: str, **options: Any) -> tuple[torch.nn.Module, None, None]:
        asked.update(options, name=name)
        return open_clip.CLIP(8, {"layers": 1}, {"layers": 1}), None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    embeddings.clip_space("ViT-B-32", "openai").load("cpu")
    assert asked["name"] == "ViT-B-32" and asked["pretrained"] == "openai"
    assert asked["force_quick_gelu"] is True
    embeddings.clip_space("ViT-B/32", "openai").load("cpu")  # as papers write it
    assert asked["name"] == "ViT-B-32" and asked["force_quick_gelu"] is True
    embeddings.clip_space("ViT-B-32", "laion2b_s34b_b79k").load("cpu")
    assert asked["force_quick_gelu"] is False
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(b"weights")
    for name, warned in (("ViT-B-32", True), ("ViT-B-32-quickgelu", False)):
        caplog.clear()
        embeddings.clip_space(name, str(weights))
        assert ("name --clip_model ViT-B-32-quickgelu" in caplog.text) == warned


def test_the_same_picture_scores_one_and_independent_ones_near_zero(
    place: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*common(place, weights, "gen"), f"-r={place / 'blocked'}"]
    run("compute_sscd_gen", *flags, monkeypatch=monkeypatch)
    assert column(place, "gen", "Median") == [1] * len(TYPES)
    generator = np.random.default_rng(0)
    apart = prompt_scores.cosine(*generator.normal(size=(2, 200, 512)))
    assert abs(np.median(apart)) < 0.01 and np.abs(apart).max() < 0.3


# What is missing or corrupt.


def test_a_missing_and_a_corrupt_picture_are_named_and_change_no_other_row(
    place: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*common(place, weights, "before"), f"-r={place / 'unblocked'}"]
    run("compute_sscd_gen", *flags, monkeypatch=monkeypatch)
    blocked = place / "blocked"
    (blocked / "img_0001_02.jpg").unlink()
    for sample in range(SAMPLES):
        (blocked / f"img_0003_{sample:02d}.jpg").unlink()
    broken = blocked / "img_0002_00.jpg"
    broken.write_bytes(broken.read_bytes()[:300])  # cut off
    (place / "unblocked" / "img_0000_01.jpg").write_text("<html>not found</html>")
    flags = [*common(place, weights, "after"), f"-r={place / 'unblocked'}"]
    found = run("compute_sscd_gen", *flags, monkeypatch=monkeypatch)
    before, after = column(place, "before", "Median"), column(place, "after", "Median")
    assert after[3] is None and rows_of(place / "after.csv")[3]["Median"] == ""
    assert after[4] == before[4], "the last prompt counts, and is joined by its row"
    assert [row["Samples"] for row in rows_of(place / "after.csv")] == ["2", "2", "2", "0", "3"]
    names = ["img_0001_02.jpg", *(f"img_0003_{s:02d}.jpg" for s in range(SAMPLES))]
    assert found["missing"] == {str(blocked): names, str(place / "unblocked"): []}
    assert sorted(found["corrupt"]) == sorted(
        [str(broken), str(place / "unblocked" / "img_0000_01.jpg")]
    )
    assert "UnidentifiedImageError" in found["corrupt"][str(place / "unblocked/img_0000_01.jpg")]
    assert found["scores"]["Median"]["TM"]["missing"] == 1
    for row, lost in ((0, 1), (1, 2), (2, 0)):
        pairs = zip(
            *(vectors_left(place / name, weights, row, lost) for name in ("blocked", "unblocked")),
            strict=True,
        )
        assert after[row] == pytest.approx(np.median([cos(a, b) for a, b in pairs]), abs=CLOSE)
    said = capsys.readouterr().out
    assert "missing in" in said and "img_0001_02.jpg" in said and "corrupt: 2" in said


def vectors_left(folder: Path, weights: Path, row: int, lost: int) -> list[np.ndarray]:
    left = [s for s in range(SAMPLES) if s != lost]
    return [embedding(folder / f"img_{row:04d}_{s:02d}.jpg", weights) for s in left]


def test_missing_references_and_captions_stay_missing(
    place: Path, weights: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "originals" / "0001_first_image.jpg").unlink()
    (place / "originals" / "0003_first_image.jpg").write_bytes(b"")
    flags = [*common(place, weights, "orig"), f"-r={place / 'originals'}"]
    found = run("compute_sscd_orig", *flags, monkeypatch=monkeypatch)
    values = column(place, "orig", "Max")
    assert [value is None for value in values] == [False, True, False, True, False]
    assert found["missing"][str(place / "originals")] == ["row 1"]
    assert list(found["corrupt"]) == [str(place / "originals" / "0003_first_image.jpg")]
    assert found["scores"]["Max"]["all"]["missing"] == 2
    assert found["scores"]["Max"]["TM"]["median"] is None
    assert found["scores"]["Max"]["TM"]["interval"] is None

    text = (place / "prompts.csv").read_text().replace("caption number 2", "")
    (place / "prompts.csv").write_text(text)
    flags = [f"-f={place / 'blocked'}", f"-p={place / 'prompts.csv'}"]
    flags += [f"--clip_model={clip_folder}", f"-o={place / 'a.csv'}"]
    found = run("compute_prompt_alignment", *flags, monkeypatch=monkeypatch)
    assert found["missing_captions"] == [2]
    assert [v is None for v in column(place, "a", "Median")] == [False, False, True, False, False]


def test_rows_join_on_the_number_not_on_the_position(
    place: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*common(place, weights, "all"), f"-r={place / 'originals'}"]
    run("compute_sscd_orig", *flags, monkeypatch=monkeypatch)
    whole = column(place, "all", "Max")
    for row in (0, 1):
        for path in (
            *place.glob(f"blocked/img_{row:04d}_*"),
            *place.glob(f"originals/{row:04d}_*"),
        ):
            path.unlink()
    flags = [*common(place, weights, "some"), f"-r={place / 'originals'}", "--rows=2-4"]
    found = run("compute_sscd_orig", *flags, monkeypatch=monkeypatch)
    assert column(place, "some", "Max") == whole[2:]
    assert set(found["of_other_prompts"].values()) == {0}
    flags = [*common(place, weights, "vm"), f"-r={place / 'originals'}", "--mem_type=VM"]
    found = run("compute_sscd_orig", *flags, monkeypatch=monkeypatch)
    assert [row["Row"] for row in rows_of(place / "vm.csv")] == ["0", "2", "4"]
    assert column(place, "vm", "Max") == [None, whole[2], whole[4]]
    assert found["missing"][str(place / "originals")] == ["row 0"]
    assert found["of_other_prompts"] == {str(place / "blocked"): 3, str(place / "originals"): 1}


def test_num_samples_and_num_ref_samples_take_the_first_ones(
    place: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*common(place, weights, "two"), "--num_samples=2", "--num_ref_samples=1"]
    run("compute_sscd_orig", *flags, f"-r={place / 'originals'}", monkeypatch=monkeypatch)
    original = embedding(place / "originals" / "0002_first_image.jpg", weights)
    expected = max(cos(v, original) for v in vectors(place / "blocked", weights, 2)[:2])
    assert column(place, "two", "Max")[2] == pytest.approx(expected, abs=CLOSE)
    flags = [*common(place, weights, "four"), "--num_samples=4"]
    found = run("compute_diversity", *flags, monkeypatch=monkeypatch)
    assert found["missing"][str(place / "blocked")] == [f"img_{r:04d}_03.jpg" for r in range(5)]


# The cache.


def test_a_second_metric_makes_no_forward_pass(
    place: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*common(place, weights, "gen"), f"-r={place / 'unblocked'}"]
    run("compute_sscd_gen", *flags, monkeypatch=monkeypatch)
    first = rows_of(place / "gen.csv")
    assert (place / "blocked.embeddings" / ".gitignore").read_text() == "*\n"

    def load(*_: object) -> Any:
        raise AssertionError("the network was loaded again")

    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "_load_torchscript", load)
        run("compute_diversity", *common(place, weights, "d"), monkeypatch=monkeypatch)
        # Names do not matter: what has these bytes has this embedding.
        renamed = place / "renamed"
        renamed.mkdir()
        for path in sorted((place / "blocked").iterdir(), reverse=True):
            row, sample = path.stem.split("_")[1:]
            (renamed / f"img_{4 - int(row):04d}_{sample}.jpg").write_bytes(path.read_bytes())
        (place / "blocked").rename(place / "gone")
        renamed.rename(place / "blocked")
        run("compute_diversity", *common(place, weights, "e"), monkeypatch=monkeypatch)
        forward, backward = column(place, "d", "Median"), column(place, "e", "Median")
        assert forward == backward[::-1]
    # Another network, another protocol and changed pictures are computed anew.
    other = metric_models.save_torchscript(place / "other.pt", seed=1)
    run("compute_diversity", *common(place, other, "other"), monkeypatch=monkeypatch)
    assert column(place, "other", "Median") != backward
    flags = [*common(place, weights, "wen"), "--sscd_protocol=wen"]
    run("compute_diversity", *flags, monkeypatch=monkeypatch)
    assert column(place, "wen", "Median") != backward
    metric_models.save_pictures(place / "blocked", {"img_0000_00.jpg": "changed"})
    run("compute_diversity", *common(place, weights, "changed"), monkeypatch=monkeypatch)
    now = column(place, "changed", "Median")
    assert now[0] != backward[0] and now[1:] == backward[1:]
    assert len(first) == len(TYPES)


def test_a_broken_cache_is_made_anew_and_worker_processes_change_nothing(
    place: Path, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = sorted((place / "blocked").iterdir())
    hashes = {path: embeddings.sha256_of_file(path) for path in paths}
    space = embeddings.sscd_space("nemo", weights)
    one = embeddings.Embedder(space, device="cpu", batch_size=2, workers=2)
    found = one.images(hashes, place / "blocked").vectors
    assert one.computed == len(paths)
    (cache,) = (place / "blocked.embeddings").glob("*.safetensors")
    cache.write_bytes(b"broken")
    again = embeddings.Embedder(space, device="cpu", batch_size=64, workers=0)
    vectors = again.images(hashes, place / "blocked").vectors
    assert again.computed == len(paths) and "made anew" in caplog.text
    for path in paths:
        assert vectors[path] == pytest.approx(found[path], abs=1e-6)
        assert vectors[path] == pytest.approx(embedding(path, weights), abs=1e-5)


@pytest.mark.parametrize("every", [0.0, 1e9])
def test_an_interrupted_run_keeps_what_it_embedded(
    place: Path, monkeypatch: pytest.MonkeyPatch, every: float
) -> None:
    paths = sorted((place / "blocked").iterdir())
    hashes = {path: embeddings.sha256_of_file(path) for path in paths}
    batches: list[int] = []

    def encode(batch: torch.Tensor) -> torch.Tensor:
        batches.append(len(batch))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return batch.flatten(1)

    network = embeddings.Network(lambda image: torch.full((3, 1, 1), float(image.width)), encode)
    space = embeddings.Space("slow", {"name": "slow"}, "none", lambda device: network)
    monkeypatch.setattr(embeddings, "SAVE_EVERY", every)
    one = embeddings.Embedder(space, device="cpu", batch_size=4, workers=0)
    with pytest.raises(KeyboardInterrupt):
        one.images(hashes, place / "blocked")
    again = embeddings.Embedder(space, device="cpu", batch_size=4, workers=0)
    assert len(again.images(hashes, place / "blocked").vectors) == len(paths)
    assert (one.computed, again.computed) == (8, len(paths) - 8)


def test_an_embedding_that_is_zero_or_not_finite_is_no_embedding(place: Path) -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.zeros(4), torch.full((4,), torch.nan), torch.ones(4)])

    network = embeddings.Network(lambda image: torch.zeros(3, 2, 2), Broken())
    space = embeddings.Space("broken", {"name": "broken"}, "none", lambda device: network)
    paths = sorted((place / "blocked").iterdir())[:3]
    hashes = {path: embeddings.sha256_of_file(path) for path in paths}
    embedder = embeddings.Embedder(space, device="cpu", batch_size=3, workers=0)
    found = embedder.images(hashes, place / "blocked")
    assert list(found.vectors) == paths[2:] and list(found.corrupt) == paths[:2]


def test_a_caption_without_a_usable_embedding_is_named_and_has_no_score(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"caption number 1": 0.0, "caption number 3": float("nan")}

    def network(device: str) -> embeddings.Network:
        return embeddings.Network(
            lambda image: torch.ones(3, 1, 1),
            lambda batch: batch.flatten(1),
            lambda captions: torch.tensor([[odd.get(c, 1.0)] * 3 for c in captions]),
        )

    space = embeddings.Space("odd", {"name": "odd"}, "none", network)
    monkeypatch.setattr(metric_runs, "clip_space", lambda *_: space)
    flags = [f"-f={place / 'blocked'}", f"-p={place / 'prompts.csv'}", f"-o={place / 'a.csv'}"]
    found = run("compute_prompt_alignment", *flags, monkeypatch=monkeypatch)
    assert column(place, "a", "Median") == [1, None, 1, None, 1]
    assert found["scores"]["Median"]["all"]["missing"] == 2
    assert f"captions left out, whose embedding is zero or not finite: {list(odd)}" in caplog.text


# Laws.

FINITE = st.floats(-1, 1, allow_nan=False, width=32)


@given(st.lists(st.tuples(FINITE, FINITE, FINITE), min_size=2, max_size=8), st.randoms())
@settings(max_examples=60, deadline=None)
def test_permuting_samples_changes_no_score(samples: list[Any], generator: Any) -> None:
    usable = [np.array(v) + np.array([3.0, 0, 0]) for v in samples]
    order = list(range(len(usable)))
    generator.shuffle(order)
    one = dict(enumerate(usable))
    other = {place: usable[number] for place, number in enumerate(order)}
    for statistic in prompt_scores.STATISTICS:
        for function in (
            prompt_scores.between_samples,
            lambda images: prompt_scores.to_nearest(images, [usable[0], usable[-1]]),
            lambda images: prompt_scores.same_sample(images, images),
        ):
            first, second = function(one), function(other)
            assert prompt_scores.score(first, statistic) == pytest.approx(
                prompt_scores.score(second, statistic), abs=1e-12
            )


SCORES = st.lists(st.one_of(st.none(), FINITE), min_size=1, max_size=20)


@given(SCORES, st.randoms())
@settings(max_examples=40, deadline=None)
def test_a_missing_prompt_changes_only_the_count(
    scores: list[float | None], generator: Any
) -> None:
    types = [generator.choice(["VM", "TM", ""]) for _ in scores]
    before = summary.summarize_scores(scores, types, resamples=50)
    after = summary.summarize_scores([*scores, None], [*types, "VM"], resamples=50)
    for kind, found in before.items():
        more = kind in ("all", "VM")
        assert after[kind] == {**found, "missing": found["missing"] + more}
    order = list(range(len(scores)))
    generator.shuffle(order)
    moved = summary.summarize_scores(
        [scores[i] for i in order], [types[i] for i in order], resamples=50
    )
    assert moved == before
    known = [score for score in scores if score is not None]
    if known:
        assert before["all"]["mad"] == pytest.approx(stats.median_abs_deviation(known), abs=1e-12)
        assert before["all"]["median"] == pytest.approx(np.median(known), abs=1e-12)


def test_the_interval_of_the_median_is_scipys() -> None:
    values = np.random.default_rng(5).normal(size=101)
    ours = summary.bootstrap_median(list(values), resamples=20_000, seed=1)
    theirs = stats.bootstrap(
        (values,), np.median, n_resamples=20_000, method="percentile", rng=2, batch=2000
    ).confidence_interval
    assert ours == pytest.approx([theirs.low, theirs.high], abs=0.03)
    assert ours == summary.bootstrap_median(list(values[::-1]), resamples=20_000, seed=1)
    assert summary.bootstrap_median([0.5], resamples=10, seed=0) is None


# Two result files side by side.


def test_prompts_that_are_not_memorized_enter_no_median(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def located(row: int, neurons: NeuronSet) -> Result:
        score = 0.5 if any(neurons) else 0.0
        return Result(row, f"caption {row}", "", neurons, score, neurons, score)

    def result_file(name: str, *sets: NeuronSet) -> Path:
        results = [located(row, neurons) for row, neurons in enumerate(sets)]
        write_table(tmp_path / name, RESULT_COLUMNS, map(result_cells, results))
        return tmp_path / name

    def compared(*paths: Path) -> tuple[str, list[str]]:
        output = tmp_path / "compared.csv"
        output.unlink(missing_ok=True)
        module = script("compare_results")
        monkeypatch.setattr(sys, "argv", ["compare_results.py", *map(str, paths), f"-o={output}"])
        assert module.main(module.parse_args()) == 0
        return capsys.readouterr().out, [row["Jaccard"] for row in rows_of(output)]

    nothing, ten, others = [[], []], [[*range(10)], []], [[], [*range(10)]]
    first = result_file("first.csv", nothing, nothing, ten, [[1], [2]])
    second = result_file("second.csv", nothing, nothing, others, nothing)
    none = result_file("none.csv", nothing)
    said, indices = compared(first, second)
    assert indices == ["", "", "0.0000", "0.0000"]
    assert "decided in both: 4" in said and "memorized: 2 and 1, in either: 2" in said
    assert "same set: 0; Jaccard mean 0.000, median 0.000" in said
    assert "median neurons: 6 and 10" in said
    said, indices = compared(first, first)
    assert indices == ["", "", "1.0000", "1.0000"] and "same set: 2; Jaccard mean 1.000" in said
    said, indices = compared(none, none)
    assert "median neurons: - and -" in said and "Jaccard" not in said and indices == [""]


# Refusals, and the scripts as commands.


def command(name: str, *flags: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "metrics" / f"{name}.py", *map(str, flags)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def without_torch(folder: Path) -> dict[str, str]:
    """An environment in which importing torch is an error."""
    (folder / "guard").mkdir()
    (folder / "guard" / "torch.py").write_text("raise SystemExit('torch was imported')")
    return {"PYTHONPATH": str(folder / "guard")}


def test_refusals_are_one_line_before_torch_and_write_nothing(
    place: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in without_torch(place).items():
        monkeypatch.setenv(name, value)
    (place / "empty").mkdir()
    (place / "empty" / "other.jpg").write_bytes(b"")
    (place / "text.pt").write_text("not a network")
    (place / "clip").mkdir()
    (place / "clip" / "open_clip_config.json").write_text("{}")
    (place / "there.csv").write_text("x")
    shown, prompts, unblocked = "-f=blocked", "-p=prompts.csv", "-r=unblocked"
    ours = f"--sscd_weights={weights}"
    cases = {
        "no weights": ((shown, prompts, unblocked), "python prompts/download.py sscd"),
        "no folder": (("-f=gone", prompts, unblocked, ours), "gone: no such image folder"),
        "no named picture": (("-f=empty", prompts, unblocked, ours), "img_0001_00.jpg"),
        "no prompts": ((shown, "-p=gone.csv", unblocked, ours), "gone.csv: no such file"),
        "not TorchScript": (
            (shown, prompts, unblocked, "--sscd_weights=text.pt"),
            "not a TorchScript file",
        ),
        "an option without effect": (
            (shown, prompts, unblocked, ours, "--clip_model=ViT-B-32"),
            "no effect",
        ),
        "an output that exists": ((shown, prompts, unblocked, ours, "-o=there.csv"), "exists"),
        "an output named like its summary": (
            (shown, prompts, unblocked, ours, "-o=scores.json"),
            "is the name of the record",
        ),
        "an output without a name": ((shown, prompts, unblocked, ours, "-o=."), "names no file"),
        "a row that is not there": ((shown, prompts, unblocked, ours, "--rows=9"), "no row 9"),
        "a CLIP without weights": (
            (shown, prompts, unblocked, "-m=clip", "--clip_model=clip"),
            "no weights",
        ),
        "an unknown CLIP": (
            (shown, prompts, unblocked, "-m=clip", "--clip_model=ViT-Z"),
            "neither an open_clip model",
        ),
    }
    before = sorted(place.rglob("*"))
    for case, (flags, said) in cases.items():
        done = command("compute_sscd_gen", *flags, "--device=cpu", folder=place)
        assert done.returncode == 2, f"{case}: {done.stderr}"
        assert said in done.stderr and done.stderr.count("\n") == 1, f"{case}: {done.stderr}"
    assert sorted(place.rglob("*")) == before


def test_as_a_command_again_and_with_other_pictures(place: Path, weights: Path) -> None:
    flags = ("-f=blocked", "-r=unblocked", "-p=prompts.csv", f"--sscd_weights={weights}")
    done = command("compute_sscd_gen", *flags, "--device=cpu", folder=place)
    assert done.returncode == 0, done.stderr
    output = place / "results/scores/sscd_gen_blocked.csv"
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["finished"] and set(record["inputs"]) == {"prompts.csv", "blocked", "unblocked"}
    assert record["model"]["sscd nemo"]["sha256"] == embeddings.sha256_of_file(weights)
    assert record["settings"]["num_samples"] == SAMPLES
    written = output.read_bytes()
    done = command("compute_sscd_gen", *flags, "--device=cpu", folder=place)
    assert done.returncode == 2 and "exists already" in done.stderr
    flags = (*flags, "--device=cpu", "--continue_run")
    done = command("compute_sscd_gen", *flags, folder=place)
    assert done.returncode == 0 and "complete already" in done.stdout
    assert "median" in done.stdout and output.read_bytes() == written
    metric_models.save_pictures(place / "blocked", {"img_0000_00.jpg": "changed"})
    done = command("compute_sscd_gen", *flags, folder=place)
    assert done.returncode == 2 and "blocked" in done.stderr


def test_pictures_that_the_network_cannot_take_are_refused(place: Path) -> None:
    network = torch.jit.script(torch.nn.Linear(7, 4))
    network.save(str(place / "linear.pt"))
    space = embeddings.sscd_space("nemo", place / "linear.pt")
    path = place / "blocked" / "img_0000_00.jpg"
    embedder = embeddings.Embedder(space, device="cpu", batch_size=4, workers=0)
    with pytest.raises(InputError, match="does not take pictures of"):
        embedder.images({path: embeddings.sha256_of_file(path)}, place / "blocked")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("DefaultCPUAllocator: can't allocate memory", RuntimeError),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", RuntimeError),
        ("a tensor in another memory format was expected", InputError),
    ],
)
def test_a_fault_of_the_device_is_not_one_of_the_network(
    place: Path, message: str, error: type[Exception]
) -> None:
    def encode(batch: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(message)

    network = embeddings.Network(lambda image: torch.ones(3, 1, 1), encode)
    space = embeddings.Space("failing", {"name": "failing"}, "none", lambda device: network)
    path = place / "blocked" / "img_0000_00.jpg"
    embedder = embeddings.Embedder(space, device="cpu", batch_size=4, workers=0)
    with pytest.raises(error, match=message):
        embedder.images({path: embeddings.sha256_of_file(path)}, place / "blocked")
