"""The shipped evaluators: on pictures they were not trained on they tell what they are to tell.
Nothing is trained here. (Their checksums are seen to in tests/tiny_files.py.)"""

from functools import cache
from pathlib import Path

import pytest
import torch
from cleanfid import fid
from torchvision.transforms.functional import to_tensor

from tiny_model.measure_evaluators import (
    detector_on_training_images,
    detector_shares,
    image_text_figures,
    unseen_pictures,
    vectors,
)
from utils.embeddings import SSCD_PROTOCOLS, Network, clip_space, feature_space, sscd_space

TINY = Path(__file__).resolve().parent.parent / "tiny_model"
EVALUATORS = TINY / "evaluators"
DETECTOR, IMAGE_TEXT = EVALUATORS / "copy_detector.pt", EVALUATORS / "image_text"
SEED, SAMPLE = 2, 60  # not the pictures that README's figures come from


@cache
def detector(protocol: str) -> Network:
    return sscd_space(protocol, DETECTOR).load("cpu")


@cache
def image_text() -> Network:
    return clip_space(str(IMAGE_TEXT), "").load("cpu")


def test_the_files_are_small() -> None:
    shipped = [path for path in EVALUATORS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) < 3e6


@pytest.mark.parametrize("protocol", SSCD_PROTOCOLS)
def test_the_detector_knows_copies_from_other_pictures_of_the_same_caption(protocol: str) -> None:
    found = detector_shares(detector(protocol), SEED, SAMPLE)
    assert {"recompressed", "cropped", "recoloured", "same caption"} <= found.keys()
    for name, figures in found.items():
        assert figures["share"] >= 0.95, f"{name}: {figures}"


@pytest.mark.parametrize("protocol", SSCD_PROTOCOLS)
def test_the_detector_knows_the_training_images(protocol: str) -> None:
    found = detector_on_training_images(detector(protocol), TINY / "training_images")
    assert found["lowest with itself"] > 0.7
    assert found["highest with another caption's"] < 0.7


def test_the_detector_does_not_see_size_and_normalisation() -> None:
    network = detector("nemo")
    pictures = [to_tensor(picture) for picture in unseen_pictures(SEED, 4)]
    levels = torch.stack(pictures)  # (4, 3, 64, 64) in [0, 1]
    larger = levels.repeat_interleave(5, dim=2).repeat_interleave(5, dim=3)
    with torch.no_grad():
        expected = network.encode(levels)
        assert expected.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
        for other in (levels * 255, (levels - 0.5) / 0.25, larger):
            alike = (network.encode(other) * expected).sum(dim=1)
            assert alike.numpy() == pytest.approx(1, abs=0.01)
        alone = network.encode(levels[:1])
        assert alone.numpy() == pytest.approx(expected[:1].numpy(), abs=1e-5)


def test_quality_distances_grow_with_what_is_done_to_the_pictures() -> None:
    """The detector as clean-fid's feature extractor: levels up to 255, 299 pixels a side."""
    network = feature_space(DETECTOR).load("cpu")
    pictures = unseen_pictures(SEED, 4 * SAMPLE)
    ours, theirs = (vectors(network, half).numpy() for half in (pictures[::2], pictures[1::2]))
    mosaics = [picture.resize((8, 8)).resize((64, 64)) for picture in pictures[1::2]]
    far = vectors(network, mosaics).numpy()
    assert fid.fid_from_feats(ours, theirs) < fid.fid_from_feats(ours, far)
    assert fid.kernel_distance(ours, theirs) < fid.kernel_distance(ours, far)


def test_the_image_text_model_prefers_right_captions() -> None:
    found = image_text_figures(image_text(), TINY / "training_images", SEED, SAMPLE)
    assert found["memorized nearest"] >= 0.9 * found["memorized pairs"]
    assert found["hold-out wrong ones further"] > 0.6


def test_the_image_text_model_reads_any_text() -> None:
    encode = image_text().encode_text
    assert encode is not None
    with torch.no_grad():
        embedded = encode(["", "ünknown wörds 漢字", "a red star " * 50])
    assert torch.isfinite(embedded).all()
