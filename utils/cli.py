"""What the scripts share on the command line: options, checks, exit codes, what a dry run prints.

Bad input ends in one line on stderr and exit code 2, before torch is imported wherever the check
does not need it.
Public: ``make_parser``; the option types ``whole_number``, ``number``, ``row_list``,
``block_list``, ``output_file``, ``output_file_of_pictures``, ``output_folder``, ``column``,
``SEED``, ``SAMPLES``, ``STEPS``, ``BATCH``, ``GUIDANCE``; ``PRECISION_HELP``,
``add_version_options``, ``add_model_options``, ``add_block_option``, ``add_prompt_options``,
``add_noise_options``, ``add_run_options``; ``BESIDE``;
``is_given``, ``noise_settings``, ``resolve_model``, ``checked_device``, ``run``,
``print_settings``.
"""

import argparse
import logging
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils import team
from utils.errors import InputError, out_of_memory
from utils.files import CAPTION_COLUMN, is_whole_number
from utils.value_layers import SEARCHED_STAGES, STAGES
from utils.versions import VERSIONS, Source, resolve


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the script's docstring as written and shows defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or action.default is argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Reports a bad option in one line, without the usage text, and refuses what no record can
    hold."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        for text in sys.argv[1:] if args is None else args:
            try:
                text.encode()
            except UnicodeEncodeError:
                self.error(f"{text!a} is not UTF-8 text; choose another name")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"{Path(self.prog).name}: {line}; -h lists the options\n")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring. Options cannot be abbreviated: a mistyped one
    must not turn into another."""
    return _Parser(description=description, formatter_class=_Formatter, allow_abbrev=False)


# Option types: each raises ArgumentTypeError with what it accepts.


def whole_number(minimum: int, maximum: int) -> Callable[[str], int]:
    """An integer from ``minimum`` to ``maximum``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{value} is not within {minimum} to {maximum}")
        return value

    return parse


def number(minimum: float, maximum: float, *, above: bool = False) -> Callable[[str], float]:
    """A finite number from ``minimum`` (``above``: strictly above it) to ``maximum``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
        inside = minimum < value <= maximum if above else minimum <= value <= maximum
        if not inside or not math.isfinite(value):
            low = "above " if above else ""
            raise argparse.ArgumentTypeError(
                f"{text} is not within {low}{minimum:g} to {maximum:g}"
            )
        return value

    return parse


MOST_ROWS = 10_000_000


def row_list(text: str) -> list[int]:
    """``0-99,205`` -> sorted row numbers, each once."""
    ranges = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(map(is_whole_number, ends)):
            raise argparse.ArgumentTypeError(f"'{part}' is neither a row nor a range such as 0-99")
        low, high = int(ends[0]), int(ends[1])
        if high < low:
            raise argparse.ArgumentTypeError(f"range '{part}' runs backwards")
        ranges.append(range(low, high + 1))
    if sum(map(len, ranges)) > MOST_ROWS:
        raise argparse.ArgumentTypeError(f"more rows than any prompt file has ({MOST_ROWS})")
    return sorted({row for rows in ranges for row in rows})


def block_list(text: str) -> tuple[str, ...]:
    """``down,mid`` -> those of ``STAGES``, in forward order, each once."""
    named = text.split(",")
    for name in named:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(STAGES)}")
    return tuple(stage for stage in STAGES if stage in named)


BESIDE = {".json": "the record", ".md": "the table to read", ".png": "a picture"}


def output_file(text: str) -> Path:
    """A file name that leaves the names of what is written beside it (the same with other endings)
    free."""
    path = Path(text)
    if not path.name or path.name == "..":
        raise argparse.ArgumentTypeError(f"'{text}' names no file")
    if path.suffix in BESIDE:
        raise argparse.ArgumentTypeError(
            f"{text} is the name of {BESIDE[path.suffix]} beside it; choose another ending"
        )
    return path


def output_file_of_pictures(text: str) -> Path:
    """A file name that leaves free, besides, the name of a folder of pictures (the same without
    ending)."""
    path = output_file(text)
    if not path.suffix:
        raise argparse.ArgumentTypeError(
            f"{text}: without an ending it is the name of the pictures' folder"
        )
    return path


def output_folder(text: str) -> Path:
    """A folder's name; an empty one would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("names no folder")
    return Path(text)


def column(text: str) -> str:
    """A column's name; the nameless one of the published files holds no captions."""
    if not text:
        raise argparse.ArgumentTypeError("names no column")
    return text


SEED = whole_number(0, 2**63 - 1)
SAMPLES = whole_number(2, 1000)
STEPS = whole_number(2, 999)  # with 1000 of 1000, an offset of 1 would lead past the last timestep
BATCH = whole_number(1, 100_000)
GUIDANCE = number(1, 1000)


def add_version_options(group: argparse._ArgumentGroup) -> None:
    """``--version --revision --device``, for scripts that neither compute with the U-Net nor look
    at a noise difference, and as a part of ``add_model_options``."""
    group.add_argument(
        "-v",
        "--version",
        default="v1-4",
        metavar="NAME|HUB_ID|DIR",
        help="short name ("
        + ", ".join(VERSIONS)
        + "), hub id or local diffusers folder; safetensors only. The makers of SD 2.x withdrew "
        "their repositories in November 2025: the v2 names load the sd2-community mirrors",
    )
    group.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub repository"
    )
    group.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if any)"
    )


PRECISION_HELP = "precision of U-Net and VAE (default: float16 on CUDA, float32 on a CPU)"
DTYPE_HELP = f"{PRECISION_HELP}; text encoders and activations are always float32"
PROTOCOL_HELP = (
    "timestep of the noise difference: the second sampling step, as the published neurons were "
    "found, or the first, as Alg. 1 is written; thresholds and neurons of the other are refused"
)


def add_model_options(
    parser: argparse.ArgumentParser,
    *,
    dtype_help: str = DTYPE_HELP,
    protocol_help: str = PROTOCOL_HELP,
) -> None:
    """``--version --revision --device --dtype --protocol``: the same in every script, but for what
    the last two are good for."""
    group = parser.add_argument_group("model")
    add_version_options(group)
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help=dtype_help,
    )
    group.add_argument(
        "--protocol",
        choices=("published", "paper"),
        default="published",
        help=protocol_help,
    )


def add_block_option(parser: argparse.ArgumentParser) -> None:
    """``--blocks``, for the scripts that look at neurons: statistics, localization, blocking."""
    parser.add_argument(
        "--blocks",
        type=block_list,
        metavar="LIST",
        help="blocks of the U-Net whose value layers are looked at, of down,mid,up; statistics, "
        "result file and pictures must have the same (default: down,mid; paper C.8)",
    )


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """``--rows --caption_column``."""
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--rows", type=row_list, metavar="LIST", help="only these 0-based rows, e.g. 0-99,205"
    )
    group.add_argument(
        "--caption_column",
        type=column,
        default=CAPTION_COLUMN,
        metavar="NAME",
        help="column that holds the captions",
    )


BATCH_HELP = (
    "seed rows per U-Net pass, for a device with little memory (default: all n, the reference; "
    "fewer may change a score by about 1e-6)"
)


def add_noise_options(parser: argparse.ArgumentParser, *, batch_help: str = BATCH_HELP) -> None:
    """What a noise difference depends on besides the model: scripts 2 and 3 alike."""
    group = parser.add_argument_group("noise difference")
    group.add_argument(
        "-s", "--seed", type=SEED, default=1, metavar="INT", help="seed of the initial noises"
    )
    group.add_argument(
        "--samples_per_prompt",
        type=SAMPLES,
        default=10,
        metavar="INT",
        help="seed rows n (paper: 10)",
    )
    group.add_argument(
        "--num_inference_steps",
        type=STEPS,
        default=50,
        metavar="INT",
        help="DDIM steps, which give the timestep that is looked at (paper: 50)",
    )
    group.add_argument(
        "--guidance_scale",
        type=GUIDANCE,
        default=1.0,
        metavar="FLOAT",
        help="classifier-free guidance; 1 is none (paper B.3)",
    )
    group.add_argument(
        "--exchanged_guidance",
        action="store_true",
        help="exchange the conditional and unconditional halves, as the published release does "
        "where guidance is on; only to reproduce its numbers",
    )
    group.add_argument(
        "--batch_size",
        type=BATCH,
        metavar="INT",
        help=batch_help,
    )


def add_run_options(parser: argparse.ArgumentParser, *, same: str = "the same bytes") -> None:
    """``--continue_run --dry_run``. ``same``: what a continued run ends with."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--continue_run",
        action="store_true",
        help=f"go on where an interrupted run with the same settings stopped; ends with {same}",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="check all that can be checked without weights or a network, print the resolved "
        "settings and, but for metrics that run no diffusion model, an estimate of time, disk and "
        "memory, and write nothing",
    )


def noise_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The part of the record that a noise difference depends on. InputError for a combination in
    which an option would do nothing."""
    if args.exchanged_guidance and args.guidance_scale == 1:
        raise InputError(
            "--exchanged_guidance needs --guidance_scale above 1: without guidance nothing is "
            "exchanged"
        )
    return {
        "protocol": args.protocol,
        "seed": args.seed,
        "samples_per_prompt": args.samples_per_prompt,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "exchanged_guidance": args.exchanged_guidance,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": args.device,
    }


def resolve_model(args: argparse.Namespace, *, steps: int | None = None) -> Source:
    """``--version --revision --device --dtype`` -> Source, checked (also for ``steps`` timesteps)
    as far as can be without loading it; fills in the device's and dtype's defaults."""
    blocks = getattr(args, "blocks", None) or SEARCHED_STAGES
    source = resolve(args.version, args.revision, blocks)
    source.check(steps=steps)
    args.device = checked_device(args.device)
    args.dtype = args.dtype or default_dtype(args.device)
    return source


def default_dtype(device: str) -> str:
    """``--dtype`` where it is not given."""
    return "float32" if device == "cpu" else "float16"


# What a CUDA, WSL or ROCm driver puts there. Without one of them torch finds no GPU, and its
# import, which takes longer than all checks together, is spared.
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))


def _gpu_count() -> int:
    if platform.system() == "Linux" and not any(path.exists() for path in GPU_DEVICES):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def checked_device(name: str | None) -> str:
    """``--device``, or its default where it is None. InputError for one that is not there."""
    if name == "cpu":
        return name
    if name is None:
        if _gpu_count():
            return checked_device("cuda")
        if GPU_DEVICES[0].exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
            # A driver too old for torch, say: weeks on a CPU may not be what was meant.
            logging.warning("there is an NVIDIA GPU that torch cannot use: the CPU computes")
        return "cpu"
    kind, _, index = name.partition(":")
    if (
        kind != "cuda"
        or name.endswith(":")
        or (index and not (index.isascii() and index.isdigit()))
    ):
        raise InputError(f"--device {name}: unknown device; use cpu, cuda or cuda:N")
    count = _gpu_count()
    if int(index or 0) >= count:
        raise InputError(
            f"--device {name}: not there ({count} CUDA devices found); use --device cpu"
        )
    if not index and team.processes_here() > count:
        raise InputError(
            f"--device {name}: {team.processes_here()} processes on this machine have {count} "
            "GPUs; start one process a GPU"
        )
    return name


def run(
    main: Callable[[argparse.Namespace], int], args: argparse.Namespace, *, lower: str | None
) -> NoReturn:
    """Runs a script's ``main`` and exits with its code; 2 and one line for bad input, 1 and one
    line that names the flag ``lower`` where the device ran out of memory, 130 where it was
    interrupted."""
    script = Path(sys.argv[0]).name
    rank = os.environ.get("RANK", "0")
    who = f"{script}:" if rank == "0" else f"{script}: [process {rank}]"
    goes_on = hasattr(args, "continue_run")
    try:
        code = main(args)
        sys.stdout.flush()  # not as Python ends, where its reader's absence would be a traceback
        sys.exit(code)
    except InputError as error:
        line = _one_line(error)
        if rank == "0":
            print(f"{who} {line}", file=sys.stderr, flush=True)
            team.tell(line)
        elif not team.told(line):  # of several processes with the same reason one says it
            print(f"{who} {line}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.strerror is None:
            raise
        place = "" if error.filename is None else f"{_one_line(error.filename)}: "  # a full disk
        print(
            f"{who} {place}{error.strerror}; mend that, or name another path"
            + ("; a run that had begun goes on with --continue_run" if goes_on else ""),
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        way = "; --continue_run goes on from here" if goes_on else ""
        print(f"{who} interrupted{way}", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        device = getattr(args, "device", None) or "cpu"
        instead = "use --device cpu" if device != "cpu" else "end other programs"
        way = f"lower {lower}" if lower else instead
        kept = " and add --continue_run" if lower and goes_on else ""
        print(f"{who} out of memory on {device}: {way}{kept}", file=sys.stderr)
        sys.exit(1)


def is_given(value: object) -> bool:
    """Whether an option without a default, or a flag, was on the command line; 0 was, too."""
    return value is not None and value is not False


def _one_line(message: object) -> str:
    """What a path or a cell may bring along must not end the line."""
    return " ".join(str(message).splitlines())


def print_settings(title: str, settings: Mapping[str, Any], estimate: Mapping[str, str]) -> None:
    """What ``--dry_run`` prints: resolved settings, then the estimate."""
    print(title)
    for name, value in {**settings, **estimate}.items():
        print(f"  {name:<34} {value}")
