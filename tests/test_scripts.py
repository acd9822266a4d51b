"""The four scripts as commands: what they write, what leaves a row as it is, what changes it."""

import csv
import functools
import json
import os
import re
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import workspace
from PIL import Image
from workspace import LOCATED, NOISE, SAMPLING, SCRIPTS, VALID, WIDTHS, Warm

from utils import cli, thresholds
from utils.errors import InputError
from utils.files import read_prompts, read_table, sha256_of_file
from utils.images import image_name
from utils.neuron_sets import RESULT_COLUMNS, read_results
from utils.paper_runs import SAMPLING as COMPARED
from utils.paper_settings import BLOCKED
from utils.search_options import THRESHOLD_FLAGS
from utils.thresholds import pairs
from utils.versions import resolve

MODEL = "--version=model"
RESULTS = Path("results/memorization_statistics_model.csv")
DETECT = (MODEL, "--dataset=memorized.csv", *NOISE)
SCAN = (*DETECT, "--detect_only")
MEMORIZED = [
    "A lighthouse, winter",
    "NA",
    'Tea; "enamel" sign',
    " null ",
    "NA",
    "grey cat on a red chair",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One workspace; every test writes under names of its own."""
    return workspace.fresh(tmp_path_factory.mktemp("scripts") / "workspace")


Call = Callable[..., workspace.Done]


@pytest.fixture(scope="module")
def call(warm: Warm, folder: Path) -> Call:
    """Runs a script in the workspace and demands its exit code."""

    def run(script: int, *options: str, code: int = 0) -> workspace.Done:
        done = warm.run(script, *options, cwd=folder)
        assert done.returncode == code, (done.stdout, done.stderr)
        return done

    return run


def lines(path: Path) -> list[bytes]:
    """The rows of a result file whose captions hold no line ends."""
    return path.read_bytes().splitlines()[1:]


def record_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


# What each script writes.


def test_statistics_are_mean_and_deviation_of_the_raw_activations(call: Call, folder: Path) -> None:
    call(1, *VALID[1], "-o=raw/raw.pt", "--no_statistics")
    raw = torch.load(folder / "raw/raw.pt", weights_only=True)
    assert [tuple(layer.shape) for layer in raw] == [(6, width) for width in WIDTHS]
    content = torch.load(folder / "statistics/statistics_model.pt", weights_only=True)
    assert type(content) is tuple and [type(part) for part in content] == [list, list]
    for layer, mean, std in zip(raw, *content, strict=True):
        assert mean.dtype == std.dtype == torch.float32
        values = layer.numpy().astype(np.float64)
        np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(std, values.std(axis=0, ddof=1), rtol=1e-6)
    # "NA" is text: other than nothing, and than another word.
    call(1, *VALID[1], "--prompts=memorized.csv", "-o=raw/memorized.pt", "--no_statistics")
    memorized = torch.load(folder / "raw/memorized.pt", weights_only=True)[0]
    assert torch.equal(memorized[1], memorized[4])
    assert len({tuple(row) for row in memorized.tolist()}) == 5


def test_the_threshold_is_mean_plus_deviation_of_the_best_pairs(folder: Path) -> None:
    path = folder / "statistics/pairwise_ssim_model.pt"
    content = torch.load(path, weights_only=True)
    assert set(content) == {"scores", "rows", "mean", "std", "threshold"}
    scores = content["scores"].numpy().astype(np.float64)
    assert scores.shape == (6, 6) and content["rows"].tolist() == list(range(6))
    best = scores.max(axis=1)
    assert content["mean"].item() == pytest.approx(best.mean(), abs=1e-12)
    assert content["std"].item() == pytest.approx(best.std(ddof=1), abs=1e-12)
    assert content["threshold"].item() == pytest.approx(best.mean() + best.std(ddof=1), abs=1e-12)
    record = record_of(path)
    assert record["threshold"] == content["threshold"].item()
    assert record["all_pairs"]["mean"] == pytest.approx(scores.mean(), abs=1e-12)
    assert record["all_pairs"]["std"] == pytest.approx(scores.std(ddof=1), abs=1e-12)


def test_a_result_row_for_every_prompt(call: Call, folder: Path) -> None:
    path = folder / RESULTS
    header, table = read_table(path)
    assert header == list(RESULT_COLUMNS)
    assert [cells["Caption"] for cells in table] == MEMORIZED, "as in the cells, spaces kept"
    prompts = read_prompts(folder / "memorized.csv")
    assert [cells["URL"] for cells in table] == [prompt.url for prompt in prompts]
    assert [cells["Row"] for cells in table] == list("012345")
    found = read_results(path, widths=WIDTHS)
    assert [result.memorized for result in found] == [True, True, True, False, True, False]
    for result, cells in zip(found, table, strict=True):
        assert len(cells["Initial SSIM"].partition(".")[2]) == 6
        subset = zip(result.refined, result.initial, strict=True)
        assert all(set(refined) <= set(initial) for refined, initial in subset)
        if not result.memorized:
            assert cells["Initial Neurons"] == cells["Refined Neurons"] == "[[], [], [], []]"
            assert cells["Initial SSIM"] == cells["Refined SSIM"] == "0.000000"
    assert (
        lines(path)[1].rsplit(b";", 1)[0].split(b";", 2)[2]
        == (lines(path)[4].rsplit(b";", 1)[0].split(b";", 2)[2])
    ), "the same caption, the same cells"
    sizes = sorted(sum(map(len, r.refined)) for r in found if r.memorized)
    record = record_of(path)
    assert (record["prompts"], record["memorized"], record["undecided_rows"]) == (6, 4, [])
    assert record["median_neurons"]["all"] == np.median(sizes)
    said = call(3, *DETECT, *LOCATED, "-o=again/result.csv").stdout
    assert "6 prompts: 4 memorized, 2 not." in said and "Written to again/result.csv" in said
    assert f"median: {np.median(sizes):g} (TM " in said


def test_pictures_are_named_by_row_and_sample(folder: Path) -> None:
    pictures = sorted(path.name for path in (folder / "images").glob("*.jpg"))
    assert pictures == [image_name(row, sample) for row in range(6) for sample in range(2)]
    assert pictures[3] == "img_0001_01.jpg"
    for name in pictures:
        with Image.open(folder / "images" / name) as picture:
            # Latents of 8, a VAE of two halvings.
            assert (picture.format, picture.size, picture.mode) == ("JPEG", (32, 32), "RGB")
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["config.json", *pictures]


OUTPUTS = {
    1: Path("statistics/statistics_model.pt"),
    2: Path("statistics/pairwise_ssim_model.pt"),
    3: RESULTS,
    4: Path("images/config.json"),
}
OWN_INPUTS = {
    1: ["holdout.csv"],
    2: ["holdout.csv"],
    3: ["memorized.csv", str(OUTPUTS[1])],
    4: [str(RESULTS)],
}


def test_the_record_of_a_search_names_layers_and_cost(folder: Path) -> None:
    record = record_of(folder / RESULTS)
    assert list(record["layers"].values()) == WIDTHS
    assert all(name.endswith(".attn2.to_v") for name in record["layers"])
    assert record["searched_again"] == 0
    assert {kind: cost["prompts"] for kind, cost in record["cost"].items()} == {"VM": 3, "TM": 2}
    assert all(cost["seconds"] > 0 for cost in record["cost"].values())


def test_what_the_tables_ask_of_a_record_stands_in_it(folder: Path) -> None:
    search, pictures = (record_of(folder / OUTPUTS[script])["settings"] for script in (3, 4))
    assert {*BLOCKED.search, *THRESHOLD_FLAGS} <= search.keys()
    assert {*BLOCKED.pictures, *COMPARED, "rows", "k", "random_seed"} <= pictures.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_record_names_what_the_output_came_from(script: int, folder: Path) -> None:
    record = record_of(folder / OUTPUTS[script])
    assert record["script"] == SCRIPTS[script].name and record["finished"] is True
    inputs = {name: sha256_of_file(folder / name) for name in OWN_INPUTS[script]}
    assert record["inputs"].items() >= inputs.items()
    assert (
        record["settings"].items()
        >= {
            "protocol": "published",
            "dtype": "float32",
            "device": "cpu",
            "rows": None,
            "caption_column": "Caption",
        }.items()
    )
    assert record["model"]["id"] == "model" and len(record["model"]["sha256"]) == 64
    assert record["command"].startswith(f"python {SCRIPTS[script].name} --version=model ")
    assert record["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["seconds"] >= 0 and "git_commit" in record
    assert re.fullmatch(r"cpu, \d+ threads", record["machine"])
    if script < 4:
        assert record["output_sha256"] == sha256_of_file(folder / OUTPUTS[script])


# The same bytes.


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_second_run_in_a_process_of_its_own_writes_the_same_bytes(
    script: int, folder: Path
) -> None:
    """Also shows that forked processes, which most tests use, do what a user's do."""
    output = "-o=cold" if script == 4 else f"-o=cold/{OUTPUTS[script].name}"
    more = LOCATED if script == 3 else ()
    done = workspace.run(script, *VALID[script], *more, output, cwd=folder)
    assert done.returncode == 0, done.stderr
    names = [path.name for path in (folder / "images").glob("*.jpg")]
    for name in names if script == 4 else [OUTPUTS[script].name]:
        first = folder / OUTPUTS[script].parent / name
        assert (folder / "cold" / name).read_bytes() == first.read_bytes()


def test_rows_and_batches_leave_statistics_and_scores_as_they_are(call: Call, folder: Path) -> None:
    def scores(name: str, *options: str) -> dict[str, torch.Tensor]:
        call(2, *VALID[2], f"-o=rows/{name}.pt", *options)
        return torch.load(folder / f"rows/{name}.pt", weights_only=True)

    everything = torch.load(folder / OUTPUTS[2], weights_only=True)
    some = scores("some", "--rows=4,0-1")
    assert some["rows"].tolist() == [0, 1, 4]
    assert torch.equal(some["scores"], everything["scores"][[0, 1, 4]])
    assert record_of(folder / "rows/some.pt")["settings"]["rows"] == [0, 1, 4]
    one_by_one = scores("batch", "--batch_size=1")
    torch.testing.assert_close(one_by_one["scores"], everything["scores"], rtol=0, atol=1e-5)

    call(1, *VALID[1], "-o=rows/all.pt", "--no_statistics")
    call(1, *VALID[1], "-o=rows/few.pt", "--no_statistics", "--rows=2,5")
    both = [torch.load(folder / f"rows/{name}.pt", weights_only=True) for name in ("all", "few")]
    assert all(torch.equal(few, full[[2, 5]]) for full, few in zip(*both, strict=True))


def test_rows_leave_results_as_they_are(call: Call, folder: Path) -> None:
    everything = lines(folder / RESULTS)
    call(3, *DETECT, *LOCATED, "-o=rows/result.csv", "--rows=5,1-2")
    assert lines(folder / "rows/result.csv") == [everything[row] for row in (1, 2, 5)]
    call(3, *DETECT, *LOCATED, "-o=rows/last.csv", "--rows=4")
    assert lines(folder / "rows/last.csv") == [everything[4]]


def test_rows_and_batches_leave_pictures_as_they_are(call: Call, folder: Path) -> None:
    def generate(name: str, *options: str) -> dict[str, Path]:
        call(4, MODEL, "--refined_neurons", "-n=2", "--steps=3", f"-o=rows/{name}", *options)
        return {path.name: path for path in sorted((folder / "rows" / name).glob("*.jpg"))}

    pairs_of_samples = generate("two", "-b=2")
    alone = generate("two_alone", "-b=2", "--rows=1,3")
    assert sorted(alone) == [image_name(row, sample) for row in (1, 3) for sample in range(2)]
    for name, path in alone.items():  # the same batches
        assert path.read_bytes() == pairs_of_samples[name].read_bytes()

    one, two = (
        np.asarray(Image.open(pairs_of_samples[image_name(1, sample)]), int) for sample in range(2)
    )
    assert np.abs(one - two).max() > 6, "the limit below would let another noise pass"
    for options in (("-b=1",), ("-b=12",), ("-b=3", "--rows=1-3")):  # other batches
        for name, path in generate(f"other{options[0]}", *options).items():
            with Image.open(path) as one, Image.open(pairs_of_samples[name]) as other:
                difference = np.abs(np.asarray(one, int) - np.asarray(other, int))
            # Rounding moves a pixel by 1 before compression, and a JPEG block by some more.
            assert difference.max() <= 6 and np.mean(difference > 2) <= 0.05, name


def test_a_dry_run_counts_the_copies_that_fill_a_batch(call: Call) -> None:
    options = (MODEL, "--refined_neurons", "-n=1", "--rows=0", "-o=rows/none", "--dry_run")
    said = [call(4, *options, f"-b={batch}").stdout for batch in (1, 100_000)]
    copies, times = (
        [re.search(rf"{name} +(\d+)", text)[1] for text in said]
        for name in ("copies that fill the last batch", "estimated time")
    )
    assert copies == ["0", "99999"] and times[0] != times[1]


def test_another_seed_or_precision_gives_other_outputs(call: Call, folder: Path) -> None:
    call(2, *VALID[2], "-o=seed/2.pt", "--seed=2")
    other, usual = (
        torch.load(folder / path, weights_only=True)["scores"] for path in ("seed/2.pt", OUTPUTS[2])
    )
    assert not torch.isclose(other, usual, atol=1e-4).all(dim=1).any()
    call(4, *VALID[4], "-o=seed/images", "--seed=3", "--rows=5")
    name = image_name(5, 0)
    usual_picture = (folder / "images" / name).read_bytes()
    assert (folder / "seed/images" / name).read_bytes() != usual_picture
    call(4, *VALID[4], "-o=seed/bfloat16", "--dtype=bfloat16", "--rows=5")
    assert (folder / "seed/bfloat16" / name).read_bytes() != usual_picture


# Script 3's options.


@pytest.fixture(scope="module")
def activations(call: Call, folder: Path) -> list[np.ndarray]:
    """(prompts, width) of each layer, of the memorized prompts."""
    call(1, *VALID[1], "--prompts=memorized.csv", "-o=options/raw.pt", "--no_statistics")
    return [layer.numpy() for layer in torch.load(folder / "options/raw.pt", weights_only=True)]


@pytest.fixture(scope="module")
def z_scores(activations: list[np.ndarray], folder: Path) -> list[np.ndarray]:
    means, stds = torch.load(folder / OUTPUTS[1], weights_only=True)
    parts = zip(activations, means, stds, strict=True)
    return [np.abs(a - mean.numpy()) / std.numpy() for a, mean, std in parts]


EVERY_PROMPT = ("--pairwise_ssim_threshold=0", "--ssim_threshold_refinement=1")
FIRST_TRY = (*EVERY_PROMPT, "--ssim_threshold_initial_selection=1")  # no score is above 1
NO_TRY = (*EVERY_PROMPT, "--ssim_threshold_initial_selection=0")  # ends by the fall-back


@pytest.mark.parametrize(
    ("name", "options", "theta", "k"),
    [
        ("first", (*FIRST_TRY, "--initial_theta=2"), 2.0, 0),
        ("first_k", (*FIRST_TRY, "--initial_theta=3", "--initial_k=4"), 3.0, 4),
        ("no_theta", (*FIRST_TRY, "--no_theta", "--initial_k=3"), np.inf, 3),
        ("no_top_k", (*NO_TRY, "--no_top_k", "--initial_theta=3", "--min_theta=2.6"), 2.75, 0),
        # Thetas 3 and 2: the next would be the minimum. k = 0 and 1.
        ("step", (*NO_TRY, "--initial_theta=3", "--theta_reduction_per_step=1"), 2.0, 1),
        ("minimum", (*NO_TRY, "--initial_theta=3", "--min_theta=2.5"), 2.75, 1),
        ("one_try", (*NO_TRY, "--initial_theta=1.5", "--min_theta=2", "--initial_k=1"), 1.5, 1),
    ],
)
def test_what_is_selected(
    name: str,
    options: tuple[str, ...],
    theta: float,
    k: int,
    call: Call,
    folder: Path,
    activations: list[np.ndarray],
    z_scores: list[np.ndarray],
) -> None:
    """Initial sets against numpy: z above theta, and the k of largest activation."""
    call(3, *DETECT, *options, "--rows=0-1", f"-o=options/{name}.csv")
    found = read_results(folder / f"options/{name}.csv", widths=WIDTHS)
    assert len(found) == 2 and all(result.memorized for result in found)
    for result in found:
        for layer, chosen in enumerate(result.initial):
            a, z = activations[layer][result.row], z_scores[layer][result.row]
            top = np.argsort(-a, kind="stable")[:k].tolist()
            above = np.nonzero(z > theta)[0].tolist()
            assert chosen == sorted({*top, *above})


def scan(call: Call, folder: Path, name: str, *options: str) -> dict[int, tuple[float, int]]:
    """Row -> (score, seed rows above the threshold)."""
    call(3, *SCAN, f"-o=scans/{name}.csv", *options)
    table = read_table(folder / f"scans/{name}.csv")[1]
    return {int(cells["Row"]): (float(cells["Score"]), int(cells["Seed Rows"])) for cells in table}


def test_thresholds_and_factor_do_what_they_say(call: Call, folder: Path) -> None:
    def located(name: str, *options: str) -> list:
        call(3, *DETECT, f"-o=levels/{name}.csv", *options)
        return read_results(folder / f"levels/{name}.csv", widths=WIDTHS)

    assert not any(r.memorized for r in located("all", "--pairwise_ssim_threshold=1"))
    # Multiplied by 1 nothing changes: the score is 1, and no neuron can be given back below 1.
    same = located("factor", *FIRST_TRY, "--scaling_factor=1", "--initial_theta=6", "--rows=0-1")
    assert all(r.initial_score == r.refined_score == 1 and r.initial == r.refined for r in same)
    # A score that may change by all of itself needs no neuron.
    relative = ("--rel_threshold_refinement=1", "--initial_theta=6", "--rows=0-1")
    free = located("relative", *FIRST_TRY[::2], *relative)
    assert all(r.memorized and not any(r.refined) and r.refined_score == 1 for r in free)
    # Refinement gives back what keeps the score below its threshold: never more than that.
    for level in (0.9925, 0.998):
        flag = f"--ssim_threshold_refinement={level}"
        refined = located(f"refined{level}", *LOCATED, flag, "--rows=1-3")
        assert all(r.refined_score < level for r in refined if r.memorized)
    quick = ("--ssim_threshold_initial_selection=1", "--initial_theta=6")
    by_file = located("file", f"--threshold_file={OUTPUTS[2]}", *quick)
    tau = record_of(folder / OUTPUTS[2])["threshold"]
    scores = {row: score for row, (score, _) in scan(call, folder, "for_file").items()}
    assert {r.row: r.memorized for r in by_file} == {row: s > tau for row, s in scores.items()}


@pytest.mark.parametrize("search", ["plain", "bisect"])
def test_the_other_searches_find_the_same(search: str, call: Call, folder: Path) -> None:
    path = f"options/{search}.csv"
    call(3, *DETECT, *LOCATED, f"--search={search}", f"-o={path}")
    assert (folder / path).read_bytes() == (folder / RESULTS).read_bytes()
    assert record_of(folder / path)["settings"]["search_method"] == search


def test_a_batch_that_does_not_hold_all_seed_rows_turns_to_the_plain_search(
    call: Call, folder: Path
) -> None:
    options = (*DETECT, *LOCATED, "--batch_size=3", "--rows=3")
    said = call(3, *options, "-o=options/small.csv").stdout
    assert "Plain search: a batch of 3 does not hold all 4 seed rows" in said
    assert record_of(folder / "options/small.csv")["settings"]["search_method"] == "plain"
    # Smaller still it is the same search, and may go on.
    call(3, *options, "-o=options/small.csv", "--batch_size=1", "--search=plain", "--continue_run")


def test_a_threshold_of_another_number_of_seed_rows_is_said(folder: Path) -> None:
    source, file = resolve("v1-4"), folder / OUTPUTS[2]
    settings = {
        "protocol": "published",
        "num_inference_steps": 50,
        "guidance_scale": 1.0,
        "exchanged_guidance": False,
        "dtype": "float32",
    }
    own = replace(source, **{"folder": folder / "model", "id": "model"})
    warning = ". Warning: measured with {} seed rows, this run has 7; tau "
    for where, model, rows in ((None, source, 10), (file, own, 4)):
        say = functools.partial(
            thresholds.choose, file=where, flags={"pairwise_ssim_threshold": None}, source=model
        )
        assert "Warning" not in say(settings={**settings, "samples_per_prompt": rows})[1]
        assert warning.format(rows) in say(settings={**settings, "samples_per_prompt": 7})[1]


def test_a_scan_ranks_the_prompts_by_their_best_pair(call: Call, folder: Path) -> None:
    call(2, *VALID[2], "--prompts=memorized.csv", "-o=scans/scores.pt")
    scores = torch.load(folder / "scans/scores.pt", weights_only=True)["scores"]
    level = scores.flatten().sort().values[-8].item()  # one of them: only what is above it counts
    call(3, *SCAN, "-o=scans/usual.csv", f"--pairwise_ssim_threshold={level!r}")
    header, table = read_table(folder / "scans/usual.csv")
    assert header == ["Caption", "URL", "Score", "Seed Rows", "Row"]
    assert len({cells["Seed Rows"] for cells in table}) > 1, "the level tells prompts apart"
    for cells in table:
        row = scores[int(cells["Row"])]
        assert cells["Score"] == f"{row.max().item():.6f}"
        above = {
            i
            for pair, score in zip(pairs(4), row.tolist(), strict=True)
            if score > level
            for i in pair
        }
        assert int(cells["Seed Rows"]) == len(above)
        assert cells["Caption"] == MEMORIZED[int(cells["Row"])]
    ranking = [float(cells["Score"]) for cells in table]
    assert ranking == sorted(ranking, reverse=True)
    order = [int(cells["Row"]) for cells in table]
    assert sorted(order) == list(range(6)) and order != list(range(6))
    assert order.index(4) == order.index(1) + 1, "equals in the order of the prompt file"
    record = record_of(folder / "scans/usual.csv")
    assert record["memorized"] == sum(cells["Seed Rows"] != "0" for cells in table)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("paper", ("--protocol=paper",)),
        ("seed", ("--seed=5",)),
        ("steps", ("--num_inference_steps=20",)),
        ("rows", ("--samples_per_prompt=5",)),
        ("guidance", ("--guidance_scale=3",)),
        ("exchanged", ("--guidance_scale=3", "--exchanged_guidance")),
        ("column", ("--caption_column=type",)),
        ("dtype", ("--dtype=bfloat16",)),
        ("model", ("--version=other",)),
    ],
)
def test_every_option_of_a_noise_difference_changes_the_scores(
    name: str, options: tuple[str, ...], call: Call, folder: Path
) -> None:
    level = "--pairwise_ssim_threshold=0.06"
    usual = folder / "scans/compared.csv"
    if not usual.exists():
        call(3, *SCAN, level, "-o=scans/compared.csv")
    if name == "exchanged":
        usual = folder / "scans/guided.csv"
        call(3, *SCAN, level, "-o=scans/guided.csv", options[0])
    call(3, *SCAN, level, f"-o=scans/{name}.csv", *options)
    both = [read_table(path)[1] for path in (usual, folder / f"scans/{name}.csv")]
    scores = [{cells["Row"]: cells["Score"] for cells in table} for table in both]
    assert scores[0].keys() == scores[1].keys()
    changed = [scores[0][row] != scores[1][row] for row in scores[0]]
    # One seed row more can leave the best pair the best.
    assert any(changed) if name == "rows" else all(changed)


@pytest.mark.parametrize(
    "options",
    [
        ("--protocol=paper",),
        ("--num_inference_steps=20",),
        ("--guidance_scale=3",),
        ("--guidance_scale=4", "--exchanged_guidance"),
        ("--dtype=bfloat16",),
    ],
)
def test_script_2_measures_with_the_options_that_it_records(
    options: tuple[str, ...], call: Call, folder: Path
) -> None:
    name = "".join(options).strip("-")
    call(2, *VALID[2], "--prompts=memorized.csv", f"-o=measured/{name}.pt", *options)
    level = "--pairwise_ssim_threshold=0.06"
    call(3, *SCAN, level, f"-o=measured/{name}_scan.csv", *options)
    scores = torch.load(folder / f"measured/{name}.pt", weights_only=True)["scores"]
    table = read_table(folder / f"measured/{name}_scan.csv")[1]
    assert len(table) == len(scores) == 6
    for cells in table:
        best = scores[int(cells["Row"])].max().item()
        assert float(cells["Score"]) == pytest.approx(best, abs=2e-6)


# Prompts that stay undecided.


@pytest.fixture(scope="module")
def undecided(folder: Path) -> Path:
    """The workspace's model with a word that gives NaN, and prompts of which rows 1 and 3 hold
    it."""
    workspace.save_model(folder / "broken", broken=True)
    captions = ["A lighthouse, winter", "a ~ b", "NA", "a ~ b", "cup"]
    (folder / "tilde.csv").write_text("Caption\n" + "".join(f"{c}\n" for c in captions))
    return folder / "tilde.csv"


def test_undecided_prompts_are_never_called_unmemorized(
    undecided: Path, call: Call, folder: Path
) -> None:
    options = ("--version=broken", "--dataset=tilde.csv", *NOISE, *LOCATED, "-o=nan/result.csv")
    options = (*options, "--statistics=nan/statistics.pt")
    call(1, "--version=broken", "--prompts=holdout.csv", "-o=nan/statistics.pt")
    done = call(3, *options, code=1)
    assert "row 1: undecided, a noise difference is not finite" in done.stdout
    assert "row 0: undecided" not in done.stdout and "row 4: undecided" not in done.stdout
    assert "5 prompts: " in done.stdout and ", 2 undecided." in done.stdout
    assert "not finite: rows 1, 3." in done.stdout
    table = lines(folder / "nan/result.csv")
    assert table[1] == b"a ~ b;;;;;;1" and table[3] == b"a ~ b;;;;;;3"
    # The others are those of the whole model.
    call(3, *DETECT, *LOCATED, "--dataset=tilde.csv", "-o=nan/whole.csv", "--rows=0,2,4")
    whole = lines(folder / "nan/whole.csv")
    assert [table[row] for row in (0, 2, 4)] == whole and b"[[], [], [], []]" not in whole[0]
    record = record_of(folder / "nan/result.csv")
    assert (record["undecided_rows"], record["prompts"]) == ([1, 3], 5)
    again = call(3, *options, "--continue_run", code=1)
    assert "complete already" in again.stdout

    images = ("--version=broken", "-f=nan/result.csv", "--refined_neurons", *SAMPLING)
    done = call(4, *images, "-o=nan/images", code=1)
    assert "[1, 3]" in done.stdout
    again = call(4, *images, "-o=nan/images", "--continue_run", code=1)
    assert "complete already" in again.stdout
    names = sorted(path.name for path in (folder / "nan/images").glob("*.jpg"))
    assert names == [image_name(row, sample) for row in (0, 2, 4) for sample in range(2)]


def test_undecided_prompts_end_a_ranking_and_count_in_no_threshold(
    undecided: Path, call: Call, folder: Path
) -> None:
    options = ("--version=broken", *NOISE)
    level = "--pairwise_ssim_threshold=0.06"
    call(3, *options, "--dataset=tilde.csv", "--detect_only", level, "-o=nan/scan.csv", code=1)
    table = read_table(folder / "nan/scan.csv")[1]
    assert [(cells["Row"], cells["Score"]) for cells in table[3:]] == [("1", ""), ("3", "")]
    assert all(float(cells["Score"]) > 0 for cells in table[:3])

    done = call(2, *options, "--prompts=tilde.csv", "-o=nan/threshold.pt", code=1)
    assert "[1, 3]" in done.stdout
    again = (*options, "--prompts=tilde.csv", "-o=nan/threshold.pt", "--continue_run")
    assert "complete already" in call(2, *again, code=1).stdout
    content = torch.load(folder / "nan/threshold.pt", weights_only=True)
    assert torch.isnan(content["scores"]).all(dim=1).tolist() == [False, True, False, True, False]
    best = content["scores"][[0, 2, 4]].double().max(dim=1).values
    assert content["threshold"].item() == pytest.approx((best.mean() + best.std()).item(), abs=1e-9)
    assert record_of(folder / "nan/threshold.pt")["undecided_rows"] == [1, 3]


def test_no_statistics_of_activations_that_are_not_finite(
    undecided: Path, call: Call, folder: Path
) -> None:
    options = ("--version=broken", "--prompts=tilde.csv", "-o=nan/none.pt")
    done = call(1, *options, code=2)
    assert "tilde.csv: row 1" in done.stderr.splitlines()[-1] and "--rows" in done.stderr
    assert not (folder / "nan/none.pt").exists()
    call(1, *options, "--rows=0,2,4")  # as it advises


# Stable Diffusion v1-4 without its weights.


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for the published files, under the names that v1-4 looks for."""
    folder = tmp_path_factory.mktemp("paper")
    for name in ("prompts", "statistics", "results", "site"):
        (folder / name).mkdir()
    for name in ("memorized", "unmemorized", "additional"):
        text = "Caption;URL;type\na;;VM\nb;;TM\n"
        (folder / f"prompts/{name}_laion_prompts.csv").write_text(text)
    pair = tuple([torch.ones(w) for w in (320, 320, 640, 640, 1280, 1280, 1280)] for _ in range(2))
    torch.save(pair, folder / "statistics/statistics_additional_laion_prompts_v1_4.pt")
    rows = [[f"{c}", "", "[[1], [], [], [], [], [], [5]]", 0.3] for c in "ab"]
    with (folder / "results/memorization_statistics_v1_4.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(RESULT_COLUMNS[:6])
        writer.writerows([*row, *row[2:]] for row in rows)
    (folder / "site/sitecustomize.py").write_text(
        "import socket\n"
        "def refused(*args, **options):\n"
        "    raise AssertionError('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refused\n"
    )
    return folder


@pytest.mark.parametrize(
    ("script", "options", "says"),
    [
        (1, (), ("statistics/statistics_v1_4.pt", "additional_laion_prompts.csv")),
        (2, (), ("statistics/pairwise_ssim_v1_4.pt", "unmemorized_laion_prompts.csv")),
        (3, (), ("results/memorization_statistics_v1_4.csv", "published value 0.428")),
        (3, ("--detect_only",), ("results/memorization_scores_v1_4.csv", "published value 0.428")),
        (
            4,
            ("--original_images", "-o=generated_images_unblocked"),
            ("generated_images_unblocked",),
        ),
        (4, ("--refined_neurons", "-o=generated_images_blocked"), ("generated_images_blocked",)),
        (
            4,
            ("--block_random_neurons=2", "--unmemorized_prompts", "-o=x"),
            ("block_random_neurons",),
        ),
    ],
)
def test_a_dry_run_for_v1_4_needs_neither_weights_nor_network(
    script: int,
    options: tuple[str, ...],
    says: tuple[str, ...],
    paper: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(paper / "site"))
    if script == 3 and not options:
        (paper / "results/memorization_statistics_v1_4.csv").rename(paper / "away.csv")
    before = workspace.tree(paper)
    done = workspace.run(script, *options, "--dry_run", cwd=paper)
    if (paper / "away.csv").exists():
        assert workspace.tree(paper) == before
        (paper / "away.csv").rename(paper / "results/memorization_statistics_v1_4.csv")
    else:
        assert workspace.tree(paper) == before
    assert (done.returncode, done.stderr) == (0, "")
    for part in (*says, "CompVis/stable-diffusion-v1-4", "estimated time", "of weights unless"):
        assert part in done.stdout


# Ends that nobody planned.


def test_an_interrupted_run_says_how_to_go_on(warm: Warm, call: Call, folder: Path) -> None:
    options = (*DETECT, *LOCATED, "--search=plain", "-o=interrupted/result.csv")
    pid = warm.start(3, *options, cwd=folder)
    path = folder / "interrupted/result.csv"
    while not (path.exists() and len(lines(path)) >= 1):
        assert warm.ended(pid, wait=False) is None
        time.sleep(0.001)
    os.kill(pid, signal.SIGINT)
    done = warm.ended(pid, wait=True)
    assert done is not None and done.returncode == 130
    said = done.stderr.splitlines()[-1]
    assert said.endswith("interrupted; --continue_run goes on from here")
    assert "Traceback" not in done.stderr
    call(3, *options, "--continue_run")
    assert path.read_bytes() == (folder / RESULTS).read_bytes()


class OutOfMemoryError(RuntimeError):
    """What torch calls it on a GPU."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't "
            "allocate memory: you tried to allocate 8 bytes."
        ),
    ],
)
def test_out_of_memory_names_the_option_that_helps(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(args: Namespace) -> int:
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/4_generate_images.py"])
    with pytest.raises(SystemExit) as end:
        cli.run(main, Namespace(device="cuda", continue_run=False), lower="-b/--batch_size")
    said = capsys.readouterr()
    assert end.value.code == 1 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("4_generate_images.py: out of memory on cuda: lower -b/--batch_size")
    assert said.err.endswith(" and add --continue_run\n")


def test_a_script_without_continue_run_does_not_name_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(args: Namespace) -> int:
        raise args.error

    for error, way in [
        (MemoryError(), "out of memory on cuda:0: use --device cpu\n"),
        (KeyboardInterrupt(), "interrupted\n"),
        (OSError(28, "No space left on device"), "mend that, or name another path\n"),
    ]:
        with pytest.raises(SystemExit):
            cli.run(main, Namespace(device="cuda:0", error=error), lower=None)
        assert capsys.readouterr().err.endswith(way)


def test_a_full_disk_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(args: Namespace) -> int:
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")
        return 0

    with pytest.raises(SystemExit) as end:
        cli.run(main, Namespace(continue_run=True), lower="-b")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert ": No space left on device; " in said and "--continue_run" in said


def test_other_errors_are_not_hidden() -> None:
    def main(args: Namespace) -> int:
        raise RuntimeError("a defect of ours")

    with pytest.raises(RuntimeError, match="a defect of ours"):
        cli.run(main, Namespace(), lower="-b")


def test_a_message_stays_one_line_whatever_is_in_a_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(args: Namespace) -> int:
        raise InputError("no\nsuch\u2028file")

    with pytest.raises(SystemExit) as end:
        cli.run(main, Namespace(), lower="-b")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.endswith("no such file\n") and len(said.splitlines()) == 1
