"""Activation statistics against numpy in float64, their files, and z-scores."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.activation_statistics import (
    RunningStatistics,
    Statistics,
    load_statistics,
    save_tensors,
    z_scores,
)
from utils.errors import InputError

WIDTHS = [3, 1, 5]


def prompts(count: int, *, offset: float = 0.0, seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.rand(width, generator=generator) + offset for width in WIDTHS] for _ in range(count)
    ]


def streamed(rows: list[list[torch.Tensor]]) -> RunningStatistics:
    running = RunningStatistics(WIDTHS)
    for row in rows:
        running.add(row)
    return running


def assert_same(first: Statistics, second: Statistics) -> None:
    for a, b in ((first.means, second.means), (first.stds, second.stds)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("count", [2, 3, 500])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_equals_numpy_in_float64(count: int, offset: float) -> None:
    """With the offset, a sum of squares in float32 would lose the deviation altogether."""
    rows = prompts(count, offset=offset)
    result = streamed(rows).result()
    for layer in range(3):
        values = np.stack([row[layer].numpy() for row in rows]).astype(np.float64)
        mean, std = values.mean(axis=0), values.std(axis=0, ddof=1)
        assert result.means[layer].dtype == result.stds[layer].dtype == torch.float32
        np.testing.assert_allclose(result.means[layer].numpy(), mean, rtol=1e-6)
        np.testing.assert_allclose(result.stds[layer].numpy(), std, rtol=1e-6)
    assert result.widths == WIDTHS


def test_memory_does_not_grow_with_prompts() -> None:
    """The state is two numbers a neuron and a count, however many prompts went in."""

    def size(running: RunningStatistics) -> int:
        return len(pickle.dumps(vars(running)))

    grown = size(streamed(prompts(1000))) - size(streamed(prompts(20)))
    assert abs(grown) < 8  # the count itself may take a byte more


def test_saved_and_restored_exactly(tmp_path: Path) -> None:
    rows = prompts(40, offset=3.0)
    whole = streamed(rows)
    half = streamed(rows[:17])
    half.save(tmp_path / "state.npy")
    resumed = RunningStatistics(WIDTHS)
    resumed.restore(tmp_path / "state.npy")
    assert resumed.count == 17
    for row in rows[17:]:
        resumed.add(row)
    assert resumed.count == whole.count == 40
    assert_same(resumed.result(), whole.result())
    assert list(tmp_path.iterdir()) == [tmp_path / "state.npy"]


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"no numbers at all"])
def test_damaged_sums_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "state.npy").write_bytes(data)
    with pytest.raises(InputError, match="not the sums of this run"):
        RunningStatistics(WIDTHS).restore(tmp_path / "state.npy")
    streamed(prompts(3)).save(tmp_path / "state.npy")
    with pytest.raises(InputError, match="delete it"):
        RunningStatistics([*WIDTHS, 1]).restore(tmp_path / "state.npy")


def test_one_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="1 prompt given; statistics need at least two"):
        streamed(prompts(1)).result()


def test_file_round_trip_has_the_published_form(tmp_path: Path) -> None:
    result = streamed(prompts(10)).result()
    for name in ("a.pt", "another.pt"):
        save_tensors((result.means, result.stds), tmp_path / name)
    assert_same(load_statistics(tmp_path / "a.pt", widths=WIDTHS), result)
    means, stds = torch.load(tmp_path / "a.pt", weights_only=True)
    assert isinstance(means, list) and isinstance(stds, list)
    # Same data, same bytes: the file's own name is not in it.
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()


def test_published_file_loads(shared_laion: Path) -> None:
    path = shared_laion / "statistics_additional_laion_prompts_v1_4.pt"
    widths = [320, 320, 640, 640, 1280, 1280, 1280]
    statistics = load_statistics(path, widths=widths)
    assert statistics.widths == widths
    for mean, std in zip(statistics.means, statistics.stds, strict=True):
        assert mean.dtype == std.dtype == torch.float32
        assert (mean > 0).all() and (std > 0).all()
    with pytest.raises(InputError, match="belongs to another model"):
        load_statistics(path, widths=[320, 320, 640, 640, 1280, 1280])


def changed(**changes: object) -> object:
    """A valid file's content with one thing changed."""
    content = {"means": [torch.ones(w) for w in WIDTHS], "stds": [torch.ones(w) for w in WIDTHS]}
    content.update(changes)
    return content["means"], content["stds"]


def vectors(first: torch.Tensor) -> list[torch.Tensor]:
    return [first, torch.ones(1), torch.ones(5)]


BAD_FILES = [
    ("NaN in a mean", changed(means=vectors(torch.tensor([1, torch.nan, 1]))), "NaN or infinity"),
    ("infinity in a std", changed(stds=vectors(torch.tensor([1, 1, torch.inf]))), "NaN or inf"),
    (
        "infinite in float32",
        changed(means=vectors(torch.tensor([1, 1e39, 1], dtype=torch.float64))),
        "NaN or infinity",
    ),
    ("negative std", changed(stds=vectors(torch.tensor([1, -0.1, 1]))), "negative standard"),
    ("a layer less", changed(means=[torch.ones(3)], stds=[torch.ones(3)]), "another model"),
    ("other widths", changed(means=[torch.ones(4)] * 3, stds=[torch.ones(4)] * 3), "another model"),
    ("layers exchanged", tuple(part[::-1] for part in changed()), "another model"),
    ("stds of other widths", changed(stds=vectors(torch.ones(2))), "differ in shape"),
    ("matrices", changed(means=[torch.ones(3, 1), *vectors(torch.ones(3))[1:]]), "float vectors"),
    ("whole numbers", changed(means=vectors(torch.ones(3, dtype=torch.long))), "float vectors"),
    ("means only", [[torch.ones(3)]], "not a pair"),
    ("a dict", {"means": [], "stds": []}, "not a pair"),
    ("a tensor", torch.ones(2, 3), "not a pair"),
]


def test_the_unchanged_file_is_good(tmp_path: Path) -> None:
    torch.save(changed(), tmp_path / "s.pt")
    assert load_statistics(tmp_path / "s.pt", widths=WIDTHS).widths == WIDTHS


@pytest.mark.parametrize(
    ("content", "reason"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES]
)
def test_bad_file_is_refused(tmp_path: Path, content: object, reason: str) -> None:
    path = tmp_path / "s.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match=reason) as caught:
        load_statistics(path, widths=WIDTHS)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save((Trap(tmp_path / "written"), []), tmp_path / "s.pt")
    with pytest.raises(InputError, match="not a statistics file"):
        load_statistics(tmp_path / "s.pt")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("data", [b"", b"Caption;URL\n", b"PK\x03\x04cut off"])
def test_file_of_another_kind_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s.pt").write_bytes(data)
    with pytest.raises(InputError, match="not a statistics file"):
        load_statistics(tmp_path / "s.pt")
    with pytest.raises(InputError, match="no such file"):
        load_statistics(tmp_path / "missing.pt")


def test_z_scores_by_hand() -> None:
    statistics = Statistics([torch.tensor([1.0, 2.0, 3.0])], [torch.tensor([0.5, 1.0, 2.0])])
    (z,) = z_scores([torch.tensor([2.0, 2.0, -3.0])], statistics)
    assert z.tolist() == [2.0, 0.0, 3.0]  # below the mean counts as much as above
    assert z.dtype == torch.float32


def test_z_score_where_the_deviation_is_zero() -> None:
    """Infinite if the activation differs from the mean at all, else 0; never NaN."""
    statistics = Statistics([torch.tensor([1.0, 1.0, 1.0])], [torch.zeros(3)])
    (z,) = z_scores([torch.tensor([1.0, 1.0000001, 0.5])], statistics)
    assert z.tolist() == [0.0, torch.inf, torch.inf]
    assert (z > 1e30).tolist() == [False, True, True]


def test_z_scores_need_as_many_layers() -> None:
    statistics = Statistics([torch.ones(3)], [torch.ones(3)])
    with pytest.raises(ValueError):
        z_scores([torch.ones(3), torch.ones(3)], statistics)
