"""What a dry run says of costs."""

import pytest
from safetensors.torch import load_file

from utils.estimates import estimate
from utils.versions import resolve

COST = {"device": "cuda", "unet_rows": 1e6, "output_bytes": 2e6}


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2)])
def test_memory_is_that_of_the_parameters_in_the_precision_asked_for(dtype: str, size: int) -> None:
    """However they are stored: those of the small model are float16, those of SD float32."""
    tiny = resolve("tiny")
    assert tiny.folder is not None
    stored = [load_file(path).values() for path in tiny.folder.rglob("*.safetensors")]
    parameters = sum(tensor.numel() for tensors in stored for tensor in tensors)
    said = estimate(tiny, dtype=dtype, **COST)
    assert said["estimated memory"].startswith(f"{1 + size * parameters / 1e9:.1f} GB")
    assert said["estimated disk"] == "2 MB of output"
    sd = estimate(resolve("v1-4"), dtype=dtype, **COST)
    assert sd["estimated memory"].startswith({4: "5.3 GB", 2: "3."}[size])
    assert "4.3 GB of weights unless cached" in sd["estimated disk"]


def test_time_follows_the_passes() -> None:
    one = estimate(resolve("v1-4"), dtype="float16", **COST)["estimated time"]
    # 10^6 passes of 0.8 TFLOP at 120 TFLOP/s
    assert one.startswith("1.9 h at 120 TFLOP/s")
