"""One run as one self-contained HTML page (``report.py``): summary, tables, figures, prompts.

Nothing is fetched and nothing but our own script runs: pictures are data URIs, the page's
content security policy allows no other source. What the run does not say is not said.
Public: ``Options``, ``make_report``, ``GENERATOR``.
"""

import base64
import hashlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from utils.attack_runs import read_attack
from utils.errors import InputError
from utils.fields import field as typed
from utils.files import Prompt, read_table
from utils.images import image_name, open_picture
from utils.neuron_sets import Result, read_results, size
from utils.run_folder import ATTACKS, RunFolder, read_record, record_of

TEMPLATES = Path(__file__).resolve().parent
GENERATOR = "NeMo report"
LARGEST_FIGURE = 1400  # pixels of its longer side
JPEG_QUALITY = 78
MOST_SCORES = 8  # of a metric that shows on every card; one with more has a table of its own
SHARE = "Share Above 0.7"  # the attack's column
NAMED = 5  # missing pictures that are named; the rest is counted


@dataclass(frozen=True)
class Options:
    """``samples``: pictures of each folder on a card; ``thumbnail``: pixels of the longer side."""

    samples: int = 4
    thumbnail: int = 112


@dataclass(frozen=True)
class Picture:
    """A picture in the page: its data URI and its text."""

    uri: str
    text: str


@dataclass(frozen=True)
class Table:
    """A table of the page; ``lines`` instead of cells where the metric has its own layout."""

    title: str
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Metric:
    """A finished metric: its summary, and the value of each prompt (row -> value) by name."""

    name: str
    record: dict[str, Any]
    run: str  # label of the pictures that it looked at
    values: dict[str, dict[int, float]]


@dataclass(frozen=True)
class Curve:
    """What an attack reached for one prompt: budget in steps -> share of copies among pictures."""

    name: str
    points: list[tuple[int, float]]
    text: str

    @property
    def drawn(self) -> list[tuple[float, float, int]]:
        """(x, y, steps) in the drawing of report_template.html; the steps on a logarithmic axis."""
        widest = math.log1p(max(1, max(steps for steps, _ in self.points)))
        return [
            (round(40 + 168 * math.log1p(steps) / widest, 1), round(88 - 80 * share, 1), steps)
            for steps, share in self.points
        ]


@dataclass(frozen=True)
class Card:
    """One prompt. ``values`` are in the order of the page's sort keys; None: not known."""

    row: int
    caption: str
    type: str
    state: str
    initial: int | None
    neurons: list[tuple[int, list[int]]]
    count: int | None
    training: Picture | None
    groups: list[tuple[str, list[Picture]]]
    values: list[float | None]
    curves: list[Curve]


class Thumbnails:
    """Reads pictures as small JPEG data URIs, and keeps the names of those that are not there or
    cannot be read."""

    def __init__(self, side: int) -> None:
        self._side = side
        self.corrupt: list[str] = []
        self.absent: list[str] = []

    def read(self, path: Path, text: str) -> Picture | None:
        """The picture, None (and noted) where there is none."""
        if not path.is_file():
            self.absent.append(str(path))
            return None
        try:
            small = open_picture(path)
        except InputError:
            self.corrupt.append(str(path))
            return None
        small.thumbnail((self._side, self._side))
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=JPEG_QUALITY)
        return Picture(_uri(buffer.getvalue(), "image/jpeg"), text)


def make_report(run: RunFolder, options: Options) -> str:
    """The page's text: the same bytes for the same run. InputError where a file is malformed."""
    import jinja2
    from markupsafe import Markup

    results = {r.row: r for r in read_results(run["results"])} if run["results"] else {}
    prompts = {p.row: p for p in run.read_prompts(run["prompts"])} if run["prompts"] else {}
    _check_captions(run, results, prompts)
    captions = {result.row: result.caption for result in results.values()}
    captions |= {prompt.row: prompt.caption for prompt in prompts.values()}
    notes = list(run.missing)
    scores = _scan(run, captions, notes)
    threshold = _threshold(run)
    metrics = list(_metrics(run, captions, notes))
    thumbnails = Thumbnails(options.thumbnail)
    figures = list(_figures(run))
    tables = list(_tables(run, notes))
    attacks = _attacks(run, captions, notes)
    columns: dict[str, dict[int, float]] = {
        "score, all neurons on": scores,
        "score, located neurons off": _known(results, lambda r: r.refined_score),
        "neurons located": _known(results, lambda r: size(r.refined or [])),
    }
    for metric in metrics:
        for score, values in metric.values.items():
            title = ", ".join(filter(None, [metric.record["metric"], metric.run])) + f": {score}"
            columns[title if title not in columns else f"{metric.name}: {score}"] = values
    columns = {name: values for name, values in columns.items() if values}
    cards = [
        _card(row, run, results.get(row), prompts.get(row), columns, attacks, thumbnails, options)
        for row in sorted(results or prompts)
    ]
    notes += _noted("cannot be read", thumbnails.corrupt)
    notes += _noted("are not there", thumbnails.absent)
    style = (TEMPLATES / "report_style.css").read_text(encoding="utf-8")
    script = (TEMPLATES / "report_script.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = _number
    environment.tests["figure"] = _is_figure
    return environment.get_template("report_template.html").render(
        title=run.title,
        generator=GENERATOR,
        policy=_policy(style, script),
        style=Markup(style),  # our own files, no data in them
        script=Markup(script),
        sentences=_summary(results, prompts, scores, threshold, metrics),
        notes=notes,
        tables=[*_metric_tables(metrics), *tables],
        figures=figures,
        columns=list(columns),
        cards=cards,
        types=sorted({card.type for card in cards if card.type}, reverse=True),
        states=sorted({card.state for card in cards}),
        commands=list(_commands(run, metrics)),
        setting=_setting(run),
    )


def _policy(style: str, script: str) -> str:
    """Nothing but the page itself: these two texts and pictures inside it."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest(style)}'; "
        f"script-src 'sha256-{digest(script)}'; base-uri 'none'; form-action 'none'"
    )


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _number(value: float | None) -> str:
    """Three decimals, whole numbers as such, a dash for what is not known."""
    if value is None:
        return "–"
    return str(int(value)) if float(value).is_integer() else f"{value:.3f}"


def _is_figure(text: str) -> bool:
    """Whether a table's cell stands at the right: a number, with what may belong to one."""
    return text[:1].isdigit() or text[:1] in "+-–" or not text


def _noted(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"Pictures that {what}: {len(names)} ({', '.join(names[:NAMED])}{more})."]


# What the run's files say.


def _check_captions(
    run: RunFolder, results: Mapping[int, Result], prompts: Mapping[int, Prompt]
) -> None:
    for row, result in results.items():
        if prompts and (row not in prompts or prompts[row].caption != result.caption):
            raise InputError(
                f"{run['results']}: row {row} is not the caption of that row in {run['prompts']}; "
                "name the prompt file of these results in run.json"
            )


def _known(results: Mapping[int, Result], score: Any) -> dict[int, float]:
    """A value for each memorized prompt: of the others nothing was blocked."""
    values = {row: score(result) for row, result in results.items() if result.memorized}
    return {row: value for row, value in values.items() if value is not None}


def _own(
    table: Sequence[Mapping[str, Any]],
    captions: Mapping[int, str],
    *,
    where: Path,
    notes: list[str],
) -> list[Mapping[str, Any]]:
    """The rows of a table whose row and caption are the run's own: those of another prompt file
    have the same numbers. The others are counted in ``notes``, where the run has prompts."""
    known = {(str(row), caption) for row, caption in captions.items()}
    own = [cells for cells in table if (str(cells.get("Row")), cells.get("Caption")) in known]
    if captions and len(own) < len(table):
        notes.append(
            f"Rows of {where} that are left out, since the run has no prompt with this row and "
            f"caption: {len(table) - len(own)} of {len(table)}."
        )
    return own


def _scan(run: RunFolder, captions: Mapping[int, str], notes: list[str]) -> dict[int, float]:
    """Row -> largest pairwise score of its seed rows, from a --detect_only run."""
    path = run["scores"]
    if path is None:
        return {}
    own = _own(read_table(path)[1], captions, where=path, notes=notes)
    return _column(own, "Score", where=path)


def _column(own: Iterable[Mapping[str, str]], name: str, *, where: Path) -> dict[int, float]:
    """Row -> number of the cells that are not empty, in the run's own rows."""
    found: dict[int, float] = {}
    for cells in own:
        row, text = int(cells["Row"]), cells.get(name, "")
        if not text:
            continue
        try:
            value = float(text)
        except ValueError:
            raise InputError(
                f"{where}: row {row}: '{text[:40]}' is no number; remake the file"
            ) from None
        if not math.isfinite(value):
            raise InputError(f"{where}: row {row}: the score is {text}; remake the file")
        found[row] = value
    return found


def _threshold(run: RunFolder) -> float | None:
    """tau: what the results were decided with, else what script 2 measured."""
    settings = record_of(run["results"]).get("settings") or {}
    value = settings.get("pairwise_ssim_threshold", record_of(run["threshold"]).get("threshold"))
    return value if isinstance(value, float) else None


def _metrics(run: RunFolder, captions: Mapping[int, str], notes: list[str]) -> Iterator[Metric]:
    """Every finished metric of the folder but those of pictures that are not shown."""
    if run["metrics"] is None:
        return
    labels = {folder.name: label for label, folder in run.images.items()}
    not_shown = {folder.name for folder in run.hidden.values()} | set(run.others)
    for path in sorted(run["metrics"].glob("*.json")):
        record = read_record(path)
        if not (record.get("finished") and "metric" in record):
            continue
        for groups in _spreads(record).values():
            for group in groups.values():
                for part in ("median", "mad"):
                    typed(group, part, float, where=path)
        folders = [Path(name).name for name in record.get("inputs") or {}]
        if any(name in not_shown for name in folders):
            continue
        label = next((labels[name] for name in folders if name in labels), "")
        table_path, values = path.with_suffix(".csv"), {}
        if table_path.is_file() and _spreads(record):
            header, table = read_table(table_path)
            own = _own(table, captions, where=table_path, notes=notes)
            named = [name for name in _spreads(record) if name in header]
            values = {name: _column(own, name, where=table_path) for name in named}
        yield Metric(path.stem, record, label, values)


def _spreads(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Score -> (all, VM, TM -> median, mad, ...) of a metric over prompts; empty for other
    metrics."""
    scores = record.get("scores")
    if not isinstance(scores, dict):
        return {}
    spreads = {
        name: groups
        for name, groups in scores.items()
        if isinstance(groups, dict)
        and all(isinstance(g, dict) and "median" in g and "mad" in g for g in groups.values())
    }
    return spreads if len(spreads) <= MOST_SCORES else {}


def _attacks(
    run: RunFolder, captions: Mapping[int, str], notes: list[str]
) -> dict[int, list[Curve]]:
    """Row -> curves, from the attacks' tables: one for each table and start."""
    points: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for path in sorted(run["attack"].glob(ATTACKS)) if run["attack"] else ():
        for cells in _own(read_attack(path), captions, where=path, notes=notes):
            if cells[SHARE] is not None:
                key = cells["Row"], f"{_words(path.stem)}, from {cells['Start']}"
                points.setdefault(key, []).append((cells["Steps"], cells[SHARE]))
    curves: dict[int, list[Curve]] = {}
    for (row, name), found in points.items():
        found.sort()
        said = ", ".join(f"{share:.0%} after {steps}" for steps, share in found)
        text = f"{name}: share of copies {said} steps"
        curves.setdefault(row, []).append(Curve(name, found, text))
    return curves


def _tables(run: RunFolder, notes: list[str]) -> Iterator[Table]:
    """Every table of the folder, from its Markdown form where there is one: that has title and
    notes. ``tables.md`` is all of them once more."""
    if run["tables"] is None:
        return
    stems = {path.stem for path in run["tables"].iterdir() if path.suffix in (".md", ".csv")}
    for stem in sorted(stems - {"tables"}):
        written = run["tables"] / f"{stem}.md"
        if written.is_file():
            yield _from_markdown(written)
            continue
        try:
            header, rows = read_table(run["tables"] / f"{stem}.csv")
        except InputError as error:
            notes.append(f"Table left out: {error}.")
            continue
        yield Table(_words(stem), header, [list(cells.values()) for cells in rows])


def _from_markdown(path: Path) -> Table:
    """A heading, a table with pipes, and a list of notes, as ``metrics/make_tables.py`` writes
    them."""
    title, rows, notes = _words(path.stem), [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("#"):
            title = line.lstrip("# ")
        elif line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
            rows.append([cell.strip().replace("\\|", "|") for cell in cells])
        elif line.startswith("- "):
            notes.append(line[2:])
    # The second line only draws the rule below the header.
    header, body = (rows[0], rows[2:]) if rows else ([], [])
    return Table(title, header, body, notes=notes)


def _figures(run: RunFolder) -> Iterator[Picture]:
    """All PNG of the figures' folder and of the metrics', as they are where they are small."""
    from PIL import Image

    for folder in (run["figures"], run["metrics"]):
        for path in sorted(folder.glob("*.png")) if folder else ():
            try:
                with Image.open(path) as image:
                    image.load()
                    large = max(image.size) > LARGEST_FIGURE
                    image.thumbnail((LARGEST_FIGURE, LARGEST_FIGURE))
                    buffer = io.BytesIO()
                    image.save(buffer, format="PNG")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                raise InputError(f"{path}: not a picture; remake it, or remove it") from None
            data = buffer.getvalue() if large else path.read_bytes()
            yield Picture(_uri(data, "image/png"), _words(path.stem))


def _words(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


# What the page shows of it.


def _card(
    row: int,
    run: RunFolder,
    result: Result | None,
    prompt: Prompt | None,
    columns: Mapping[str, Mapping[int, float]],
    attacks: Mapping[int, list[Curve]],
    thumbnails: Thumbnails,
    options: Options,
) -> Card:
    groups = []
    for label, folder in run.images.items():
        pictures = [
            thumbnails.read(folder / image_name(row, sample), f"{label}, sample {sample}")
            for sample in range(options.samples)
            # A run may have fewer samples; without any the first one is noted as absent.
            if sample == 0 or (folder / image_name(row, sample)).is_file()
        ]
        groups.append((label, [picture for picture in pictures if picture]))
    refined = result.refined if result else None
    known = prompt or result
    assert known is not None
    return Card(
        row=row,
        caption=known.caption,
        type=prompt.type if prompt else "",
        state=_state(result),
        initial=size(result.initial) if result and result.initial else None,
        neurons=[(layer, columns) for layer, columns in enumerate(refined or []) if columns],
        count=size(refined) if refined is not None else None,
        training=_training(run, row, thumbnails),
        groups=groups,
        values=[values.get(row) for values in columns.values()],
        curves=attacks.get(row, []),
    )


def _state(result: Result | None) -> str:
    if result is None:
        return "not looked at"
    if result.initial is None:
        return "undecided"
    return "memorized" if result.memorized else "not memorized"


def _training(run: RunFolder, row: int, thumbnails: Thumbnails) -> Picture | None:
    folder = run["training_images"]
    if folder is None:
        return None
    names = (f"{row:04d}_first_image.jpg", image_name(row, 0))
    path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    return thumbnails.read(path, "training image")


def _summary(
    results: Mapping[int, Result],
    prompts: Mapping[int, Prompt],
    scores: Mapping[int, float],
    threshold: float | None,
    metrics: Sequence[Metric],
) -> list[str]:
    """The run in sentences; one is left out where its numbers are not there."""
    said = []
    if results:
        found = [result for result in results.values() if result.memorized]
        undecided = sum(result.initial is None for result in results.values())
        tau = "the threshold" + ("" if threshold is None else f" of {threshold:.3f}")
        said.append(
            f"{len(found)} of {len(results)} prompts are memorized: noise differences of at "
            f"least two of their seeds are more alike than {tau} allows."
        )
        if undecided:
            said.append(f"{undecided} prompts are undecided: a value was not finite.")
        if found:
            said.append(_said_of_neurons(found, prompts))
            after = [r.refined_score for r in found if r.refined_score is not None]
            before = [scores[r.row] for r in found if r.row in scores]
            start = f" from {median(before):.3f}" if len(before) == len(found) else ""
            if after:
                said.append(
                    "Switching a prompt's own neurons off brings its memorization score (median)"
                    f"{start} to {median(after):.3f}."
                )
    said += _said_of_copies(metrics)
    return said


def _said_of_neurons(found: Sequence[Result], prompts: Mapping[int, Prompt]) -> str:
    def middle(results: Sequence[Result]) -> str:
        return f"{median(size(r.refined or []) for r in results):g}"

    types = sorted({p.type for p in prompts.values() if p.type}, reverse=True)
    by_type = {
        kind: [r for r in found if r.row in prompts and prompts[r.row].type == kind]
        for kind in types
    }
    parts = [f"{kind} {middle(group)}" for kind, group in by_type.items() if group]
    return (
        f"Responsible are a median of {middle(found)} neurons a prompt"
        + (f" ({', '.join(parts)})" if parts else "")
        + f", between {min(size(r.refined or []) for r in found)} and "
        f"{max(size(r.refined or []) for r in found)}."
    )


def _said_of_copies(metrics: Sequence[Metric]) -> list[str]:
    said = []
    of_pictures = {
        metric.run: metric
        for metric in metrics
        if metric.record.get("script") == "compute_sscd_orig.py" and metric.record.get("copies")
    }
    for label, metric in sorted(of_pictures.items(), key=lambda item: item[0] != "unblocked"):
        protocol, copies = next(iter(metric.record["copies"].items()))
        largest = next(
            (g["all"]["median"] for n, g in _spreads(metric.record).items() if n.startswith("Max")),
            None,
        )
        every = copies["all"]
        closest = "" if largest is None else f", the closest picture's similarity is {largest:.3f}"
        said.append(
            f"Pictures '{label}': {every['prompts']} of {every['of_prompts']} prompts give a copy "
            f"of their training image (SSCD above 0.7, {protocol}), {every['pictures']} of "
            f"{every['of_pictures']} pictures{closest} (median over prompts)."
        )
    return said


def _metric_tables(metrics: Sequence[Metric]) -> list[Table]:
    """All metrics that have a score for each prompt in one table; the others as they print
    themselves."""
    header = ["Metric", "Pictures", "Score", "Prompts", "Median", "MAD", "n", "Missing", "95%"]
    rows, others = [], []
    for metric in metrics:
        spreads = _spreads(metric.record)
        for score, groups in spreads.items():
            for kind, found in groups.items():
                interval = found.get("interval")
                between = "–" if not interval else f"{interval[0]:.3f} to {interval[1]:.3f}"
                numbers = [_number(found["median"]), _number(found["mad"])]
                counts = [str(found.get("n", "–")), str(found.get("missing", "–"))]
                name = str(metric.record["metric"])
                rows.append([name, metric.run, score, kind, *numbers, *counts, between])
        lines = metric.record.get("table")
        if not spreads and isinstance(lines, list):
            others.append(Table(_words(metric.name), lines=[str(line) for line in lines]))
    spread = [Table("Metrics over prompts", header, rows)] if rows else []
    return spread + others


def _commands(run: RunFolder, metrics: Sequence[Metric]) -> Iterator[dict[str, Any]]:
    """The commands in the order of the pipeline, as their records keep them."""
    parts = [run[part] for part in ("threshold", "scores", "results")]
    files = [*parts, *run.images.values()]
    outputs = [(path.name, record_of(path)) for path in files if path]
    outputs += [(metric.name, metric.record) for metric in metrics]
    for name, record in outputs:
        if record.get("command"):
            yield {
                "output": name,
                "command": record["command"],
                "seconds": record.get("seconds"),
                "finished": bool(record.get("finished")),
                "commit": str(record.get("git_commit") or "")[:12],
            }


def _setting(run: RunFolder) -> dict[str, str]:
    """Model, settings and versions of the localization, else of the first pictures."""
    record = record_of(run["results"])
    for folder in run.images.values():
        record = record or record_of(folder)
    model = {f"model: {k}": v for k, v in (record.get("model") or {}).items()}
    packages = {f"version: {k}": v for k, v in (record.get("packages") or {}).items()}
    everything = {
        **model,
        **(record.get("settings") or {}),
        **packages,
        "version: python": record.get("python"),
    }
    return {name: str(value) for name, value in everything.items() if value is not None}
