"""The paper's tables from what runs/paper.sh left, ours beside the published.

Public: ``MEASURES``, ``Published``, ``read_published``, ``published_comparisons``, ``Builder``.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

from utils.errors import InputError
from utils.neuron_sets import Result, by_frequency, counted, size
from utils.paper_plan import (
    command_for,
    counts_of_most_frequent,
    output_of,
    shares_of_pruning,
)
from utils.paper_runs import ALL, KINDS, MAIN, NotRunError, PaperRuns, Scored, Setting
from utils.paper_settings import (
    BLOCKED,
    BLOCKS,
    DEFAULT,
    HOLDOUT_UNBLOCKED,
    PAPER_PROTOCOL,
    SETTINGS,
    UNBLOCKED,
    methods,
    most_frequent,
)
from utils.tables import NONE, NOT_RUN, Comparison, Measured, Number, Table, comparison_table, shown

T = TypeVar("T")

# Measure, as in metrics/paper_tables.csv -> heading and decimals.
MEASURES = {
    "neurons": ("neurons", 1),
    "sscd_orig": ("SSCD_Orig", 3),
    "sscd_gen": ("SSCD_Gen", 3),
    "d_sscd": ("D_SSCD", 3),
    "a_clip": ("A_CLIP", 3),
}
# Measure -> metric, and the score of its summary.
METRICS = {
    "sscd_orig": ("sscd_orig", "Max"),
    "sscd_gen": ("sscd_gen", "Median"),
    "d_sscd": ("diversity", "Median"),
    "a_clip": ("alignment", "Median"),
}
TITLES = {
    "1": ("table_1_main_results", "Table 1: main results"),
    "4": ("table_4_ablations", "Table 4: ablations"),
}
# Measure, as in metrics/paper_values.csv -> heading, and its name in a summary.
DETECTION = {
    "auroc": ("AUROC", "auroc"),
    "accuracy": ("accuracy", "accuracy"),
    "tpr": ("TPR at 1%", "tpr_at_1_fpr_below"),
    "tpr nearest": ("TPR near 1%", "tpr_at_1_fpr_nearest"),  # nobody published it
}
PUBLISHED_DETECTION = tuple(DETECTION)[:3]
DETECTORS = {
    "pairwise_ssim": "pairwise SSIM (NeMo)",
    "text_conditional_noise": "text-conditional noise (Wen et al.)",
    "attention_entropy": "cross-attention entropy (Ren et al.)",
}
FURTHER_READINGS = {
    "text_conditional_noise_first_step": "text-conditional noise, first step (Wen et al.)",
    "attention_entropy_e": "cross-attention entropy E (Ren et al.)",
}
# Metrics that work with the model itself: stages of their own in the table of costs.
WITH_MODEL = ("compute_detector_scores.py", "attribute_tokens.py", "compute_disentanglement.py")
MOST_SHARED = 20  # neurons that the table of shared ones names
DEVIATION = (
    "A number is the median over prompts ± the median absolute deviation. The difference is ours "
    "minus the published value, in published deviations; empty where none was published, or 0."
)


@dataclass(frozen=True)
class Published:
    """The paper's numbers: (table, setting, type) -> measure -> number, in the files' order."""

    rows: Mapping[tuple[str, str, str], Mapping[str, Number]]

    def of(self, table: str) -> dict[tuple[str, str], Mapping[str, Number]]:
        """(setting, type) -> numbers of one table."""
        return {key[1:]: numbers for key, numbers in self.rows.items() if key[0] == table}


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; it ships with the project, restore it")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise InputError(f"{path}: no column '{missing[0]}'; restore the file")
    return rows


def _number(text: str, deviation: str, path: Path) -> Number:
    for part in filter(None, (text, deviation)):
        try:
            float(part)
        except ValueError:
            raise InputError(f"{path}: '{part}' is not a number; restore the file") from None
    return Number(text, deviation)


def read_published(tables: Path, values: Path) -> Published:
    """``metrics/paper_tables.csv`` and ``metrics/paper_values.csv``, every number as written.
    InputError for a file that is missing or malformed."""
    rows: dict[tuple[str, str, str], dict[str, Number]] = {}
    columns = ["table", "setting", "type", *MEASURES, *(f"{measure}_dev" for measure in MEASURES)]
    for cells in _read_csv(tables, columns):
        rows[cells["table"], cells["setting"], cells["type"]] = {
            measure: _number(cells[measure], cells[f"{measure}_dev"], tables)
            for measure in MEASURES
        }
    for cells in _read_csv(values, ("table", "setting", "type", "measure", "value")):
        key = cells["table"], cells["setting"], cells["type"]
        rows.setdefault(key, {})[cells["measure"]] = _number(cells["value"], "", values)
    return Published(rows)


def published_comparisons(
    published: Published,
    table: str,
    ours: Callable[[str, str], tuple[Mapping[str, Measured | None], str]],
    settings: Sequence[str] = (),
    kinds: Sequence[str] = KINDS,
) -> list[Comparison]:
    """The rows of one published table and those of our ``settings``, in the order of the latter;
    of each the types that were published and ours, ``kinds``. ``ours``: (setting, type) -> (what
    was measured, how many prompts)."""
    known = published.of(table)
    rows = []
    for setting in dict.fromkeys([*settings, *(name for name, _ in known)]):
        own = [kind for name, kind in known if name == setting]
        for kind in dict.fromkeys([*own, *kinds]):
            measured, prompts = ours(setting, kind)
            numbers = known.get((setting, kind), {})
            rows.append(Comparison(setting, kind, numbers, measured, prompts))
    return rows


def spread(values: Sequence[float]) -> Measured | None:
    """Median and median absolute deviation; None of nothing."""
    if not values:
        return None
    middle = median(values)
    return Measured(middle, median(abs(value - middle) for value in values))


def _mean(several: Sequence[Measured | None]) -> Measured | None:
    """The mean over repetitions; None where one of them had nothing to measure."""
    known = [one for one in several if one is not None]
    if len(known) < len(several):
        return None
    return Measured(fmean(one.value for one in known), fmean(one.deviation or 0 for one in known))


def _count(counts: Mapping[str, int], prompts: int) -> str:
    """How many of the prompts have scores (measure -> number), in words."""
    most = max(counts.values(), default=0)
    fewer = [f"{MEASURES[name][0]} {n}" for name, n in counts.items() if n != most]
    return (f"{most} of {prompts}" if counts else "") + (f" ({', '.join(fewer)})" if fewer else "")


@dataclass
class _Missing:
    """What could not be read, for one table's notes: path -> reason, and who wanted it."""

    found: dict[Path, tuple[str, list[str]]] = field(default_factory=dict)

    def attempt(self, what: str, get: Callable[[], T]) -> T | None:
        """What ``get`` returns; None, kept for the notes, where it was not run."""
        try:
            return get()
        except NotRunError as error:
            self._add(error.path, error.reason, what)
            return None

    def take(self, other: "_Missing") -> None:
        """Adds what another one has kept."""
        for path, (reason, wanted) in other.found.items():
            for what in wanted:
                self._add(path, reason, what)

    def _add(self, path: Path, reason: str, what: str) -> None:
        wanted = self.found.setdefault(path, (reason, []))[1]
        if what not in wanted:
            wanted.append(what)


class Builder:
    """Builds the tables of one model's runs. What was not run is named, with its command."""

    def __init__(self, runs: PaperRuns, published: Published, plan: Sequence[str]) -> None:
        self._runs = runs
        self._published = published
        self._plan = list(plan)

    def tables(self) -> list[Table]:
        """All of them."""
        return [
            self.main_or_ablations("1"),
            self.cost(),
            self.disentanglement(),
            self.main_or_ablations("4"),
            self.detection(),
            self.neurons_per_prompt(),
            self.neurons_per_layer(),
            self.shared_neurons(),
            self.most_frequent(),
            self.blocks(),
            self.protocols(),
        ]

    # What cells are made of.

    def _notes(self, missing: _Missing) -> list[str]:
        return [
            f"{NOT_RUN}: {', '.join(wanted)} ({path}: {reason}). Command"
            f"{', once that is removed' if path.exists() else ''}: "
            f"{command_for(path, self._plan, self._runs.source)}"
            for path, (reason, wanted) in missing.found.items()
        ]

    def _scores(self, measure: str, setting: Setting, *, holdout: bool = False) -> Scored:
        metric, score = METRICS[measure]
        return self._runs.scores(metric, score, setting, holdout=holdout)

    def _sizes(self, setting: Setting, kind: str, rows: Sequence[int] | None) -> list[int]:
        """How many neurons are blocked for each memorized prompt of this type among ``rows``
        (None: those that have pictures)."""
        if rows is None and setting.neurons == MAIN and setting.run != MAIN:
            rows = self._runs.pictures_record(setting)["settings"]["rows"]
        results = [
            result
            for result in self._runs.of_kind(kind, self._runs.results(setting))
            if result.memorized and (rows is None or result.row in rows)
        ]
        return [size((r.initial if setting.initial else r.refined) or []) for r in results]

    def _measured(
        self,
        what: str,
        setting: Setting,
        kind: str,
        missing: _Missing,
        rows: Sequence[int] | None = None,
    ) -> tuple[dict[str, Measured | None], str]:
        """All measures of one run (None: nothing to measure), and the prompts that counted, of
        those among ``rows`` (None: all that it has)."""
        if kind not in (ALL, *self._runs.kinds()):
            return dict.fromkeys(MEASURES), f"no {kind} prompts"
        found: dict[str, Measured | None] = {}
        counts: dict[str, int] = {}
        if not setting.neurons:
            if missing.attempt(what, lambda: self._runs.pictures_record(setting)):
                found["neurons"] = Measured(0)
        else:
            sizes = missing.attempt(what, lambda: self._sizes(setting, kind, rows))
            if sizes is not None:
                found["neurons"] = spread(sizes)
        for measure in METRICS:
            scored = missing.attempt(what, partial(self._scores, measure, setting))
            if scored is not None:
                scores = scored.of(kind, rows)
                found[measure] = spread(scores)
                counts[measure] = len(scores)
        return found, _count(counts, len(self._runs.rows(kind)))

    def _common_rows(self, settings: Iterable[Setting]) -> list[int] | None:
        """The prompts that all of these settings have pictures of, as far as they were run; None:
        all prompts."""
        common: set[int] | None = None
        for setting in settings:
            try:
                rows = self._runs.pictures_record(setting)["settings"]["rows"]
            except NotRunError:
                continue  # named where its own row is made
            if rows is not None:
                common = set(rows) if common is None else common & set(rows)
        return None if common is None else sorted(common)

    def _repeated(
        self, what: str, settings: Sequence[Setting], kind: str, missing: _Missing
    ) -> tuple[dict[str, Measured | None], str]:
        """The mean over those repetitions that were run whole, of the measures that all of them
        have; the gaps of those that were planned. The first one's where none was."""
        if len(settings) == 1 or kind not in (ALL, *self._runs.kinds()):
            return self._measured(what, settings[0], kind, missing)
        tried = [(_Missing(), setting) for setting in settings]
        each = [self._measured(setting.run, setting, kind, gaps) for gaps, setting in tried]
        whole = [one for one, (gaps, _) in zip(each, tried, strict=True) if not gaps.found]
        if not whole:
            return self._measured(what, settings[0], kind, missing)
        planned = [output_of(command, self._runs.source) for command in self._plan]
        for gaps, setting in tried:
            if self._runs.folder(setting.run) in planned:
                missing.take(gaps)
        measured = {name: _mean([one[name] for one, _ in whole]) for name in MEASURES}
        return measured, f"{whole[0][1]}, {len(whole)} draws"

    def _looked_with(self) -> list[str]:
        networks = ", ".join(f"{metric}: {name}" for metric, name in self._runs.networks.items())
        return [f"Measured with {networks}."] if networks else []

    # The tables.

    def main_or_ablations(self, table: str) -> Table:
        """Tables 1 and 4."""
        missing = _Missing()
        settings = methods(shares_of_pruning(self._plan)) if table == "1" else SETTINGS[table]

        others = [each for name, (each, *_) in settings.items() if name != DEFAULT]
        common = self._common_rows(others) if DEFAULT in settings else None

        def ours(setting: str, kind: str) -> tuple[Mapping[str, Measured | None], str]:
            if setting == DEFAULT:
                return self._measured(setting, BLOCKED, kind, missing, common)
            return self._repeated(setting, settings[setting], kind, missing)

        kinds = self._runs.kinds()
        rows = published_comparisons(self._published, table, ours, list(settings), kinds)
        notes = [DEVIATION, *self._looked_with(), *self._notes(missing)]
        return comparison_table(*TITLES[table], rows, MEASURES, notes)

    def cost(self) -> Table:
        """Table 2: seconds per prompt of localization, and what every stage took."""
        missing = _Missing()
        published = {
            kind: (setting, numbers["seconds per prompt"].text)
            for (setting, kind), numbers in self._published.of("2").items()
        }
        rows = []
        record = missing.attempt("localization", lambda: self._runs.search_record(BLOCKED))
        for kind in dict.fromkeys([*published, *self._runs.kinds()]):
            setting, number = published.get(kind, ("", ""))
            name = f"localization, {kind} prompts" + (f" ({setting})" if setting else "")
            cells = [NOT_RUN, "", ""]
            if record and "cost" in record:  # earlier versions did not write it
                spent = [c for own, c in record["cost"].items() if kind in (ALL, own)]
                prompts = sum(cost["prompts"] for cost in spent)
                seconds = sum(cost["seconds"] for cost in spent)
                cells = [NONE, "0", ""]
                if prompts:
                    cells = [f"{seconds / prompts:.2f}", str(prompts), _machine(record)]
            rows.append([name, number, *cells])
        for command in self._plan:
            stage = self._stage(command, missing)
            if stage is not None:
                rows.append(stage)
        return Table(
            "table_2_cost",
            "Table 2: cost",
            ("stage", "published, s per prompt", "ours, s per item", "items", "on"),
            rows,
            [
                "Seconds of the process that finished the stage, loading included; of a stage that "
                "was interrupted only its last part, of one shared by several processes the first "
                "one's. For localization by type, the seconds that each prompt took in whichever "
                "process decided it, loading left out.",
                *self._notes(missing),
            ],
        )

    def _stage(self, command: str, missing: _Missing) -> list[str] | None:
        """A row for a planned stage that works with the model; None for others, as metrics of
        pictures."""
        output = output_of(command, self._runs.source)
        script = Path(command.partition(".py")[0].split()[-1] + ".py").name
        if output is None or not (script[0].isdigit() or script in WITH_MODEL):
            return None
        inside = not output.suffix or output.is_dir()
        path = output / "config.json" if inside else output.with_suffix(".json")
        record = missing.attempt("seconds", partial(self._runs.made_with_model, path, of=output))
        if record is None:
            return [str(output), "", NOT_RUN, "", ""]
        images = record.get("images")
        items = images or record["settings"]["prompts"]
        unit = "pictures" if images else "prompts"
        cells = [f"{record['seconds'] / items:.2f}", f"{items} {unit}", _machine(record)]
        return [str(output), "", *cells]

    def disentanglement(self) -> Table:
        """Table 3: mean cosine of cross-attention outputs with and without blocked neurons."""
        missing = _Missing()
        columns: dict[str, Sequence[float | None]] = {}
        layers: Sequence[str] = []
        prompts = []
        for which, setting in {"random": None, "located": BLOCKED}.items():
            path = self._runs.metric_path("disentanglement", which)
            record = missing.attempt(
                f"{which} neurons", partial(self._runs.model_record, path, setting)
            )
            if record is None:
                continue
            layers = [name.removesuffix(".to_v") for name in record["layers"]]
            prompts.append(f"{which} neurons: {record['settings']['prompts']} prompts")
            for k, means in record["means"].items():
                columns[f"{k} {which}"] = means
        rows = [
            [str(position), layer]
            + [NONE if m[position] is None else f"{m[position]:.4f}" for m in columns.values()]
            for position, layer in enumerate(layers)
        ]
        return Table(
            "table_3_disentanglement",
            "Table 3: cosine of attention outputs with and without blocked neurons",
            ("layer", "cross-attention", *columns),
            rows,
            [
                "A column is the number of neurons blocked in every layer. The published values "
                "do not ship with this project: none beside ours.",
                *prompts,
                *self._notes(missing),
            ],
        )

    def detection(self) -> Table:
        """Appendix B.4, and the other detectors."""
        missing = _Missing()
        published = self._published.of("B.4")
        rows = []
        for reading, name in {**DETECTORS, **FURTHER_READINGS}.items():
            path = self._runs.metric_path("detection", reading)
            record = missing.attempt(name, partial(self._runs.detection_record, path, reading))
            for kind in (ALL, *KINDS):
                numbers = published.get((name, kind), {})
                found = (record or {}).get("detection", {}).get(kind)
                if found is None and not numbers and kind != ALL:
                    continue
                cells = [numbers.get(m, Number("")).text for m in PUBLISHED_DETECTION]
                ours = [NONE if record else NOT_RUN] * len(DETECTION)
                counts = ""
                if found:
                    ours = [f"{found[key]:.4f}" for _, key in DETECTION.values()]
                    counts = f"{found['memorized']} / {found['unmemorized']}"
                rows.append([name, kind, *cells, *ours, counts])
        return Table(
            "table_b4_detection",
            "Appendix B.4: detection of memorized prompts",
            (
                "detector",
                "memorized",
                *(f"{DETECTION[measure][0]}, published" for measure in PUBLISHED_DETECTION),
                *(f"{heading}, ours" for heading, _ in DETECTION.values()),
                "prompts",
            ),
            rows,
            [
                "Accuracy at the best threshold. TPR at 1% false positives: at the last point "
                "below it, and near it, at the nearest point. Which reading was published is not "
                "said; it stands under the first, without a deviation. Prompts: memorized / not.",
                *self._notes(missing),
            ],
        )

    def _located(self, missing: _Missing) -> list[Result]:
        results = missing.attempt("located neurons", lambda: self._runs.results(BLOCKED))
        return [result for result in results or [] if result.memorized]

    def neurons_per_prompt(self) -> Table:
        """How many neurons were found for each memorized prompt."""
        missing = _Missing()
        types = self._runs.types()
        rows = []
        for result in self._located(missing):
            assert result.initial is not None and result.refined is not None
            rows.append(
                [
                    str(result.row),
                    types.get(result.row, ""),
                    str(size(result.initial)),
                    f"{result.initial_score:.3f}",
                    str(size(result.refined)),
                    f"{result.refined_score:.3f}",
                    " ".join(str(len(layer)) for layer in result.refined),
                ]
            )
        columns = (
            "row",
            "type",
            "initial neurons",
            "score",
            "refined neurons",
            "score",
            "refined, by layer",
        )
        title = "Neurons of each memorized prompt"
        return Table("neurons_per_prompt", title, columns, rows, self._notes(missing))

    def neurons_per_layer(self) -> Table:
        """How many neurons were found in each layer."""
        missing = _Missing()
        located = self._located(missing)
        kinds = self._runs.kinds()
        names = missing.attempt("layers", lambda: self._runs.layer_widths(BLOCKED)) or {}
        count = len(located[0].refined or []) if located else 0
        layers = list(names.items()) if len(names) == count else [("", 0)] * count
        rows = []
        for position, (name, width) in enumerate(layers):
            distinct = {i for result in located for i in (result.refined or [])[position]}
            cells = [str(position), name.removesuffix(".attn2.to_v"), str(width or "")]
            cells.append(str(len(distinct)))
            for kind in kinds:
                of_kind = [
                    len((result.refined or [])[position])
                    for result in self._runs.of_kind(kind, located)
                ]
                cells.append(f"{fmean(of_kind):.2f}" if of_kind else NONE)
            rows.append(cells)
        return Table(
            "neurons_per_layer",
            "Neurons in each value layer",
            (
                "layer",
                "name",
                "neurons",
                "located for any prompt",
                *(f"per {kind} prompt" if kind != ALL else "per prompt" for kind in kinds),
            ),
            rows,
            self._notes(missing),
        )

    def shared_neurons(self) -> Table:
        """Neurons that were located for several prompts."""
        missing = _Missing()
        located = self._located(missing)
        counts = counted(result.refined or [] for result in located)
        of_kind = {
            kind: counted(r.refined or [] for r in self._runs.of_kind(kind, located))
            for kind in self._runs.kinds()
            if kind != ALL
        }
        ranked = by_frequency(counts)
        rows = [
            [str(n[0]), str(n[1]), str(counts[n]), *(str(own[n]) for own in of_kind.values())]
            for n in ranked[:MOST_SHARED]
        ]
        shared = sum(count > 1 for count in counts.values())
        notes = [
            f"{len(counts)} different neurons were located for {len(located)} memorized prompts; "
            f"{shared} of them for more than one. Shown are the {len(rows)} most frequent."
        ]
        columns = ("layer", "neuron", "prompts", *(f"{kind} prompts" for kind in of_kind))
        title = "Neurons shared between prompts"
        notes = [*(notes if located else []), *self._notes(missing)]
        return Table("shared_neurons", title, columns, rows, notes)

    def most_frequent(self) -> Table:
        """One set for all prompts: the k neurons located most often."""
        missing = _Missing()
        rows = []
        counts = counts_of_most_frequent(self._plan)
        runs = {
            holdout: {k: most_frequent(k, holdout=holdout) for k in counts}
            for holdout in (False, True)
        }
        common = {holdout: self._common_rows(runs[holdout].values()) for holdout in runs}
        for k in (0, *counts):
            for holdout, whose in ((False, "memorized"), (True, "hold-out")):
                setting = HOLDOUT_UNBLOCKED if holdout else UNBLOCKED
                setting = runs[holdout].get(k, setting)
                cells = [str(k), whose]
                numbers: dict[str, int] = {}
                for measure in METRICS:
                    if holdout and measure == "sscd_orig":
                        cells.append("")
                        continue
                    scored = missing.attempt(
                        f"{k} neurons, {whose}",
                        partial(self._scores, measure, setting, holdout=holdout),
                    )
                    if scored is None:
                        cells.append(NOT_RUN)
                        continue
                    scores = scored.of(rows=None if k else common[holdout])
                    middle = spread(scores)
                    cells.append(
                        f"{middle.value:.3f} ± {middle.deviation or 0:.3f}" if middle else NONE
                    )
                    numbers[measure] = len(scores)
                if numbers:
                    every = self._runs.holdout_prompts if holdout else self._runs.prompts
                    cells.append(_count(numbers, len(every)))
                rows.append(cells if numbers else [*cells, ""])
        headings = (MEASURES[measure][0] for measure in METRICS)
        return Table(
            "most_frequent_neurons",
            "Blocking the k neurons located most often, for all prompts",
            ("k", "prompts", *headings, "number of prompts"),
            rows,
            [*self._looked_with(), *self._notes(missing)],
        )

    def blocks(self) -> Table:
        """Appendix C.8: the value layers of the up blocks."""
        missing = _Missing()
        rows = []
        common = self._common_rows(each for each in BLOCKS.values() if each != BLOCKED)
        for blocks, setting in BLOCKS.items():
            among = common if setting == BLOCKED else None
            for kind in self._runs.kinds():
                measured, prompts = self._measured(blocks, setting, kind, missing, among)
                rows.append(
                    Comparison(f"layers of {blocks} blocks", kind, ours=measured, prompts=prompts)
                )
        return comparison_table(
            "table_c8_blocks",
            "Appendix C.8: value layers of the up blocks",
            rows,
            MEASURES,
            [
                "Each search has statistics of its own layers. The published values do not ship "
                "with this project.",
                *self._looked_with(),
                *self._notes(missing),
            ],
        )

    def protocols(self) -> Table:
        """Where the protocols `published` and `paper` differ."""
        missing = _Missing()
        settings = {"published": BLOCKED, "paper": PAPER_PROTOCOL}
        if self._runs.protocol == "paper":
            settings = {"paper": BLOCKED}
        common = self._common_rows(settings.values())
        columns: dict[str, list[str]] = {}
        results: dict[str, dict[int, Result]] = {}
        lines = ["threshold", "memorized prompts"]
        kinds = self._runs.kinds()
        for name, setting in settings.items():
            record = missing.attempt(name, partial(self._runs.search_record, setting))
            if record is None:
                continue
            threshold = record["settings"]["pairwise_ssim_threshold"]
            column = [f"{threshold:.4f}", f"{record['memorized']} of {record['prompts']}"]
            results[name] = {r.row: r for r in self._runs.results(setting)}
            for kind in kinds:
                measured, prompts = self._measured(name, setting, kind, missing, common)
                column.append(prompts or NOT_RUN)
                for measure, (_, digits) in MEASURES.items():
                    value = measured.get(measure)
                    nothing = NONE if measure in measured else NOT_RUN
                    column.append(nothing if value is None else shown(value.value, digits))
            columns[name] = column
        headings = ["prompts with pictures", *(heading for heading, _ in MEASURES.values())]
        lines += [f"{heading}, {kind}" for kind in kinds for heading in headings]
        rows = [
            [line, *(column[position] for column in columns.values())]
            for position, line in enumerate(lines)
        ]
        notes = self._notes(missing)
        if len(results) == len(settings) > 1:
            differing = _differing_prompts(results)
            rows += differing
            said = (
                "Below the summary: prompts whose refined sets differ, their sizes, and in "
                "brackets the neurons in both."
                if differing
                else "Both found the same refined set for every prompt that both looked at."
            )
            notes = [said, *notes]
        return Table(
            "protocols",
            "The two protocols: noise differences at the second timestep (published) and at the "
            "first (paper)",
            ("", *columns),
            rows if columns else [],
            notes,
        )


def _differing_prompts(results: Mapping[str, Mapping[int, Result]]) -> list[list[str]]:
    """A line for each prompt that both protocols decided and whose refined sets are not equal."""
    first, second = results.values()
    rows = []
    for row in sorted(first.keys() & second.keys()):
        if first[row].refined is None or second[row].refined is None:
            continue  # undecided: nothing to compare
        sets = [_members(one[row]) for one in (first, second)]
        if sets[0] != sets[1]:
            both = len(sets[0] & sets[1])
            rows.append([f"neurons of row {row}", f"{len(sets[0])} ({both})", f"{len(sets[1])}"])
    return rows


def _members(result: Result) -> set[tuple[int, int]]:
    return {(l, i) for l, layer in enumerate(result.refined or []) for i in layer}


def _machine(record: Mapping[str, Any]) -> str:
    """Of a run with a model what computed it, and in which precision; of others the device."""
    settings = record["settings"]
    machine = record.get("machine") or settings.get("device")
    return ", ".join(filter(None, (machine, settings.get("dtype"))))
