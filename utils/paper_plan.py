"""The commands of runs/paper.sh, as the shell itself lists them, and what each of them writes.

Public: ``planned``, ``output_of``, ``command_for``, ``counts_of_most_frequent``,
``shares_of_pruning``.
"""

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from utils.errors import InputError
from utils.versions import PROJECT_ROOT, Source

PYTHON = "python"


def planned(version: str) -> list[str]:
    """Every command of the paper's run on this model, in order, one line each; nothing is run.
    InputError if the shell cannot list them."""
    name = "tiny.sh" if version == "tiny" else "paper.sh"
    settings = {"PLAN": "1", "VERSION": version, "PYTHON": PYTHON}
    done = subprocess.run(
        ["sh", str(PROJECT_ROOT / "runs" / name)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(f"runs/{name}: cannot list its commands: {done.stderr.strip()}")
    return done.stdout.splitlines()


def output_of(command: str, source: Source) -> Path | None:
    """The file or folder that a planned command writes: its ``-o``, or the default of scripts 1 to
    3. None for other commands (a download)."""
    words = shlex.split(command)
    for word in words:
        if word.startswith("-o="):
            return Path(word.removeprefix("-o="))
    if any(word.startswith("1_") for word in words):
        return source.own_statistics
    if any(word.startswith("2_") for word in words):
        return source.threshold
    if any(word.startswith("3_") for word in words):
        return source.scores if "--detect_only" in words else source.results
    return None


def command_for(path: Path, plan: Sequence[str], source: Source) -> str:
    """The planned command that makes ``path``; the whole run where none does."""
    for command in plan:
        if output_of(command, source) == path:
            return command
    if source.name == "tiny":
        return "sh runs/tiny.sh"
    return f"VERSION={shlex.quote(source.name)} sh runs/paper.sh"


def counts_of_most_frequent(plan: Sequence[str]) -> list[int]:
    """k of every planned run that blocks the k neurons located most often."""
    return sorted(map(int, _values("--block_top_k_neurons=", plan)))


def shares_of_pruning(plan: Sequence[str]) -> list[float]:
    """The shares of weights of every planned run of Wanda that names one."""
    return sorted(map(float, _values("--mitigation_options=share=", plan)))


def _values(flag: str, plan: Sequence[str]) -> set[str]:
    words = (word for command in plan for word in shlex.split(command))
    return {word.removeprefix(flag) for word in words if word.startswith(flag)}
