"""What the scripts share that read a whole run: tables and figures.

Public: ``add_paper_options``, ``check_folder``, ``read_runs``.
"""

import argparse
from pathlib import Path

from utils.errors import InputError
from utils.files import read_prompts
from utils.paper_runs import PaperRuns
from utils.versions import resolve


def add_paper_options(parser: argparse.ArgumentParser) -> None:
    """``--version --revision --protocol``, and the prompt files."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "-v",
        "--version",
        default="v1-4",
        metavar="NAME|HUB_ID|DIR",
        help="model whose run is looked at, as scripts 1 to 4 name it",
    )
    group.add_argument("--revision", metavar="REV", help="of a hub repository")
    group.add_argument(
        "--protocol",
        choices=("published", "paper"),
        default="published",
        help="protocol that the neurons were found with",
    )
    for name, what in {"prompts": "memorized", "holdout": "hold-out"}.items():
        group.add_argument(
            *(["-p"] if name == "prompts" else []),
            f"--{name}",
            type=Path,
            metavar="CSV",
            help=f"{what} prompts (default: the version's)",
        )


def check_folder(path: Path) -> None:
    """InputError for a file where a folder is to be written."""
    if path.exists() and not path.is_dir():
        raise InputError(f"-o {path}: is a file; name a folder")


def read_runs(args: argparse.Namespace) -> PaperRuns:
    """The run that the options name. InputError for a model or prompt file that is not there."""
    source = resolve(args.version, args.revision)
    prompts_file = args.prompts or Path(source.defaults.memorized_prompts)
    holdout_file = args.holdout or Path(source.defaults.unmemorized_prompts)
    prompts = read_prompts(prompts_file)
    return PaperRuns(source, args.protocol, prompts_file, prompts, holdout_file)
