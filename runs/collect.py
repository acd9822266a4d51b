"""The folder that a run of the paper ends with: plan, exact versions, and every record.

Tables, figures and the log are in the folder already.

Reads:   the records (.json) in statistics/, results/ and generated_images/ of one model
Writes:  in the folder --output: plan.txt (the commands), versions.json (packages, Python, machine,
         git commit), and records/, a copy of every record with its settings

Examples:
  python runs/collect.py --version=tiny -o=results/paper_tiny
  python runs/collect.py --version=v1-4 -o=results/paper_v1_4
"""

import argparse
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

# `python runs/collect.py` puts runs/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli
from utils.files import read_json, write_bytes, write_json
from utils.paper_plan import output_of, planned
from utils.records import git_commit
from utils.versions import resolve


def main(args: argparse.Namespace) -> int:
    source = resolve(args.version)
    plan = planned(args.version)
    write_bytes(args.output / "plan.txt", ("\n".join(plan) + "\n").encode())
    write_json(args.output / "versions.json", versions())
    copied = 0
    for command in plan:
        output = output_of(command, source)
        if output is None:
            continue
        for record in (output / "config.json", output.with_suffix(".json")):
            if record.is_file():
                write_json(args.output / "records" / record, read_json(record))
                copied += 1
    print(f"{args.output}: {len(plan)} commands, {copied} records.")
    return 0


def versions() -> dict[str, object]:
    """What a run depends on besides its settings."""
    import torch

    cuda = torch.cuda.is_available()
    packages = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        if cuda
        else [],
        "cuda": torch.version.cuda if cuda else None,
        "packages": dict(sorted(packages.items())),
    }


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "-v",
        "--version",
        default="v1-4",
        metavar="NAME|HUB_ID|DIR",
        help="model whose run is collected",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="the run's folder"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
