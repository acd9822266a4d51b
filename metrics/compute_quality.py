r"""FID, CLIP-FID and KID: how near generated pictures are, as a set, to real ones.

Computed by clean-fid (resizing, Inception, distances), from features that are cached like every
other embedding. CLIP-FID is the same distance in the embeddings of an open_clip model. KID is the
mean over 100 random subsets of at most 1000 pictures; --seed fixes them.

Reads:   a folder of pictures; against it another folder (-r), COCO's validation pictures (--coco)
         or statistics of clean-fid (--statistics)
Writes:  --output, a row a metric, and its summary (.json) beside it; embeddings in
         <folder>.embeddings/

Examples:
  python metrics/compute_quality.py -f=generated_images_coco -p=prompts/coco2014_val_10000.csv \
      --coco
  python metrics/compute_quality.py -f=generated_images/tiny_blocked \
      -r=generated_images/tiny_unblocked --feature_model=features.pt --metrics=fid,kid
"""

import argparse
import contextlib
import importlib.util
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# `python metrics/compute_quality.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, metric_runs
from utils.embeddings import Space, feature_space, inception_space
from utils.errors import InputError
from utils.files import CAPTION_COLUMN
from utils.metric_runs import Pictures

if TYPE_CHECKING:
    import numpy as np

METRICS = {"fid": "FID", "clip_fid": "CLIP-FID", "kid": "KID"}
COLUMNS = ("Metric", "Value", "Pictures", "References", "Dimensions")


@dataclass(frozen=True)
class Statistics:
    """Statistics of clean-fid, by the name they were made or published under."""

    name: str
    resolution: str
    split: str

    def read(self, metric: str) -> Any:
        """(mean, covariance) for a Frechet distance, features for KID. InputError if clean-fid
        neither has nor can fetch them."""
        from cleanfid.features import get_reference_statistics

        network = "clip_vit_b_32" if metric == "clip_fid" else "inception_v3"
        kind = "KID" if metric == "kid" else "FID"
        try:
            return get_reference_statistics(
                self.name, self.resolution, model_name=network, split=self.split, metric=kind
            )
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(
                f"--statistics {self.name}: clean-fid cannot fetch or read them for "
                f"{METRICS[metric]} ({error}); check name, resolution and split, and delete a "
                "file that is cut off"
            ) from None


def main(args: argparse.Namespace) -> int:
    # Check.
    metric_runs.check_device(args)
    check_options(args)
    spaces = chosen_spaces(args)
    pictures = folder_of(args)
    references = None if args.statistics else metric_runs.every_picture(reference_folder(args))
    folders = [pictures, *([references] if references else [])]
    for some in folders:
        if len(some.hashes) < 2:
            raise InputError(f"{some.folder}: one picture; a distance of sets needs at least two")
    run = metric_runs.MetricRun(
        "Quality",
        metric_runs.output_path(args, "quality", args.folder),
        args,
        settings=metric_runs.settings(
            args,
            metrics=args.metrics,
            seed=args.seed,
            statistics=args.statistics and vars(args.statistics),
        ),
        spaces={space.key(args.device): space for space in spaces.values()}.values(),
        files=[args.prompts] if args.prompts else [],
        folders=folders,
    )
    if run.over():
        return 0

    # Embed and compare.
    statistics = {metric: args.statistics.read(metric) for metric in spaces if args.statistics}
    corrupt: dict[str, str] = {}
    embedders = {
        space.key(args.device): metric_runs.embedder(space, args, run.team)
        for space in spaces.values()
    }
    values: dict[str, float] = {}
    rows = []
    for metric, space in spaces.items():
        embedder = embedders[space.key(args.device)]
        ours = features(pictures, embedder, corrupt)
        if references is None:
            theirs, count = statistics[metric], ""
        else:
            theirs = features(references, embedder, corrupt)
            count = str(len(theirs))
        values[metric] = distance(metric, ours, theirs, seed=args.seed)
        rows.append([METRICS[metric], f"{values[metric]:.6f}", len(ours), count, ours.shape[1]])

    # Write.
    if not run.team.first:
        return 0
    lines = [f"{'Quality':<9} {'value':>12} {'pictures':>9} {'references':>11} {'dimensions':>11}"]
    lines += [
        f"{row[0]:<9} {row[1]:>12} {row[2]:>9} {row[3] or '-':>11} {row[4]:>11}" for row in rows
    ]
    few = [
        name
        for name, _, count, others, dimensions in rows
        if name != METRICS["kid"] and min(count, int(others or count)) <= dimensions
    ]
    if few:
        lines.append(
            f"{' and '.join(few)}: fewer pictures than dimensions, so the covariance is singular; "
            "compare with the same number of pictures only"
        )
    run.write_rows(COLUMNS, rows)
    run.finish("\n".join(lines), quality=values, corrupt=corrupt)
    return 0


def features(pictures: Pictures, embedder: Any, corrupt: dict[str, str]) -> "np.ndarray":
    """(pictures that decode, d) float32, in the order of their names. InputError for fewer than
    two."""
    import numpy as np

    found = pictures.embed(embedder, corrupt)
    vectors = [vector for samples in found.values() for vector in samples.values()]
    if len(vectors) < 2:
        raise InputError(f"{pictures.folder}: fewer than two pictures decode")
    return np.stack(vectors)


def distance(metric: str, ours: "np.ndarray", theirs: Any, *, seed: int) -> float:
    """clean-fid's distance of features (n, d) from features (m, d), or, for the Frechet distances,
    from (mean, covariance). InputError where covariances of too few pictures have none."""
    import numpy as np
    from cleanfid import fid

    if metric == "kid":
        with numpy_seed(seed):
            return float(fid.kernel_distance(ours, theirs))
    try:
        if isinstance(theirs, tuple):
            own = np.mean(ours, axis=0), np.cov(ours, rowvar=False)
            return float(fid.frechet_distance(*own, *theirs))
        return float(fid.fid_from_feats(ours, theirs))
    except ValueError as error:  # of the root of two singular covariances
        raise InputError(
            f"{METRICS[metric]}: {' '.join(str(error).split())}, from {len(ours)} pictures of "
            f"{ours.shape[1]} dimensions; take more pictures, or leave {metric} out of --metrics"
        ) from None


@contextlib.contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """clean-fid draws KID's subsets from numpy's global generator: seeded here, and given back as
    it was."""
    import numpy as np

    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def check_options(args: argparse.Namespace) -> None:
    """Fills in ``--caption_column`` and ``--seed``. InputError for options that would do nothing,
    or do not fit each other."""
    inception = any(metric != "clip_fid" for metric in args.metrics)
    if args.feature_model is not None and not inception:
        raise InputError("--feature_model has no effect without fid or kid; leave it out")
    for option in ("clip_model", "clip_pretrained"):
        if getattr(args, option) is None:
            continue
        if "clip_fid" not in args.metrics:
            raise InputError(f"--{option} has no effect without clip_fid; leave it out")
        if args.statistics:
            raise InputError(
                f"--{option}: clean-fid's statistics belong to ViT-B-32 of openai; use -r"
            )
    if args.statistics and args.feature_model is not None:
        raise InputError("--feature_model: clean-fid's statistics belong to Inception; use -r")
    if args.prompts is None:
        for option in ("rows", "caption_column", "mem_type", "num_samples"):
            if getattr(args, option) is not None:
                raise InputError(f"--{option} has no effect without -p; name the prompt file")
    if args.seed is not None and "kid" not in args.metrics:
        raise InputError("--seed has no effect without kid; leave it out")
    args.caption_column = args.caption_column or CAPTION_COLUMN
    args.seed = args.seed or 0


def chosen_spaces(args: argparse.Namespace) -> dict[str, Space]:
    """Metric -> where its features live."""
    make: dict[str, Callable[[], Space]] = {
        "clip_fid": lambda: metric_runs.clip_from(args),
        "fid": inception_space
        if args.feature_model is None
        else lambda: feature_space(args.feature_model),
    }
    make["kid"] = make["fid"]
    return {metric: make[metric]() for metric in args.metrics}


def folder_of(args: argparse.Namespace) -> Pictures:
    """The pictures to judge: all of the folder, or those of the chosen prompts."""
    if args.prompts is None:
        return metric_runs.every_picture(args.folder)
    rows = [prompt.row for prompt in metric_runs.read_targets(args)]
    return metric_runs.generated(args.folder, rows, args.num_samples)


def reference_folder(args: argparse.Namespace) -> Path:
    if not args.coco:
        return args.reference
    folder = metric_runs.COCO_FOLDER
    if not folder.is_dir():
        raise InputError(
            f"{folder}: COCO's pictures are not there; get them with: "
            "python prompts/download.py coco, or name their folder with -r"
        )
    return folder


def metric_list(text: str) -> list[str]:
    """``fid,kid`` -> the metrics, each once."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(METRICS)}")
    return list(dict.fromkeys(names))


def statistics_name(text: str) -> Statistics:
    """NAME, or NAME:RESOLUTION:SPLIT for statistics that clean-fid publishes."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(parts):
        raise argparse.ArgumentTypeError(f"'{text}' is neither NAME nor NAME:RESOLUTION:SPLIT")
    if len(parts) == 3:
        return Statistics(*parts)
    package = importlib.util.find_spec("cleanfid")
    assert package is not None and package.submodule_search_locations is not None
    folder = Path(package.submodule_search_locations[0]) / "stats"
    if not any(folder.glob(f"{text.lower()}_clean_*custom_na*.npz")):
        raise argparse.ArgumentTypeError(
            f"clean-fid has no statistics '{text}'; make them with its fid.make_custom_stats"
        )
    return Statistics(text, "na", "custom")


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    metric_runs.add_image_options(parser, prompts_required=False)
    parser.set_defaults(caption_column=None)  # without effect where there are no prompts
    real = parser.add_argument_group("against (one of)").add_mutually_exclusive_group(required=True)
    real.add_argument("-r", "--reference", type=Path, metavar="DIR", help="a folder of pictures")
    real.add_argument(
        "--coco",
        action="store_true",
        help=f"COCO's validation pictures in {metric_runs.COCO_FOLDER}/ (prompts/download.py coco)",
    )
    real.add_argument(
        "--statistics",
        type=statistics_name,
        metavar="NAME[:RES:SPLIT]",
        help="statistics of clean-fid: your own, or e.g. cifar10:32:train",
    )
    parser.add_argument(
        "--metrics",
        type=metric_list,
        default=list(METRICS),
        metavar="LIST",
        help="of " + ", ".join(METRICS),
    )
    parser.add_argument(
        "--feature_model",
        type=Path,
        metavar="FILE",
        help="TorchScript in Inception's place: (B, 3, 299, 299) in 0 to 255 -> (B, d)",
    )
    parser.add_argument(
        "--seed",
        type=cli.whole_number(0, 2**32 - 1),
        metavar="INT",
        help="seed of KID's subsets (default: 0)",
    )
    metric_runs.add_network_options(parser, methods=("clip",))
    metric_runs.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
