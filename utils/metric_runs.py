"""What the metric scripts share: options, the pictures of a run, the record, the table.

Public: ``add_image_options``, ``add_network_options``, ``add_run_options``,
``add_output_options``, ``check_device``, ``settings``, ``read_targets``, ``chosen_spaces``,
``clip_from``, ``embedder``, ``named``, ``Pictures``, ``generated``, ``references``,
``every_picture``, ``MetricRun``, ``output_path``, ``report``.
"""

import argparse
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import cli
from utils.embeddings import (
    SSCD_FOLDER,
    SSCD_PROTOCOLS,
    Embedder,
    Space,
    all_images,
    clip_space,
    default_workers,
    numbered_images,
    reference_images,
    sscd_space,
)
from utils.errors import InputError
from utils.files import Prompt, read_json, read_prompts, read_table, sha256_of_file, write_table
from utils.images import image_name
from utils.records import Record, open_output, version_of
from utils.summary import format_summary, summarize_scores
from utils.team import Team, join
from utils.versions import Source

if TYPE_CHECKING:
    import numpy as np

CLIP_MODEL, CLIP_PRETRAINED = "ViT-B-32", "openai"  # paper B.4
PACKAGES = ("torchvision", "open_clip_torch", "clean-fid", "scipy", "Pillow", "matplotlib")
COCO_FOLDER = Path("coco/val2014")  # where prompts/download.py puts its pictures
NAMED = 5  # missing pictures that are named on the screen; the summary names all


# Options.


def add_image_options(
    parser: argparse.ArgumentParser, *, reference: str | None = None, prompts_required: bool = True
) -> None:
    """``-f -p --num_samples --mem_type --rows --caption_column``, and ``-r`` with its help."""
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "-f",
        "--folder",
        type=Path,
        required=True,
        metavar="DIR",
        help="generated pictures img_{row}_{sample}.jpg, whoever made them",
    )
    if reference is not None:
        group.add_argument(
            "-r", "--reference", type=Path, required=True, metavar="DIR", help=reference
        )
    group.add_argument(
        "-p",
        "--prompts",
        type=Path,
        required=prompts_required,
        metavar="CSV",
        help="prompt file: its rows say which pictures there should be, its column 'type' which "
        "prompts are VM and TM" + ("" if prompts_required else " (default: every picture counts)"),
    )
    group.add_argument(
        "--num_samples",
        type=cli.whole_number(1, 1000),
        metavar="INT",
        help="pictures of each prompt that count, from sample 0 (default: up to the highest "
        "sample of the chosen prompts)",
    )
    group.add_argument(
        "--mem_type", choices=("VM", "TM"), help="only verbatim or only template prompts"
    )
    cli.add_prompt_options(parser)


def add_network_options(
    parser: argparse.ArgumentParser, *, methods: Sequence[str] = ("sscd", "clip")
) -> None:
    """``--sscd_weights --sscd_protocol``, ``--clip_model --clip_pretrained``, and ``-m`` where
    there is a choice."""
    group = parser.add_argument_group("network")
    if len(methods) > 1:
        group.add_argument(
            "-m", "--method", choices=methods, default=methods[0], help="what embeds the pictures"
        )
    if "sscd" in methods:
        group.add_argument(
            "--sscd_protocol",
            choices=(*SSCD_PROTOCOLS, "all"),
            help="network and preprocessing of a paper, whose numbers are comparable with no "
            "other's; all: one table of all (default: nemo)",
        )
        group.add_argument(
            "--sscd_weights",
            type=Path,
            metavar="FILE",
            help="TorchScript file (default: the protocol's, as prompts/download.py names it)",
        )
    if "clip" in methods:
        group.add_argument(
            "--clip_model",
            metavar="NAME|DIR",
            help=f"open_clip model, or a local open_clip folder (default: {CLIP_MODEL})",
        )
        group.add_argument(
            "--clip_pretrained",
            metavar="TAG|FILE",
            help=f"its weights (default: {CLIP_PRETRAINED})",
        )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """``-o --continue_run --dry_run``."""
    parser.add_argument(
        "-o",
        "--output",
        type=cli.output_file,
        metavar="CSV",
        help="scores; the summary lies beside it (default: results/scores/<metric>_<run>.csv, the "
        "run being the name of the folder or file that is looked at)",
    )
    cli.add_run_options(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """``--device --batch_size --workers``, and those of ``add_output_options``."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if any)"
    )
    group.add_argument(
        "--batch_size", type=cli.BATCH, default=64, metavar="INT", help="pictures per pass"
    )
    group.add_argument(
        "--workers",
        type=cli.whole_number(0, 256),
        default=default_workers(),
        metavar="INT",
        help="processes that decode pictures",
    )
    add_output_options(parser)


# What is scored, and with what.

# Options that a score depends on, as the record keeps them.
SETTINGS = (
    "rows",
    "caption_column",
    "mem_type",
    "num_samples",
    "num_ref_samples",
    "method",
    "sscd_protocol",
    "device",
)


def check_device(args: argparse.Namespace) -> None:
    """Fills in and checks ``--device``. InputError for one that is not there."""
    args.device = cli.checked_device(args.device)


def settings(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The resolved options for the record; ``more`` adds to them or replaces them."""
    return {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)} | more


def read_targets(args: argparse.Namespace) -> list[Prompt]:
    """The chosen prompts, in the file's order. An empty caption is not refused: it stays missing
    where captions are needed. InputError as ``files.read_prompts``, or if no prompt is left."""
    _, table = read_table(args.prompts)
    chosen = args.rows if args.rows is not None else range(len(table))
    empty = {
        row
        for row in chosen
        if row < len(table) and not table[row].get(args.caption_column, "?").strip()
    }
    prompts = read_prompts(
        args.prompts,
        caption_column=args.caption_column,
        rows=[row for row in chosen if row not in empty],
    )
    for row in empty:
        prompts.append(Prompt(row, "", table[row].get("URL", ""), table[row].get("type", "")))
    if args.mem_type is not None:
        prompts = [prompt for prompt in prompts if prompt.type == args.mem_type]
        if not prompts:
            raise InputError(
                f"{args.prompts}: no prompt of type {args.mem_type} in column 'type'; leave out "
                "--mem_type"
            )
    return sorted(prompts, key=lambda prompt: prompt.row)


def chosen_spaces(args: argparse.Namespace) -> dict[str, Space]:
    """What ``-m`` and its options ask for: protocol (or "clip") -> space. InputError for weights
    that are not there, and for options that would do nothing."""
    method = getattr(args, "method", "sscd")
    unused = {"sscd": ("clip_model", "clip_pretrained"), "clip": ("sscd_protocol", "sscd_weights")}
    for option in unused[method]:
        if getattr(args, option, None) is not None:
            raise InputError(f"--{option} has no effect with --method={method}; leave it out")
    if method == "clip":
        return {"clip": clip_from(args)}
    protocols = [args.sscd_protocol or "nemo"]
    if protocols == ["all"]:
        protocols = list(SSCD_PROTOCOLS)
    return {
        name: sscd_space(name, args.sscd_weights or SSCD_FOLDER / SSCD_PROTOCOLS[name].weights)
        for name in protocols
    }


def clip_from(args: argparse.Namespace) -> Space:
    """The image-text model that the options name."""
    model = args.clip_model or CLIP_MODEL
    if args.clip_pretrained is not None and Path(model).is_dir():
        raise InputError("--clip_pretrained has no effect with a --clip_model folder; leave it out")
    return clip_space(model, args.clip_pretrained or CLIP_PRETRAINED)


def embedder(space: Space, args: argparse.Namespace, team: Team | None = None) -> Embedder:
    """An embedder with the machine's options, shared by the processes of a run."""
    return Embedder(
        space, device=args.device, batch_size=args.batch_size, workers=args.workers, team=team
    )


def named(
    scores: Mapping[str, list[float | None]], protocol: str, protocols: Iterable[str]
) -> dict[str, list[float | None]]:
    """Columns of one protocol, with its name before them where there are several."""
    several = len(list(protocols)) > 1
    return {f"{protocol} {name}" if several else name: column for name, column in scores.items()}


@dataclass(frozen=True)
class Pictures:
    """The pictures of the chosen prompts in one folder. ``missing`` names what should be there,
    ``others`` counts pictures of other rows or samples."""

    folder: Path
    paths: Mapping[int, Mapping[int, Path]]  # row -> sample (for references: their order) -> path
    missing: list[str]
    hashes: Mapping[Path, str]  # sha256 of each picture's bytes
    others: int

    @property
    def samples(self) -> int:
        """One more than the highest sample number."""
        return 1 + max(max(samples) for samples in self.paths.values())

    @property
    def digest(self) -> str:
        """Hex sha256 over the names and bytes of all pictures: what a record keeps of them."""
        digest = hashlib.sha256()
        for picture, sha256 in sorted(self.hashes.items()):
            digest.update(f"{picture.name} {sha256}\n".encode())
        return digest.hexdigest()

    def embed(
        self, embedder: Embedder, corrupt: dict[str, str]
    ) -> dict[int, dict[int, "np.ndarray"]]:
        """Row -> sample -> embedding; what has none is added to ``corrupt`` (path -> why)."""
        found = embedder.images(self.hashes, self.folder)
        corrupt.update({str(path): reason for path, reason in found.corrupt.items()})
        return {
            row: {n: found.vectors[path] for n, path in samples.items() if path in found.vectors}
            for row, samples in self.paths.items()
        }


def _pictures(
    folder: Path, paths: Mapping[int, Mapping[int, Path]], missing: list[str], *, there: int
) -> Pictures:
    if not any(paths.values()):
        raise InputError(f"{folder}: no picture of the chosen prompts; check folder and rows")
    hashes = {path: sha256_of_file(path) for row in paths.values() for path in row.values()}
    known = {row: samples for row, samples in paths.items() if samples}
    return Pictures(folder, known, missing, hashes, there - len(hashes))


def generated(folder: Path, rows: Sequence[int], samples: int | None) -> Pictures:
    """The first ``samples`` pictures of each row (None: up to the highest sample that any of these
    rows has). InputError if there is none at all."""
    found = numbered_images(folder)
    if samples is None:
        samples = 1 + max((max(found[row]) for row in rows if row in found), default=0)
    wanted = {row: [n for n in range(samples) if n in found.get(row, {})] for row in rows}
    paths = {row: {n: found[row][n] for n in numbers} for row, numbers in wanted.items()}
    missing = [
        image_name(row, n) for row in rows for n in range(samples) if n not in paths.get(row, {})
    ]
    return _pictures(folder, paths, missing, there=sum(map(len, found.values())))


def references(folder: Path, rows: Sequence[int], most: int | None = None) -> Pictures:
    """The reference pictures of each row, by name, at most ``most``. InputError if there is none at
    all."""
    found = reference_images(folder)
    paths = {row: dict(enumerate(found.get(row, [])[:most])) for row in rows}
    missing = [f"row {row}" for row in rows if not paths[row]]
    return _pictures(folder, paths, missing, there=sum(map(len, found.values())))


def every_picture(folder: Path) -> Pictures:
    """All pictures of a folder and the folders in it, whatever their names."""
    found = all_images(folder)
    return _pictures(folder, {0: dict(enumerate(found))}, [], there=len(found))


# The run.


def output_path(args: argparse.Namespace, metric: str, run: Path) -> Path:
    """``-o``, or results/scores/<metric>_<run>.csv."""
    name = run.stem if run.is_file() else run.resolve().name
    return args.output or Path("results/scores") / f"{metric}_{name}.csv"


class _MetricRecord(Record):
    """The record of scripts 1 to 4, with any networks in the place of the one model."""

    def __init__(
        self,
        path: Path,
        *,
        settings: Mapping[str, Any],
        source: Source | None,
        spaces: Iterable[Space],
        files: Iterable[Path],
        folders: Iterable[Pictures],
    ) -> None:
        networks = {
            space.name: {**space.model, "preprocessing": space.preprocessing} for space in spaces
        }
        model = networks if source is None else source.identity
        super().__init__(path, settings=settings, model=model, inputs=files)
        for pictures in folders:
            self.content["inputs"][str(pictures.folder)] = pictures.digest
        self.content["packages"] |= {name: version_of(name) for name in PACKAGES}


class MetricRun:
    """One run of a metric: its record and its output, checked before anything is computed.

    Nothing is written before all results are there, but for rows that are decided one by one
    (``utils.decided_rows``). An interrupted run leaves the embeddings that it has made in the
    cache, and the same command goes on from them. Several processes share the embedding; all of
    them have the scores then, and the first of the ``team`` writes them.
    """

    def __init__(
        self,
        title: str,
        output: Path,
        args: argparse.Namespace,
        *,
        settings: Mapping[str, Any],
        source: Source | None = None,
        spaces: Iterable[Space] = (),
        files: Iterable[Path] = (),
        folders: Sequence[Pictures] = (),
        others: Iterable[Path] = (),
    ) -> None:
        self.title, self.output = title, output
        self._folders = folders
        self.record = _MetricRecord(
            output.with_suffix(".json"),
            settings=settings,
            source=source,
            spaces=spaces,
            files=files,
            folders=folders,
        )
        self.team = join()
        self._state = self.team.agree(
            "state",
            lambda: open_output(
                self.record,
                output,
                continue_run=args.continue_run or self.team.restarted,
                others=others,
            ),
        )
        self._dry = args.dry_run

    def over(self, cost: Mapping[str, str] | None = None) -> bool:
        """Whether there is nothing to do: a dry run, or a run that is complete. Says so, a dry run
        with its ``cost`` (of ``estimates.estimate``), where a diffusion model is run."""
        if self._dry and self.team.first:
            counts = {f"pictures in {p.folder}": str(len(p.hashes)) for p in self._folders}
            settings = self.record.content["settings"]
            cli.print_settings(str(self.output), settings, counts | dict(cost or {}))
        elif self._state == "finished" and self.team.first:
            print(f"{self.output} is complete already.")
            print("\n".join(read_json(self.record.path).get("table", [])))
        return self._dry or self._state == "finished"

    def exit_code(self) -> int:
        """Of a process that has nothing to do: 1 where the run is complete and left rows undecided
        (of several processes the first one says so), else 0."""
        return 1 if not self._dry and self.record.stored.get("undecided_rows") else 0

    def write(
        self,
        prompts: Sequence[Prompt],
        scores: Mapping[str, Sequence[float | None]],
        *,
        counts: Sequence[int],
        corrupt: Mapping[str, str],
        notes: Sequence[str] = (),
        **results: Any,
    ) -> None:
        """Writes one row a prompt (``counts``: similarities behind its score) and the summary,
        prints the table with ``notes`` under it, and names what was missing or corrupt."""
        if not self.team.first:
            return
        columns = ("Row", "Caption", "type", *scores, "Samples")
        rows = [
            [
                prompt.row,
                prompt.caption,
                prompt.type,
                *("" if column[i] is None else f"{column[i]:.6f}" for column in scores.values()),
                counts[i],
            ]
            for i, prompt in enumerate(prompts)
        ]
        types = [prompt.type for prompt in prompts]
        summaries = {name: summarize_scores(column, types) for name, column in scores.items()}
        table = "\n".join([format_summary(self.title, summaries), *notes])
        self.write_rows(columns, rows)
        self.finish(table, scores=summaries, corrupt=dict(corrupt), **results)

    def write_rows(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """The output. Its record comes first, so that the same command goes on with a run that is
        killed between the two."""
        self.record.start()
        write_table(self.output, columns, rows)

    def finish(self, table: str, **results: Any) -> None:
        """Completes the summary of an output that is written, and prints the table; names what was
        missing (in the folders, or in ``results``) or corrupt."""
        results.setdefault("missing", {str(p.folder): p.missing for p in self._folders})
        results["of_other_prompts"] = {str(p.folder): p.others for p in self._folders}
        self.record.finish(
            metric=self.title,
            **results,
            table=table.splitlines(),
            output_sha256=sha256_of_file(self.output),
        )
        print(table)
        for place, names in results["missing"].items():
            report(f"missing in {place}", names)
        report("corrupt", list(results.get("corrupt", {})))
        for place, count in results["of_other_prompts"].items():
            if count:
                print(f"not counted in {place}: {count} pictures of other rows or samples")
        print(f"Written to {self.output}, summary in {self.record.path}.")


def report(what: str, names: Sequence[str]) -> None:
    """Counts and names, on one line; nothing if there are none."""
    if names:
        rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        print(f"{what}: {len(names)} ({', '.join(names[:NAMED])}{rest})")
