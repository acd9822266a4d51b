"""The record beside every output: what was run on what, so that another run can tell what it may go
on with, or use.

Public: ``Record``, ``open_output``, ``part_of``, ``check_same_model``, ``check_same_blocks``,
``check_commits``, ``check_bytes``, ``check_statistics_record``, ``check_result_record``,
``git_commit``, ``version_of``.
"""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import read_json, sha256_of_file, write_json
from utils.value_layers import SEARCHED_STAGES
from utils.versions import PROJECT_ROOT, Source

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scikit-image")


class Record:
    """The ``.json`` beside an output: settings, model, inputs, versions, command, and at the end
    what came out. ``settings``, ``model`` and ``inputs`` must be equal for a run to be
    continued."""

    COMPARED = ("script", "settings", "model", "inputs")
    # Lowering it is the way out of too little memory; it changes results by rounding at the most.
    NOT_COMPARED = ("batch_size",)

    def __init__(
        self,
        path: Path,
        *,
        settings: Mapping[str, Any],
        model: Mapping[str, Any],
        inputs: Iterable[Path],
    ) -> None:
        """``model``: what makes the model this one, as ``Source.identity``."""
        self.path = path
        self.content: dict[str, Any] = {
            "script": Path(sys.argv[0]).name,
            "settings": dict(settings),
            "model": dict(model),
            "inputs": {str(p): sha256_of_file(p) for p in inputs},
            "finished": False,
            "command": shlex.join(["python", _script_path(), *sys.argv[1:]]),
            "git_commit": git_commit(),
            "packages": {name: version_of(name) for name in PACKAGES},
            "python": platform.python_version(),
        }
        self.stored: dict[str, Any] = {}  # what open_output read, of the run to continue
        self._started = time.monotonic()

    def start(self, *, commit: str | None = None, machine: str | None = None) -> None:
        """Writes the record before the first unit of work. ``commit``: of the hub model that was
        loaded; InputError if the run to continue had another. ``machine``: what a U-Net's passes
        are computed by (``Model.provenance``), after what computed them before."""
        before = self.stored.get("commit", commit)
        if before != commit:
            raise InputError(
                f"{self.path}: the run to continue loaded commit {before} of the model, this one "
                f"{commit}; name another output, and keep the model with --revision={commit}"
            )
        check_commits(self.content["inputs"], self.content["model"], commit)
        machines = [*filter(None, (self.stored.get("machine") or "").split("; then "))]
        if machine and machine not in machines:
            machines.append(machine)
        self.content |= {"commit": commit, "machine": "; then ".join(machines) or None}
        write_json(self.path, self.content)

    def finish(self, **results: Any) -> None:
        """Completes the record: counts and whatever the run found, and the seconds it took."""
        self.content.update(results)
        self.content["finished"] = True
        self.content["seconds"] = round(time.monotonic() - self._started, 3)
        write_json(self.path, self.content)

    def check_same_run(self) -> bool:
        """Compares with the record on disk; InputError names the field and both values if they
        differ. Returns whether that run was finished."""
        stored = self.stored = read_json(self.path)
        for part in self.COMPARED:
            there, here = stored.get(part), self.content[part]
            if not (isinstance(there, dict) and isinstance(here, dict)):
                there, here = {part: there}, {part: here}
            if part == "inputs" and [*there.values()] == [*here.values()]:
                continue  # the same bytes under another path are the same input
            for field in [*here, *(f for f in there if f not in here)]:
                if field not in self.NOT_COMPARED and there.get(field) != here.get(field):
                    raise InputError(
                        f"{self.path}: the run to continue has {field} = {there.get(field)}, this "
                        f"one has {here.get(field)}; use the same settings or another output"
                    )
        return bool(stored.get("finished"))


def open_output(
    record: Record, output: Path, *, continue_run: bool, others: Iterable[Path] = ()
) -> str:
    """Decides how a run begins, before anything is written: "new", "continued" or "finished".

    InputError if the output exists and ``--continue_run`` was not given, if it belongs to a run
    with other settings or was changed since that run was finished, or if its folder cannot be
    written to. ``others`` are further files of the same output.
    """
    existing = [path for path in (output, record.path, *others) if path.exists()]
    if not existing:
        _check_writable(output)
        return "new"
    if not continue_run:
        raise InputError(
            f"{existing[0]} exists already; add --continue_run to go on with it, or name another "
            "output with -o"
        )
    if not record.path.exists():
        raise InputError(
            f"{output}: its record {record.path} is missing; name another output with -o"
        )
    finished = record.check_same_run()
    if finished and output != record.path:
        finished = output.exists()
        if finished:
            way = "restore it, or name another output with -o"
            check_bytes(output, record.stored, way=way)
    return "finished" if finished else "continued"


def _script_path() -> str:
    """The running script as a command in the project's folder names it."""
    path = Path(sys.argv[0]).resolve()
    inside = path.is_relative_to(PROJECT_ROOT)
    return path.relative_to(PROJECT_ROOT).as_posix() if inside else path.name


def _check_writable(path: Path) -> None:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{path}: {folder} is a file, not a folder; name another output with -o")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: cannot write to {folder}; name another output with -o")


def git_commit() -> str | None:
    """The commit that is checked out; None where there is no repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def version_of(package: str) -> str | None:
    """Of an installed package; None for one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def part_of(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of a record that is an object; an empty one where it is anything else."""
    part = record.get(name)
    return part if isinstance(part, dict) else {}


def check_same_model(record: Mapping[str, Any], source: Source, *, where: Path) -> None:
    """InputError if a record names another model than ``source``. Folders are the same model if
    their weights are, hub models if id and revision are."""
    there, here = part_of(record, "model"), source.identity
    by_weights = bool(there.get("sha256") and here["sha256"])
    fields = ("sha256",) if by_weights else ("id", "revision")
    for field in fields:
        if there.get(field) != here[field]:
            raise InputError(
                f"{where}: belongs to the model {there.get('id')} ({field} {there.get(field)}), "
                f"this run uses {here['id']} ({field} {here[field]}); make it anew for this model"
            )


def check_commits(inputs: Iterable[str], model: Mapping[str, Any], commit: str | None) -> None:
    """InputError if an input was made, as the record beside it says, with another ``commit`` of
    this hub model: known once it is loaded, since its branch may have moved on meanwhile."""
    if commit is None:
        return
    for path in map(Path, inputs):
        beside = path.parent / f"{path.stem}.json"
        if beside == path or not beside.is_file():
            continue
        try:
            record = read_json(beside)
        except InputError:
            continue  # somebody's own file of that name: no record of ours
        there = record.get("commit")
        if there and there != commit and part_of(record, "model").get("id") == model.get("id"):
            raise InputError(
                f"{path}: made with commit {there} of {model.get('id')}, this run loaded {commit}; "
                f"keep the model with --revision={there}, or make that file anew"
            )


def check_bytes(path: Path, record: Mapping[str, Any], *, way: str) -> None:
    """InputError, which names the ``way`` out, if an output is not what its record describes."""
    if record.get("output_sha256") != sha256_of_file(path):
        raise InputError(
            f"{path}: its bytes are not those that {path.with_suffix('.json')} describes; {way}"
        )


def check_same_blocks(record: Mapping[str, Any], source: Source, *, where: Path) -> None:
    """InputError if a record is of the value layers of other blocks than ``source``."""
    usual = ",".join(SEARCHED_STAGES)
    there = part_of(record, "model").get("blocks", usual)
    here = source.identity.get("blocks", usual)
    if there != here:
        raise InputError(
            f"{where}: of the value layers of {there}, this run looks at {here}; add "
            f"--blocks={there}, or make it anew with --blocks={here}"
        )


def check_statistics_record(path: Path, source: Source) -> None:
    """InputError for statistics that are missing or, as their record says, of another model, not
    complete, or changed since."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such statistics file; make it with: "
            f"python 1_compute_activations_statistics.py --version={source.name} -o={path}"
        )
    if path.with_suffix(".json").is_file():
        record = read_json(path.with_suffix(".json"))
        check_same_model(record, source, where=path)
        check_same_blocks(record, source, where=path)
        if not record.get("finished"):
            raise InputError(
                f"{path}: its run is not finished; complete it with script 1 and --continue_run"
            )
        check_bytes(path, record, way="remake it with script 1")


def check_result_record(path: Path, source: Source, protocol: str | None) -> None:
    """InputError if the record beside a result file (the authors' files have none) names another
    model or protocol (None: a set is a set, whichever it was found with), or an unfinished run."""
    record_path = path.with_suffix(".json")
    if not record_path.is_file():
        return
    record = read_json(record_path)
    check_same_model(record, source, where=path)
    check_same_blocks(record, source, where=path)
    found = part_of(record, "settings").get("protocol")
    if protocol is not None and found != protocol:
        raise InputError(f"{path}: found with protocol {found}; add --protocol={found}")
    if not record.get("finished"):
        raise InputError(
            f"{path}: the run is not finished; complete it with script 3 and --continue_run"
        )
