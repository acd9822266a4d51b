"""Several processes share the embedding of a metric: the same bytes as one, also where one dies."""

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import metric_models
import numpy as np
import pytest
import torch
from torch.distributed import HashStore
from workspace import ROOT, Warm, launched

from utils import embeddings
from utils.errors import InputError
from utils.files import sha256_of_file
from utils.team import Team

ROWS, SAMPLES, BATCH = 12, 2, 4
SCRIPT = ROOT / "metrics" / "compute_sscd_gen.py"
OPTIONS = (
    *("-f=blocked", "-r=unblocked", "-p=prompts.csv", "--sscd_weights=sscd.pt", "-o=out/gen.csv"),
    *(f"--batch_size={BATCH}", "--device=cpu", "--workers=0"),
)
# The script, but each batch is saved at once, and behind its first one a process waits for "go"
# (not for ever: a test that failed leaves nothing running).
SLOW = f"""
import pathlib, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
from utils import embeddings
decode, begun, end = embeddings._Pictures.__getitem__, [], time.monotonic() + 300
def slowly(self, key):
    begun.append(key)
    while len(begun) > {BATCH} and not pathlib.Path("go").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return decode(self, key)
embeddings._Pictures.__getitem__ = slowly
embeddings.SAVE_EVERY = -1
sys.argv[0] = {str(SCRIPT)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def prepared(folder: Path) -> Path:
    """Two folders of pictures, one picture corrupt, some equal."""
    folder.mkdir()
    lines = [f"caption {row};u{row};VM\n" for row in range(ROWS)]
    (folder / "prompts.csv").write_text("Caption;URL;type\n" + "".join(lines))
    names = [(f"img_{r:04d}_{s:02d}.jpg", r, s) for r in range(ROWS) for s in range(SAMPLES)]
    metric_models.save_pictures(folder / "blocked", {n: ("b", r, s) for n, r, s in names})
    metric_models.save_pictures(folder / "unblocked", {n: ("u", r % 7, s) for n, r, s in names})
    (folder / "blocked" / "img_0003_01.jpg").write_bytes(b"no picture")
    metric_models.save_torchscript(folder / "sscd.pt")
    (folder / "slow.py").write_text(SLOW)
    return folder


def written(folder: Path) -> dict[str, bytes]:
    """Scores and embeddings, by path."""
    found = [folder / "out" / "gen.csv", *sorted(folder.glob("*.embeddings/*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> dict[str, bytes]:
    """What one process writes."""
    folder = prepared(tmp_path_factory.mktemp("alone") / "place")
    done = warm.run(SCRIPT, *OPTIONS, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "corrupt: 1 (blocked/img_0003_01.jpg)" in done.stdout
    return written(folder)


def test_two_processes_write_what_one_writes(
    alone: dict[str, bytes], warm: Warm, tmp_path: Path
) -> None:
    folder = prepared(tmp_path / "place")
    done = warm.together(SCRIPT, *OPTIONS, cwd=folder)
    said = done.stdout
    assert done.returncode == 0, done.stderr
    assert written(folder) == alone
    assert said.count("Loading sscd nemo") == said.count("Written to") == 1, "one of them speaks"
    assert "corrupt: 1 (blocked/img_0003_01.jpg)" in said, "whoever came upon it"


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.embeddings/sscd*.part-*"))  # none that is being written


def killed(folder: Path, *, restarts: int) -> subprocess.Popen[str]:
    """A run one of whose processes is killed when both have saved their first batch."""
    process = launched(folder / "slow.py", *OPTIONS, cwd=folder, restarts=restarts)
    while len(parts(folder)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    listed = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)]
    children = subprocess.run(listed, capture_output=True, text=True).stdout.splitlines()
    workers = [int(line.split()[0]) for line in children if "slow.py" in line]
    os.kill(workers[1], signal.SIGKILL)
    (folder / "go").touch()
    return process


# Two batches, one of them perhaps with the corrupt picture.
SAVED = 2 * BATCH - 1


def begun(progress: str) -> list[int]:
    """How far the bars were when they were first drawn."""
    return [int(found) for found in re.findall(r"nemo: blocked: .*?(\d+)/24 \[00:00<\?", progress)]


def test_the_launcher_restarts_what_died(alone: dict[str, bytes], tmp_path: Path) -> None:
    folder = prepared(tmp_path / "place")
    process = killed(folder, restarts=1)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    first, *_, second = begun(errors)
    assert first == 0 and second >= SAVED, "what was saved is not made again"
    assert written(folder) == alone and not parts(folder)


def test_one_process_goes_on_with_what_two_have_left(
    alone: dict[str, bytes], warm: Warm, tmp_path: Path
) -> None:
    folder = prepared(tmp_path / "place")
    process = killed(folder, restarts=0)
    process.communicate(timeout=300)
    assert process.returncode != 0 and parts(folder) and not (folder / "out").exists()
    done = warm.run(SCRIPT, *OPTIONS, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert begun(done.stderr)[0] >= SAVED, "what was saved is not made again"
    assert written(folder) == alone and not parts(folder)


# Two processes of a team as two threads: what one cannot save, the other misses.


def network() -> embeddings.Network:
    return embeddings.Network(
        lambda image: torch.tensor([[[float(image.getpixel((0, 0))[0] + 1)]]]),
        lambda batch: batch.flatten(1),
    )


@pytest.mark.parametrize("writable", [True, False])
def test_every_process_has_all_vectors_or_it_is_said(
    writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = metric_models.save_pictures(
        tmp_path / "shown", {f"img_{row:04d}_00.jpg": row for row in range(9)}
    )
    hashes = {path: sha256_of_file(path) for path in sorted(folder.iterdir())}
    space = embeddings.Space("first pixel", {"name": "x"}, "none", lambda device: network())
    if not writable:
        (tmp_path / "shown.embeddings").write_text("a file where the folder would be")
    store, found, computed = HashStore(), {}, {}
    monkeypatch.setattr(embeddings.Embedder, "network", network())  # no loading in two threads

    def process(rank: int) -> None:
        team = Team(rank=rank, size=2, store=store)
        one = embeddings.Embedder(space, device="cpu", batch_size=2, workers=0, team=team)
        try:
            found[rank] = one.images(hashes, folder).vectors
        except InputError as error:
            found[rank] = error
        computed[rank] = one.computed

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sum(computed.values()) == len(hashes), "each picture once"
    if not writable:
        assert any("make it writable for all" in str(one) for one in found.values())
        return
    for rank in range(2):
        assert found[rank].keys() == hashes.keys()
        assert all(np.array_equal(found[rank][path], found[0][path]) for path in hashes)
