"""Jobs behind the caller's own work: order, bound, errors; and pictures written there."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utils.behind import WAITING, Behind
from utils.generation import write_pictures
from utils.images import image_name, save_jpeg
from utils.stable_diffusion import Model, decode


def test_results_come_in_order_to_the_callers_thread_from_another() -> None:
    heard: list[tuple[int, int]] = []
    made: list[int] = []

    def job(number: int) -> int:
        made.append(threading.get_ident())
        time.sleep(0.002 * (number % 3))
        return number

    hear = lambda number: heard.append((number, threading.get_ident()))  # noqa: E731
    with Behind(hear, at_once=False) as behind:
        for number in range(12):
            behind(lambda number=number: job(number))  # type: ignore[misc]
    assert heard == [(number, threading.get_ident()) for number in range(12)]
    assert len(set(made)) == 1 and threading.get_ident() not in made


def test_the_caller_goes_on_until_enough_jobs_wait() -> None:
    go, asked = threading.Event(), threading.Semaphore(0)
    begun: list[int] = []

    def work() -> None:
        with Behind(lambda _: None, at_once=False) as behind:
            for number in range(WAITING + 4):
                behind(lambda number=number: (begun.append(number), go.wait()))  # type: ignore[misc]
                asked.release()

    caller = threading.Thread(target=work)
    caller.start()
    for _ in range(1 + WAITING):  # one runs, the others wait
        assert asked.acquire(timeout=30)
    assert not asked.acquire(timeout=0.2) and begun == [0]
    go.set()
    caller.join(timeout=30)
    assert begun == list(range(WAITING + 4))


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_what_a_job_raises_the_caller_hears(last: bool, at_once: bool) -> None:
    made: list[int] = []

    def job(number: int) -> None:
        if number == 3:
            raise RuntimeError("no space left")
        made.append(number)

    done = Behind(lambda _: None, at_once=at_once)
    with pytest.raises(RuntimeError, match="no space left"), done as behind:
        for number in range(4 if last else 100):
            behind(lambda number=number: job(number))  # type: ignore[misc]
    assert made[:3] == [0, 1, 2] and len(made) < 8, "it is heard soon"


def test_where_the_block_raises_nothing_more_begins() -> None:
    go, begun = threading.Event(), threading.Event()
    made: list[int] = []

    def first() -> None:
        begun.set()
        go.wait()

    with pytest.raises(KeyboardInterrupt), Behind(lambda _: None, at_once=False) as behind:
        behind(first)
        assert begun.wait(timeout=30)
        behind(lambda: made.append(1))
        threading.Timer(0.05, go.set).start()
        raise KeyboardInterrupt
    assert made == []


@pytest.mark.parametrize("at_once", [False, True])
def test_pictures_are_those_that_the_caller_would_write(
    small_model: Callable[..., Model], tmp_path: Path, at_once: bool
) -> None:
    model = small_model("sd1")
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn((3, *model.latent_shape), generator=generator) for _ in range(3)]
    batches[1][1] = torch.nan  # is no picture
    names = [[(row, sample) for sample in range(3)] for row in range(3)]
    (tmp_path / image_name(2, 0)).write_bytes(b"is there already")
    counts: list[int] = []
    with Behind(counts.append, at_once=at_once) as behind:
        for latents, batch in zip(batches, names, strict=True):
            behind(
                lambda latents=latents, batch=batch: write_pictures(  # type: ignore[misc]
                    model, latents, batch[:2], tmp_path
                )
            )
    assert counts == [2, 1, 1]
    expected = {image_name(2, 0): b"is there already"}
    for latents, batch in zip(batches, names, strict=True):
        for job, picture in zip(batch[:2], decode(model, latents), strict=False):
            name = image_name(*job)
            if picture is not None and name not in expected:
                save_jpeg(picture, tmp_path / "again" / name)
                expected[name] = (tmp_path / "again" / name).read_bytes()
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*.jpg")}
    assert written == expected and len(written) == 5
