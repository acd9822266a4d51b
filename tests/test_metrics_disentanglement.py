"""Disentanglement against attention written out in numpy, and against zeroed weights."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import small_models
import torch
import workspace

from utils import estimates
from utils.errors import InputError
from utils.noise_difference import scored_timestep
from utils.stable_diffusion import Model, encode_prompt, initial_noise, load_model, unet_output
from utils.versions import Source, resolve

ROOT = Path(__file__).resolve().parent.parent
ROWS = 3


def script() -> ModuleType:
    name = "compute_disentanglement"
    spec = importlib.util.spec_from_file_location(name, ROOT / "metrics" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("disentanglement")
    small_models.save_small_model(place / "model", "sd1")
    lines = [f"caption {i};u;{t}\n" for i, t in enumerate(("VM", "TM", "VM"))]
    (place / "prompts.csv").write_text("Caption;URL;type\n" + "".join(lines))
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(resolve(str(folder / "model")), device="cpu", dtype="float32")


def cross_attention(module: Any, x: np.ndarray, text: np.ndarray, off: list[int]) -> np.ndarray:
    """to_out(softmax(Q K / sqrt(d)) V), the columns ``off`` of V at zero: (tokens, C) float64."""

    def linear(layer: Any, values: np.ndarray) -> np.ndarray:
        bias = 0 if layer.bias is None else layer.bias.detach().double().numpy()
        return values @ layer.weight.detach().double().numpy().T + bias

    query, key = linear(module.to_q, x), linear(module.to_k, text)
    value = linear(module.to_v, text)
    value[:, off] = 0
    heads = []
    for part in np.split(np.arange(query.shape[1]), module.heads):
        logits = query[:, part] @ key[:, part].T / np.sqrt(len(part))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ value[:, part])
    return linear(module.to_out[0], np.concatenate(heads, axis=1))


def mean_cosine(first: np.ndarray, second: np.ndarray) -> float:
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return float(np.mean((first * second).sum(axis=-1) / lengths))


def observed(model: Model, caption: str, noise: torch.Tensor, step: torch.Tensor) -> dict[str, Any]:
    """Input, text and output of each searched cross-attention in one U-Net pass."""
    seen: dict[str, Any] = {}
    handles = [
        model.unet.get_submodule(name.removesuffix(".to_v")).register_forward_hook(
            lambda _, args, kwargs, output, name=name: seen.__setitem__(
                name, (args[0], kwargs["encoder_hidden_states"], output)
            ),
            with_kwargs=True,
        )
        for name in model.value_layers
    ]
    unet_output(model, noise, step, encode_prompt(model, caption).repeat(len(noise)))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("together", [False, True])
def test_against_attention_written_out(model: Model, together: bool) -> None:
    module = script()
    noise = initial_noise(model, ROWS, 1)
    step = scored_timestep(model, 50, "published")
    widths = [layer.out_features for layer in model.value_layers.values()]
    sets = {
        k: module.chosen_neurons(k, widths, None, seed=0, row=4) for k in (1, 9, min(widths) - 1)
    }
    assert all([len(layer) for layer in sets[k]] == [k] * len(widths) for k in sets)
    assert all(set(few) < set(more) for few, more in zip(sets[1], sets[9], strict=True))
    sets[0] = [[] for _ in widths]
    found = module.attention_cosines(model, "a", noise, step, sets, together=together)
    assert not any(m._forward_hooks for m in model.unet.modules()), "no hook is left"
    assert found[0] == pytest.approx([1] * len(widths), abs=1e-9)
    seen = observed(model, "a", noise, step)
    for k, neurons in sets.items():
        expected = []
        if together:
            saved = [layer.weight.detach().clone() for layer in model.value_layers.values()]
            for layer, columns in zip(model.value_layers.values(), neurons, strict=True):
                with torch.no_grad():
                    layer.weight[columns] = 0
            blocked = observed(model, "a", noise, step)
            for layer, weight in zip(model.value_layers.values(), saved, strict=True):
                with torch.no_grad():
                    layer.weight.copy_(weight)
            for name in model.value_layers:
                pair = [out[name][2].double().numpy() for out in (seen, blocked)]
                expected.append(mean_cosine(*pair))
        else:
            for name, columns in zip(model.value_layers, neurons, strict=True):
                attention = model.unet.get_submodule(name.removesuffix(".to_v"))
                x, text = (tensor.double().numpy() for tensor in seen[name][:2])
                pairs = [
                    [cross_attention(attention, x[row], text[row], off) for off in ([], columns)]
                    for row in range(ROWS)
                ]
                expected.append(float(np.mean([mean_cosine(*pair) for pair in pairs])))
        assert found[k] == pytest.approx(expected, abs=1e-5)
    assert max(found[min(widths) - 1]) < 0.999 < min(found[0])


def run(
    *flags: object, monkeypatch: pytest.MonkeyPatch, stop: int | None = None, code: int = 0
) -> dict[str, Any]:
    """The summary. ``stop``: the prompt at which the run is interrupted; ``code``: what a run that
    is not ends with."""
    monkeypatch.setattr(sys, "argv", ["compute_disentanglement.py", *map(str, flags)])
    module = script()
    args = module.parse_args()
    compare, begun = module.attention_cosines, []

    def interrupted(*of_prompt: Any, **options: Any) -> dict[int, list[float | None]]:
        if len(begun) == stop:
            raise KeyboardInterrupt
        begun.append(of_prompt)
        return compare(*of_prompt, **options)

    module.attention_cosines = interrupted
    assert module.main(args) == code
    return json.loads(args.output.with_suffix(".json").read_text())


def test_the_script(
    folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--version={folder / 'model'}", "--device=cpu", f"-p={folder / 'prompts.csv'}"]
    flags.append("--num_samples=2")
    found = run(*flags, "-k=1,4", f"-o={folder / 'd.csv'}", monkeypatch=monkeypatch)
    names = list(model.value_layers)
    assert found["layers"] == names and set(found["means"]) == {"1", "4"}
    rows = [line.split(";") for line in (folder / "d.csv").read_text().splitlines()]
    assert len(rows) == 4 and len(rows[0]) == 3 + 2 * len(names)
    place = rows[0].index("k=4 layer 2")
    values = [float(row[place]) for row in rows[1:]]
    assert found["means"]["4"][2] == pytest.approx(np.mean(values), abs=1e-6)
    assert found["scores"]["k=4 layer 2"]["VM"]["n"] == 2
    assert found["scores"]["k=4 layer 2"]["all"]["median"] == pytest.approx(
        np.median(values), abs=1e-6
    )
    assert names[0].removesuffix(".to_v") in capsys.readouterr().out
    # A prompt's score does not depend on which others are asked for.
    more = f"-o={folder / 'one.csv'}"
    run(*flags, "-k=1,4", "--rows=2", more, monkeypatch=monkeypatch)
    assert (folder / "one.csv").read_text().splitlines()[1].split(";") == rows[3]
    for option in ("--seed=5", "--random_seed=5", "--protocol=paper", "--num_inference_steps=20"):
        other = folder / f"with{option}.csv"
        run(*flags, "-k=1,4", "--rows=2", option, f"-o={other}", monkeypatch=monkeypatch)
        assert other.read_bytes() != (folder / "one.csv").read_bytes(), option
    # Located neurons.
    sets = json.dumps([[0, 1], *([[2]] * (len(names) - 1))])
    head = "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM;Row\n"
    (folder / "results.csv").write_text(head + f"caption 0;u;{sets};0.2;{sets};0.3;0\n")
    located = f"-f={folder / 'results.csv'}"
    found = run(*flags, "-k=2", located, f"-o={folder / 'l.csv'}", monkeypatch=monkeypatch)
    assert found["settings"]["neurons"] == "located"
    for bad, said in ((["-k=3", located], "no layer has more"), (["-k=999"], "narrowest layer")):
        with pytest.raises(InputError, match=said):
            run(*flags, *bad, f"-o={folder / 'no.csv'}", monkeypatch=monkeypatch)
    # A run with the other protocol, and one that is not finished.
    source = resolve(str(folder / "model"))
    for protocol, finished, said in (
        ("paper", True, "add --protocol=paper"),
        ("published", False, "the run is not finished"),
    ):
        record = {"model": source.identity, "settings": {"protocol": protocol}}
        (folder / "results.json").write_text(json.dumps({**record, "finished": finished}))
        with pytest.raises(InputError, match=said):
            run(*flags, "-k=2", located, f"-o={folder / 'no.csv'}", monkeypatch=monkeypatch)
    (folder / "results.json").unlink()
    # A prompt that was left undecided has no neurons to count, and is named.
    with (folder / "results.csv").open("a") as file:
        file.write("caption 1;u;;;;;1\n")
    capsys.readouterr()
    run(*flags, "-k=2", located, f"-o={folder / 'u.csv'}", monkeypatch=monkeypatch)
    assert "not counted: 1 (row 1)" in capsys.readouterr().out
    assert not list(folder.glob("no*"))


def test_interrupted_or_shared_a_run_writes_the_same_bytes(
    folder: Path, warm: workspace.Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal captions keep random neurons of their own: one is scored before, one after."""
    (folder / "equal.csv").write_text("Caption;type\n" + "a caption;VM\n" * 3)
    flags = [f"--version={folder / 'model'}", "--device=cpu", f"-p={folder / 'equal.csv'}"]
    flags += ["--num_samples=2", "-k=4"]
    whole = run(*flags, f"-o={folder / 'whole.csv'}", monkeypatch=monkeypatch)
    rows = (folder / "whole.csv").read_text().splitlines()[1:]
    assert len({row.split(";", 1)[1] for row in rows}) == 3
    output = folder / "stopped.csv"
    with pytest.raises(KeyboardInterrupt):
        run(*flags, f"-o={output}", monkeypatch=monkeypatch, stop=2)
    assert len(output.read_text().splitlines()) == 3
    with output.open("a") as file:
        file.write("2;a cap")  # killed while it wrote
    with pytest.raises(InputError, match="continue_run"):
        run(*flags, f"-o={output}", monkeypatch=monkeypatch)
    again = run(*flags, f"-o={output}", "--continue_run", monkeypatch=monkeypatch, stop=1)
    assert output.read_bytes() == (folder / "whole.csv").read_bytes()
    assert again["means"] == whole["means"] and again["scores"] == whole["scores"]
    script = ROOT / "metrics" / "compute_disentanglement.py"
    done = warm.together(script, *flags, "-o=shared.csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Loading") == 1
    assert (folder / "shared.csv").read_bytes() == (folder / "whole.csv").read_bytes()
    assert not list(folder.glob(".shared.csv*"))


def test_a_score_that_is_not_finite_is_named_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that is complete already too: runs/paper.sh counts gaps by that."""
    workspace.save_model(tmp_path / "model", broken=True)
    (tmp_path / "prompts.csv").write_text("Caption;type\na cat;VM\na ~ cat;TM\n")
    flags = [f"--version={tmp_path / 'model'}", "--device=cpu", f"-p={tmp_path / 'prompts.csv'}"]
    flags += ["--num_samples=1", "-k=1", f"-o={tmp_path / 'd.csv'}"]
    for more in ([], ["--continue_run"]):
        found = run(*flags, *more, monkeypatch=monkeypatch, code=1)
        assert found["finished"] and found["undecided_rows"] == [1]
    assert found["scores"]["k=1 layer 0"]["all"]["missing"] == 1
    assert "a score is not finite: 1 (row 1)" in capsys.readouterr().out


@pytest.mark.parametrize(("more", "passes"), [([], 1), (["--together"], 3)])
def test_a_dry_run_estimates_the_passes_and_writes_nothing(
    folder: Path,
    more: list[str],
    passes: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [f"--version={folder / 'model'}", "--device=cpu", f"-p={folder / 'prompts.csv'}"]
    flags += ["--num_samples=2", "-k=1,4", f"-o={folder / 'dry.csv'}", "--dry_run", *more]
    monkeypatch.setattr(sys, "argv", ["compute_disentanglement.py", *flags])
    module = script()
    rows: list[float] = []

    def estimate(source: Source, *, unet_rows: float, **cost: Any) -> dict[str, str]:
        rows.append(unet_rows)
        return estimates.estimate(source, unet_rows=unet_rows, **cost)

    monkeypatch.setattr(module, "estimate", estimate)
    assert module.main(module.parse_args()) == 0
    assert rows == [3 * 2 * passes] and "estimated time" in capsys.readouterr().out
    assert not list(folder.glob("*dry*"))
