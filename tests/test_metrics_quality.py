"""FID, CLIP-FID and KID against clean-fid called directly, and against scipy and the definition."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import metric_models
import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid import fid

from utils.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 14  # more than the networks have dimensions


def quality() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "compute_quality", ROOT / "metrics" / "compute_quality.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(*flags: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    argv = ["compute_quality.py", *map(str, flags), "--device=cpu", "--workers=0"]
    monkeypatch.setattr(sys, "argv", argv)
    module = quality()
    args = module.parse_args()
    assert module.main(args) == 0
    return json.loads(args.output.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    metric_models.save_torchscript(folder / "features.pt")
    metric_models.save_open_clip(folder / "clip")
    ours = {f"img_{r:04d}_{s:02d}.jpg": (r, s) for r in range(PICTURES // 2) for s in range(2)}
    metric_models.save_pictures(folder / "ours", ours)
    theirs = {f"COCO_{i}.jpg": ("real", i) for i in range(PICTURES + 3)}
    metric_models.save_pictures(folder / "theirs" / "deeper", theirs)
    lines = "".join(f"caption {i};VM\n" for i in range(PICTURES // 2))
    (folder / "prompts.csv").write_text("Caption;type\n" + lines)
    return folder


def clean_features(folder: Path, weights: Path) -> np.ndarray:
    network = torch.jit.load(str(weights))
    return fid.get_folder_features(
        str(folder), network, num_workers=0, device=torch.device("cpu"), verbose=False
    )


def test_fid_and_kid_are_clean_fids(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = np.random.get_state()[1].copy()
    found = run(
        f"-f={place / 'ours'}",
        f"-r={place / 'theirs'}",
        f"--feature_model={place / 'features.pt'}",
        "--metrics=fid,kid",
        f"-o={place / 'quality.csv'}",
        monkeypatch=monkeypatch,
    )["quality"]
    assert (np.random.get_state()[1] == state).all(), "numpy's global generator was left as it was"
    direct = fid.compute_fid(
        str(place / "ours"),
        str(place / "theirs"),
        custom_feat_extractor=torch.jit.load(str(place / "features.pt")),
        num_workers=0,
        device=torch.device("cpu"),
        verbose=False,
        use_dataparallel=False,
    )
    assert found["fid"] == pytest.approx(direct, rel=1e-6)
    ours = clean_features(place / "ours", place / "features.pt")
    theirs = clean_features(place / "theirs", place / "features.pt")
    np.random.seed(0)
    assert found["kid"] == pytest.approx(fid.kernel_distance(ours, theirs), rel=1e-6)

    # The definitions: the Frechet distance through eigenvalues; the unbiased polynomial MMD.
    means = ours.mean(axis=0, dtype=np.float64), theirs.mean(axis=0, dtype=np.float64)
    spread = np.cov(ours, rowvar=False), np.cov(theirs, rowvar=False)
    root = np.sqrt(np.abs(scipy.linalg.eigvals(spread[0] @ spread[1]).real)).sum()
    frechet = ((means[0] - means[1]) ** 2).sum() + np.trace(spread[0] + spread[1]) - 2 * root
    assert found["fid"] == pytest.approx(frechet, rel=1e-4)
    generator = np.random.default_rng(0)
    estimates = [
        unbiased_mmd(ours, theirs[generator.choice(len(theirs), len(ours), replace=False)])
        for _ in range(2000)
    ]
    assert found["kid"] == pytest.approx(
        np.mean(estimates), abs=4 * np.std(estimates) / np.sqrt(100)
    )


def unbiased_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """KID's squared maximum mean discrepancy with the kernel (x y / d + 1) ** 3."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) @ b.T / a.shape[1] + 1) ** 3

    count = len(first)
    own = sum(k.sum() - np.trace(k) for k in (kernel(first, first), kernel(second, second)))
    return own / (count * (count - 1)) - 2 * kernel(first, second).mean()


def test_clip_fid_is_the_distance_of_clip_embeddings(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    from PIL import Image

    found = run(
        f"-f={place / 'ours'}",
        f"-r={place / 'theirs'}",
        f"--clip_model={place / 'clip'}",
        "--metrics=clip_fid",
        f"-o={place / 'clip.csv'}",
        monkeypatch=monkeypatch,
    )["quality"]
    where = f"local-dir:{place / 'clip'}"
    network, _, transform = open_clip.create_model_and_transforms(where)
    network.eval()
    features = []
    for folder in ("ours", "theirs"):
        paths = sorted((place / folder).rglob("*.jpg"))
        pictures = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
        with torch.no_grad():
            features.append(network.encode_image(pictures).numpy())
    assert found["clip_fid"] == pytest.approx(fid.fid_from_feats(*features), rel=1e-4)


def test_the_same_pictures_are_at_no_distance_and_prompts_choose_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"-f={place / 'ours'}", f"--feature_model={place / 'features.pt'}", "--metrics=fid"]
    same = run(*flags, f"-r={place / 'ours'}", f"-o={place / 'same.csv'}", monkeypatch=monkeypatch)
    assert same["quality"]["fid"] == pytest.approx(0, abs=1e-4)
    assert (same["settings"]["caption_column"], same["settings"]["seed"]) == ("Caption", 0)
    chosen = [f"-r={place / 'theirs'}", f"-p={place / 'prompts.csv'}", "--num_samples=3"]
    found = run(*flags, *chosen, f"-o={place / 'chosen.csv'}", monkeypatch=monkeypatch)
    names = [f"img_{r:04d}_02.jpg" for r in range(PICTURES // 2)]
    assert found["missing"][str(place / "ours")] == names
    metric_models.save_pictures(place / "few", {f"{i}.png": i for i in range(5)})
    (place / "few" / "6.png").write_text("no picture")
    found = run(
        *flags,
        f"-f={place / 'few'}",
        f"-r={place / 'theirs'}",
        f"-o={place / 'few.csv'}",
        monkeypatch=monkeypatch,
    )
    assert list(found["corrupt"]) == [str(place / "few" / "6.png")]
    assert "fewer pictures than dimensions" in capsys.readouterr().out
    cells = (place / "few.csv").read_text().splitlines()[1].split(";")
    assert cells[0] == "FID" and cells[2:] == ["5", str(PICTURES + 3), str(metric_models.WIDTH)]


def test_statistics_of_clean_fid(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics as clean-fid stores them, in the place of its own: the same as its folder."""
    module = quality()
    ours = clean_features(place / "ours", place / "features.pt")
    theirs = clean_features(place / "theirs", place / "features.pt")
    package = tmp_path / "cleanfid"
    (package / "stats").mkdir(parents=True)
    np.savez(
        package / "stats" / "mine_clean_custom_na.npz",
        mu=theirs.mean(axis=0),
        sigma=np.cov(theirs, rowvar=False),
    )
    np.savez(package / "stats" / "mine_clean_custom_na_kid.npz", feats=theirs)
    monkeypatch.setattr("cleanfid.__file__", str(package / "__init__.py"))
    statistics = module.Statistics("mine", "na", "custom")
    for metric in ("fid", "kid"):
        found = module.distance(metric, ours, statistics.read(metric), seed=0)
        assert found == pytest.approx(module.distance(metric, ours, theirs, seed=0), rel=1e-6)


def test_statistics_that_are_cut_off_and_covariances_without_a_root_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = quality()
    package = tmp_path / "cleanfid"
    (package / "stats").mkdir(parents=True)
    (package / "stats" / "mine_clean_custom_na.npz").write_bytes(b"PK\x03\x04 cut off")
    monkeypatch.setattr("cleanfid.__file__", str(package / "__init__.py"))
    with pytest.raises(InputError, match="delete a file that is cut off"):
        module.Statistics("mine", "na", "custom").read("fid")

    def no_root(*_: object) -> float:
        raise ValueError("Imaginary component 0.1")

    monkeypatch.setattr(fid, "fid_from_feats", no_root)
    with pytest.raises(InputError, match=r"FID: Imaginary .* 2 pictures of 3 dimensions"):
        module.distance("fid", np.ones((2, 3)), np.ones((2, 3)), seed=0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--metrics=fid,is"], "is none of fid, clip_fid, kid"),
        (["--statistics=unknown"], "fid.make_custom_stats"),
        (["--statistics=cifar10:32:train", "--feature_model=features.pt"], "belong to Inception"),
        (["--coco"], "python prompts/download.py coco"),
        (["-r=theirs", "--rows=3"], "no effect without -p"),
        (["-r=theirs", "--caption_column=Caption"], "no effect without -p"),
        (["-r=theirs", "--metrics=fid", "--seed=0"], "--seed has no effect without kid"),
        (["-r=theirs", "--metrics=fid", "--clip_model=ViT-B-32"], "no effect without clip_fid"),
        (["-r=one", "--metrics=kid", "--feature_model=features.pt"], "at least two"),
    ],
)
def test_refusals(
    place: Path,
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    metric_models.save_pictures(place / "one", {"1.png": 1})
    monkeypatch.chdir(place)
    try:
        run("-f=ours", *flags, "-o=refused.csv", monkeypatch=monkeypatch)
    except InputError as error:
        message = str(error)
    except SystemExit as stop:
        assert stop.code == 2
        message = capsys.readouterr().err
    assert said in message
    assert not list(place.glob("refused*"))
