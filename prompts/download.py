"""Fetches what the paper's runs need, into the folders where the other scripts look for it.

Parts: ``prompts`` and ``statistics`` (the public release), ``sscd`` (copy detection networks),
``coco`` (captions and validation images for FID), ``training_images`` (the pictures behind the
memorized prompts: the link itself, then the Wayback Machine, arquivo.pt, Common Crawl and a folder
of your own, each in turn for what is still missing). Without a part, all of them.

To resume an interrupted run, run the same command again: files go on where they stopped, pictures
that are there are not fetched again, and of the rest only what may have passed (time-outs, busy
servers) is asked once more; --retry asks everything. Every sum that is known is checked; where
none is published, the first download's is recorded in prompts/download.lock.json and holds from
then on. A picture that is not found stays missing.

Reads:   prompts/memorized_laion_prompts.csv (for training_images), the web
Writes:  prompts/*.csv, statistics/statistics_additional_laion_prompts_v1_4.pt,
         sscd_disc_mixup.torchscript.pt, sscd_disc_large.torchscript.pt, coco/annotations/,
         coco/val2014/, original_images/0001_first_image.jpg and so on by row (bytes as found),
         original_images/training_images.csv, original_images/attempts.sqlite (every try)

Examples:
  python prompts/download.py prompts statistics
  python prompts/download.py training_images --rows=0-99 --local_images=my_pictures
"""

import argparse
import contextlib
import ipaddress
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as prompts/download.py

from utils import cli, web_archives
from utils.downloads import Fetcher, FetchError, Limits, Network
from utils.errors import InputError
from utils.files import Prompt, read_prompts, sha256_of_file
from utils.pinned_files import PinnedFile, Shelf
from utils.training_images import AttemptLog, Collector, Settings
from utils.web_archives import Place

COMMIT = "f952eded64fca0bcf42e0bb3be9a01d64653cfdb"
RELEASE = (
    "https://raw.githubusercontent.com/ml-research/localizing_memorization_in_diffusion_models"
)
SSCD = "https://dl.fbaipublicfiles.com/sscd-copy-detection"
# images.cocodataset.org shows the certificate of s3.amazonaws.com: asked there, it is the right one
COCO = "https://s3.amazonaws.com/images.cocodataset.org"
WAYBACK = "https://web.archive.org"
ARQUIVO = "https://arquivo.pt"
COMMON_CRAWL = "https://index.commoncrawl.org"
COMMON_CRAWL_DATA = "https://data.commoncrawl.org"
# One crawl a year of those that LAION's links come from; each costs a request per missing picture.
CRAWLS = "CC-MAIN-2021-04,CC-MAIN-2020-05,CC-MAIN-2019-35,CC-MAIN-2018-30,CC-MAIN-2017-30"

PARTS = ("prompts", "statistics", "sscd", "coco", "training_images")
STAGES = ("url", "wayback", "arquivo", "commoncrawl", "local")
LOCK = Path("prompts/download.lock.json")
MEMORIZED = Path("prompts/memorized_laion_prompts.csv")


def main(args: argparse.Namespace) -> int:
    # Check.
    parts = [part for part in PARTS if part in args.parts or not args.parts]
    stages = _stages(args)
    shelf = Shelf(args.output, args.output / LOCK)
    files = [file for part in parts for file in _files(part, args)]
    for file in files:
        shelf.has(file)  # refuses what is there and is not what is pinned
    csv = args.prompts or args.output / MEMORIZED
    fetched_first = args.prompts is None and "prompts" in parts
    if "training_images" in parts and not csv.exists() and not fetched_first:
        raise InputError(f"{csv}: no such file; fetch the part 'prompts' first or name it with -p")
    if "training_images" in parts and csv.exists():
        _prompts(csv, args)
    if args.dry_run:
        _print_plan(args, shelf, parts, stages, csv)
        return 0

    # Files.
    limits = Limits(
        seconds=args.timeout,
        silence=min(args.silence, args.timeout),
        max_bytes=int(args.max_mb * 2**20),
        redirects=args.redirects,
        tries=args.tries,
        back_off=args.back_off,
        longest_wait=args.longest_wait,
        per_host=args.per_host,
        pause=args.pause,
    )
    large = replace(limits, seconds=args.file_timeout, max_bytes=64 * 2**30)
    fetcher = Fetcher(large, allowed=args.allow_network, stay_secure=True)
    failures = []
    for file in files:
        path = args.output / file.path
        if shelf.has(file):
            print(f"{path}: {shelf.adopt(file) or 'is there'}")
            continue
        try:
            with _BytesBar(file.path) as bar:
                done = shelf.get(file, fetcher, bar.show)
            print(f"{path}: {done}")
        except FetchError as error:
            failures.append(file.path)
            print(f"{path}: not fetched: {error}", file=sys.stderr)

    # Training images.
    if "training_images" in parts:
        if csv.exists():
            fetcher = Fetcher(limits, allowed=args.allow_network)
            print(_collect(args, fetcher, stages, csv))
        else:
            failures.append("training_images")
            print(f"training_images: not begun: {csv} is missing", file=sys.stderr)
    if failures:
        print(f"Not fetched: {', '.join(failures)}. Run again to go on.", file=sys.stderr)
        return 1
    return 0


def _files(part: str, args: argparse.Namespace) -> list[PinnedFile]:
    """The files of a part. Sums of the release: its files at COMMIT. Sums of COCO: those that
    TensorFlow Datasets records for the same archives (url_checksums/coco.txt)."""
    release = f"{args.release_url}/{COMMIT}"
    if part == "prompts":
        sums = {
            "memorized_laion_prompts": (
                "0b527a5965dc463e7a3e0d234ff7fd5489b1a76869c456dbb209dc753cb4af25"
            ),
            "unmemorized_laion_prompts": (
                "f453b418cc157864baacbf68d97447273feac41e8066b2ead6b307bf795988e1"
            ),
            "coco2014_val_10000": (
                "5445e449c60fd6b326a05c79a683c4d64620b0330a372de843eb6b9dbe5901e3"
            ),
            "additional_laion_prompts": None,
        }
        return [
            PinnedFile(
                f"prompts/{name}.csv",
                f"{release}/prompts/{name}.csv",
                digest,
                megabytes=0.7 if digest else 10,
                min_bytes=1 if digest else 2**20,
            )
            for name, digest in sums.items()
        ]
    if part == "statistics":
        path = "statistics/statistics_additional_laion_prompts_v1_4.pt"
        digest = "42072d31334d50ce0d981f58865ab2ab378303c51e779c39f8505b681b0d1d9b"
        return [PinnedFile(path, f"{release}/{path}", digest, megabytes=0.1)]
    if part == "sscd":
        names = ("sscd_disc_mixup.torchscript.pt", "sscd_disc_large.torchscript.pt")
        return [
            PinnedFile(name, f"{args.sscd_url}/{name}", megabytes=size, min_bytes=20 * 2**20)
            for name, size in zip(names, (95, 180), strict=True)
        ]
    if part == "coco":
        return [
            PinnedFile(
                "coco/annotations_trainval2014.zip",
                f"{args.coco_url}/annotations/annotations_trainval2014.zip",
                "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
                megabytes=253,
                members=r"annotations/captions_val2014\.json",
            ),
            PinnedFile(
                "coco/val2014.zip",
                f"{args.coco_url}/zips/val2014.zip",
                "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
                megabytes=6645,
                members=r"val2014/COCO_val2014_\d{12}\.jpg",
            ),
        ]
    return []


def _stages(args: argparse.Namespace) -> dict[str, Place]:
    """The places to ask, in the order given. InputError for an unknown one."""
    max_bytes = int(args.max_mb * 2**20)
    places = {
        "url": web_archives.original,
        "wayback": web_archives.wayback(args.wayback_url),
        "arquivo": web_archives.arquivo(args.arquivo_url),
        "commoncrawl": web_archives.common_crawl(
            args.commoncrawl_url, args.commoncrawl_data_url, args.crawls, max_bytes
        ),
    }
    if args.local_images is not None:
        if not args.local_images.is_dir():
            raise InputError(f"--local_images {args.local_images}: no such folder")
        places["local"] = web_archives.local_folder(args.local_images, max_bytes)
    names = (args.stages or ",".join(places)).split(",")
    for name in names:
        if name not in STAGES:
            raise InputError(f"--stages: '{name}' is none of {', '.join(STAGES)}")
    if ("local" in names) != ("local" in places):
        raise InputError("--local_images and the stage local need each other")
    return {name: places[name] for name in names}


def _prompts(csv: Path, args: argparse.Namespace) -> list[Prompt]:
    """The prompts whose pictures are looked for. InputError if they cannot be read or have no
    links."""
    prompts = read_prompts(csv, caption_column=args.caption_column, rows=args.rows)
    if not any(prompt.url for prompt in prompts):
        raise InputError(f"{csv}: no links in a column 'URL'; name another prompt file with -p")
    return prompts


def _collect(
    args: argparse.Namespace, fetcher: Fetcher, stages: dict[str, Place], csv: Path
) -> str:
    """Runs the stages and returns the report."""
    folder = args.output / args.images
    prompts = _prompts(csv, args)
    log = AttemptLog(folder / "attempts.sqlite", sha256_of_file(csv))
    settings = Settings(args.captures, int(args.max_megapixels * 1e6), args.workers)
    if args.retry:
        log.forget_finished()

    def progress(asked: Iterable[Any], stage: str, total: int) -> Iterable[Any]:
        return tqdm(asked, desc=stage, total=total, unit="image")

    collector = Collector(folder, log, prompts, fetcher, settings)
    try:
        if answered := collector.collect(stages, progress):
            print(
                f"{answered} missing rows were not asked for where an earlier run had a final "
                "answer, though options may have changed; --retry asks again",
                file=sys.stderr,
            )
        return collector.report()
    finally:
        log.close()


class _BytesBar:
    """A progress bar of one file's bytes; ``show`` is given those there and those expected."""

    def __init__(self, name: str) -> None:
        self._bar = tqdm(desc=name, unit="B", unit_scale=True, leave=False)

    def __enter__(self) -> "_BytesBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, there: int, expected: int | None) -> None:
        self._bar.total = expected
        self._bar.update(there - self._bar.n)


def _print_plan(
    args: argparse.Namespace, shelf: Shelf, parts: list[str], stages: dict[str, Place], csv: Path
) -> None:
    """What ``--dry_run`` prints: every file and whether it is there, and what it costs."""
    total = 0.0
    for part in parts:
        for file in _files(part, args):
            state = "is there"
            if not shelf.has(file):
                total += file.megabytes
                pin = shelf.pin(file) or "none published: pinned on first use"
                state = f"about {file.megabytes:g} MB from {file.url}, sha256 {pin}"
            print(f"{args.output / file.path}: {state}")
        if part == "training_images":
            count = "its rows'"
            if csv.exists():
                count = str(len(_prompts(csv, args)))
            print(
                f"{args.output / args.images}: {count} training images of {csv}, "
                f"asking {', '.join(stages)}"
            )
    print(
        f"About {total:,.0f} MB to fetch, besides training images (about 0.1 MB each); unpacking "
        "an archive needs its size once more."
    )


def network(text: str) -> Network:
    """``127.0.0.0/8`` or a single address."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def web_address(text: str) -> str:
    """An http or https URL, without the last slash."""
    if not text.startswith(("https://", "http://")):
        raise argparse.ArgumentTypeError(f"'{text}' does not begin with https:// or http://")
    return text.rstrip("/")


def crawl_list(text: str) -> list[str]:
    """``CC-MAIN-2021-04,CC-MAIN-2020-05``: at least one."""
    names = text.split(",")
    for name in names:
        if not re.fullmatch(r"CC-MAIN-[0-9]{4}-[0-9]{2}", name):
            raise argparse.ArgumentTypeError(f"'{name}' is no crawl's name such as CC-MAIN-2021-04")
    return names


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("."), metavar="DIR", help="the project's folder"
    )
    cli.add_prompt_options(parser)
    group = parser.add_argument_group("training images")
    group.add_argument(
        "-p",
        "--prompts",
        type=Path,
        metavar="CSV",
        help=f"prompt file with a column URL (default: {MEMORIZED} in --output)",
    )
    group.add_argument(
        "--images",
        type=Path,
        default=Path("original_images"),
        metavar="DIR",
        help="folder for the pictures, below --output unless absolute",
    )
    group.add_argument(
        "--stages",
        metavar="LIST",
        help=f"places to ask, in this order (default: {','.join(STAGES)}; local needs "
        "--local_images)",
    )
    group.add_argument(
        "--local_images",
        type=Path,
        metavar="DIR",
        help="your own pictures for the stage local, named by row: 0001_anything.png",
    )
    group.add_argument(
        "--captures",
        type=cli.whole_number(1, 50),
        default=3,
        metavar="INT",
        help="captures of one archive that are tried for a picture",
    )
    group.add_argument(
        "--crawls",
        type=crawl_list,
        default=CRAWLS,
        metavar="LIST",
        help="indexes of Common Crawl to ask",
    )
    group.add_argument(
        "--retry", action="store_true", help="ask again also where the last answer was final"
    )

    group = parser.add_argument_group("limits")
    seconds = cli.number(0, 7 * 86400, above=True)
    wait = cli.number(0, 86400)
    for name, kind, default, text in (
        ("timeout", seconds, 60.0, "seconds for one try of a picture, redirects included"),
        ("file_timeout", seconds, 86400.0, "seconds for one try of a file"),
        ("silence", seconds, 15.0, "seconds for a connection, and between two reads"),
        ("tries", cli.whole_number(1, 20), 3, "tries where a failure may pass"),
        ("back_off", wait, 1.0, "seconds before the second try; doubles"),
        ("longest_wait", wait, 60.0, "longest Retry-After in seconds that is waited for"),
        ("redirects", cli.whole_number(0, 50), 5, "redirects that are followed"),
        ("per_host", cli.whole_number(1, 32), 2, "requests to one host at a time"),
        ("pause", wait, 1.0, "seconds between the starts of two requests to one host"),
        ("workers", cli.whole_number(1, 64), 8, "pictures at a time"),
        ("max_mb", cli.number(0, 2000, above=True), 32.0, "size of one picture in MiB"),
        ("max_megapixels", cli.number(0, 80, above=True), 50.0, "millions of pixels of one"),
    ):
        kind_name = "INT" if isinstance(default, int) else "FLOAT"
        group.add_argument(f"--{name}", type=kind, default=default, metavar=kind_name, help=text)
    group.add_argument(
        "--allow_network",
        type=network,
        action="append",
        default=[],
        metavar="CIDR",
        help="addresses that may be asked although they are private, e.g. 127.0.0.1 for a server "
        "of your own; may be given several times",
    )

    group = parser.add_argument_group("servers (mirrors may be named)")
    for name, base in (
        ("release", RELEASE),
        ("sscd", SSCD),
        ("coco", COCO),
        ("wayback", WAYBACK),
        ("arquivo", ARQUIVO),
        ("commoncrawl", COMMON_CRAWL),
        ("commoncrawl_data", COMMON_CRAWL_DATA),
    ):
        group.add_argument(
            f"--{name}_url", type=web_address, default=base, metavar="URL", help="base address"
        )
    parser.add_argument(
        "--dry_run", action="store_true", help="list what would be fetched, ask and write nothing"
    )
    args = parser.parse_args()
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"'{part}' is no part; choose from {', '.join(PARTS)}")
    return args


def run(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """The exit code: 2 for bad input, 1 where something was not fetched or could not be written,
    130 if interrupted."""
    try:
        return main(args)
    except InputError as error:
        print(f"download.py: {error}", file=sys.stderr)
        return 2
    except (OSError, sqlite3.Error) as error:
        print(f"download.py: {error}; the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("download.py: interrupted; the same command goes on from here", file=sys.stderr)
        with contextlib.suppress(OSError):  # its reader may have gone
            sys.stdout.flush()
        os._exit(130)  # what is under way may take minutes, and nothing half-done is kept


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
