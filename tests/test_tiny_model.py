"""The shipped model: its files are those that its README describes, and what is planted is as it
says."""

import json
import shutil
from collections import Counter
from pathlib import Path

import tiny_files
import torch
from diffusers import StableDiffusionPipeline
from tiny_files import altered, listed

from tiny_model.captions import LITTLE_WORDS, words_of
from utils.files import read_prompts
from utils.neuron_sets import read_results, size
from utils.versions import resolve, stored_layer_widths

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny_model"


def test_a_file_that_was_altered_is_noticed(tmp_path: Path, monkeypatch) -> None:
    """`conftest.py` ends every session of tests where one is."""
    assert altered() == []
    sizes = {name: (TINY / name).stat().st_size for name in listed() if name[:8] == "pipeline"}
    assert sum(sizes.values()) < 12e6
    copy = tmp_path / "tiny_model"
    shutil.copytree(TINY, copy, ignore=shutil.ignore_patterns("work"))
    shutil.copytree(ROOT / "prompts", tmp_path / "prompts")
    monkeypatch.setattr(tiny_files, "TINY", copy)
    assert altered() == []
    (copy / "fixed_parts/0003.png").touch()
    (copy / "planted_neurons.csv").unlink()
    (copy / "pipeline/scheduler/scheduler_config.json").write_text("{}")
    assert altered() == [
        "fixed_parts/0003.png",
        "pipeline/scheduler/scheduler_config.json",
        "planted_neurons.csv",
    ]


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
    words = {word for caption in known for word in words_of(caption)} - LITTLE_WORDS
    assert all(words & set(words_of(caption)) for caption in captions)
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
    pipeline = StableDiffusionPipeline.from_pretrained(str(TINY / "pipeline"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    index = json.loads((TINY / "pipeline/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    pipeline.scheduler.set_timesteps(50)
    assert pipeline.scheduler.timesteps[:2].tolist() == [981, 961]
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    image = pipeline("Piano keys and jazz trumpet album", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
