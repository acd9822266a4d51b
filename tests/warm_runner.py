"""Runs the project's scripts in forked processes that find torch and diffusers imported already.

Orders are JSON lines on stdin: {argv, cwd, stdout, stderr, environment} starts a script, with more
in its environment, and answers with its process id; {pid, wait} answers with its exit code, or null
while it runs and wait is false. Nothing but imports happens before a fork, so that a script's
process has no state of another's.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def become(order: dict) -> None:
    """Turns this (forked) process into a run of the script; does not return."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        # a suite that was started in the background ignores it, and its children with it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(order["cwd"])
        os.environ.update(order["environment"])
        sys.argv = order["argv"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    from utils import cli, scoring, stable_diffusion  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if "argv" in order:
            answer = os.fork()
            if answer == 0:
                become(order)
        else:
            pid, status = os.waitpid(order["pid"], 0 if order["wait"] else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
