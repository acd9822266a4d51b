"""The README.md of an edited pipeline folder: what was edited, with what, and what that is worth.

It names no neuron and no prompt: who gets the model is not told where to look. That stands in the
record of the run, which lies beside the folder and not in it.
Public: ``model_card``, ``with_measurements``.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"
NOT_MEASURED = "Not measured."


def model_card(
    *,
    base: Mapping[str, Any],
    base_sha256: str,
    does: str,
    equal: str,
    neurons: int,
    layers: Sequence[int],
    prompts: int,
    options: Mapping[str, Any],
    findings: Mapping[str, Any],
    precision: str,
    whole_unet: bool,
) -> str:
    """``base``: ``Source.identity`` of the model that was edited; ``layers``: widths of its value
    layers; ``prompts``: whose sets were united (0: a set given as such); ``whole_unet``: more than
    the neurons has changed."""
    of_hub = base["revision"] is not None
    front = f"base_model: {base['id']}\n" if of_hub else ""
    origin = f"{base['id']}, revision {base['revision']}" if of_hub else base["id"]
    source = f"located for {prompts} memorized prompts" if prompts else "a given set"
    summary = fill(
        f"{neurons} of the {sum(layers)} neurons in {len(layers)} cross-attention value layers of "
        f"the U-Net were edited, {source} (method: NeMo, arXiv 2406.02366): {does}. "
        f"{'What is not the U-Net' if whole_unet else 'Everything else'} is as it was, and it "
        "loads like any other model:"
    )
    facts = {
        "edited model": origin,
        "its U-Net's tensors, sha256": base_sha256,
        "U-Net weights": precision,
        **{name.replace("_", " "): _shown(value) for name, value in options.items()},
        **{name.replace("_", " "): _shown(value) for name, value in findings.items()},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
{front}library_name: diffusers
pipeline_tag: text-to-image
---
# {base["id"]}, edited against memorized images

{summary}

```python
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("this folder")
```

| what | value |
|---|---|
{table}

The licence of the edited model holds for this one.

## What is equal to what

{fill(equal)}

## Measured effect

{BEGIN}
{NOT_MEASURED}
{END}

## What this does not guarantee

- Where the edit works, captions no longer reach the images; the images are not out of the weights.
  An optimised text embedding can bring them back from models edited so (DoRI, arXiv 2507.16880).
- Rows of a checkpoint that are exactly zero tell where to look (arXiv 2603.06640), and whoever has
  the base model can subtract, whatever the edit.
- Only prompts that were looked at were edited. Memorization that nobody found is still there.
- The neurons also do something on other text: see the measured effect on unmemorized prompts.
"""


def fill(text: str) -> str:
    """Lines of at most 100 characters."""
    return textwrap.fill(text, width=100, break_long_words=False, break_on_hyphens=False)


def _shown(value: Any) -> str:
    if value is None:
        return "chosen for each row"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def with_measurements(card: str, table: str) -> str:
    """The card with ``table`` (Markdown) as its measured effect. ValueError if it has no place for
    one."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError("no place for measurements")
    return f"{before}{BEGIN}\n{table.strip()}\n{END}{after}"
