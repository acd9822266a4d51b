"""The benchmark scripts run, on settings too small to tell anything, and write what they promise.
No time is asserted."""

import json
from pathlib import Path

import pytest
from workspace import ROOT, Warm, fresh, run

from utils.files import read_table

COLUMNS = {
    "localization": "search prompts evaluations unet_rows seconds ratio_to_release_like same_sets",
    "localization_cost": "candidates needed exact bisect k log2(n/k)",
    "localization_prompts": "Row selection search candidates kept evaluations unet_rows seconds",
    "full_size_search": "prompt candidates carriers search found evaluations unet_rows seconds "
    "TFLOP share of matrix rate",
    "replay": "restart at the value layer of GFLOP per row fewer by",
    "generation": "batch images seconds images_per_second ratio_to_one_prompt",
    "statistics": "prompts peak_mb against_fewest seconds prompts_per_second",
    "memory": "work batch peak_mb beyond_loading_mb",
}
SMALL = {
    "localization": (
        "--version=model",
        "--dataset=memorized.csv",
        "--prompts=1",
        "--long_prompts=1",
        "--threshold=0.03",
        "--samples=3",
    ),
    "full_size": ("--flops_only",),
    "full_size_search": (
        "--narrow",
        "--searches=exact,bisect,plain",
        "--samples=3",
        "--batch_size=3",
    ),
    "generation": (
        "--version=model",
        "--dataset=memorized.csv",
        "--prompts=2",
        "--steps=2",
        "--batches=2",
    ),
    "statistics": ("--version=model", "--dataset=holdout.csv", "--counts=3,12"),
    "memory": (
        "--version=model",
        "--dataset=memorized.csv",
        "--batches=2",
        "--samples=3",
        "--steps=2",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh(tmp_path_factory.mktemp("benchmarks") / "workspace")


@pytest.mark.parametrize("name", SMALL)
def test_runs_and_writes_its_table(name: str, place: Path, warm: Warm) -> None:
    script = ROOT / "benchmarks" / f"benchmark_{name}.py"
    options = ("--repeats=1", "--threads=1", "--device=cpu", "-o=out/results")
    done = warm.run(script, *SMALL[name], *options, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "1 threads; torch" in done.stdout.splitlines()[0]
    folder = place / "out" / "results"
    page = (place / "out" / "RESULTS.md").read_text(encoding="utf-8")
    written = {"full_size": ["replay"]}.get(name, [name])
    if name == "localization":
        written += ["localization_cost", "localization_prompts"]
    for table in written:
        header, rows = read_table(folder / f"{table}.csv")
        assert " ".join(header) == COLUMNS[table] and rows
        assert all(cell or column == "batch" for row in rows for column, cell in row.items())
        if table != "localization_prompts":
            assert (folder / f"{table}.png").read_bytes().startswith(b"\x89PNG")
            section = json.loads((folder / f"{table}.json").read_text(encoding="utf-8"))
            assert f"## {section['title']}" in page and section["command"] in page
    # The last output is the script's own table.
    last = done.stdout.rpartition("\n\n")[2].splitlines()
    header, rows = read_table(folder / f"{written[0]}.csv")
    assert last[1].split() == " ".join(header).split() and len(last) > 1 + len(rows)


def test_what_localization_compares(place: Path) -> None:
    """Exact finds what plain finds (the script fails otherwise). Which rows it looks at first goes
    by what they cost on this device: against plain, its rows are no matter for a test."""
    _, rows = read_table(place / "out" / "results" / "localization.csv")
    found = {row["search"]: row for row in rows}
    assert list(found) == ["release-like", "plain", "exact", "bisect"]
    assert all(found[name]["same_sets"] == "1.000" for name in ("release-like", "exact"))
    assert float(found["exact"]["unet_rows"]) < float(found["release-like"]["unet_rows"])
    assert float(found["release-like"]["unet_rows"]) > 2 * float(found["plain"]["unet_rows"])
    assert float(found["release-like"]["ratio_to_release_like"]) == 1


def test_replay_saves_what_it_has_to(place: Path) -> None:
    _, rows = read_table(place / "out" / "results" / "replay.csv")
    saved = {row["restart at the value layer of"]: float(row["fewer by"]) for row in rows}
    assert saved["mid_block.attentions.0"] >= 1.4
    assert saved["spread evenly"] >= 1.15
    assert float(rows[0]["GFLOP per row"]) == pytest.approx(803, abs=1)


def test_a_planted_prompt_costs_what_the_search_saves(place: Path) -> None:
    """Every search finds the carriers (the script fails otherwise). The plain one makes whole
    passes over all seed rows, and as many evaluations as were counted without the U-Net."""
    folder = place / "out" / "results"
    _, rows = read_table(folder / "full_size_search.csv")
    found = {(row["prompt"], row["search"]): row for row in rows}
    prompts, searches = ("VM-like", "TM-like"), ("exact", "bisect", "plain")
    assert list(found) == [(prompt, search) for prompt in prompts for search in searches]
    assert {row["found"] for row in rows} == {"all"}
    whole = float(found["TM-like", "plain"]["TFLOP"]) / int(found["TM-like", "plain"]["unet_rows"])
    for row in rows:
        if row["search"] == "plain":
            assert int(row["unet_rows"]) == 3 * int(row["evaluations"])
        else:  # most passes restart half-way
            assert float(row["TFLOP"]) < 0.95 * whole * int(row["unet_rows"])
    # Not by rows: which exact looks at first goes by what they cost on this device.
    exact, bisect, plain = (found["TM-like", search] for search in searches)
    assert float(exact["TFLOP"]) < float(plain["TFLOP"])
    assert int(bisect["unet_rows"]) < int(plain["unet_rows"])
    remarks = json.loads((folder / "full_size_search.json").read_text(encoding="utf-8"))["remarks"]
    counted = " and ".join(found[prompt, "plain"]["evaluations"] for prompt in prompts)
    assert f"makes {counted} evaluations" in remarks[1]
    assert "500 prompts" in remarks[2] and "targets" not in remarks[2]


def test_help_of_every_script(tmp_path: Path) -> None:
    for path in sorted((ROOT / "benchmarks").glob("benchmark_*.py")):
        done = run(path, "-h", cwd=tmp_path)
        assert done.returncode == 0 and "Examples:" in done.stdout
    assert not list(tmp_path.iterdir())
