"""A folder as runs/paper.sh leaves it, made of records and one-colour pictures: no model runs.

Public: ``PROMPTS``, ``HOLDOUT``, ``SCORES``, ``PaperFolder``.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from utils.detectors import DETECTORS
from utils.files import read_prompts
from utils.paper_runs import READINGS, PaperRuns, Setting
from utils.paper_settings import BLOCKED, HOLDOUT_UNBLOCKED, UNBLOCKED
from utils.search_options import THRESHOLD_FLAGS
from utils.versions import resolve

PROMPTS = ";Caption;type\n0;one;VM\n1;two;VM\n2;three;TM\n3;four & five;TM\n"
HOLDOUT = ";Caption\n0;plain\n1;usual\n"
SETS = ([[1, 2], [], [3]], [[1], [4], []], [[5], [], [6, 7]], [[], [], []])
SCORES = {0: 0.5, 1: 0.25, 2: 0.125, 3: 0.0}  # of every metric, unless told otherwise
METRICS = {"sscd_orig": "Max", "sscd_gen": "Median", "diversity": "Median", "alignment": "Median"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest(folder: Path, rows: Iterable[int]) -> str:
    """As ``metric_runs.generated`` has it: of the names and bytes of some rows' pictures."""
    total = hashlib.sha256()
    names = {f"{row:04d}" for row in rows}
    for picture in sorted(folder.glob("*.jpg")):
        if picture.name[4:8] not in names:
            continue
        total.update(f"{picture.name} {sha256(picture)}\n".encode())
    return total.hexdigest()


class PaperFolder:
    """Writes the outputs of single stages into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = resolve("tiny")
        (folder / "prompts.csv").write_text(PROMPTS)
        (folder / "holdout.csv").write_text(HOLDOUT)

    def runs(self, protocol: str = "published") -> PaperRuns:
        """To be used with the folder as the current one."""
        prompts = read_prompts(self.folder / "prompts.csv")
        return PaperRuns(self.source, protocol, Path("prompts.csv"), prompts, Path("holdout.csv"))

    def record(self, path: Path, settings: dict[str, Any], **more: Any) -> None:
        content = {
            "script": "some.py",
            "settings": {"device": "cpu", "dtype": "float32", "rows": None, **settings},
            "model": self.source.identity,
            "inputs": {},
            "finished": True,
            "seconds": 8.0,
            **more,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def neurons(self, run: str = "blocked", **settings: Any) -> Path:
        """A result file of script 3."""
        path = self.folder / self.runs().neurons_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            f"caption {i};;{s};{0.4 * any(s)};{s};{0.45 * any(s)};{i}\n" for i, s in enumerate(SETS)
        ]
        path.write_text(
            "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM;Row\n"
            + "".join(rows)
        )
        settings = {
            "protocol": "published",
            "prompts": 4,
            **dict.fromkeys(THRESHOLD_FLAGS, 0.31),
            **BLOCKED.search,
            **settings,
        }
        cost = {"VM": {"prompts": 2, "seconds": 3.0}, "TM": {"prompts": 1, "seconds": 4.0}}
        self.record(
            path.with_suffix(".json"),
            settings,
            inputs={"prompts": sha256(self.folder / "prompts.csv")},
            output_sha256=sha256(path),
            cost=cost,
            memorized=3,
            prompts=4,
        )
        return path

    def pictures(self, setting: Setting = BLOCKED, *, rows: int = 4, **settings: Any) -> Path:
        """A folder of script 4, two samples a prompt."""
        folder = self.folder / self.runs().folder(setting.run)
        folder.mkdir(parents=True, exist_ok=True)
        for row in range(rows):
            for sample in range(2):
                colour = (40 * row, 99 * sample, len(setting.run))
                Image.new("RGB", (16, 16), colour).save(folder / f"img_{row:04d}_{sample:02d}.jpg")
        inputs = {name: sha256(self.folder / name) for name in ("prompts.csv", "holdout.csv")}
        if setting.neurons:
            path = self.folder / self.runs().neurons_path(setting.neurons)
            inputs["neurons"] = sha256(path)
        settings = {
            "protocol": "published",
            "seed": 2,
            "num_samples": 2,
            "steps": 50,
            "guidance_scale": 7.0,
            "scaling_factor": 0.0,
            **setting.pictures,
            **settings,
        }
        self.record(folder / "config.json", settings, inputs=inputs, images=2 * rows)
        return folder

    def metric(
        self,
        metric: str,
        setting: Setting = BLOCKED,
        scores: Mapping[int, float | None] | None = None,
        *,
        holdout: bool = False,
        name: str | None = None,
        **settings: Any,
    ) -> Path:
        """A metric's scores of a setting's pictures, ``name`` being their column."""
        path = self.folder / self.runs().metric_path(metric, setting.run)
        folder = self.folder / self.runs().folder(setting.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        prompts = self.folder / ("holdout.csv" if holdout else "prompts.csv")
        kinds = {prompt.row: prompt.type for prompt in read_prompts(prompts)}
        scores = scores or {row: SCORES[row] for row in kinds}
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerow(["Row", "Caption", "type", name or METRICS[metric], "Samples"])
            writer.writerows([row, "", kinds[row], score, 2] for row, score in scores.items())
        inputs = {"pictures": digest(folder, scores)}
        if metric == "sscd_gen":
            reference = self.folder / self.runs().folder(setting.reference)
            if not reference.exists():
                self.pictures(HOLDOUT_UNBLOCKED if holdout else UNBLOCKED, rows=len(scores))
            inputs["reference"] = digest(reference, scores)
        self.record(
            path.with_suffix(".json"),
            {"num_samples": 2, **settings},
            model={"network": {"sha256": "abc"}},
            inputs={"prompts": sha256(prompts), **inputs},
            output_sha256=sha256(path),
        )
        return path

    def detection(self, reading: str = "pairwise_ssim", **found: Any) -> Path:
        """A detection metric with the scores of both kinds of prompts that it was made of."""
        detector, column = READINGS[reading]
        settings = {
            "protocol": "published",
            "detector": detector,
            "samples_per_prompt": DETECTORS[detector].samples,
            "num_inference_steps": 50,
            "guidance_scale": DETECTORS[detector].guidance_scale,
        }
        inputs = {}
        for prompts in ("prompts.csv", "holdout.csv"):
            scores = Path(f"results/detectors/{detector}_{prompts}")
            path = self.folder / scores
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("Row\n")
            self.record(
                path.with_suffix(".json"),
                settings,
                inputs={prompts: sha256(self.folder / prompts)},
                output_sha256=sha256(path),
            )
            inputs[str(scores)] = sha256(path)
        path = self.folder / self.runs().metric_path("detection", reading)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("Row\n")
        self.record(
            path.with_suffix(".json"),
            {"score_column": column},
            inputs=inputs,
            output_sha256=sha256(path),
            **found,
        )
        return path

    def disentanglement(self, neurons: str = "random") -> Path:
        """The disentanglement metric, by "random" or by "located" neurons, which are there."""
        path = self.folder / self.runs().metric_path("disentanglement", neurons)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("Row\n")
        inputs = {"prompts": sha256(self.folder / "prompts.csv")}
        if neurons == "located":
            located = self.folder / self.runs().neurons_path(BLOCKED.neurons)
            inputs["neurons"] = sha256(located)
        settings = {
            "protocol": "published",
            "prompts": 4,
            "neurons": neurons,
            "together": False,
            "num_samples": 10,
            "num_inference_steps": 50,
        }
        self.record(
            path.with_suffix(".json"),
            settings,
            inputs=inputs,
            output_sha256=sha256(path),
            layers=["a.to_v"],
            means={"1": [0.5]},
        )
        return path

    def whole(self, setting: Setting = BLOCKED, **settings: Any) -> None:
        """Pictures and the four metrics of a setting whose neurons are there."""
        self.pictures(setting, **settings)
        for metric in METRICS:
            self.metric(metric, setting)


def change(path: Path, *keys: str, to: Any) -> None:
    """Sets one field of a JSON file."""
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    path.write_text(json.dumps(content))
