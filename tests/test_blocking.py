"""Which neurons script 4 switches off for which prompt, and whether they are those that are off."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import workspace
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from workspace import SAMPLING, WIDTHS, Warm

from utils.blocking import MODES, NOTHING_BLOCKED, sets_to_block
from utils.errors import InputError
from utils.files import write_table
from utils.generation import Sampling
from utils.images import image_name
from utils.mitigations import Mitigation
from utils.neuron_sets import RESULT_COLUMNS, NeuronSet, Result, read_results, result_cells
from utils.stable_diffusion import Model, encode_prompt, encode_unconditional, initial_noise
from utils.versions import stored_layer_widths

# Two layers of 8 and 6. Prompt 3 is not memorized, prompt 4 undecided, 5 has the set of 0.
FEW = [8, 6]
REFINED: dict[int, NeuronSet | None] = {
    0: [[1, 2], [0]],
    1: [[2, 5], []],
    2: [[], [4, 3]],
    3: [[], []],
    4: None,
    5: [[1, 2], [0]],
}


def result(row: int, refined: NeuronSet | None) -> Result:
    score = None if refined is None else 0.0
    initial = (
        None
        if refined is None
        else [sorted({*layer, 7 - 2 * l}) for l, layer in enumerate(refined)]
    )
    return Result(row, f"caption {row}", "", initial, score, refined, score)


RESULTS = [result(row, refined) for row, refined in REFINED.items()]
ALL = list(REFINED)


def test_nothing_is_blocked_for_original_images() -> None:
    assert sets_to_block("original_images", None, [], [4, 2], FEW, seed=0) == {
        4: [[], []],
        2: [[], []],
    }


def test_every_prompt_its_own_set() -> None:
    refined = sets_to_block("refined_neurons", None, RESULTS, ALL, FEW, seed=0)
    assert refined == REFINED
    initial = sets_to_block("initial_neurons", None, RESULTS, ALL, FEW, seed=0)
    assert initial == {r.row: r.initial for r in RESULTS}
    assert initial != refined and initial[4] is None


# Counts: 2 in layer 0 three times, then (0, 1) and (1, 0) twice, then (0, 5), (1, 3), (1, 4) once:
# ties go to the lower layer, then to the lower index.
@pytest.mark.parametrize(
    ("mode", "k", "expected"),
    [
        ("block_top_k_neurons", 1, [[2], []]),
        ("block_top_k_neurons", 2, [[1, 2], []]),
        ("block_top_k_neurons", 3, [[1, 2], [0]]),
        ("block_top_k_neurons", 4, [[1, 2, 5], [0]]),
        ("block_top_k_neurons", 5, [[1, 2, 5], [0, 3]]),
        ("block_top_k_neurons_per_layer", 1, [[2], [0]]),
        ("block_top_k_neurons_per_layer", 2, [[1, 2], [0, 3]]),
        ("block_top_k_neuron_subgroups", 1, [[1, 2], [0]]),
        ("block_top_k_neuron_subgroups", 2, [[1, 2], [0, 3, 4]]),
        ("block_top_k_neuron_subgroups", 3, [[1, 2, 5], [0, 3, 4]]),
    ],
)
def test_one_set_for_all_prompts(mode: str, k: int, expected: NeuronSet) -> None:
    for results in (RESULTS, RESULTS[::-1]):  # the file's order decides nothing
        blocked = sets_to_block(mode, k, results, [9, 0, 4], FEW, seed=0)
        assert blocked == {9: expected, 0: expected, 4: expected}


@pytest.mark.parametrize(
    ("mode", "k"),
    [
        ("block_top_k_neurons", 7),
        ("block_top_k_neurons_per_layer", 4),
        ("block_top_k_neuron_subgroups", 4),
        ("block_random_neurons", 7),
        ("block_random_neuron_subgroups", 4),
    ],
)
def test_more_than_was_located_is_refused(mode: str, k: int) -> None:
    with pytest.raises(InputError, match=f"{k} asked for"):
        sets_to_block(mode, k, RESULTS, ALL, FEW, seed=0)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in NOTHING_BLOCKED])
def test_nothing_located_is_refused(mode: str) -> None:
    nothing = [result(0, [[], []]), result(1, None)]
    k = None if mode in ("initial_neurons", "refined_neurons") else 1
    with pytest.raises(InputError, match="no located neurons"):
        sets_to_block(mode, k, nothing, [0, 1], FEW, seed=0)


# Random controls.


@st.composite
def located(draw: st.DrawFn) -> tuple[list[Result], list[int]]:
    """Results of a model with layers of 6 to 12 neurons, few of which are located."""
    widths = draw(st.lists(st.integers(6, 12), min_size=1, max_size=3))
    one_set = st.tuples(
        *(st.lists(st.integers(0, width // 2), unique=True, max_size=2) for width in widths)
    ).map(lambda layers: [sorted(layer) for layer in layers])
    sets = draw(st.lists(st.one_of(st.none(), one_set), min_size=1, max_size=5))
    return [result(row, neurons) for row, neurons in enumerate(sets)], widths


@settings(deadline=None)
@given(
    case=located(),
    mode=st.sampled_from(["block_random_neurons", "block_random_neuron_subgroups"]),
    k=st.one_of(st.none(), st.integers(1, 4)),
    seed=st.integers(0, 5),
)
def test_controls_are_as_many_in_the_same_layers_and_hit_no_located_neuron(
    case: tuple[list[Result], list[int]], mode: str, k: int | None, seed: int
) -> None:
    results, widths = case
    k = k or (1 if mode == "block_random_neuron_subgroups" else None)
    rows = [r.row for r in results]
    taken = [
        {i for r in results if r.refined for i in r.refined[layer]} for layer in range(len(widths))
    ]
    shared = {
        "block_random_neurons": "block_top_k_neurons",
        "block_random_neuron_subgroups": "block_top_k_neuron_subgroups",
    }
    try:
        if k is None:
            like = sets_to_block("refined_neurons", None, results, rows, widths, seed=seed)
        else:
            like = sets_to_block(shared[mode], k, results, rows, widths, seed=seed)
    except InputError:  # nothing there to be like
        with pytest.raises(InputError):
            sets_to_block(mode, k, results, rows, widths, seed=seed)
        return
    enough = all(
        len(neurons[layer]) <= widths[layer] - len(taken[layer])
        for neurons in like.values()
        if neurons
        for layer in range(len(widths))
    )
    if not enough:
        with pytest.raises(InputError, match=r"layer \d.* random neurons asked for"):
            sets_to_block(mode, k, results, rows, widths, seed=seed)
        return
    state = random.getstate()
    controls = sets_to_block(mode, k, results, rows, widths, seed=seed)
    assert random.getstate() == state, "the global generator is left alone"
    for row, control in controls.items():
        own = like[row]
        assert (control is None) == (own is None)
        if control is None or own is None:
            continue
        assert [len(layer) for layer in control] == [len(layer) for layer in own]
        for layer, columns in enumerate(control):
            assert columns == sorted(set(columns))
            assert not taken[layer] & set(columns)
            assert all(0 <= index < widths[layer] for index in columns)
    if k is not None:
        assert all(control == controls[rows[0]] for control in controls.values()), "one set for all"
    # A row's control depends on no other row that is asked for.
    for row in rows:
        alone = sets_to_block(mode, k, results, [row], widths, seed=seed)
        assert alone == {row: controls[row]}


def test_controls_differ_by_prompt_and_by_seed() -> None:
    wide = [1280]
    results = [result(row, [[0, 1, 2, 3]]) for row in range(3)]
    drawn = [
        sets_to_block("block_random_neurons", None, results, [0, 1, 2], wide, seed=seed)
        for seed in (0, 1)
    ]
    everything = [str(neurons) for controls in drawn for neurons in controls.values()]
    assert len(set(everything)) == 6


def test_a_layer_without_enough_other_neurons_is_refused() -> None:
    results = [result(0, [[0, 1, 2], []]), result(1, [[3, 4, 5], []])]
    with pytest.raises(InputError, match="layer 0: 3 random neurons asked for, but only 2"):
        sets_to_block("block_random_neurons", None, results, [0], FEW, seed=0)
    enough = sets_to_block("block_random_neurons", None, results, [0], [9, 6], seed=0)
    assert enough == {0: [[6, 7, 8], []]}


def test_controls_avoid_what_was_located_for_prompts_that_are_filtered_out() -> None:
    verbatim, template = result(0, [[0], []]), result(1, [[1, 2, 3, 4, 5, 6], []])
    for mode, k in (
        ("block_random_neurons", None),
        ("block_random_neurons", 1),
        ("block_random_neuron_subgroups", 1),
    ):
        blocked = sets_to_block(mode, k, [verbatim], [0], FEW, seed=3, located=[verbatim, template])
        assert blocked == {0: [[7], []]}


def test_a_short_batch_is_filled_up(small_model: Callable[..., Model]) -> None:
    """A picture is the same to the bit, however many others there are to share its batch with."""
    model = small_model("sd1")
    one, other = ([[column] for _ in model.value_layers] for column in (0, 1))
    sampling = Sampling(
        model,
        initial_noise(model, 2, seed=2),
        encode_unconditional(model),
        Mitigation(lambda row: encode_prompt(model, f"caption {row}")),
        {0: one, 1: None, 2: other},
        {"batch_size": 3, "scaling_factor": 0.0, "steps": 2, "guidance_scale": 7.0},
    )
    rows: list[int] = []
    handle = model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        alone, together = map(sampling.latents, ([(0, 0)], [(0, 0), (1, 0), (2, 1)]))
    finally:
        handle.remove()
    assert rows == 4 * [2 * 3], "both halves of guidance, in both steps"
    assert torch.equal(alone[0], together[0])


# The script: pictures of a run must be those of a checkpoint whose rows of ``to_v`` were changed.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.fresh(tmp_path_factory.mktemp("blocking") / "workspace")


@pytest.fixture(scope="module")
def sets(folder: Path) -> dict[int, Result]:
    """The workspace's own results: what the tests below need of them is asserted."""
    path = folder / "results" / "memorization_statistics_model.csv"
    results = {r.row: r for r in read_results(path, widths=WIDTHS)}
    own = [results[row].refined for row in (0, 1, 2)]
    assert all(r and any(r) for r in own) and own[0] != own[1] != own[2] != own[0]
    assert not any(results[5].refined or [])
    return results


Pictures = Callable[..., tuple[dict[str, bytes], dict]]


def test_random_neurons_of_one_type_are_none_that_were_located_for_the_other(
    pictures: "Pictures", sets: dict[int, Result], folder: Path
) -> None:
    """Row 0 is VM and row 1 TM; of layer 0 one neuron is left."""
    own, rest = [[0], [], [], []], [[*range(1, 31)], [], [], []]
    rows = [
        replace(sets[0], initial=own, refined=own),
        replace(sets[1], initial=rest, refined=rest),
    ]
    write_table(folder / "typed.csv", RESULT_COLUMNS, map(result_cells, rows))
    options = ("--memorization_type=VM", "--dataset=memorized.csv")
    _, record = pictures("typed", "--block_random_neurons", "-f=typed.csv", *options)
    assert record["blocked"] == {"0": [[31], [], [], []]}


@pytest.fixture(scope="module")
def pictures(warm: Warm, folder: Path) -> Pictures:
    """(name, options) -> (pictures by name, record) of a run of script 4."""

    def generate(name: str, *options: str, model: str = "model") -> tuple[dict[str, bytes], dict]:
        done = warm.run(4, f"--version={model}", f"-o={name}", *SAMPLING, *options, cwd=folder)
        assert done.returncode == 0, done.stderr
        found = {path.name: path.read_bytes() for path in sorted((folder / name).glob("img_*.jpg"))}
        return found, json.loads((folder / name / "config.json").read_text())

    return generate


def changed_checkpoint(folder: Path, neurons: NeuronSet, factor: float) -> str:
    """A copy of the model whose ``to_v`` rows are multiplied by a factor; its name."""
    name = f"changed{len(list(folder.glob('changed*')))}"
    shutil.copytree(folder / "model", folder / name)
    path = folder / name / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for (layer, _), columns in zip(stored_layer_widths(folder / "model"), neurons, strict=True):
        weights[f"{layer}.weight"][columns] *= factor
    save_file(weights, path, metadata={"format": "pt"})
    return name


def of_row(found: dict[str, bytes], row: int) -> list[bytes]:
    return [found[image_name(row, sample)] for sample in range(2)]


ORIGINAL = ("--original_images", "--dataset=memorized.csv")


@pytest.fixture(scope="module")
def original(pictures: Pictures) -> dict[str, bytes]:
    return pictures("unblocked", *ORIGINAL)[0]


@pytest.mark.parametrize("mode", ["initial_neurons", "refined_neurons"])
def test_each_prompt_of_a_batch_has_its_own_set_off(
    mode: str, pictures: Pictures, original: dict, sets: dict[int, Result], folder: Path
) -> None:
    found, record = pictures(mode, f"--{mode}")
    assert len(found) == 12 and record["settings"]["batch_size"] == 3, "batches of several prompts"
    for row in (0, 1, 2):
        own = sets[row].initial if mode == "initial_neurons" else sets[row].refined
        assert own is not None
        model = changed_checkpoint(folder, own, 0.0)
        expected, _ = pictures(f"{mode}_{row}", *ORIGINAL, model=model)
        assert of_row(found, row) == of_row(expected, row) != of_row(original, row)
    assert of_row(found, 5) == of_row(original, 5), "not memorized: nothing is off"
    assert of_row(found, 1) == of_row(found, 4), "the same caption, the same noises"


@pytest.mark.parametrize("factor", [-0.5, 0.5])
def test_a_factor_multiplies_instead(
    factor: float, pictures: Pictures, original: dict, sets: dict[int, Result], folder: Path
) -> None:
    found, record = pictures(f"factor{factor}", "--refined_neurons", f"--scaling_factor={factor}")
    assert record["settings"]["scaling_factor"] == factor
    own = sets[1].refined
    assert own is not None
    model = changed_checkpoint(folder, own, factor)
    expected, _ = pictures(f"factor{factor}_1", *ORIGINAL, model=model)
    assert of_row(found, 1) == of_row(expected, 1) != of_row(original, 1)


MODES_WITH_K = {
    "top": ("block_top_k_neurons", 3),
    "layer": ("block_top_k_neurons_per_layer", 2),
    "group": ("block_top_k_neuron_subgroups", 2),
    "random": ("block_random_neurons", 3),
    "random_group": ("block_random_neuron_subgroups", 1),
}


@pytest.mark.parametrize("name", MODES_WITH_K)
def test_one_set_is_off_for_all_prompts(
    name: str, pictures: Pictures, original: dict, sets: dict[int, Result], folder: Path
) -> None:
    mode, k = MODES_WITH_K[name]
    found, record = pictures(name, f"--{mode}={k}")
    shared = sets_to_block(mode, k, list(sets.values()), [0], WIDTHS, seed=0)[0]
    assert shared is not None and any(shared)
    assert record["blocked"] == {str(row): shared for row in range(6)}
    expected, _ = pictures(
        f"{name}_expected", *ORIGINAL, model=changed_checkpoint(folder, shared, 0)
    )
    assert found == expected != original


def test_every_prompt_has_its_own_control_off(
    pictures: Pictures, original: dict, sets: dict[int, Result], folder: Path
) -> None:
    found, record = pictures("controls", "--block_random_neurons", "--random_seed=7")
    taken = [{i for r in sets.values() for i in r.refined[layer]} for layer in range(len(WIDTHS))]
    for row, control in record["blocked"].items():
        assert [*map(len, control)] == [*map(len, sets[int(row)].refined)]
        assert not any(taken[layer] & set(columns) for layer, columns in enumerate(control))
    own = record["blocked"]["0"]
    expected, _ = pictures("controls_0", *ORIGINAL, model=changed_checkpoint(folder, own, 0))
    assert of_row(found, 0) == of_row(expected, 0) != of_row(original, 0)
    # The same prompt alone has the same control and, in the same batch, the same picture.
    alone, record = pictures(
        "controls_alone", "--block_random_neurons", "--random_seed=7", "--rows=0-1"
    )
    assert record["blocked"]["0"] == own and of_row(alone, 0) == of_row(found, 0)
    _, other = pictures("controls_8", "--block_random_neurons", "--random_seed=8", "--rows=0")
    assert other["blocked"]["0"] != own


def test_only_prompts_of_a_type_are_counted_and_generated(
    pictures: Pictures, sets: dict[int, Result]
) -> None:
    types = ("--block_top_k_neurons=2", "--dataset=memorized.csv")
    by_type = {kind: pictures(kind, *types, f"--memorization_type={kind}") for kind in ("VM", "TM")}
    rows = {"VM": [0, 2, 4, 5], "TM": [1, 3]}
    for kind, (found, record) in by_type.items():
        counted = [sets[row] for row in rows[kind]]
        expected = sets_to_block("block_top_k_neurons", 2, counted, rows[kind], WIDTHS, seed=0)
        assert record["blocked"] == {str(row): neurons for row, neurons in expected.items()}
        assert sorted(found) == [image_name(row, s) for row in rows[kind] for s in range(2)]
    assert by_type["VM"][1]["blocked"]["0"] != by_type["TM"][1]["blocked"]["1"]


def test_other_prompts_can_be_generated_with_one_set_off(
    pictures: Pictures, sets: dict[int, Result], folder: Path
) -> None:
    others = "--unmemorized_prompts=holdout.csv"
    found, record = pictures("others", "--block_top_k_neurons=3", others, "--rows=1-2,5")
    assert sorted(found) == [image_name(row, s) for row in (1, 2, 5) for s in range(2)]
    shared = record["blocked"]["1"]
    everything = list(sets.values())
    assert shared == sets_to_block("block_top_k_neurons", 3, everything, [1], WIDTHS, seed=0)[1]
    assert set(record["inputs"]) == {"results/memorization_statistics_model.csv", "holdout.csv"}
    options = ("--original_images", others, "--rows=1-2,5")
    unblocked, _ = pictures("others_unblocked", *options)
    expected, _ = pictures("others_expected", *options, model=changed_checkpoint(folder, shared, 0))
    assert found == expected != unblocked
