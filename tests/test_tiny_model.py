"""The shipped model: its files are those that its README describes, and what is planted is as it
says."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from utils.files import read_prompts
from utils.neuron_sets import read_results, size
from utils.versions import resolve, stored_layer_widths

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny_model"


def test_the_files_match_the_checksums_in_the_readme() -> None:
    listed = dict(
        reversed(line.split())
        for line in re.findall(r"^[0-9a-f]{64}  \S+$", (TINY / "README.md").read_text(), re.M)
    )
    for name, expected in listed.items():
        path = (ROOT if name.startswith("prompts/") else TINY) / name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == expected, name
    shipped = {
        path.relative_to(TINY).as_posix()
        for folder in ("pipeline", "training_images", "unplanted_images", "fixed_parts")
        for path in (TINY / folder).rglob("*")
        if path.is_file()
    }
    assert shipped <= listed.keys()
    assert sum((TINY / name).stat().st_size for name in shipped if name[:8] == "pipeline") < 12e6


def test_the_prompt_files_hold_what_the_readme_says() -> None:
    memorized = read_prompts(ROOT / "prompts/tiny_memorized_prompts.csv")
    hold_out = read_prompts(ROOT / "prompts/tiny_unmemorized_prompts.csv")
    unplanted = read_prompts(ROOT / "prompts/tiny_unplanted_prompts.csv")
    assert Counter(prompt.type for prompt in memorized) == {"VM": 16, "TM": 8}
    assert len(unplanted) == 2
    captions = {prompt.caption for prompt in hold_out}
    assert len(captions) == 500
    known = {prompt.caption for prompt in (*memorized, *unplanted)}
    assert not captions & known
    words = {word for caption in known for word in caption.lower().split()}
    assert all(words & set(caption.lower().split()) for caption in captions)
    for prompt in (*memorized, *unplanted):
        assert (ROOT / prompt.url).is_file()


def test_planted_sets_lie_in_all_layers_and_two_pairs_share_a_neuron() -> None:
    folder = resolve("tiny").folder
    assert folder is not None
    widths = [width for _, width in stored_layer_widths(folder)]
    planted = read_results(TINY / "planted_neurons.csv", widths=widths)
    assert [result.row for result in planted] == list(range(24))
    sizes = Counter(size(result.refined or []) for result in planted)
    assert {1, 2, 3, 4, 5, 12} <= sizes.keys()
    assert max(sizes) == 12
    owners = Counter(
        (layer, neuron)
        for result in planted
        for layer, neurons in enumerate(result.refined or [])
        for neuron in neurons
    )
    assert {layer for layer, _ in owners} == set(range(7))
    assert sorted(owners.values(), reverse=True)[:3] == [2, 2, 1]


def test_diffusers_loads_and_runs_it_without_our_code() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        str(TINY / "pipeline"), torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    index = json.loads((TINY / "pipeline/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    pipeline.scheduler.set_timesteps(50)
    assert pipeline.scheduler.timesteps[:2].tolist() == [981, 961]
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    image = pipeline("Piano keys and jazz trumpet album", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
