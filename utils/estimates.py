"""The rough costs that ``--dry_run`` prints.

Public: ``estimate``.
"""

import math

from utils.versions import Source, read_header

# Sustained rates assumed where nothing was measured: two desktop cores, and an A100-class GPU.
ASSUMED_TFLOPS = {("cpu", "float32"): 0.1, ("cuda", "float16"): 120.0, ("cuda", "bfloat16"): 120.0}
FALLBACK_TFLOPS = {"cpu": 0.02, "cuda": 15.0}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def estimate(
    source: Source, *, device: str, dtype: str, unet_rows: float, output_bytes: float
) -> dict[str, str]:
    """Name -> text: time for ``unet_rows`` U-Net passes of one latent each, disk, memory."""
    kind = device.partition(":")[0]
    rate = ASSUMED_TFLOPS.get((kind, dtype), FALLBACK_TFLOPS[kind])
    seconds = unet_rows * source.defaults.gflop_per_row / 1000 / rate
    disk = f"{_size(output_bytes)} of output"
    if source.folder is not None:
        headers = [read_header(path)[0] for path in source.folder.rglob("*.safetensors")]
        entries = [e for header in headers for n, e in header.items() if n != "__metadata__"]
        parameters = sum(math.prod(entry["shape"]) for entry in entries)
    else:
        fetched = source.defaults.disk_gb * 1e9
        parameters = fetched / BYTES["float32"]
        disk += f", {_size(fetched)} of weights unless cached"
    return {
        "estimated time": f"{_duration(seconds)} at {rate:g} TFLOP/s (assumed), and loading",
        "estimated disk": disk,
        "estimated memory": f"{_size(parameters * BYTES[dtype] + 1e9)}, more with large batches",
    }


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
