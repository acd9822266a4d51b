"""The optimizer and the loop that train the small model: against singular values, by one process or
two, killed and continued."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tiny_model.muon import Muon, orthogonal
from tiny_model.training_loop import Schedule, torch_rng, train
from tiny_model.workers import Workers


@pytest.mark.parametrize("shape", [(2, 6, 6), (3, 4, 9), (1, 12, 5)])
def test_orthogonal_has_the_singular_vectors_and_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonal(matrices) @ right.mT
    strengths = found.diagonal(dim1=1, dim2=2)
    assert (found - torch.diag_embed(strengths)).abs().max() < 1e-9
    strong = values > 0.05 * values.norm(dim=1, keepdim=True)
    assert strong.sum() > 0.8 * strong.numel()
    assert ((strengths > 0.6) & (strengths < 1.3))[strong].all()


def test_what_has_no_gradient_stays() -> None:
    matrices = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    matrices[:, 2], matrices[:, :, 5] = 0, 0
    found = orthogonal(matrices)
    assert not found[:, 2].any() and not found[:, :, 5].any() and found.any()
    assert not orthogonal(torch.zeros(1, 3, 3)).any()


def weights() -> list[Tensor]:
    """Two convolutions of one shape, a linear layer, another one's."""
    rng = torch.Generator().manual_seed(2)
    shapes = [(6, 3, 3, 3), (6, 3, 3, 3), (4, 7), (9, 4)]
    parameters = [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    return parameters


def test_a_step_of_several_workers_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[Tensor] = []
    monkeypatch.setattr(Workers, "add_up", lambda self, steps: shares.append(steps.clone()))
    alone = weights()
    Muon(alone, 0.1).step()
    for rank in range(3):
        Muon(weights(), 0.1, workers=Workers(rank, 3)).step()
    whole, *parts = shares
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-6)
    assert not torch.stack([part != 0 for part in parts]).sum(dim=0).gt(1).any()
    moved = [after - before for after, before in zip(alone, weights(), strict=True)]
    for step in moved:  # as long as a step of AdamW, whatever the shape
        assert 0.4 * 0.02 < step.square().mean().sqrt() < 1.3 * 0.02


SCHEDULE = Schedule(
    steps=12, learning_rate=0.01, matrix_rate=0.05, warm_up=2, checkpoint_every=4, log_every=100
)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)
        rng = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))

    def forward(self, rows: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(rows)))


def trained(folder: Path, *, killed_at: int | None = None, rate: float = 0.05) -> dict[str, Tensor]:
    module = Two()

    def loss_of_step(step: int) -> dict[str, Tensor]:
        if step == killed_at:
            raise KeyboardInterrupt
        rows = torch.randn(16, 5, generator=torch_rng(4, "rows", step))
        return {"loss": (module(rows) - rows[:, :3].abs()).square().mean()}

    schedule = replace(SCHEDULE, matrix_rate=rate)
    return train(module, loss_of_step, schedule, checkpoint=folder / "module.pt")


@pytest.mark.parametrize("rate", [0.0, 0.05])
@pytest.mark.parametrize("killed_at", [2, 7])
def test_a_killed_training_ends_with_the_same_weights(
    tmp_path: Path, rate: float, killed_at: int
) -> None:
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    whole = trained(tmp_path / "whole", rate=rate)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", killed_at=killed_at, rate=rate)
    again = trained(tmp_path / "killed", rate=rate)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_biases_are_not_the_matrices_optimizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    class Counted(Muon):
        def step(self) -> None:
            given.append(len(self.param_groups[0]["params"]))
            super().step()

    monkeypatch.setattr("tiny_model.training_loop.Muon", Counted)
    trained(tmp_path)
    assert given == [2] * SCHEDULE.steps
    (tmp_path / "none").mkdir()
    trained(tmp_path / "none", rate=0.0)
    assert len(given) == SCHEDULE.steps
