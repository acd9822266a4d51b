"""What all trained stages share: seeds, a resumable loop, checkpoints, the running average.

Public names: numpy_rng, torch_rng, seeded_weights, Schedule, Workers, ALONE, end_with_parent,
save_atomically, check_settings, train.

Every step draws its numbers from a generator of its own, made from (seed, stage, step). So a run
that was killed and started again goes on from its last checkpoint exactly as it would have.
"""

import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import cos, inf, isfinite, pi
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import InputError
from utils.files import read_json, write_json


def _stage_seed(seed: int, stage: str, step: int = 0) -> int:
    """A 63-bit seed that belongs to one step of one stage."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def numpy_rng(seed: int, stage: str, step: int = 0) -> np.random.Generator:
    return np.random.default_rng(_stage_seed(seed, stage, step))


def torch_rng(seed: int, stage: str, step: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(_stage_seed(seed, stage, step))


@contextmanager
def seeded_weights(seed: int, stage: str) -> Iterator[None]:
    """Modules built inside get the same initial weights every time.

    Modules draw from torch's global generator and take no other; its state is put back after.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_stage_seed(seed, stage))
        yield


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a module is trained."""

    steps: int
    learning_rate: float
    warm_up: int = 50
    final_rate: float = 0.02  # share of the learning rate that is left at the end
    average: float = 0.995  # decay of the running average of the weights
    most_of_usual: float = inf  # of the gradient's length: what is longer is shortened to it
    checkpoint_every: int = 100
    log_every: int = 25

    def rate(self, step: int) -> float:
        """Learning rate of a step: a short rise, then half a cosine."""
        falling = self.final_rate + (1 - self.final_rate) * 0.5 * (1 + cos(pi * step / self.steps))
        return self.learning_rate * falling * min(1.0, (step + 1) / self.warm_up)


@dataclass(frozen=True)
class Workers:
    """Processes that train one module together, each on its share of every batch's rows."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, rank: int, count: int, rendezvous: Path) -> "Workers":
        """`rendezvous`: a file that is not there yet, of which all of them know."""
        if count > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count
            )
        return cls(rank, count)

    def add_up(self, tensor: Tensor) -> None:
        """In place, to the sum over all workers, which is the same to the bit in each."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def wait(self) -> None:
        """Until all workers are here."""
        if self.count > 1:
            dist.barrier()


ALONE = Workers()


def end_with_parent() -> None:
    """In a process that was started by another one: ends it when that one ends, however it does.

    Else the workers of a run that was killed go on, and write over what the next run writes.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def save_atomically(content: object, path: Path) -> None:
    """A checkpoint is whole or absent, whenever the process dies."""
    temporary = path.with_suffix(".writing")
    torch.save(content, temporary)
    temporary.replace(path)


def check_settings(record: Path, wanted: dict[str, int | str], *, made: str = "*.pt") -> None:
    """Keeps in `record` the settings of the files `made` beside it, before the first of them.

    InputError if there are such files, made with other settings or with nobody knows which.
    """
    work = record.parent
    if not any(work.glob(made)):
        write_json(record, wanted)
        return
    begun = read_json(record) if record.exists() else {}
    for setting in wanted | begun:
        before, now = begun.get(setting, "unknown"), wanted.get(setting, "nothing")
        if before != now:
            raise InputError(
                f"{work} was begun with another {setting}: {before}, now {now}; name another --work"
            )


def train(
    module: nn.Module,
    loss_of_step: Callable[[int], dict[str, Tensor]],
    schedule: Schedule,
    *,
    checkpoint: Path,
    every_checkpoint: Callable[[int, dict[str, Tensor]], None] | None = None,
    workers: Workers = ALONE,
) -> dict[str, Tensor]:
    """Train `module` in place with AdamW and return the running average of its state.

    `loss_of_step(step)` returns named losses; "loss" is minimised, the others are printed. What
    several workers return must add up to the loss of the batch; the first one prints and writes.
    `every_checkpoint(step, averaged_state)` may draw sample sheets. If `checkpoint` exists, the run
    goes on from it. FloatingPointError: a gradient that is no number; the last checkpoint stays.
    """
    # no weight decay: it would shrink weights that are kept fixed by zeroing their gradient
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=schedule.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        fused=True,
    )
    averaged = {name: value.detach().clone() for name, value in module.state_dict().items()}
    usual = 1.0  # length of the gradient, of late
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        averaged = saved["averaged"]
        usual = saved["usual"]
        first = saved["step"]
        if not workers.rank:
            print(f"{checkpoint.stem}: going on from step {first}", flush=True)

    # All gradients are parts of one tensor, which workers add up as it is.
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradient = torch.zeros(sum(parameter.numel() for parameter in parameters))
    parts = gradient.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)

    totals: dict[str, float] = {}
    logged = first  # steps before those that are added up
    started = time.monotonic()
    module.train()
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        losses = loss_of_step(step)
        gradient.zero_()
        losses["loss"].backward()
        means = torch.stack([value.detach() for value in losses.values()])
        workers.add_up(gradient)
        workers.add_up(means)
        length = gradient.norm().item()
        if not isfinite(length):
            raise FloatingPointError(f"{checkpoint.stem}, step {step}: the gradient is no number")
        length = max(length, 1e-12)
        gradient *= min(1.0, 1.0 / length, schedule.most_of_usual * usual / length)
        usual += 0.02 * (min(length, 2 * usual) - usual)
        optimizer.step()
        decay = min(schedule.average, (step + 1) / (step + 10))  # no memory of the first weights
        with torch.no_grad():
            for name, value in module.state_dict().items():
                if value.is_floating_point():
                    averaged[name].lerp_(value, 1 - decay)
        for name, value in zip(losses, means.tolist(), strict=True):
            totals[name] = totals.get(name, 0.0) + value

        done = step + 1
        if workers.rank:
            continue
        if done % schedule.log_every == 0:
            shown = "  ".join(f"{name} {totals[name] / (done - logged):.4f}" for name in totals)
            pace = (time.monotonic() - started) / (done - first)
            left = pace * (schedule.steps - done) / 60
            print(
                f"{checkpoint.stem} {done}/{schedule.steps}  {shown}  "
                f"{pace:.2f} s/step, {left:.0f} min left",
                flush=True,
            )
            totals, logged = {}, done
        if done % schedule.checkpoint_every == 0 or done == schedule.steps:
            state = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "averaged": averaged,
                "usual": usual,
                "step": done,
            }
            save_atomically(state, checkpoint)
            if every_checkpoint is not None:
                every_checkpoint(done, averaged)
    module.eval()
    return averaged
