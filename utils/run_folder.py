"""What a run left behind, found for ``report.py``: by a ``run.json`` that names it, or by names.

Contract. RUN_FOLDER may hold a ``run.json``, an object with any of the keys of ``PARTS``, and
``title`` and ``images``, the latter an object from a label to a folder of pictures ("unblocked"
and "blocked" are shown first, other labels behind them). Paths count from RUN_FOLDER. A part that
``run.json`` does not name is looked for below RUN_FOLDER, and with a model's name below the working
directory too, under the names that the scripts give it by default (``KNOWN``). What is not there is
listed in ``RunFolder.missing`` with the way to make it.
Public: ``PARTS``, ``KNOWN``, ``ATTACKS``, ``RunFolder``, ``find_parts``, ``record_of``,
``read_record``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.fields import field as typed
from utils.files import Prompt, read_json, read_prompts, sha256_of_file
from utils.neuron_sets import read_results
from utils.versions import PROJECT_ROOT

RUN_FILE = "run.json"
# Part -> what it is, and what makes it.
PARTS = {
    "results": ("located neurons", "3_detect_memorized_neurons.py"),
    "scores": ("memorization scores", "3_detect_memorized_neurons.py --detect_only"),
    "threshold": ("threshold", "2_compute_pairwise_ssim.py"),
    "prompts": ("prompt file", "the record beside the result file names it"),
    "training_images": ("training images", "prompts/download.py training_images"),
    "metrics": ("metrics", "the scripts in metrics/"),
    "tables": ("tables", "metrics/make_tables.py"),
    "figures": ("figures", "metrics/make_figures.py"),
    "attack": ("attack curves", "metrics/attack.py"),
}
FOLDERS = ("training_images", "metrics", "tables", "figures", "attack")
# Part -> where the scripts put it by default; {tag} is the model's, any if none was asked for.
KNOWN = {
    "results": ("results/memorization_statistics_{tag}.csv", "memorization_statistics_{tag}.csv"),
    "scores": ("results/memorization_scores_{tag}.csv", "memorization_scores_{tag}.csv"),
    "threshold": ("statistics/pairwise_ssim_{tag}.pt", "pairwise_ssim_{tag}.pt"),
    "training_images": ("original_images", "training_images"),
    "metrics": ("results/metrics_{tag}", "metrics_{tag}", "metrics_results"),
    "tables": ("tables", "results/paper_{tag}/tables"),
    "figures": ("figures", "results/paper_{tag}/figures"),
}
KNOWN_IMAGES = ("generated_images/{tag}_*", "images/*", "generated_images_*")
ATTACKS = "attack_*.csv"  # in the folder of the metrics
FIRST = ("unblocked", "blocked")


@dataclass
class RunFolder:
    """The parts of one run. A path is None where the part is missing; ``missing`` says so in
    sentences."""

    folder: Path
    title: str
    paths: dict[str, Path | None]
    images: dict[str, Path]
    missing: list[str] = field(default_factory=list)
    hidden: dict[str, Path] = field(default_factory=dict)  # pictures that were not asked for
    others: list[str] = field(default_factory=list)  # folders of pictures of another run

    def __getitem__(self, part: str) -> Path | None:
        return self.paths[part]

    def read_prompts(self, path: Path) -> list[Prompt]:
        """A prompt file, with the column of captions that the run itself read."""
        settings = record_of(self["results"]).get("settings", {})
        column = typed(settings, "caption_column", str, where=path)
        return read_prompts(path, caption_column=column)


def record_of(path: Path | None) -> dict[str, Any]:
    """The record beside an output (``config.json`` in a folder of pictures); empty if there is
    none."""
    if path is None:
        return {}
    record = path / "config.json" if path.is_dir() else path.with_suffix(".json")
    return read_record(record) if record.is_file() else {}


def read_record(path: Path) -> dict[str, Any]:
    """A record, its parts being objects. InputError where one is something else."""
    record = read_json(path)
    for part in ("settings", "model", "inputs", "scores"):
        typed(record, part, dict, where=path)
    return record


def find_parts(folder: Path, *, tag: str | None = None, labels: Sequence[str] = ()) -> RunFolder:
    """Finds the parts of a run. ``tag``: only default names of this model count (``tiny``).
    ``labels``: folders of pictures that are wanted besides those that ``run.json`` names, or
    "unblocked" and "blocked".

    InputError if the folder is not there or holds no part of a run, if ``run.json`` is malformed,
    if a default name fits several outputs, and for a label that no folder has.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the folder of a run, or . for this one")
    named = _read_run_file(folder / RUN_FILE)
    run = RunFolder(folder, str(named.get("title") or ""), {}, {})
    for part in PARTS:
        if part in named:
            run.paths[part] = _named(run, part, folder / named[part])
        else:
            run.paths[part] = _discovered(_roots(folder, tag), part, tag)
    results = record_of(run["results"])
    if run["metrics"] and "attack" not in named and any(run["metrics"].glob(ATTACKS)):
        run.paths["attack"] = run["metrics"]
    if run["prompts"] is None and "prompts" not in named:
        run.paths["prompts"] = _prompts_of(run, results)
    if "training_images" not in named:
        # A folder that is known by its name alone may hold another model's.
        run.paths["training_images"] = _shipped_with(folder, results) or run["training_images"]
    for label, place in named.get("images", {}).items():
        if (folder / place).is_dir():
            run.images[label] = folder / place
        else:
            run.missing.append(f"Pictures '{label}': {RUN_FILE} names {place}, which is not there.")
    if "images" not in named or labels:
        _discover_images(run, tag, [*labels, *(() if "images" in named else FIRST)])
    unknown = [label for label in labels if label not in run.images]
    if unknown:
        raise InputError(
            f"{folder}: no pictures '{unknown[0]}' of these prompts; there are "
            f"{', '.join([*run.images, *run.hidden]) or 'none'}"
        )
    run.images = dict(sorted(run.images.items(), key=lambda item: _rank(item[0])))
    if not run.images and not any(run.paths.values()):
        raise InputError(
            f"{folder}: nothing of a run in it; run the scripts, or write {RUN_FILE} with the "
            f"places of {', '.join([*PARTS, 'images'])}"
        )
    _name_missing(run, named)
    model = results.get("model") or {}
    run.title = run.title or f"Memorization in {model.get('version') or folder.resolve().name}"
    return run


def _read_run_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    known = ("title", *PARTS, "images")
    for key, value in content.items():
        if key not in known:
            raise InputError(f"{path}: '{key}' is not known; the keys are {', '.join(known)}")
        texts = [value]
        if key == "images":
            if not isinstance(value, dict):
                raise InputError(f"{path}: 'images' is not an object from labels to folders")
            texts = list(value.values())
        if not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"{path}: '{key}' holds something other than text; write a path")
    return content


def _named(run: RunFolder, part: str, path: Path) -> Path | None:
    if path.is_dir() if part in FOLDERS else path.is_file():
        return path
    run.missing.append(
        f"{PARTS[part][0].capitalize()}: {RUN_FILE} names {path}, which is not there."
    )
    return None


def _roots(folder: Path, tag: str | None) -> list[Path]:
    """Where default names are looked for: they tell one run from another only with a model."""
    return [folder] if tag is None or folder.samefile(Path()) else [folder, Path()]


def _discovered(roots: Sequence[Path], part: str, tag: str | None) -> Path | None:
    for root in roots:
        for pattern in KNOWN.get(part, ()):
            found = [
                path
                for path in sorted(root.glob(pattern.format(tag=tag or "*")))
                if (path.is_dir() if part in FOLDERS else path.is_file())
            ]
            if len(found) > 1:
                raise InputError(
                    f"{root}: {' and '.join(path.name for path in found)}: one report is of one "
                    f"run; choose with --version, or name '{part}' in {RUN_FILE}"
                )
            if found:
                return found[0]
    return None


def _prompts_of(run: RunFolder, record: dict[str, Any]) -> Path | None:
    """The prompt file that the result file's record names. If its bytes have changed since, its
    captions must still be those of the results."""
    for name, sha256 in (record.get("inputs") or {}).items():
        places = [root / name for root in (run.folder, Path(), PROJECT_ROOT)]
        path = next((place for place in places if place.is_file()), None)
        if path is None or path.suffix != ".csv":
            continue
        if sha256_of_file(path) == sha256:
            return path
        assert run["results"] is not None
        captions = {prompt.row: prompt.caption for prompt in run.read_prompts(path)}
        same = all(captions.get(r.row) == r.caption for r in read_results(run["results"]))
        run.missing.append(
            f"Prompt file: {name} has changed since neurons were located"
            + ("; the captions are the same." if same else ", and so have captions.")
        )
        return path if same else None
    return None


def _shipped_with(folder: Path, record: dict[str, Any]) -> Path | None:
    """Training images that lie beside the model's own folder, as with the small model."""
    model = str((record.get("model") or {}).get("id") or "")
    places = [root / Path(model).parent / "training_images" for root in (folder, PROJECT_ROOT)]
    return next((place for place in places if model and place.is_dir()), None)


def _discover_images(run: RunFolder, tag: str | None, labels: Sequence[str]) -> None:
    """Folders of pictures made for the run's own prompts, from its own results (rows of another
    prompt file are other prompts); of these the ones with ``labels``."""
    own: dict[Path, dict[str, Any]] = {}
    places = [
        place
        for root in _roots(run.folder, tag)
        for pattern in KNOWN_IMAGES
        for place in sorted(root.glob(pattern.format(tag=tag or "*")))
    ]
    for place in places:
        config = record_of(place)
        if config and _is_of(config, run):
            own[place] = config
        elif config:
            run.others.append(place.name)
    found = {}
    for label, mode in (("unblocked", "original_images"), ("blocked", "refined_neurons")):
        fitting = [place for place, config in own.items() if _is_plain(config, mode)]
        if fitting:
            found[label] = min(fitting, key=lambda p: (not p.name.endswith(label), p.name))
    taken = list(found.values())
    found |= {_short(place.name, tag): place for place in own if place not in taken}
    run.images |= {label: place for label, place in found.items() if label in labels}
    run.hidden = {label: place for label, place in found.items() if label not in labels}
    for place in run.images.values():
        if _made_before(own.get(place, {}), run):
            run.missing.append(f"Pictures in {place} were made before {run['prompts']} changed.")
    if run.others:
        run.missing.append(
            "Pictures that are left out, since they were made from other prompts or another "
            f"result file: {', '.join(run.others)}."
        )
    if run.hidden:
        run.missing.append(
            f"Pictures that are not shown (--images adds them): {', '.join(run.hidden)}."
        )


def _is_of(config: dict[str, Any], run: RunFolder) -> bool:
    """Whether all tables that pictures were made from are the run's."""
    results = run["results"]
    digest = None if results is None else sha256_of_file(results)
    files = {n: s for n, s in (config.get("inputs") or {}).items() if n.endswith(".csv")}
    return bool(files) and all(
        sha256 == digest or _same_file(name, run["prompts"], run) for name, sha256 in files.items()
    )


def _made_before(config: dict[str, Any], run: RunFolder) -> bool:
    """Whether pictures come from an earlier state of the prompt file."""
    prompts = run["prompts"]
    return any(
        prompts is not None and _same_file(name, prompts, run) and sha256 != sha256_of_file(prompts)
        for name, sha256 in (config.get("inputs") or {}).items()
    )


def _same_file(name: str, path: Path | None, run: RunFolder) -> bool:
    """Whether a record's input is this file; its name counts from where the command ran."""
    places = (root / name for root in (run.folder, Path(), PROJECT_ROOT))
    return path is not None and any(place.is_file() and place.samefile(path) for place in places)


def _is_plain(config: dict[str, Any], mode: str) -> bool:
    """Whether pictures were made in this mode of script 4 with nothing else changed."""
    settings = config.get("settings") or {}
    return (
        settings.get("mode") == mode
        and not settings.get("mitigation")
        and not settings.get("scaling_factor")
    )


def _short(name: str, tag: str | None) -> str:
    """A folder's name without what all have in common."""
    return name.removeprefix("generated_images_").removeprefix(f"{tag}_" if tag else "")


def _rank(label: str) -> tuple[int, str]:
    return (FIRST.index(label) if label in FIRST else len(FIRST), label)


def _name_missing(run: RunFolder, named: dict[str, Any]) -> None:
    told = " ".join(run.missing)
    for part, (what, maker) in PARTS.items():
        if run[part] is None and f"{what.capitalize()}:" not in told:
            run.missing.append(f"{what.capitalize()}: not there; made by {maker}.")
    for label, option in (("unblocked", "--original_images"), ("blocked", "--refined_neurons")):
        if label not in run.images and f"'{label}'" not in told:
            run.missing.append(
                f"Pictures '{label}': not there; made by 4_generate_images.py {option}."
            )
