"""The options of script 3 that say how neurons are searched, and which do not go together.

Public: ``THRESHOLD_FLAGS``, ``BATCH_HELP``, ``add_search_options``, ``check_scan_options``,
``search_method``, ``search_settings``, ``used_thresholds``.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from utils import cli
from utils.errors import InputError
from utils.localization import Search

THRESHOLD_FLAGS = {
    "pairwise_ssim_threshold": "a seed row counts if its best pairwise score is above this",
    "ssim_threshold_initial_selection": "selection ends at a score at or below this",
    "ssim_threshold_refinement": "a neuron is given back if the score stays below this",
}
BATCH_HELP = (
    "seed rows per U-Net pass (default: all n of a neuron set, and as many sets as pay on this "
    "device). Fewer than n, for a device with little memory: the plain search, one set at a time, "
    "whose scores may differ by about 1e-6. From 2 n on: so many whole sets share a pass at the "
    "most, whose scores are the same"
)
# Options that only the search for neurons looks at.
SEARCH_OPTIONS = (
    "statistics",
    "blocks",
    "ssim_threshold_initial_selection",
    "ssim_threshold_refinement",
    "rel_threshold_refinement",
    "search",
    "scaling_factor",
    "initial_theta",
    "theta_reduction_per_step",
    "min_theta",
    "no_theta",
    "initial_k",
    "no_top_k",
)


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Thresholds and the search: what script 3 has beside model, noise and prompts."""
    group = parser.add_argument_group("thresholds (tau, paper 3.1)")
    group.add_argument(
        "--threshold_file",
        type=Path,
        metavar="FILE",
        help="threshold of script 2 (default: 0.428, the published value, for v1-4 in the "
        "published protocol without guidance; else statistics/pairwise_ssim_<version>.pt)",
    )
    group.add_argument(
        "--threshold_stds",
        type=cli.number(-10, 10),
        metavar="FLOAT",
        help="tau = mean + this many standard deviations of the threshold file (default: 1; the "
        "ablation of paper table 4 takes -1, 0 and 2)",
    )
    for name, use in THRESHOLD_FLAGS.items():
        group.add_argument(
            f"--{name}", type=cli.number(0, 1), metavar="FLOAT", help=f"{use} (default: tau)"
        )
    group.add_argument(
        "--rel_threshold_refinement",
        type=cli.number(0, 1, above=True),
        metavar="FLOAT",
        help="drop a neuron if the score changes by less than this share of the initial set's "
        "score, instead of comparing it with a threshold",
    )
    group = parser.add_argument_group("search (paper 3.2)")
    group.add_argument(
        "--search",
        choices=("exact", "plain", "bisect"),
        help="exact (default): the same neurons as plain from far less computation; plain: one "
        "set at a time, as the paper's algorithms read; bisect: refinement by halving, for long "
        "candidate lists, which assumes that a larger set never raises the score: checked at the "
        "end, with the exact search where the check fails",
    )
    group.add_argument(
        "-sf",
        "--scaling_factor",
        type=cli.number(-10, 10),
        metavar="FLOAT",
        help="what deactivated neurons are multiplied by while searching (default: 0)",
    )
    group.add_argument(
        "--initial_theta",
        type=cli.number(0, 1000),
        metavar="FLOAT",
        help="first z-score threshold (default: 5, paper B.3)",
    )
    group.add_argument(
        "--theta_reduction_per_step",
        type=cli.number(0, 1000, above=True),
        metavar="FLOAT",
        help="how much theta falls per try (default: 0.25)",
    )
    group.add_argument(
        "--min_theta",
        type=cli.number(0, 1000),
        metavar="FLOAT",
        help="theta at which selection stops (default: 1)",
    )
    group.add_argument(
        "--no_theta", action="store_true", help="select by largest activations alone"
    )
    group.add_argument(
        "--initial_k",
        type=cli.whole_number(0, 100_000),
        metavar="INT",
        help="neurons of largest activation per layer in the first try; one more each try "
        "(default: 0)",
    )
    group.add_argument("--no_top_k", action="store_true", help="select by z-scores alone")


def used_thresholds(args: argparse.Namespace) -> list[str]:
    """Which of ``THRESHOLD_FLAGS`` this run compares a score with."""
    if args.detect_only:
        return ["pairwise_ssim_threshold"]
    relative = args.rel_threshold_refinement is not None
    return [
        name for name in THRESHOLD_FLAGS if not (relative and name == "ssim_threshold_refinement")
    ]


def check_scan_options(args: argparse.Namespace) -> None:
    """InputError for options that would do nothing with --detect_only."""
    for name in SEARCH_OPTIONS:
        if cli.is_given(getattr(args, name)):
            raise InputError(
                f"--{name} has no effect with --detect_only, which finds no neurons; leave one out"
            )


def search_method(args: argparse.Namespace) -> str | None:
    """How neurons are searched (None: not at all). The exact and the bisect search replay passes
    over all seed rows, so a smaller batch leaves the plain one; InputError if it leaves not what
    was asked for by name."""
    if args.detect_only:
        return None
    method = args.search or "exact"
    if args.batch_size is None or args.batch_size >= args.samples_per_prompt or method == "plain":
        return method
    if args.search is not None:
        raise InputError(
            f"--search={method}: a batch of {args.batch_size} does not hold all "
            f"{args.samples_per_prompt} seed rows, which only the plain search can do with; use "
            f"--search=plain or --batch_size={args.samples_per_prompt}"
        )
    return "plain"


def search_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``localization.Search``. InputError for options that would do nothing."""
    if args.no_theta and args.no_top_k:
        raise InputError(
            "--no_theta and --no_top_k leave nothing to select by; leave one of them out"
        )
    unused = {
        "--no_theta": (args.no_theta, ("initial_theta", "theta_reduction_per_step", "min_theta")),
        "--no_top_k": (args.no_top_k, ("initial_k",)),
        "--rel_threshold_refinement": (
            args.rel_threshold_refinement is not None,
            ("ssim_threshold_refinement",),
        ),
    }
    for flag, (given, others) in unused.items():
        for other in others:
            if given and getattr(args, other) is not None:
                raise InputError(f"--{other} has no effect with {flag}; leave one of them out")
    fields = {
        "initial_theta": args.initial_theta,
        "theta_step": args.theta_reduction_per_step,
        "min_theta": args.min_theta,
        "initial_k": args.initial_k,
        "relative": args.rel_threshold_refinement,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return asdict(Search(use_theta=not args.no_theta, use_top_k=not args.no_top_k, **given))
