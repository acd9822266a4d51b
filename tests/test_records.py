"""What a record keeps of a run, and what it refuses."""

import json
from pathlib import Path

import pytest

from utils.errors import InputError
from utils.files import sha256_of_file
from utils.records import Record, check_bytes, check_commits, check_same_model, open_output
from utils.versions import resolve

OURS, THEIRS = "a" * 40, "b" * 40
MODEL = {"id": "someone/a-model", "revision": None}


def record_of(folder: Path, inputs: tuple[Path, ...] = ()) -> Record:
    return Record(folder / "table.json", settings={"rows": 3}, model=MODEL, inputs=inputs)


def test_every_machine_that_had_part_in_a_run_is_named_once(tmp_path: Path) -> None:
    for machine in ("A", "B", "A", None, "C"):
        record = record_of(tmp_path)
        if record.path.exists():
            record.check_same_run()
        record.start(machine=machine)
    assert json.loads(record.path.read_text())["machine"] == "A; then B; then C"


def test_without_a_machine_none_is_named(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    record.start()
    assert json.loads(record.path.read_text())["machine"] is None


def test_inputs_of_another_commit_are_refused_once_the_model_is_known(tmp_path: Path) -> None:
    threshold, prompts = tmp_path / "threshold.pt", tmp_path / "prompts.csv"
    threshold.write_bytes(b"scores")
    prompts.write_text("Caption\n")
    made = {"model": MODEL, "commit": THEIRS}
    (tmp_path / "threshold.json").write_text(json.dumps(made))
    record = record_of(tmp_path, (threshold, prompts))
    with pytest.raises(InputError, match=rf"commit {THEIRS} .*--revision={THEIRS}"):
        record.start(commit=OURS)
    assert not record.path.exists()
    record.start(commit=THEIRS)
    record.start()  # a folder has no commit
    (tmp_path / "threshold.json").write_text(json.dumps({**made, "model": {"id": "another"}}))
    check_commits([str(threshold)], MODEL, OURS)  # an input that is of another model by intent
    for foreign in ("[1, 2]", "{broken"):
        (tmp_path / "prompts.json").write_text(foreign)
        check_commits([str(prompts)], MODEL, OURS)  # no record at all


def test_a_run_goes_on_with_the_commit_that_it_began_with(tmp_path: Path) -> None:
    record_of(tmp_path).start(commit=THEIRS)
    again = record_of(tmp_path)
    again.check_same_run()
    with pytest.raises(InputError, match=f"loaded commit {THEIRS} of the model, this one {OURS}"):
        again.start(commit=OURS)
    again.start(commit=THEIRS)


def test_what_was_made_with_another_revision_of_a_hub_model_is_refused() -> None:
    made = {"model": resolve("v1-4", "one").identity}
    check_same_model(made, resolve("v1-4", "one"), where=Path("statistics.pt"))
    with pytest.raises(InputError, match=r"\(revision one\), .*\(revision two\)"):
        check_same_model(made, resolve("v1-4", "two"), where=Path("statistics.pt"))


def test_a_finished_output_that_was_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    output = tmp_path / "table.csv"
    output.write_text("Row\n0\n")
    record_of(tmp_path).finish(output_sha256=sha256_of_file(output))
    assert open_output(record_of(tmp_path), output, continue_run=True) == "finished"
    output.write_text("Row\n1\n")
    with pytest.raises(InputError, match=r"not those that .*table\.json describes"):
        open_output(record_of(tmp_path), output, continue_run=True)
    output.unlink()  # can be made again
    assert open_output(record_of(tmp_path), output, continue_run=True) == "continued"


def test_bytes_without_a_checksum_are_not_vouched_for(tmp_path: Path) -> None:
    output = tmp_path / "table.csv"
    output.write_text("Row\n0\n")
    with pytest.raises(InputError, match="remake it"):
        check_bytes(output, {}, way="remake it")
