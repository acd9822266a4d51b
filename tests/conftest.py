"""What several test files share: small random models, made and loaded once a process."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
if not torch.cuda.is_available():  # before anything imports it: Triton's own functions look too
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # two processes of one thread are faster than two that fight for cores

from small_models import save_small_model  # noqa: E402
from tiny_files import altered  # noqa: E402
from workspace import Warm  # noqa: E402
from workspace import warm as shared_warm  # noqa: E402

from utils.stable_diffusion import Model, load_model  # noqa: E402
from utils.versions import resolve  # noqa: E402

LAION = ROOT.parent / "shared" / "laion"


def pytest_sessionstart() -> None:
    """No figure of the small model holds for other files than those that its README lists."""
    if names := altered():
        pytest.exit(
            f"not as tiny_model/README.md lists them by checksum: {', '.join(names)}", returncode=1
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's commands first: they take longest, and the other files fill the rest."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> folder of its small random pipeline. To be read, never written."""
    folders: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in folders:
            place = tmp_path_factory.mktemp("small") / architecture
            folders[architecture] = save_small_model(place, architecture)
        return folders[architecture]

    return folder


@pytest.fixture(scope="session")
def small_model(small_folder: Callable[[str], Path]) -> Callable[..., Model]:
    """(architecture, dtype) -> loaded model, as a user's is loaded. Tests leave it as it was."""
    models: dict[tuple[str, str], Model] = {}

    def model(architecture: str, dtype: str = "float32") -> Model:
        key = architecture, dtype
        if key not in models:
            source = resolve(str(small_folder(architecture)))
            models[key] = load_model(source, device="cpu", dtype=dtype)
        return models[key]

    return model


@pytest.fixture(scope="session")
def warm() -> Warm:
    """Runs scripts without their imports' four seconds."""
    return shared_warm()


@pytest.fixture(scope="session")
def shared_laion() -> Path:
    """The folder with the real published files, which a user's clone does not have."""
    if not LAION.is_dir():
        pytest.skip(f"{LAION} is not on this machine: the published files cannot be read")
    return LAION
