"""What runs/paper.sh left behind, read so that nothing of another model, protocol or run slips in.

A cell of a table comes from a chain of files: the neurons of a run (script 3), its pictures (script
4), the summary of a metric. Every link is checked by the records: model, protocol, the run's own
settings, that each file was made from the one before it as that is now, and that pictures which are
compared were sampled alike.
Public: ``MAIN``, ``ALL_ON``, ``HOLDOUT_ALL_ON``, ``ALL``, ``KINDS``, ``READINGS``, ``STEPS``,
``DISENTANGLEMENT``, ``NotRunError``, ``Setting``, ``Scored``, ``PaperRuns``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from utils import metric_runs
from utils.detectors import DETECTORS
from utils.errors import InputError
from utils.files import Prompt, read_json, read_prompts, read_table, sha256_of_file
from utils.neuron_sets import Result, read_results
from utils.records import check_same_model, part_of
from utils.search_options import THRESHOLD_FLAGS
from utils.value_layers import SEARCHED_STAGES
from utils.versions import Source

MAIN = "blocked"  # the run of the paper's own method
ALL_ON, HOLDOUT_ALL_ON = "unblocked", "holdout_unblocked"  # pictures with all neurons on
COMPARES = "sscd_gen"  # the metric that looks at the reference's pictures too
# The same in compared pictures.
SAMPLING = ("seed", "num_samples", "steps", "guidance_scale", "dtype")
KINDS = ("VM", "TM")
ALL = "all"  # prompts of every type, and of none
# Run of the detection metric -> detector and the column of its scores.
READINGS = {
    "pairwise_ssim": ("pairwise_ssim", "Score"),
    "text_conditional_noise": ("text_conditional_noise", "Score"),
    "attention_entropy": ("attention_entropy", "Score"),
    "text_conditional_noise_first_step": ("text_conditional_noise", "Score First Step"),
    "attention_entropy_e": ("attention_entropy", "Score E"),
}
USUAL_BLOCKS = ",".join(SEARCHED_STAGES)
# What the metrics that run the model do by default, and so for runs/paper.sh.
STEPS = 50
DISENTANGLEMENT = {"together": False, "num_samples": 10, "num_inference_steps": STEPS}


class NotRunError(Exception):
    """A file that a table or figure needs is not there, not finished, or not what it should be."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class Setting:
    """One setting of the paper: how its run is called, and what its records must say.

    ``neurons`` names the run whose neurons it blocks ("" for none); ``pictures`` and ``search``
    are settings that the records of script 4 and of script 3 must hold; ``reference`` is the run
    whose pictures its own are compared with.
    """

    run: str
    neurons: str = ""
    initial: bool = False  # the initial sets are blocked instead of the refined ones
    pictures: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    protocol: str | None = None  # of its own; None: that of the tables
    blocks: str = USUAL_BLOCKS
    reference: str = ALL_ON


@dataclass(frozen=True)
class Scored:
    """A metric's score of every prompt that has one, as (row, type, score)."""

    prompts: Sequence[tuple[int, str, float]]

    def of(self, kind: str = ALL, rows: Sequence[int] | None = None) -> list[float]:
        """The scores of the prompts of a type that are among ``rows`` (None: all)."""
        return [
            score
            for row, own, score in self.prompts
            if kind in (ALL, own) and (rows is None or row in rows)
        ]


@dataclass(frozen=True)
class PaperRuns:
    """The outputs of one model's run, in the current folder."""

    source: Source
    protocol: str
    prompts_file: Path
    prompts: Sequence[Prompt]
    holdout_file: Path
    # Of pictures: every metric of every type asks for the same ones, all of them for the reference.
    _digests: dict[tuple[Path, tuple[int, ...], int], str] = field(
        default_factory=dict, repr=False, compare=False
    )

    # Metric -> the network that all its scores have: others would not be comparable.
    networks: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def _tag(self) -> str:
        return self.source.tag

    def types(self) -> dict[int, str]:
        """Row -> "VM", "TM" or ""."""
        return {prompt.row: prompt.type for prompt in self.prompts}

    def kinds(self) -> list[str]:
        """The types that occur, and ``ALL`` where a prompt has none of them."""
        found = set(self.types().values())
        return [kind for kind in KINDS if kind in found] + ([ALL] if found - {*KINDS} else [])

    def rows(self, kind: str) -> list[int]:
        """The memorized prompts of a type."""
        return [prompt.row for prompt in self.prompts if kind in (ALL, prompt.type)]

    def of_kind(self, kind: str, results: Sequence[Result]) -> list[Result]:
        """Those results that are of prompts of a type."""
        rows = set(self.rows(kind))
        return [result for result in results if result.row in rows]

    # Where things are, as runs/paper.sh names them.

    def neurons_path(self, run: str) -> Path:
        """The result file of script 3."""
        if run == MAIN:
            return self.source.results
        return Path(f"results/neurons_{self._tag}/{run}.csv")

    def folder(self, run: str) -> Path:
        """The pictures of script 4."""
        return Path(f"generated_images/{self._tag}_{run}")

    def metric_path(self, metric: str, run: str) -> Path:
        """A metric's scores; the summary lies beside them."""
        return Path(f"results/metrics_{self._tag}/{metric}_{run}.csv")

    # Reading, with every check.

    def record(
        self, path: Path, *, output: Path | None = None, of: Path | None = None
    ) -> dict[str, Any]:
        """A finished record. NotRunError, naming ``of`` (default: ``output``), if it is missing or
        unfinished, or if the bytes of its ``output`` are not those that it describes."""
        of = of or output or path
        if not path.is_file():
            raise NotRunError(of, "not there")
        record = read_json(path)
        if not record.get("finished"):
            raise NotRunError(of, "not finished")
        for part in ("settings", "model", "inputs"):
            if not isinstance(record.get(part), dict):
                raise NotRunError(of, f"its record {path} has no {part}")
        if output is not None:
            changed = not output.is_file()
            if changed or sha256_of_file(output) != record.get("output_sha256"):
                raise NotRunError(of, "changed since its record was written, or gone")
        return record

    def _of_this_model(self, record: Mapping[str, Any], path: Path, protocol: str | None) -> None:
        try:
            check_same_model(record, self.source, where=path)
        except InputError as error:
            raise NotRunError(path, str(error).partition(": ")[2]) from None
        found = record["settings"].get("protocol")
        if protocol is not None and found != protocol:
            raise NotRunError(path, f"made with protocol {found}, not {protocol}")

    def _as_expected(self, record: Mapping[str, Any], path: Path, want: Mapping[str, Any]) -> None:
        for name, value in want.items():
            found = record["settings"].get(name)
            if found != value:
                raise NotRunError(path, f"made with {name} = {found}, not {value}")

    def _of_these_neurons(self, record: Mapping[str, Any], path: Path, setting: Setting) -> None:
        if sha256_of_file(self.neurons_path(setting.neurons)) not in record["inputs"].values():
            raise NotRunError(path, "made with neurons that have been searched anew since")

    def _of_these_prompts(self, record: Mapping[str, Any], path: Path, prompts: Path) -> None:
        if not prompts.is_file():
            raise NotRunError(path, f"its prompt file {prompts} is not there")
        if sha256_of_file(prompts) not in record["inputs"].values():
            raise NotRunError(path, f"made with another prompt file than {prompts}")

    def search_record(self, setting: Setting) -> dict[str, Any]:
        """The record of the run that found a setting's neurons."""
        path = self.neurons_path(setting.neurons)
        record = self.record(path.with_suffix(".json"), output=path)
        self._of_this_model(record, path, setting.protocol or self.protocol)
        self._as_expected(record, path, setting.search)
        self._of_these_prompts(record, path, self.prompts_file)
        levels = {name: record["settings"].get(name) for name in THRESHOLD_FLAGS}
        if len(set(levels.values())) != 1:
            raise NotRunError(path, f"made with several thresholds: {levels}")
        blocks = record["model"].get("blocks", USUAL_BLOCKS)
        if blocks != setting.blocks:
            raise NotRunError(path, f"of the value layers of {blocks}, not {setting.blocks}")
        return record

    def results(self, setting: Setting) -> list[Result]:
        """The rows that script 3 wrote for a setting."""
        self.search_record(setting)
        return read_results(self.neurons_path(setting.neurons))

    def pictures_record(self, setting: Setting) -> dict[str, Any]:
        """The record of a setting's pictures, made from the neurons as they are now."""
        folder = self.folder(setting.run)
        if setting.neurons:
            self.search_record(setting)
        record = self.record(folder / "config.json", of=folder)
        needs_protocol = (setting.protocol or self.protocol) if setting.neurons else None
        self._of_this_model(record, folder, needs_protocol)
        self._as_expected(record, folder, setting.pictures)
        if setting.neurons:
            self._of_these_neurons(record, folder, setting)
        reference = self.folder(setting.reference) / "config.json"
        if reference.is_file():
            sampled = part_of(read_json(reference), "settings")
            self._as_expected(record, folder, {name: sampled.get(name) for name in SAMPLING})
        return record

    def scores(self, metric: str, score: str, setting: Setting, *, holdout: bool = False) -> Scored:
        """A metric's scores of a setting's pictures. NotRunError where a link of the chain does
        not hold, and for those of another network than the first that were asked for."""
        pictures = self.pictures_record(setting)
        path = self.metric_path(metric, setting.run)
        record = self.record(path.with_suffix(".json"), output=path)
        rows = pictures["settings"].get("rows")
        if record["settings"].get("rows") != rows:
            raise NotRunError(path, "made of other rows than the pictures")
        samples = pictures["settings"].get("num_samples")
        self._as_expected(record, path, {"num_samples": samples, "num_ref_samples": None})
        prompts_file = self.holdout_file if holdout else self.prompts_file
        self._of_these_prompts(record, path, prompts_file)
        if holdout or not setting.neurons:
            self._of_these_prompts(pictures, self.folder(setting.run), prompts_file)
        inputs = record["inputs"].values()
        if rows is None:
            rows = [p.row for p in (self.holdout_prompts if holdout else self.prompts)]
        folders = [setting.run, *([setting.reference] if metric == COMPARES else [])]
        for folder in map(self.folder, folders):
            if self._digest(folder, rows, record) not in inputs:
                raise NotRunError(path, f"made of other pictures than are in {folder} now")
        network = ", ".join(record["model"])
        files = {str(m.get("sha256", m.get("pretrained", ""))) for m in record["model"].values()}
        header, table = read_table(path)
        if score not in header:
            raise NotRunError(path, f"has no score '{score}'; made with other options")
        prompts = [(int(c["Row"]), c["type"], float(c[score])) for c in table if c[score]]
        network = f"{network} {' '.join(sorted(files))[:16]}".strip()
        others = self.networks.setdefault(metric, network)
        if network != others:
            raise NotRunError(path, f"measured with {network}, others with {others}")
        return Scored(prompts)

    def made_with_model(self, path: Path, *, of: Path) -> dict[str, Any]:
        """The finished record of anything, ``of``, that this model made."""
        record = self.record(path, of=of)
        self._of_this_model(record, of, None)
        return record

    def model_record(self, path: Path, setting: Setting | None = None) -> dict[str, Any]:
        """The record of the disentanglement of these prompts, by a setting's neurons as they are
        now, or by random ones (None)."""
        record = self.record(path.with_suffix(".json"), output=path)
        self._of_this_model(record, path, self.protocol)
        neurons = "random" if setting is None else "located"
        self._as_expected(record, path, {"neurons": neurons, **DISENTANGLEMENT})
        self._of_these_prompts(record, path, self.prompts_file)
        if setting is not None:
            self.search_record(setting)
            self._of_these_neurons(record, path, setting)
        return record

    def detection_record(self, path: Path, reading: str) -> dict[str, Any]:
        """The record of a detection metric (one of ``READINGS``), whose scores are of this model
        and of these prompts, sampled as the detector does by default."""
        detector, column = READINGS[reading]
        sampled = {
            "samples_per_prompt": DETECTORS[detector].samples,
            "num_inference_steps": STEPS,
            "guidance_scale": DETECTORS[detector].guidance_scale,
        }
        record = self.record(path.with_suffix(".json"), output=path)
        self._as_expected(record, path, {"score_column": column})
        left = [self.prompts_file, self.holdout_file]
        for name, sha256 in record["inputs"].items():
            scores = Path(name)
            if scores == self.prompts_file:
                continue
            made = self.record(scores.with_suffix(".json"), output=scores)
            if sha256_of_file(scores) != sha256:
                raise NotRunError(path, f"made with other scores than {scores} has now")
            self._of_this_model(
                made, scores, self.protocol if detector == "pairwise_ssim" else None
            )
            # Scripts 2 and 3 have one detector and do not name it.
            found = made["settings"].get("detector", "pairwise_ssim")
            if found != detector:
                raise NotRunError(path, f"made with scores of {found}, not {detector}")
            self._as_expected(made, scores, sampled)
            if left:
                self._of_these_prompts(made, scores, left.pop(0))
        if left:
            raise NotRunError(path, f"made without scores of {left[0]}")
        return record

    def layer_widths(self, setting: Setting) -> dict[str, int]:
        """Name of every searched value layer -> its neurons: from the record of the search, else
        (it was written by an earlier version) from that of script 1."""
        layers = self.search_record(setting).get("layers")
        if layers:
            return dict(layers)
        path = self.source.own_statistics
        record = self.record(path.with_suffix(".json"), output=path)
        self._of_this_model(record, path, None)
        return dict(record["value_layers"])

    def _digest(self, folder: Path, rows: Sequence[int], record: Mapping[str, Any]) -> str:
        samples = record["settings"]["num_samples"]
        key = folder, tuple(rows), samples
        if key not in self._digests:
            try:
                self._digests[key] = metric_runs.generated(folder, rows, samples).digest
            except InputError as error:
                raise NotRunError(folder, str(error).partition(": ")[2]) from None
        return self._digests[key]

    @cached_property
    def holdout_prompts(self) -> list[Prompt]:
        """All prompts of the hold-out file."""
        return read_prompts(self.holdout_file)
