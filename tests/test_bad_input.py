"""Bad input: one line on stderr, exit code 2, nothing written, torch never imported.

Every case is a valid command of a script with one thing changed: an option or an input file.
"""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import workspace
from safetensors.torch import save_file
from workspace import LOCATED, SCRIPTS, VALID

Alter = Callable[[Path], None]
STATISTICS = "statistics/statistics_model.pt"
THRESHOLD = "statistics/pairwise_ssim_model.pt"
RESULTS = "results/memorization_statistics_model.csv"
INDEX = "model_index.json"


@dataclass(frozen=True)
class Case:
    """``base`` are options that make another valid command of the script's usual one; ``change``
    are options that replace those of the same name (``--x=`` nothing: left out); ``alter`` changes
    a file. ``says``: what the line must hold."""

    words: str
    script: int
    says: tuple[str, ...]
    change: tuple[str, ...] = ()
    alter: Alter | None = None
    base: tuple[str, ...] = ()
    range: bool = False  # a plain number range
    torch: bool = False  # the check reads a tensor file


def merged(options: tuple[str, ...], changes: tuple[str, ...]) -> list[str]:
    """Options with others in their place; ``-`` before one takes it away."""
    names = [change.lstrip("!").partition("=")[0] for change in changes]
    kept = [option for option in options if option.partition("=")[0] not in names]
    return [*kept, *(change for change in changes if not change.startswith("!"))]


# How a file is altered.


def replace(name: str, old: str, new: str) -> Alter:
    def alter(folder: Path) -> None:
        text = (folder / name).read_bytes().decode()
        assert old in text
        (folder / name).write_bytes(text.replace(old, new, 1).encode())

    return alter


def write(name: str, data: bytes) -> Alter:
    def alter(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(data)

    return alter


def without_value_layers(folder: Path) -> None:
    """Beside the model another one, ``flat``."""
    (folder / "flat/unet").mkdir(parents=True)
    shutil.copy(folder / "model" / INDEX, folder / "flat" / INDEX)
    save_file({"conv_in.weight": torch.zeros(1)}, folder / "flat/unet/model.safetensors")


def cut(name: str, count: int) -> Alter:
    def alter(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-count])

    return alter


def remove(name: str) -> Alter:
    return lambda folder: (folder / name).unlink()


def in_record(name: str, **fields: object) -> Alter:
    """Changes fields of a record, wherever they stand in it."""

    def alter(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for field, value in fields.items():
            places = [part for part in (content, *content.values()) if isinstance(part, dict)]
            place = next(part for part in places if field in part)
            place[field] = value
        (folder / name).write_text(json.dumps(content))

    return alter


def tensors(name: str, make: Callable[[object], object]) -> Alter:
    def alter(folder: Path) -> None:
        torch.save(make(torch.load(folder / name)), folder / name)

    return alter


def with_nan(content: object) -> object:
    means, stds = content
    means[2][5] = torch.nan
    return means, stds


def in_results(change: Callable[[list[dict[str, str]]], None]) -> Alter:
    def alter(folder: Path) -> None:
        with (folder / RESULTS).open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter=";"))
        change(rows)
        with (folder / RESULTS).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=";", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    return alter


def cell(column: str, text: str) -> Alter:
    return in_results(lambda rows: rows[0].update({column: text}))


def without_column(name: str, column: str) -> Alter:
    def alter(folder: Path) -> None:
        with (folder / name).open(newline="", encoding="utf-8") as file:
            table = list(csv.reader(file, delimiter=";"))
        place = table[0].index(column)
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=";", lineterminator="\n")
            writer.writerows([cells[:place] + cells[place + 1 :] for cells in table])

    return alter


def without_record(alter: Alter) -> Alter:
    """For a tensor file from elsewhere: it comes without a record."""

    def both(folder: Path) -> None:
        alter(folder)
        (folder / STATISTICS).with_suffix(".json").unlink()

    return both


FULL = str([list(range(width)) for width in workspace.WIDTHS])
MODEL_ID = {"id": "elsewhere/model", "sha256": "0" * 64}
CONTINUED = "--continue_run"
RESUME_1 = (f"-o={STATISTICS}", CONTINUED)
RESUME_2 = (f"-o={THRESHOLD}", CONTINUED)
RESUME_3 = (f"-o={RESULTS}", *LOCATED, CONTINUED)
RESUME_4 = ("-o=images", CONTINUED)
ORIGINAL = ("!--refined_neurons", "--original_images", "--dataset=memorized.csv")
TYPED = ("--memorization_type=VM", "--dataset=memorized.csv")
TOP = ("!--refined_neurons", "--block_top_k_neurons=1")
LAYER_TOP = ("!--refined_neurons", "--block_top_k_neurons_per_layer=1")
GROUP_TOP = ("!--refined_neurons", "--block_top_k_neuron_subgroups=1")
RANDOM = ("!--refined_neurons", "--block_random_neurons")
ALL_FLAGS = (*LOCATED,)
UNFINISHED = {"finished": False}

CASES = [
    # Script 1: prompt files, rows, outputs, models.
    Case(
        "prompt file is missing",
        1,
        ("gone.csv: no such file", "check the path"),
        ("--prompts=gone.csv",),
    ),
    Case("prompt file is a folder", 1, ("model: no such file",), ("--prompts=model",)),
    Case(
        "no such column",
        1,
        ("no column 'Text'", "URL", "--caption_column"),
        ("--caption_column=Text",),
    ),
    Case(
        "empty caption",
        1,
        ("holdout.csv: row 2 has an empty caption", "--rows"),
        alter=replace("holdout.csv", "a green hat 3", " "),
    ),
    Case(
        "wrong separator",
        1,
        ("holdout.csv: no column 'Caption'", "separator ';'"),
        alter=lambda f: write("holdout.csv", (f / "holdout.csv").read_bytes().replace(b";", b","))(
            f
        ),
    ),
    Case(
        "unquoted separator in a caption",
        1,
        ("holdout.csv: row 1 has 4 cells", "not quoted"),
        alter=replace("holdout.csv", "Two boats", "Two; boats"),
    ),
    Case(
        "cut off inside a quoted cell",
        1,
        ("holdout.csv: line 7", "cut off", "quote"),
        alter=replace("holdout.csv", "map of Oslo;\n", '"map of Os'),
    ),
    Case(
        "cut off in the middle of a row",
        1,
        ("holdout.csv: row 5 has 2 cells, the header has 3", "cut off"),
        alter=cut("holdout.csv", 4),
    ),
    Case(
        "not UTF-8",
        1,
        ("holdout.csv: not UTF-8 text at byte 15", "save it as UTF-8"),
        alter=lambda f: write(
            "holdout.csv", (f / "holdout.csv").read_bytes().replace(b"one dog", b"\xe9n dog")
        )(f),
    ),
    Case(
        "empty prompt file",
        1,
        ("holdout.csv: empty file", "header"),
        alter=write("holdout.csv", b""),
    ),
    Case(
        "header without rows",
        1,
        ("holdout.csv: a header but no rows",),
        alter=write("holdout.csv", b";Caption;URL\n"),
    ),
    Case(
        "one prompt has no standard deviation",
        1,
        ("holdout.csv: 1 prompt given", "at least two"),
        ("--rows=3",),
    ),
    Case(
        "row that the file does not have",
        1,
        ("holdout.csv: no row 6, the last one is 5", "--rows"),
        ("--rows=0-6",),
    ),
    Case("range backwards", 1, ("--rows", "'5-2' runs backwards"), ("--rows=0,5-2",)),
    Case(
        "rows in words",
        1,
        ("--rows", "'all' is neither a row nor a range", "0-99"),
        ("--rows=all",),
    ),
    Case(
        "output exists",
        1,
        ("new/statistics.pt exists already", "--continue_run", "-o"),
        alter=write("new/statistics.pt", b"x"),
    ),
    Case(
        "only the record exists",
        1,
        ("new/statistics.json exists already", "--continue_run"),
        alter=write("new/statistics.json", b"{}"),
    ),
    Case(
        "output below a file",
        1,
        ("holdout.csv is a file, not a folder", "-o"),
        ("-o=holdout.csv/statistics.pt",),
    ),
    Case(
        "output with the record's name", 1, ("new/a.json", "name of the record"), ("-o=new/a.json",)
    ),
    Case("output without a name", 1, ("'/' names no file",), ("-o=/",)),
    Case(
        "output with a name too long for the disk",
        1,
        ("File name too long", "another path"),
        (f"-o={'a' * 300}.pt",),
    ),
    Case(
        "output whose name is no text",
        1,
        ("'-o=new/\\udcff.pt' is not UTF-8 text", "another name"),
        ("-o=new/\udcff.pt",),
    ),
    Case(
        "column without a name", 1, ("--caption_column: names no column",), ("--caption_column=",)
    ),
    Case(
        "more rows than can be",
        1,
        ("--rows", "more rows than any prompt file has"),
        ("--rows=0-9999999,10000000-19999999",),
    ),
    Case(
        "tokenizer without files",
        1,
        ("model/tokenizer: no * in it", "restore it"),
        alter=lambda folder: [path.unlink() for path in (folder / "model/tokenizer").iterdir()],
    ),
    Case(
        "unknown option",
        1,
        ("unrecognized arguments: --promts=a.csv", "-h lists"),
        ("--promts=a.csv",),
    ),
    Case(
        "abbreviated option",
        1,
        ("unrecognized arguments: --caption=Caption", "-h lists"),
        ("--caption=Caption",),
    ),
    Case(
        "device that is not there",
        1,
        ("--device cuda:0: not there (0 CUDA devices", "--device cpu"),
        ("--device=cuda:0",),
    ),
    Case("unknown device", 1, ("--device tpu: unknown device", "cuda:N"), ("--device=tpu",)),
    Case(
        "unknown version",
        1,
        ("--version v9: not a short name (v1-1,", "no such folder"),
        ("--version=v9",),
    ),
    Case(
        "transformer model",
        1,
        ("transformer: StableDiffusion3Pipeline is not supported", "transformer without them"),
        ("--version=transformer",),
        write(
            "transformer/model_index.json",
            b'{"_class_name": "StableDiffusion3Pipeline", "transformer": []}',
        ),
    ),
    Case(
        "U-Net without value layers",
        1,
        ("flat: no cross-attention value layers",),
        ("--version=flat",),
        without_value_layers,
    ),
    Case(
        "folder that is no model",
        1,
        ("--version statistics: statistics holds no model_index.json",),
        ("--version=statistics",),
    ),
    Case(
        "revision of a local folder",
        1,
        ("--revision main: model is a local folder",),
        ("--revision=main",),
    ),
    Case(
        "model without its index",
        1,
        ("--version model: model holds no model_index.json",),
        alter=remove(f"model/{INDEX}"),
    ),
    Case(
        "continued with another file's rows",
        1,
        ("statistics_model.json", "prompts = 6, this one has 4", "another output"),
        ("--rows=0-3",),
        base=RESUME_1,
    ),
    Case(
        "record is missing",
        1,
        ("its record statistics/statistics_model.json is missing", "-o"),
        alter=remove("statistics/statistics_model.json"),
        base=RESUME_1,
    ),
    Case(
        "record is cut off",
        1,
        ("statistics/statistics_model.json: not valid JSON",),
        alter=cut("statistics/statistics_model.json", 9),
        base=RESUME_1,
    ),
    Case(
        "continued with other prompts",
        1,
        ("holdout.csv = ", "the run to continue has"),
        alter=replace("holdout.csv", "one dog", "two dogs"),
        base=RESUME_1,
    ),
    # Script 2: what a threshold is measured with.
    Case("missing file", 2, ("gone.csv: no such file",), ("--prompts=gone.csv",)),
    Case(
        "column twice",
        2,
        ("holdout.csv: column 'URL' appears twice", "keep one"),
        alter=replace("holdout.csv", "Caption;URL", "URL;URL"),
    ),
    Case(
        "one prompt has no threshold",
        2,
        ("holdout.csv: 1 prompt given", "at least two"),
        ("--rows=0",),
    ),
    Case(
        "exchanged halves without guidance",
        2,
        ("--exchanged_guidance needs --guidance_scale above 1",),
        ("--exchanged_guidance",),
    ),
    Case(
        "unknown protocol",
        2,
        ("--protocol", "'first'", "'published', 'paper'"),
        ("--protocol=first",),
    ),
    Case("unknown precision", 2, ("--dtype", "'float8'", "'bfloat16'"), ("--dtype=float8",)),
    Case("a number in words", 2, ("--seed", "'one' is not a whole number"), ("--seed=one",)),
    Case(
        "one seed row has no pair",
        2,
        ("--samples_per_prompt", "1 is not within 2 to 1000"),
        ("--samples_per_prompt=1",),
        range=True,
    ),
    Case(
        "more steps than timesteps",
        2,
        ("--num_inference_steps", "1001 is not within 2"),
        ("--num_inference_steps=1001",),
        range=True,
    ),
    Case(
        "more steps than this model has timesteps",
        2,
        ("scheduler_config.json: 50 steps asked for, but the model has 40 timesteps",),
        alter=in_record("model/scheduler/scheduler_config.json", num_train_timesteps=40),
    ),
    Case(
        "text encoder is cut off",
        2,
        ("model/text_encoder/model.safetensors", "cut off", "restore it"),
        alter=cut("model/text_encoder/model.safetensors", 8),
    ),
    Case(
        "guidance that is no number",
        2,
        ("--guidance_scale", "nan is not within 1 to 1000"),
        ("--guidance_scale=nan",),
        range=True,
    ),
    Case("negative seed", 2, ("--seed", "-1 is not within 0"), ("--seed=-1",), range=True),
    Case(
        "no rows in a batch",
        2,
        ("--batch_size", "0 is not within 1"),
        ("--batch_size=0",),
        range=True,
    ),
    Case(
        "output exists",
        2,
        ("new/threshold.pt exists already", "--continue_run"),
        alter=write("new/threshold.pt", b"x"),
    ),
    Case(
        "scores of a run without its record",
        2,
        ("new/.threshold.pt.scores exists already",),
        alter=write("new/.threshold.pt.scores", b"x" * 24),
    ),
    Case(
        "output is a file used as a folder",
        2,
        ("holdout.csv is a file",),
        ("-o=holdout.csv/a/b.pt",),
    ),
    Case(
        "continued with another seed",
        2,
        ("pairwise_ssim_model.json", "seed = 1, this one has 2"),
        ("--seed=2",),
        base=RESUME_2,
    ),
    Case(
        "continued with another model",
        2,
        ("version = model, this one has other",),
        ("--version=other",),
        base=RESUME_2,
    ),
    Case(
        "weights are cut off",
        2,
        ("model/unet/diffusion_pytorch_model.safetensors", "cut off", "restore it"),
        alter=cut("model/unet/diffusion_pytorch_model.safetensors", 8),
    ),
    Case(
        "model index is not JSON",
        2,
        ("model/model_index.json: not valid JSON",),
        alter=write(f"model/{INDEX}", b"{"),
    ),
    # Script 3: statistics and thresholds that belong elsewhere, options at odds.
    Case("missing prompt file", 3, ("gone.csv: no such file",), ("--dataset=gone.csv",)),
    Case(
        "no statistics",
        3,
        (
            f"{STATISTICS}: no such statistics file",
            "1_compute_activations_statistics.py --version=model",
        ),
        alter=remove(STATISTICS),
    ),
    Case(
        "statistics of another model",
        3,
        (f"{STATISTICS}: belongs to the model elsewhere/model", "uses model"),
        alter=in_record("statistics/statistics_model.json", **MODEL_ID),
    ),
    Case(
        "record of another shape",
        3,
        (f"{STATISTICS}: belongs to the model None",),
        alter=in_record("statistics/statistics_model.json", model="tiny"),
    ),
    Case(
        "threshold record of another shape",
        3,
        (THRESHOLD, "measured with protocol = None"),
        alter=in_record("statistics/pairwise_ssim_model.json", settings=["tiny"]),
    ),
    Case(
        "statistics of other widths, no record",
        3,
        (f"{STATISTICS}: statistics of layers [32, 64, 64]", "[32, 64, 64, 64]", "script 1"),
        alter=without_record(tensors(STATISTICS, lambda pair: tuple(part[:3] for part in pair))),
        torch=True,
    ),
    Case(
        "statistics with NaN",
        3,
        (f"{STATISTICS}: holds NaN", "script 1"),
        alter=without_record(tensors(STATISTICS, with_nan)),
        torch=True,
    ),
    Case(
        "statistics that are no tensors",
        3,
        (f"{STATISTICS}: not a statistics file", "script 1"),
        alter=without_record(write(STATISTICS, b"means and deviations")),
        torch=True,
    ),
    Case(
        "statistics file was changed",
        3,
        (STATISTICS, "its bytes are not those", "script 1"),
        alter=tensors(STATISTICS, with_nan),
    ),
    Case(
        "statistics run not finished",
        3,
        (STATISTICS, "its run is not finished", "script 1 and --continue_run"),
        alter=in_record("statistics/statistics_model.json", **UNFINISHED),
    ),
    Case(
        "finished statistics were changed",
        1,
        (STATISTICS, "its bytes are not those", "another output"),
        alter=tensors(STATISTICS, with_nan),
        base=RESUME_1,
    ),
    Case(
        "threshold file given as statistics",
        3,
        (f"{THRESHOLD}: not a pair", "script 1"),
        (f"--statistics={THRESHOLD}",),
        torch=True,
    ),
    Case(
        "no threshold for a model of one's own",
        3,
        (
            f"{THRESHOLD}: no such threshold file",
            "2_compute_pairwise_ssim.py --version=model",
            f"-o={THRESHOLD}",
        ),
        alter=remove(THRESHOLD),
    ),
    Case(
        "threshold of another protocol",
        3,
        (THRESHOLD, "protocol = published, this run has paper", "script 2"),
        ("--protocol=paper",),
    ),
    Case(
        "threshold of another precision",
        3,
        (THRESHOLD, "dtype = float32, this run has bfloat16", "script 2"),
        ("--dtype=bfloat16",),
    ),
    Case(
        "threshold of another guidance",
        3,
        (THRESHOLD, "guidance_scale = 1.0, this run has 7.0", "script 2"),
        ("--guidance_scale=7",),
    ),
    Case(
        "threshold of other steps",
        3,
        (THRESHOLD, "num_inference_steps = 50, this run has 25"),
        ("--num_inference_steps=25",),
    ),
    Case(
        "threshold without exchanged halves",
        3,
        (THRESHOLD, "exchanged_guidance = False, this run has True"),
        ("--guidance_scale=7", "--exchanged_guidance"),
        alter=in_record("statistics/pairwise_ssim_model.json", guidance_scale=7.0),
    ),
    Case(
        "threshold of another model",
        3,
        (THRESHOLD, "belongs to the model elsewhere/model"),
        alter=in_record("statistics/pairwise_ssim_model.json", **MODEL_ID),
    ),
    Case(
        "threshold file was changed",
        3,
        (THRESHOLD, "its bytes are not those", "script 2"),
        alter=lambda f: write(THRESHOLD, (f / THRESHOLD).read_bytes() + b"\0")(f),
    ),
    Case(
        "threshold is NaN",
        3,
        ("pairwise_ssim_model.json: the threshold is nan", "script 2"),
        alter=in_record("statistics/pairwise_ssim_model.json", threshold=float("nan")),
    ),
    Case(
        "threshold run not finished",
        3,
        ("pairwise_ssim_model.json: no threshold in it", "--continue_run"),
        alter=in_record("statistics/pairwise_ssim_model.json", **UNFINISHED),
    ),
    Case(
        "threshold file with nothing to say",
        3,
        (f"--threshold_file {THRESHOLD}: not used", "leave one out"),
        (f"--threshold_file={THRESHOLD}",),
        base=ALL_FLAGS,
    ),
    Case(
        "exchanged halves without guidance",
        3,
        ("--exchanged_guidance needs --guidance_scale",),
        ("--exchanged_guidance",),
    ),
    Case(
        "nothing to select by",
        3,
        ("--no_theta and --no_top_k leave nothing",),
        ("--no_theta",),
        base=("--no_top_k",),
    ),
    Case(
        "k without top-k",
        3,
        ("--initial_k has no effect with --no_top_k", "leave one"),
        ("--initial_k=0",),
        base=("--no_top_k",),
    ),
    Case(
        "theta without theta",
        3,
        ("--min_theta has no effect with --no_theta",),
        ("--min_theta=2",),
        base=("--no_theta",),
    ),
    Case(
        "two refinement thresholds",
        3,
        ("--ssim_threshold_refinement has no effect with --rel_threshold_refinement",),
        ("--ssim_threshold_refinement=0.4",),
        base=("--rel_threshold_refinement=0.1",),
    ),
    Case(
        "search options for a scan",
        3,
        ("--no_theta has no effect with --detect_only",),
        ("--no_theta",),
        base=("--detect_only",),
    ),
    Case(
        "a k of 0 for a scan",
        3,
        ("--initial_k has no effect with --detect_only",),
        ("--initial_k=0",),
        base=("--detect_only",),
    ),
    Case(
        "rows of several processes' run without its record",
        3,
        ("new/.result.csv.part-0 exists already",),
        alter=write("new/.result.csv.part-0", b"x"),
    ),
    Case(
        "a batch that only the plain search can do with",
        3,
        ("--search=bisect: a batch of 3 does not hold all 4 seed rows", "--search=plain"),
        ("--search=bisect",),
        base=("--batch_size=3",),
    ),
    Case(
        "continued with a batch that turns to another search",
        3,
        ("search_method = exact, this one has plain",),
        ("--batch_size=3",),
        base=RESUME_3,
    ),
    Case(
        "score above one",
        3,
        ("--pairwise_ssim_threshold", "1.5 is not within 0 to 1"),
        ("--pairwise_ssim_threshold=1.5",),
        range=True,
    ),
    Case(
        "theta that never falls",
        3,
        ("--theta_reduction_per_step", "0 is not within above 0"),
        ("--theta_reduction_per_step=0",),
        range=True,
    ),
    Case(
        "infinite factor",
        3,
        ("-sf/--scaling_factor", "inf is not within -10 to 10"),
        ("--scaling_factor=inf",),
        range=True,
    ),
    Case(
        "k of another world",
        3,
        ("--initial_k", "'1e99' is not a whole number"),
        ("--initial_k=1e99",),
        range=True,
    ),
    Case(
        "abbreviated threshold",
        3,
        ("unrecognized arguments: --pairwise_ssim=0.4",),
        ("--pairwise_ssim=0.4",),
    ),
    Case("output exists", 3, (f"{RESULTS} exists already", "-o"), (f"-o={RESULTS}",)),
    Case(
        "continued with another threshold",
        3,
        ("pairwise_ssim_threshold = 0.075, this one has 0.08",),
        ("--pairwise_ssim_threshold=0.08",),
        base=RESUME_3,
    ),
    Case(
        "continued with another factor",
        3,
        ("scaling_factor = 0.0, this one has 0.5",),
        ("--scaling_factor=0.5",),
        base=RESUME_3,
    ),
    Case(
        "a row that the file does not have",
        3,
        ("memorized.csv: no row 17", "--rows"),
        ("--rows=17",),
    ),
    # Script 4: result files, modes, what there is to block.
    Case(
        "no result file",
        4,
        (f"{RESULTS}: no such result file", "script 3", "-f"),
        alter=remove(RESULTS),
    ),
    Case(
        "result file cut off at the end",
        4,
        (f"{RESULTS}: the last row is cut off", "--continue_run"),
        alter=cut(RESULTS, 1),
    ),
    Case(
        "result file cut off in a row",
        4,
        (f"{RESULTS}: row 5 has", "cells", "cut off"),
        alter=cut(RESULTS, 30),
    ),
    Case(
        "missing column",
        4,
        (f"{RESULTS}: no column 'Refined Neurons'", "script 3"),
        alter=without_column(RESULTS, "Refined Neurons"),
    ),
    Case(
        "neuron out of range",
        4,
        (f"{RESULTS}: row 0, 'Refined Neurons': neuron 64 of layer 1 is out of range", "0 to 63"),
        alter=cell("Refined Neurons", "[[], [3, 64], [], []]"),
    ),
    Case(
        "negative neuron",
        4,
        ("row 0, 'Initial Neurons': layer 0", "whole numbers"),
        alter=cell("Initial Neurons", "[[-1], [], [], []]"),
    ),
    Case(
        "neuron twice",
        4,
        ("row 0, 'Refined Neurons': layer 2 names neuron 7 twice",),
        alter=cell("Refined Neurons", "[[], [], [7, 3, 7], []]"),
    ),
    Case(
        "no rows in a result file",
        4,
        (f"{RESULTS}: no row 0, the last one is -1",),
        ("--rows=0",),
        alter=lambda f: write(RESULTS, (f / RESULTS).read_bytes().split(b"\n")[0] + b"\n")(f),
    ),
    Case(
        "wrong number of layers",
        4,
        ("row 0, 'Refined Neurons': 7 layers, but the model has 4",),
        alter=cell("Refined Neurons", "[[1], [], [], [], [], [], []]"),
    ),
    Case(
        "cell that is no list",
        4,
        ("row 0, 'Refined Neurons': '[[1, 2], [' is not a list", "write [["),
        alter=cell("Refined Neurons", "[[1, 2], ["),
    ),
    Case(
        "score that is no number",
        4,
        ("row 0, 'Refined SSIM': the score is nan",),
        alter=cell("Refined SSIM", "nan"),
    ),
    Case(
        "row number twice",
        4,
        ("row 1: 'Row' 0 appears twice",),
        alter=in_results(lambda rows: rows[1].update(Row="0")),
    ),
    Case(
        "result of another protocol",
        4,
        (f"{RESULTS}: found with protocol published", "--protocol=published"),
        ("--protocol=paper",),
    ),
    Case(
        "result of another model",
        4,
        (f"{RESULTS}: belongs to the model model", "uses other"),
        ("--version=other",),
        base=(f"--result_file={RESULTS}",),
    ),
    Case(
        "run of script 3 not finished",
        4,
        (f"{RESULTS}: the run is not finished", "--continue_run"),
        alter=in_record("results/memorization_statistics_model.json", **UNFINISHED),
    ),
    Case(
        "two modes",
        4,
        ("--initial_neurons: not allowed with argument --refined_neurons",),
        ("--initial_neurons",),
    ),
    Case(
        "no mode",
        4,
        ("one of the arguments --original_images", "is required"),
        ("!--refined_neurons",),
    ),
    Case("no output", 4, ("required: -o/--output",), ("!-o",)),
    Case("output without a name", 4, ("-o/--output: names no folder",), ("-o=",)),
    Case(
        "folder of other prompts",
        4,
        (".: no such file",),
        ("--unmemorized_prompts=.",),
        base=TOP,
    ),
    Case(
        "continued with another decoder",
        4,
        ("images/config.json", "the run to continue has vae_sha256 = "),
        alter=in_record("model/vae/config.json", scaling_factor=0.5),
        base=RESUME_4,
    ),
    Case(
        "too few other neurons for a control",
        4,
        ("layer 0: 4 random neurons asked for, but only 0", "block fewer"),
        alter=in_results(lambda rows: rows[4].update({"Refined Neurons": FULL})),
        base=RANDOM,
    ),
    Case(
        "more neurons than were located",
        4,
        ("different neurons were located, 500 asked for",),
        ("--block_top_k_neurons=500",),
        base=TOP,
    ),
    Case(
        "more neurons per layer than located",
        4,
        ("no layer has more than", "60 asked for"),
        ("--block_top_k_neurons_per_layer=60",),
        base=LAYER_TOP,
    ),
    Case(
        "more sets than were located",
        4,
        ("only 3 different neuron sets were located, 4 asked for",),
        ("--block_top_k_neuron_subgroups=4",),
        base=GROUP_TOP,
    ),
    Case(
        "nothing was located",
        4,
        ("no located neurons to block",),
        alter=in_results(
            lambda rows: [
                row.update({"Initial Neurons": str([[]] * 4), "Refined Neurons": str([[]] * 4)})
                for row in rows
            ]
        ),
    ),
    Case(
        "own sets for other prompts",
        4,
        ("--refined_neurons blocks each memorized prompt's own", "--block_top_k_neurons K"),
        ("--unmemorized_prompts=holdout.csv",),
    ),
    Case(
        "types that the file does not have",
        4,
        ("memorized.csv: no prompt of type VM in column 'type'", "-d"),
        alter=without_column("memorized.csv", "type"),
        base=TYPED,
    ),
    Case(
        "types of another prompt file",
        4,
        (f"{RESULTS}: row 5 is not the caption of that row in memorized.csv", "-d"),
        alter=replace("memorized.csv", "grey cat", "grey dog"),
        base=TYPED,
    ),
    Case(
        "unknown type",
        4,
        ("--memorization_type", "'XM'", "'VM', 'TM'"),
        ("--memorization_type=XM",),
        base=TYPED,
    ),
    Case(
        "factor with nothing blocked",
        4,
        ("--scaling_factor 0.5 has no effect with --original_images",),
        ("--scaling_factor=0.5",),
        base=ORIGINAL,
    ),
    Case(
        "result file with nothing blocked",
        4,
        (f"--result_file {RESULTS} has no effect with --original_images",),
        (f"--result_file={RESULTS}",),
        base=ORIGINAL,
    ),
    Case(
        "prompt file without effect",
        4,
        ("--dataset memorized.csv has no effect here", "captions are those of the result"),
        ("--dataset=memorized.csv",),
    ),
    Case(
        "caption column without effect",
        4,
        ("--caption_column Caption has no effect here", "captions are those of the result"),
        ("--caption_column=Caption",),
    ),
    Case(
        "seed of random neurons without random neurons",
        4,
        ("--random_seed 3 has no effect with --refined_neurons", "leave it out"),
        ("--random_seed=3",),
    ),
    Case("row that was not located", 4, (f"{RESULTS}: no row 9", "--rows"), ("--rows=0,9",)),
    Case("no images", 4, ("--num_samples", "0 is not within 1"), ("-n=0",), range=True),
    Case(
        "image folder is a file",
        4,
        ("memorized.csv is a file, not a folder", "-o"),
        ("-o=memorized.csv",),
    ),
    Case(
        "images without their record",
        4,
        ("new/images/img_0000_00.jpg exists already",),
        alter=write("new/images/img_0000_00.jpg", b"x"),
    ),
    Case(
        "continued with other steps",
        4,
        ("images/config.json", "steps = 3, this one has 4"),
        ("--steps=4",),
        base=RESUME_4,
    ),
]


@pytest.fixture(scope="module")
def template() -> Path:
    """The workspace, to be read only."""
    return workspace.built()


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that, on PYTHONPATH, makes every import of a heavy package an error."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refused:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'diffusers', 'transformers'):\n"
        "            raise AssertionError(f'{name} was imported')\n"
        "sys.meta_path.insert(0, Refused())\n"
    )
    return str(folder)


BASES = sorted({(case.script, case.base) for case in CASES} | {(script, ()) for script in VALID})


@pytest.mark.parametrize(("script", "base"), BASES)
def test_the_commands_that_are_changed_are_valid(
    template: Path, script: int, base: tuple[str, ...], warm: workspace.Warm
) -> None:
    before = workspace.tree(template)
    done = warm.run(script, *merged(VALID[script], base), "--dry_run", cwd=template)
    assert (done.returncode, done.stderr) == (0, "")
    assert "estimated time" in done.stdout
    assert workspace.tree(template) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.script}: {case.words}")
def test_bad_input_is_refused_in_one_line_and_changes_nothing(
    case: Case, template: Path, without_torch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workspace.fresh(tmp_path / "workspace")
    if case.alter:
        case.alter(folder)
    before = workspace.tree(folder)
    if not case.torch:
        monkeypatch.setenv("PYTHONPATH", without_torch)
    options = merged(tuple(merged(VALID[case.script], case.base)), case.change)
    done = workspace.run(case.script, *options, cwd=folder)
    assert done.returncode == 2, done
    assert done.stderr.endswith("\n") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{SCRIPTS[case.script].name}: ")
    for part in case.says:
        assert part in done.stderr
    assert done.stdout == ""
    assert workspace.tree(folder) == before


def test_rows_that_are_left_out_are_not_looked_at(
    template: Path, tmp_path: Path, warm: workspace.Warm
) -> None:
    folder = workspace.fresh(tmp_path / "workspace")
    replace("memorized.csv", "grey cat on a red chair", " ")(folder)
    unblocked = ("!--refined_neurons", "--original_images", "-d=memorized.csv")
    options = merged(VALID[4], unblocked)
    done = warm.run(4, *options, "--rows=0-4", "--dry_run", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    done = warm.run(4, *options, "--rows=4-5", "--dry_run", cwd=folder)
    assert done.returncode == 2 and "row 5 has an empty caption" in done.stderr


def test_a_reader_that_has_gone_is_no_error_of_ours(template: Path) -> None:
    """Also where its absence shows only as Python ends."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(SCRIPTS[1]), *VALID[1], "--dry_run"],
        cwd=template,
        env=workspace.environment() | {"PYTHONUNBUFFERED": ""},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_never_imports_torch(
    script: int, without_torch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", without_torch)
    done = workspace.run(script, "-h", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(f"python {SCRIPTS[script].name}") == 2, "two complete commands"


def test_the_guard_against_torch_does_guard(
    template: Path, without_torch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", without_torch)
    done = workspace.run(3, *VALID[3], "--dry_run", cwd=template)
    assert done.returncode == 1 and "torch was imported" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_number_is_too_absurd_to_be_refused(
    script: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every option that takes a number: what is none, and what no script can do."""
    spec = importlib.util.spec_from_file_location(f"script_{script}", SCRIPTS[script])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [SCRIPTS[script].name, "-h"])
    with pytest.raises(SystemExit):
        module.parse_args()
    listed = capsys.readouterr().out
    numbers = {
        words[0].rstrip(",")
        for words in map(str.split, listed.splitlines())
        if words and words[0].startswith("-") and {"INT", "FLOAT", "K", "[K]"} & set(words)
    }
    assert len(numbers) == {1: 0, 2: 5, 3: 15, 4: 12}[script], numbers
    valid = merged(VALID[script], ("!--refined_neurons",)) if script == 4 else VALID[script]
    for name in numbers:
        for value in ("nan", "inf", "-1e99", "1e99", "", "ten", "9" * 5000):
            option = [f"{name}={value}"] if name.startswith("--") else [name, value]
            monkeypatch.setattr(sys, "argv", [SCRIPTS[script].name, *valid, *option])
            with pytest.raises(SystemExit) as end:
                module.parse_args()
            said = capsys.readouterr()
            assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
            assert name in said.err and ("is not" in said.err or "expected one" in said.err)
