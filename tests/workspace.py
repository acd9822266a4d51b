"""A small workspace in which every script runs in seconds, and two ways to run a script there.

The model is random, with its cross-attention made strong enough that captions and neurons matter.
Public: ``SCRIPTS``, ``VALID``, ``LOCATED``, ``WIDTHS``, ``environment``, ``launched``, ``run``,
``Warm``, ``warm``, ``free_port``, ``tree``, ``save_model``, ``built``, ``fresh``.
"""

import atexit
import functools
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    1: ROOT / "1_compute_activations_statistics.py",
    2: ROOT / "2_compute_pairwise_ssim.py",
    3: ROOT / "3_detect_memorized_neurons.py",
    4: ROOT / "4_generate_images.py",
}
WIDTHS = [32, 64, 64, 64]
# Column names and quirks of the published prompt files; rows 1 and 4 are the same caption.
MEMORIZED = (
    ";Caption;URL;type\n"
    "0;A lighthouse, winter;https://example.org/0.jpg;VM\n"
    "1;NA;https://example.org/1.jpg;TM\n"
    '2;"Tea; ""enamel"" sign";;VM\n'
    "3; null ;;TM\n"
    "4;NA;https://example.org/4.jpg;VM\n"
    "5;grey cat on a red chair;;VM\n"
)
HOLDOUT = ";Caption;URL\n" + "".join(
    f"{row};{text};\n"
    for row, text in enumerate(
        ["one dog", "Two boats at sea", "a green hat 3", "stairs (wood)", "RAIN", "map of Oslo"]
    )
)
NOISE = ("--samples_per_prompt=4",)
SAMPLING = ("-n=2", "--steps=3", "-b=3")
# The command of each script that a test changes one thing of. Inputs are the workspace's.
VALID: dict[int, tuple[str, ...]] = {
    1: ("--version=model", "--prompts=holdout.csv", "-o=new/statistics.pt"),
    2: ("--version=model", "--prompts=holdout.csv", "-o=new/threshold.pt", *NOISE),
    3: ("--version=model", "--dataset=memorized.csv", "-o=new/result.csv", *NOISE),
    4: ("--version=model", "--refined_neurons", "-o=new/images", *SAMPLING),
}

# How the workspace's own results were found: four memorized prompts of six, with different sets.
LOCATED = (
    "--pairwise_ssim_threshold=0.075",
    "--ssim_threshold_initial_selection=0.99",
    "--ssim_threshold_refinement=0.993",
    "--initial_theta=3",
    "--initial_k=2",
)


def environment() -> dict[str, str]:
    """One thread, no network, no GPU: what a test's process sees."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launched(script: Path, *options: str, cwd: Path, restarts: int = 0) -> "subprocess.Popen[str]":
    """Two processes of a script under torchrun, which `accelerate launch` is built on."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
            *(
                "--master_addr=127.0.0.1",
                f"--master_port={free_port()}",
                f"--max_restarts={restarts}",
            ),
            *("--monitor_interval=0.1", str(script), *options),
        ],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@dataclass(frozen=True)
class Done:
    """How a process ended (a negative code: the signal) and what it said."""

    returncode: int
    stdout: str
    stderr: str


def run(script: int | Path, *options: str, cwd: Path) -> Done:
    """Runs a script as a user does, in a Python of its own."""
    path = SCRIPTS[script] if isinstance(script, int) else script
    done = subprocess.run(
        [sys.executable, str(path), *options],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return Done(done.returncode, done.stdout, done.stderr)


class Warm:
    """Runs scripts in processes forked from one that has imported torch and diffusers already:
    the same code from its first line, without four seconds of imports. Use as a context.
    ``project``: whose ``utils`` they import."""

    def __init__(self, project: Path = ROOT) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(project / "tests" / "warm_runner.py")],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._said = Path(tempfile.mkdtemp(prefix="warm"))
        self._meeting: dict[str, str] = {}

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
        shutil.rmtree(self._said)

    def _ask(self, **order: object) -> object:
        assert self._server.stdin and self._server.stdout
        print(json.dumps(order), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def start(self, script: int | Path, *options: str, cwd: Path, rank: int | None = None) -> int:
        """Starts a script; its process id. One at a time, but for the ranks of a team of two."""
        path = SCRIPTS[script] if isinstance(script, int) else script
        pid = self._ask(
            argv=[str(path), *options],
            cwd=str(cwd),
            stdout=str(self._said / f"stdout{rank or 0}"),
            stderr=str(self._said / f"stderr{rank or 0}"),
            environment={} if rank is None else {"RANK": str(rank), **self._meeting},
        )
        assert isinstance(pid, int)
        return pid

    def ended(self, pid: int, *, wait: bool, rank: int = 0) -> Done | None:
        """How the process ended; None if it still runs and is not waited for."""
        code = self._ask(pid=pid, wait=wait)
        if code is None:
            return None
        assert isinstance(code, int)
        said = [self._said / f"{name}{rank}" for name in ("stdout", "stderr")]
        return Done(code, *(path.read_text(encoding="utf-8") for path in said))

    def together(self, script: int | Path, *options: str, cwd: Path) -> Done:
        """Runs a script to its end in two processes, in the environment that a launcher gives
        them: the first failure's exit code, and what both said."""
        self._meeting = {
            **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        }
        pids = [self.start(script, *options, cwd=cwd, rank=rank) for rank in range(2)]
        first, second = (self.ended(pid, wait=True, rank=rank) for rank, pid in enumerate(pids))
        assert first and second
        said = first.stdout + second.stdout, first.stderr + second.stderr
        return Done(first.returncode or second.returncode, *said)

    def run(self, script: int | Path, *options: str, cwd: Path) -> Done:
        """Runs a script to its end."""
        done = self.ended(self.start(script, *options, cwd=cwd), wait=True)
        assert done is not None
        return done


@functools.cache
def warm() -> Warm:
    """The one that all tests of this process share; it ends with it."""
    runner = Warm()
    atexit.register(runner.close)
    return runner


def tree(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Every path below a folder -> (size, time of last change, sha256); folders have no size."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        size = status.st_size if path.is_file() else 0
        found[str(path.relative_to(folder))] = (size, status.st_mtime_ns, digest)
    return found


def save_model(folder: Path, *, seed: int = 0, broken: bool = False) -> None:
    """A random SD 1 folder with value layers of ``WIDTHS`` whose captions and neurons matter;
    ``broken``: captions with a tilde as a word give NaN."""
    import torch
    from small_models import small_pipeline

    changes = {"layers_per_block": 1, "block_out_channels": (32, 64, 64, 64), "sample_size": 8}
    pipeline = small_pipeline("sd1", seed=seed, **changes)
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out" in name:
                parameter.mul_(8)
        if broken:
            embedding = pipeline.text_encoder.get_input_embeddings()
            embedding.weight[pipeline.tokenizer.convert_tokens_to_ids("~</w>")] = torch.nan
    pipeline.save_pretrained(folder)


_template: list[Path] = []


def built() -> Path:
    """The workspace, made once a process; to be read only, ``fresh`` copies it.

    ``model`` and ``other`` (other weights, same shapes), ``memorized.csv``, ``holdout.csv``,
    the default outputs of scripts 1 to 3 for ``model``, and ``images`` of script 4.
    """
    if not _template:
        folder = Path(tempfile.mkdtemp(prefix="workspace"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        save_model(folder / "model")
        save_model(folder / "other", seed=1)
        (folder / "memorized.csv").write_text(MEMORIZED, encoding="utf-8")
        (folder / "holdout.csv").write_text(HOLDOUT, encoding="utf-8")
        for script, options in VALID.items():
            kept = [option for option in options if not option.startswith("-o=")]
            more = {3: LOCATED, 4: ("-o=images",)}.get(script, ())
            done = warm().run(script, *kept, *more, cwd=folder)
            assert done.returncode == 0, done.stderr
        _template.append(folder)
    return _template[0]


def fresh(folder: Path) -> Path:
    """A copy of the workspace in ``folder``, which must not exist."""
    return Path(shutil.copytree(built(), folder))
