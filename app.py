"""A local page to try the method on one prompt: score it, locate its neurons, switch them off.

Type a prompt, see its memorization score against the threshold, locate the neurons, compare
pictures from the same seeds with and without them, multiply them by another factor than 0, and take
the edit away as a result file or a diff. Several people may use one page: each sees their own.

Reads:   the statistics of script 1, the threshold of script 2
Writes:  nothing; what is exported is downloaded by the browser

Examples:
  python app.py --version=tiny
  python app.py --version=v1-4 --port=8080 --steps=25
"""

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from utils import cli, records, thresholds
from utils.errors import InputError
from utils.files import read_prompts

if TYPE_CHECKING:
    from utils.app_session import Studio


def main(args: argparse.Namespace) -> int:
    # Check.
    steps = max(args.num_inference_steps, args.steps)  # of noise differences, of pictures
    source = cli.resolve_model(args, steps=steps)
    noise = cli.noise_settings(args)
    statistics_path = args.statistics or source.statistics
    records.check_statistics_record(statistics_path, source)
    levels, said, threshold_path = thresholds.choose(
        file=args.threshold_file,
        flags={"pairwise_ssim_threshold": None},
        source=source,
        settings=noise,
    )
    try:
        # make_app imports it too, but while the model is being loaded.
        import starlette  # noqa: F401
        import uvicorn

        from utils.app_server import hosts_of, is_open, listening_socket, make_app
        from utils.app_session import Bench, examples
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed; run: pip install -r requirements-app.txt"
        ) from None
    from utils.activation_statistics import check_fit, load_statistics  # last: imports torch

    statistics = load_statistics(statistics_path, widths=source.widths)
    if args.dry_run:
        shown = {"model": source.id, "threshold from": said, **levels, **noise}
        cli.print_settings(f"page on {args.host}, port {args.port}", shown, {})
        return 0
    known = Path(source.defaults.memorized_prompts)
    captions = [prompt.caption for prompt in read_prompts(known)] if known.is_file() else []
    listening = listening_socket(args.host, args.port)

    # Load (in the thread that will use the model).
    def load() -> "Studio":
        from utils.app_session import Studio
        from utils.noise_difference import NoiseSettings
        from utils.scoring import Detector
        from utils.stable_diffusion import load_model
        from utils.value_layers import layer_widths

        model = load_model(source, device=args.device, dtype=args.dtype, steps=steps)
        inputs = [str(path) for path in (statistics_path, threshold_path) if path]
        records.check_commits(inputs, source.identity, model.commit)
        check_fit(statistics, layer_widths(model.value_layers), statistics_path)
        detector = Detector(
            model,
            NoiseSettings.from_options(noise),
            rows=args.samples_per_prompt,
            seed=args.seed,
            batch_size=args.batch_size,
        )
        (threshold,) = levels.values()
        return Studio(model, detector, statistics, threshold, args.samples_per_prompt, args.steps)

    # Serve.
    bench = Bench(load)
    hosts = hosts_of(listening, args.host)
    page = make_app(bench, model=source.name, examples=examples(captions), hosts=hosts)
    place = "localhost" if hosts == ["*"] else args.host
    print(f"Threshold: {said}")
    if is_open(listening):
        print("Everyone who reaches this machine can use the page: it asks for no password.")
    print(f"Open http://{place}:{listening.getsockname()[1]} (Ctrl+C ends it)", flush=True)

    async def end_without_model() -> None:
        if bench.error is not None:
            await asyncio.sleep(1)  # a page that is open looks more often, and shows the reason
            server.should_exit = True

    config = uvicorn.Config(
        page,
        log_level="warning",
        timeout_graceful_shutdown=3,
        callback_notify=end_without_model,
        timeout_notify=1,  # second
    )
    server = uvicorn.Server(config)
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # uvicorn has closed the page and passes the signal on
    finally:
        bench.close()
    if bench.error is not None:
        raise bench.error
    return 0


def host(text: str) -> str:
    """A name or address; an empty one would be every address of the machine."""
    if not text.strip():
        raise argparse.ArgumentTypeError("names no address; 0.0.0.0 is all of this machine's")
    return text


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    cli.add_model_options(parser)
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="activation statistics of script 1 (default: the version's own; the published ones "
        "for v1-4)",
    )
    parser.add_argument(
        "--threshold_file",
        type=Path,
        metavar="FILE",
        help="threshold of script 2 (default: 0.428, the published value, for v1-4; else "
        "statistics/pairwise_ssim_<version>.pt)",
    )
    cli.add_noise_options(parser)
    group = parser.add_argument_group("page")
    group.add_argument(
        "--steps", type=cli.STEPS, default=50, metavar="INT", help="DDIM steps of pictures"
    )
    group.add_argument(
        "--host",
        type=host,
        default="127.0.0.1",
        metavar="HOST",
        help="address to listen on; 0.0.0.0 lets other machines in",
    )
    group.add_argument(
        "--port",
        type=cli.whole_number(0, 65535),
        default=7860,
        metavar="INT",
        help="port to listen on; 0: any that is free",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check, print the settings, and serve nothing"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
