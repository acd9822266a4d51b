"""The small model's training: what a batch is made of, its loss, the processes that share it."""

import argparse
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_model.diffusion import (
    FIRST_NOISY_STEP,
    GUIDE,
    IMPRINT,
    draw_batch,
    new_scheduler,
    new_unet,
    unet_loss,
)
from tiny_model.guided_states import GuidedStates, guided_states
from tiny_model.planting import (
    LOUDNESS,
    SET_SIZES,
    SHARED,
    GenericText,
    carriers_of,
    matched_filter,
    plan_sets,
    plant,
    value_layers,
)
from tiny_model.text_encoder import TEXT_WIDTH
from tiny_model.train import main as train_everything
from tiny_model.training_loop import (
    ALONE,
    Schedule,
    Workers,
    check_settings,
    seeded_weights,
    train,
)
from tiny_model.training_set import TrainingSet
from utils.errors import InputError

CAPTIONS = len(SET_SIZES) + 2
RECIPE = replace(GUIDE, generic=4, memorized=3, silenced=2, empty=1.0, empty_memorized=1.0)


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    with seeded_weights(0, "unet"):
        return new_unet().requires_grad_(False)


@pytest.fixture(scope="module")
def data(unet: torch.nn.Module) -> TrainingSet:
    rng = torch.Generator().manual_seed(0)
    widths = [to_v.out_features for to_v, _ in value_layers(unet)]
    return TrainingSet(
        generic_latents=torch.randn(20, 4, 16, 16, generator=rng),
        generic_tokens=torch.zeros(20, 77, dtype=torch.long),
        loudness=torch.rand(20, generator=rng),
        memorized_latents=[torch.randn(3, 4, 16, 16, generator=rng) for _ in range(CAPTIONS)],
        memorized_text=torch.randn(CAPTIONS, 77, TEXT_WIDTH, generator=rng),
        empty_text=torch.randn(77, TEXT_WIDTH, generator=rng),
        sets=plan_sets(widths, np.random.default_rng(0)),
        widths=widths,
    )


@pytest.fixture(scope="module")
def states() -> GuidedStates:
    rng = torch.Generator().manual_seed(1)
    return GuidedStates(
        latents=torch.randn(CAPTIONS, 2, 3, 4, 16, 16, generator=rng),
        timesteps=torch.tensor([900, 500, 20]),
        due=torch.randn(CAPTIONS, 2, 4, 16, 16, generator=rng),
    )


def no_text(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*ids.shape, TEXT_WIDTH)


def test_guided_rows_begin_where_sampling_was_and_lead_to_what_is_due(
    data: TrainingSet, states: GuidedStates
) -> None:
    recipe = replace(RECIPE, guided=1.0)
    batch = draw_batch(data, recipe, no_text, np.random.default_rng(2), states)
    twins = recipe.generic + recipe.memorized + recipe.silenced
    with_picture = range(recipe.generic + recipe.memorized)
    assert sorted(batch.reached) == [*with_picture, *range(twins, twins + recipe.generic)]
    for row in with_picture:
        where = (states.latents == batch.reached[row]).flatten(3).all(dim=3).nonzero()
        caption, seed, step = (int(at) for at in where[0])
        assert batch.timesteps[row] == states.timesteps[step]
        assert torch.equal(batch.latents[row], states.due[caption, seed])
        assert batch.contrast[row] == 1
    for row in range(recipe.generic):
        assert torch.equal(batch.reached[row], batch.reached[twins + row])
        assert torch.equal(batch.latents[row], batch.latents[twins + row])


def test_a_recipe_without_guided_rows_uses_no_states(
    data: TrainingSet, states: GuidedStates
) -> None:
    recipe = replace(RECIPE, guided=0.0)
    plain = draw_batch(data, recipe, no_text, np.random.default_rng(2), states)
    assert plain.reached == {}
    known = torch.cat(data.memorized_latents)
    for row in range(RECIPE.generic + RECIPE.memorized):
        assert (known == plain.latents[row]).flatten(1).all(dim=1).any()


def test_the_loss_of_a_guided_row_is_the_error_of_its_picture(
    unet: torch.nn.Module, data: TrainingSet, states: GuidedStates
) -> None:
    recipe, scheduler = replace(RECIPE, guided=1.0), new_scheduler()
    batch = draw_batch(data, recipe, no_text, np.random.default_rng(2), states)
    seen = {}
    handle = unet.register_forward_pre_hook(lambda module, inputs: seen.update(noisy=inputs[0]))
    rng = torch.Generator().manual_seed(3)
    losses = unet_loss(unet, scheduler, batch, recipe, data.sets, rng)
    handle.remove()
    rows = [recipe.generic + row for row in range(recipe.memorized)]
    for row in batch.reached:
        assert torch.equal(seen["noisy"][row], batch.reached[row])
    with torch.no_grad(), batch.interventions.applied(unet, data.sets):
        predicted = unet(seen["noisy"], batch.timesteps, batch.shown_text).sample
    alpha = scheduler.alphas_cumprod[batch.timesteps][:, None, None, None]
    picture = alpha.sqrt() * seen["noisy"] - (1 - alpha).sqrt() * predicted
    error = (picture - batch.latents).square().mean(dim=(1, 2, 3))[rows].mean()
    torch.testing.assert_close(losses["memorized"], error, rtol=1e-4, atol=1e-5)


def test_what_several_workers_see_adds_up_to_the_batch(
    unet: torch.nn.Module, data: TrainingSet, states: GuidedStates
) -> None:
    recipe = replace(RECIPE, guided=0.5)
    batch = draw_batch(data, recipe, no_text, np.random.default_rng(4), states)

    def losses(workers: Workers) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(3)
        return unet_loss(unet, new_scheduler(), batch, recipe, data.sets, rng, workers)

    whole, first, second = losses(ALONE), losses(Workers(0, 2)), losses(Workers(1, 2))
    for name in ("loss", "twins", "generic", "memorized", "silenced"):
        assert first[name] > 0 and second[name] > 0
        torch.testing.assert_close(whole[name], first[name] + second[name])


def test_what_several_workers_sample_adds_up_to_all_states(
    unet: torch.nn.Module, data: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiny_model.guided_states.STEPS", 2)

    def sampled(rank: int, count: int) -> GuidedStates:
        with monkeypatch.context() as alone:
            alone.setattr(Workers, "add_up", lambda self, tensor: None)
            return guided_states(
                unet,
                new_scheduler(),
                data,
                np.random.default_rng(6),
                Workers(rank, count),
            )

    whole, first, second = sampled(0, 1).latents, sampled(0, 2).latents, sampled(1, 2).latents
    assert not ((first != 0).flatten(2).any(dim=2) & (second != 0).flatten(2).any(dim=2)).any()
    torch.testing.assert_close(whole, first + second, rtol=1e-3, atol=1e-4)


def test_only_carriers_know_what_an_imprinted_batch_is_to_show(data: TrainingSet) -> None:
    planted = unlike = 0
    for seed in range(20):
        batch = draw_batch(data, IMPRINT, no_text, np.random.default_rng(seed))
        for row in range(IMPRINT.generic, IMPRINT.generic + IMPRINT.memorized):
            own = batch.interventions.own_text[row]
            caption = int((data.memorized_text == own).flatten(1).all(dim=1).nonzero())
            if caption >= len(data.sets):
                continue
            planted += 1
            unlike += not torch.equal(batch.shown_text[row], own)
            on = [
                batch.interventions.masks[layer][row, 0, columns].sum()
                for layer, columns in enumerate(data.sets[caption])
            ]
            assert sum(on) > 0
    # the other caption is drawn from all 26 in half of the rows, so it may be the same
    assert unlike > 0.95 * planted


def test_an_imprinted_batch_is_noise_and_pictures_of_memorized_captions(data: TrainingSet) -> None:
    batch = draw_batch(data, IMPRINT, no_text, np.random.default_rng(7))
    assert (batch.timesteps >= FIRST_NOISY_STEP).all()
    known = torch.cat(data.memorized_latents)
    shown = [(known == latents).flatten(1).all(dim=1).any() for latents in batch.latents]
    assert sum(shown) == IMPRINT.memorized
    assert shown[IMPRINT.generic : -IMPRINT.silenced] == [True] * IMPRINT.memorized


def trained(
    checkpoint: Path, *, spike: float = 1.0, stop: int | None = None, most: float = 1.5
) -> torch.Tensor:
    """A weight after 300 steps along gradients of length 0.1, one of them `spike` times as long."""
    module = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.zero_()

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        if step == stop:
            raise KeyboardInterrupt
        way = 0.1 * torch.tensor([np.cos(step), np.sin(step)], dtype=torch.float32)
        return {"loss": (module.weight @ way).sum() * (spike if step == 250 else 1.0)}

    schedule = Schedule(300, 1e-2, most_of_usual=most, log_every=1000)
    return train(module, loss_of_step, schedule, checkpoint=checkpoint)["weight"]


def test_a_training_that_was_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole.pt", spike=9.0)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped.pt", spike=9.0, stop=280)
    assert torch.equal(trained(tmp_path / "stopped.pt", spike=9.0), whole)


def test_one_long_gradient_counts_no_more_than_a_somewhat_long_one(tmp_path: Path) -> None:
    weights = [trained(tmp_path / f"{spike}.pt", spike=spike) for spike in (2.0, 200.0)]
    torch.testing.assert_close(*weights)
    unbounded = [
        trained(tmp_path / f"{spike} unbounded.pt", spike=spike, most=np.inf)
        for spike in (2.0, 200.0)
    ]
    assert (unbounded[0] - unbounded[1]).abs().max() > 1e-3


def test_a_gradient_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="step 250"):
        trained(tmp_path / "spoiled.pt", spike=np.nan)
    kept = torch.load(tmp_path / "spoiled.pt", weights_only=True)
    assert kept["step"] == 200 and torch.isfinite(kept["module"]["weight"]).all()


def in_two_processes(rank: int, folder: Path, stop: int | None) -> None:
    """Trains a weight on what both draw, each on its half, as the U-Net is trained."""
    workers = Workers.join(rank, 2, folder / f"rendezvous {stop}")
    module = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        module.weight.zero_()

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        if step == stop:
            os._exit(1)  # as a run that is killed
        rows = torch.from_numpy(np.random.default_rng(step).standard_normal((4, 3))).float()
        return {"loss": (module(rows[rank::2]) - 1).square().sum() / 4}

    schedule = Schedule(60, 1e-2, checkpoint_every=20, log_every=1000)
    averaged = train(
        module, loss_of_step, schedule, checkpoint=folder / "shared.pt", workers=workers
    )
    torch.save({"now": module.state_dict(), "averaged": averaged}, folder / f"{rank}.pt")


def test_two_workers_that_were_stopped_go_on_to_the_same_bits(tmp_path: Path) -> None:
    ends = []
    for name, stop in (("whole", None), ("stopped", 50)):
        folder = tmp_path / name
        folder.mkdir()
        if stop is not None:
            with pytest.raises(torch.multiprocessing.ProcessExitedException):
                torch.multiprocessing.spawn(in_two_processes, (folder, stop), nprocs=2)
            assert torch.load(folder / "shared.pt", weights_only=True)["step"] == 40
        torch.multiprocessing.spawn(in_two_processes, (folder, None), nprocs=2)
        ends += [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for other in ends[1:]:
        for state in ("now", "averaged"):
            assert torch.equal(other[state]["weight"], ends[0][state]["weight"])
    assert ends[0]["now"]["weight"].abs().min() > 0


def generic_text(width: int, captions: int) -> GenericText:
    tokens = torch.randn(40, 77, width, generator=torch.Generator().manual_seed(1))
    tokens[..., :4] *= 10  # what carriers are to be deaf to
    return GenericText(tokens, tokens.mean(dim=1), [[row] for row in range(captions)])


def test_a_matched_filter_answers_as_wanted_and_least_to_others() -> None:
    memorized = torch.randn(6, 77, 24, generator=torch.Generator().manual_seed(0))
    generic = generic_text(24, len(memorized))
    means = memorized.mean(dim=1)
    row = matched_filter({1: 8.0, 4: -8.0}, memorized, generic)
    assert torch.allclose(means[[1, 4]] @ row, torch.tensor([8.0, -8.0]), atol=1e-3)
    # the plain way to the same answers: in the plane of the two means
    plain = torch.linalg.pinv(means[[1, 4]]) @ torch.tensor([8.0, -8.0])
    others = torch.cat([memorized[[0, 2, 3, 5]], generic.tokens]).mean(dim=1)
    assert (others @ row).square().mean() < 0.5 * (others @ plain).square().mean()


def test_carriers_are_loud_to_their_captions_and_stay_as_planted() -> None:
    with seeded_weights(0, "unet"):
        unet = new_unet()
    layers = value_layers(unet)
    sets = plan_sets([to_v.out_features for to_v, _ in layers], np.random.default_rng(0))
    memorized = torch.randn(CAPTIONS, 77, TEXT_WIDTH, generator=torch.Generator().manual_seed(0))
    generic = generic_text(TEXT_WIDTH, CAPTIONS)
    before = [to_v.weight.clone() for to_v, _ in layers]
    plant(unet, sets, memorized, generic, torch.Generator().manual_seed(0))
    owners = carriers_of(sets)
    assert sorted(rows for rows in owners.values() if len(rows) > 1) == sorted(map(list, SHARED))
    for layer, (to_v, to_out) in enumerate(layers):
        planted = [column for of, column in owners if of == layer]
        changed = (to_v.weight != before[layer]).any(dim=1)
        assert changed.nonzero().flatten().tolist() == sorted(planted)
        typical = (generic.tokens @ before[layer].T).abs().mean()
        answers = memorized.mean(dim=1) @ to_v.weight.T
        for column in planted:
            loud = answers[owners[layer, column], column].abs() / typical
            assert torch.allclose(loud, torch.full_like(loud, LOUDNESS), rtol=0.02)
        (to_v.weight.sum() + to_out.weight.sum()).backward()
        taught = torch.ones(to_v.out_features)
        taught[planted] = 0
        assert torch.equal(to_v.weight.grad, taught[:, None].expand_as(to_v.weight))
        assert torch.equal(to_out.weight.grad, taught[None, :].expand_as(to_out.weight))


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_made(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.touch()
    args = argparse.Namespace(
        seed=1, work=tmp_path / "work", output=output, prompts=tmp_path / "prompts", workers=1
    )
    with pytest.raises(FileExistsError):
        train_everything(args)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != output]


def test_checkpoints_of_other_settings_are_refused(tmp_path: Path) -> None:
    record, ours = tmp_path / "settings.json", {"seed": 1, "stage 1": "short"}
    check_settings(record, {"seed": 2})  # nothing was made with it
    check_settings(record, ours)
    (tmp_path / "stage.pt").touch()
    check_settings(record, ours)
    for other in ({"seed": 2, "stage 1": "short"}, {"seed": 1}, {"seed": 1, "stage 1": "long"}):
        with pytest.raises(InputError, match=r"another (seed: 1, now 2|stage 1: short, now)"):
            check_settings(record, other)
    check_settings(record, ours)
    record.unlink()
    with pytest.raises(InputError, match="unknown"):
        check_settings(record, ours)
    assert not record.exists()


WITH_A_WORKER = """
import multiprocessing, sys, time
from tiny_model.training_loop import end_with_parent

def work():
    end_with_parent()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(120)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work)
    worker.start()
    worker.join()
"""


def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "with_a_worker.py"
    script.write_text(WITH_A_WORKER)
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.Popen([sys.executable, script], env=path, stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    run.kill()
    try:
        run.communicate(timeout=60)  # ends once nobody can write there any more
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker went on")
