"""One test for each line of the section 'To the bit' of the method: each quotes its line.

Other files look at the same modules more widely; here a line of the specification finds its test.
"""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from small_models import save_small_model
from torchmetrics.functional.image import structural_similarity_index_measure

from utils import exact_search
from utils.activation_statistics import (
    Statistics,
    load_statistics,
    save_tensors,
    z_scores,
)
from utils.errors import InputError
from utils.exact_search import Question
from utils.images import image_name
from utils.localization import (
    Search,
    Thresholds,
    UndecidedError,
    candidates,
    kept_rows,
    localize,
)
from utils.neuron_sets import NeuronSet, Result, read_results, result_cells
from utils.noise_difference import NoiseSettings, normalized
from utils.scoring import Detector, MemorizationScore
from utils.ssim import number_of_scales, pairwise_ssim, ssim, ssim_floor
from utils.stable_diffusion import Model, encode_prompt, initial_noise, load_model
from utils.summary import summarize_results
from utils.thresholds import PUBLISHED, pairs, published_threshold, summary
from utils.training_images import image_path
from utils.versions import resolve

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = Thresholds(pairwise=-1.0, initial=0.5, refinement=0.5)


def script(number: int) -> Path:
    (path,) = ROOT.glob(f"{number}_*.py")
    return path


def module(number: int) -> ModuleType:
    """A numbered script as a module, so that its ``main`` can be called in this process."""
    spec = importlib.util.spec_from_file_location(f"script_{number}", script(number))
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_defaults_are_the_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = {"seed": 1, "samples_per_prompt": 10, "num_inference_steps": 50, "guidance_scale": 1.0}
    pictures = {"seed": 2, "num_samples": 10, "steps": 50, "guidance_scale": 7.0}
    for number, more, wanted in (
        (2, [], noise),
        (3, [], noise),
        (4, ["--original_images"], pictures),
    ):
        monkeypatch.setattr(sys, "argv", [script(number).name, "-o=x", *more])
        options = vars(module(number).parse_args())
        assert {name: options[name] for name in wanted} == wanted


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs a script's ``main`` in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(number: int, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", [script(number).name, *options])
        loaded = module(number)
        return loaded.main(loaded.parse_args())

    return run


def statistics_of(model: Model) -> Statistics:
    """From a few captions; wide enough that a few neurons stand out."""
    read = [
        model.value_reader.activations(encode_prompt(model, caption).embedding[0])
        for caption in ("a house", "two boats", "stairs (wood)")
    ]
    layers = [torch.stack(layer) for layer in zip(*read, strict=True)]
    return Statistics([x.mean(dim=0) for x in layers], [4 * x.std(dim=0) for x in layers])


# Numbers and comparisons


class TestThreeThresholds:
    """'Scores are float32, turned into Python floats before any comparison; thresholds are
    unrounded float64': 0.428 itself lies between two float32 numbers."""

    nearest = float(np.float32(0.428))

    def test_pairwise_strictly_above(self) -> None:
        assert self.nearest != 0.428
        score = torch.tensor([self.nearest], dtype=torch.float32)
        below, above = (math.nextafter(self.nearest, side) for side in (0, 1))
        assert kept_rows(score, 2, self.nearest) == []
        assert kept_rows(score, 2, below) == [0, 1]  # in float32 the two would be equal
        assert kept_rows(score, 2, above) == []
        assert (kept_rows(score, 2, 0.428) == [0, 1]) == (self.nearest > 0.428)

    @pytest.mark.parametrize(
        ("tau", "done"), [(nearest, True), (math.nextafter(nearest, 0), False)]
    )
    def test_initial_selection_at_or_below(self, tau: float, done: bool) -> None:
        found = localize(
            [torch.ones(1)],
            [torch.tensor([9.0])],
            lambda neurons: self.nearest if neurons[0] else 1.0,
            search=Search(),
            thresholds=Thresholds(0.0, tau, tau),
        )
        assert found.fell_back != done

    @pytest.mark.parametrize(
        ("tau", "dropped"), [(nearest, False), (math.nextafter(nearest, 1), True)]
    )
    def test_refinement_strictly_below(self, tau: float, dropped: bool) -> None:
        scores = {2: 0.1, 1: self.nearest, 0: 1.0}
        found = localize(
            [torch.ones(2)],
            [torch.tensor([9.0, 9.0])],
            lambda neurons: scores[len(neurons[0])],
            search=Search(),
            thresholds=Thresholds(0.0, tau, tau),
        )
        assert len(found.refined[0]) == (1 if dropped else 2)

    def test_each_is_tau_unless_its_flag_is_given_and_fall_back_replaces_the_last(self) -> None:
        """'Refinement does not use the score that initial selection ended with, except after the
        fall-back, which replaces it even if its flag was given.'"""
        scores = {2: 0.6, 1: 0.7, 0: 1.0}

        def refined(initial: float, refinement: float) -> int:
            found = localize(
                [torch.ones(2)],
                [torch.tensor([9.0, 9.0])],
                lambda neurons: scores[len(neurons[0])],
                search=Search(),
                thresholds=Thresholds(0.0, initial, refinement),
            )
            return len(found.refined[0])

        assert refined(0.65, 0.65) == 2
        assert refined(0.65, 0.75) == 1
        assert refined(0.5, 0.75) == 2  # fell back to 0.6: giving one back is 0.7


class TestReferenceEvaluation:
    """'Where a faster evaluation lies within 1e-5 of the value that it is compared with, the
    reference evaluation decides. Written scores, and the threshold after a fall-back, are reference
    evaluations.'"""

    def test_question_is_left_open_within_the_margin(self) -> None:
        question = Question(lambda score: score < 0.5, (0.5,))
        assert not question.clear(0.5, 1e-5) and not question.clear(0.500009, 1e-5)
        assert not question.clear(0.499991, 1e-5) and not question.clear(math.nan, 1e-5)
        assert question.clear(0.50002, 1e-5) and question.clear(0.49998, 1e-5)
        assert not question.clear_above(0.500009, 1e-5) and not question.clear_above(0.4, 1e-5)
        assert question.clear_above(0.50002, 1e-5)

    def test_a_fast_evaluation_that_is_a_little_wrong_changes_nothing(
        self, small_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The random model's deep neurons hardly have an effect, and after the fall-back such land
        on the threshold itself: without the reference, noise would decide."""
        model = small_model("sd1")
        statistics = statistics_of(model)
        search = Search(initial_theta=2.0, min_theta=1.4, initial_k=1)
        detector = Detector(model, NoiseSettings(), rows=3, seed=1)
        # Two of three rows count: where all do, the reference evaluation is as fast.
        one_pair = detector.pairwise("a quiet sea").max().item() - 1e-6
        levels = replace(EVERYTHING, pairwise=one_pair)

        def find(method: str) -> Any:
            return detector.find(
                "a quiet sea", statistics, search=search, thresholds=levels, method=method
            )

        plain = find("plain").outcome
        assert plain.fell_back and sum(map(len, plain.initial)) > 15
        errors = itertools.cycle([8e-6, -8e-6, -8e-6, 8e-6])
        wrong: list[float] = []

        def off(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def evaluated(*arguments: Any) -> torch.Tensor:
                wrong.append(next(errors))
                return function(*arguments) + wrong[-1]

            return evaluated

        # What the fast evaluation scores with; the reference has its own name for it.
        monkeypatch.setattr(exact_search, "ssim", off(ssim))
        monkeypatch.setattr(exact_search, "ssim_floor", off(ssim_floor))
        exact = find("exact").outcome
        assert len(wrong) > 10, "the fast evaluation was used"
        assert exact == plain  # scores included, bit for bit

    def test_tries_that_restart_from_the_one_before_grow_rightly(
        self, small_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Selection ends at its third try. A try may be replayed from the one before, which has
        fewer neurons in its first layers."""
        model = small_model("sd1")
        statistics = statistics_of(model)
        detector = Detector(model, NoiseSettings(), rows=3, seed=1)

        def find(method: str, tau: float, min_theta: float) -> Any:
            search = Search(initial_theta=20.0, min_theta=min_theta, initial_k=1)
            levels = Thresholds(-1.0, tau, 0.0)
            found = detector.find(
                "a quiet sea", statistics, search=search, thresholds=levels, method=method
            )
            return found.outcome

        second, third = (find("plain", 0.0, 20 - 0.25 * tries).initial_score for tries in (2, 3))
        assert third < second - 4e-5
        detector._one_row_share = 0.05  # taken for so fast that rows are looked at one by one
        detector.sets_per_pass = 1
        restarts: list[int] = []
        replaying = detector._replay.replaying

        def noted(recording: Any, layer: int, chosen: Sequence[int]) -> Any:
            restarts.append(layer)
            return replaying(recording, layer, chosen)

        monkeypatch.setattr(detector._replay, "replaying", noted)
        tau = (second + third) / 2
        plain, exact = (find(method, tau, 10.0) for method in ("plain", "exact"))
        assert len(restarts) >= 3 and 0 in restarts, "first layers differ from try to try"
        assert not plain.fell_back and [len(layer) for layer in plain.initial] == [3] * 7
        assert exact == plain

    def test_reference_is_one_set_all_rows_in_one_pass(
        self, small_model: Callable[..., Model]
    ) -> None:
        model = small_model("sd1")
        detector = Detector(model, NoiseSettings(), rows=4, seed=1)
        batches: list[int] = []
        handle = model.unet.register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))
        try:
            finding = detector.find(
                "a quiet sea",
                statistics_of(model),
                search=Search(use_theta=False, initial_k=2),
                thresholds=Thresholds(-1.0, 2.0, 0.0),
                method="plain",
            )
        finally:
            handle.remove()
        assert set(batches) == {4} and len(batches) == finding.evaluations

    def test_no_pass_is_made_twice(self) -> None:
        """A set that refinement comes back to, in any order of its neurons, is known."""
        asked: list[NeuronSet] = []

        def difference(neurons: NeuronSet) -> torch.Tensor:
            asked.append(neurons)
            return torch.rand(2, 4, 16, 16)

        score = MemorizationScore(difference, torch.rand(2, 4, 16, 16), [0, 1])
        assert score([[1, 2], [3]]) == score([[2, 1], [3]]) and len(asked) == 1
        assert score([[], []]) == pytest.approx(1, abs=1e-5) and len(asked) == 1


class TestRangesOfSsim:
    """'In step 1 the batches are all pairs of the n rows; from step 2 on they are the kept rows
    only, although the U-Net sees all n.'"""

    def rows(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return 0.5 * torch.rand(3, 4, 16, 16, generator=generator)

    def test_from_step_two_on_only_kept_rows_count(self) -> None:
        unblocked = self.rows()
        blocked = 0.7 * unblocked + 0.3 * self.rows().roll(1, 0)
        blocked[2] *= 2  # a louder row, which is not kept
        score = MemorizationScore(lambda neurons: blocked, unblocked, [0, 1])
        assert score([[1]]) == ssim(unblocked[:2], blocked[:2]).max().item()
        assert score([[1]]) != ssim(unblocked, blocked)[:2].max().item()

    def test_the_loudest_row_is_a_place_among_the_kept_rows(self) -> None:
        unblocked = self.rows()
        blocked = unblocked.roll(1, 0)
        blocked[2] = unblocked[2]
        score = MemorizationScore(lambda neurons: blocked, unblocked, [0, 2])
        assert score([[1]]) > 0.99 and score.loudest == 1

    def test_in_step_one_all_pairs_are_one_batch(self) -> None:
        rows = self.rows()
        rows[2] *= 2
        together = pairwise_ssim(rows)
        assert together[0] == ssim(rows[[0, 0, 1]], rows[[1, 2, 2]])[0]
        assert together[0] != ssim(rows[:1], rows[1:2])[0]

    def test_only_variances_are_clamped_not_the_covariance(self) -> None:
        """Where one half of a picture is inverted, its covariance is negative and counts so."""
        first = self.rows()[:1] + torch.linspace(0, 1, 16)
        second = first.clone()
        second[..., 8:] = 1.5 - second[..., 8:]
        low = ssim(first, second).item()
        # With the covariance clamped at 0 the inverted half would give about 0 instead of -1.
        assert low < 0.25

    def test_pooling_drops_an_odd_last_row_or_column(self) -> None:
        """21 pixels: the second scale is made of the 20 x 20 corner, 10 x 10 means of it."""
        generator = torch.Generator().manual_seed(0)
        first, second = torch.rand(2, 1, 2, 21, 21, generator=generator)
        second = 0.6 * first + 0.4 * second
        pooled = [
            image[..., :20, :20].reshape(1, 2, 10, 2, 10, 2).mean(dim=(3, 5))
            for image in (first, second)
        ]
        _, contrast = structural_similarity_index_measure(
            first, second, sigma=1.5, kernel_size=11, return_contrast_sensitivity=True
        )
        second_term = ssim(*pooled).item() ** (1 / 0.99)  # one scale: to the power 0.99
        expected = (contrast.item() * second_term) ** 0.495
        assert ssim(first, second).item() == pytest.approx(expected, abs=2e-6)

    @pytest.mark.parametrize(
        ("side", "scales"), [(64, 3), (41, 3), (40, 2), (21, 2), (20, 1), (6, 1)]
    )
    def test_scales_by_the_smaller_side(self, side: int, scales: int) -> None:
        assert number_of_scales(side, 64) == number_of_scales(64, side) == scales

    def test_below_six_pixels_is_bad_input(self) -> None:
        with pytest.raises(InputError):
            number_of_scales(64, 5)


class TestConstantAndNotFinite:
    """'A channel whose difference has max = min becomes 0. What is not finite leaves the prompt
    undecided: its four result cells stay empty, the summary names it, the exit code is 1.'"""

    def test_constant_channel_becomes_zero(self) -> None:
        assert torch.equal(normalized(torch.full((1, 1, 4, 4), 3.0)), torch.zeros(1, 1, 4, 4))

    @pytest.mark.parametrize("method", ["plain", "exact"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_undecided(
        self,
        small_model: Callable[..., Model],
        monkeypatch: pytest.MonkeyPatch,
        method: str,
        value: float,
    ) -> None:
        model = small_model("sd1")
        detector = Detector(model, NoiseSettings(), rows=3, seed=1)
        forward = model.unet.forward

        def broken(*args: Any, **options: Any) -> Any:
            output = forward(*args, **options)[0].clone()
            output[1, 0, 0, 0] = value
            return (output,)

        monkeypatch.setattr(model.unet, "forward", broken)
        with pytest.raises(UndecidedError):
            detector.pairwise("a quiet sea")
        with pytest.raises(UndecidedError):
            detector.find(
                "a quiet sea",
                statistics_of(model),
                search=Search(),
                # Were NaN below every threshold, the prompt would pass for not memorized.
                thresholds=Thresholds(2.0, 2.0, 2.0),
                method=method,
            )

    @pytest.mark.parametrize("method", ["plain", "exact"])
    def test_undecided_when_a_blocked_pass_breaks(
        self, small_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        """NaN in a kept row's blocked difference: neither below the threshold nor above."""
        model = small_model("sd1")
        detector = Detector(model, NoiseSettings(), rows=3, seed=1)
        statistics = statistics_of(model)
        forward = model.unet.forward
        passes: list[int] = []

        def broken(*args: Any, **options: Any) -> Any:
            output = forward(*args, **options)[0].clone()
            passes.append(1)
            if len(passes) > 2:
                output[:, 0, 0, 0] = math.nan
            return (output,)

        monkeypatch.setattr(model.unet, "forward", broken)
        with pytest.raises(UndecidedError):
            detector.find(
                "a quiet sea",
                statistics,
                search=Search(initial_k=1),
                thresholds=EVERYTHING,
                method=method,
            )

    def test_its_cells_stay_empty_and_the_summary_names_it(self) -> None:
        undecided = Result(3, "a", "", None, None, None, None)
        assert result_cells(undecided) == ["a", "", "", "", "", "", 3]
        assert summarize_results([undecided], {3: "VM"})["undecided_rows"] == [3]

    def test_exit_code_is_one(
        self,
        run_main: Callable[..., int],
        small_folder: Callable[[str], Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def undecided(*args: Any) -> torch.Tensor:
            raise UndecidedError("not finite")

        Path("p.csv").write_text("Caption\na\nb\n")
        options = [
            f"--version={small_folder('sd1')}",
            "-d=p.csv",
            "-o=out.csv",
            "--detect_only",
            "--pairwise_ssim_threshold=0.5",
        ]
        monkeypatch.setattr(Detector, "pairwise", undecided)
        assert run_main(3, *options) == 1
        assert json.loads(Path("out.json").read_text())["undecided_rows"] == [0, 1]
        assert Path("out.csv").read_text().splitlines()[1:] == ["a;;;;0", "b;;;;1"]


# Noise and text


def test_every_prompt_has_the_same_noises(small_model: Callable[..., Model]) -> None:
    """'The generator is re-seeded for every prompt. Drawn in float32.'

    The order in which prompts are scored therefore plays no role."""
    model = small_model("sd1")
    expected = torch.randn((3, 4, 16, 16), generator=torch.Generator("cpu").manual_seed(1))
    seen: list[torch.Tensor] = []
    handle = model.unet.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    try:
        detector = Detector(model, NoiseSettings(), rows=3, seed=1)
        first, second = detector.pairwise("one"), detector.pairwise("two")
        assert torch.equal(detector.pairwise("one"), first)
        assert torch.equal(Detector(model, NoiseSettings(), rows=3, seed=1).pairwise("two"), second)
    finally:
        handle.remove()
    assert len(seen) == 4 and all(torch.equal(x, expected) for x in seen)
    half = small_model("sd1", "bfloat16")
    assert initial_noise(half, 3, 1).dtype == torch.float32
    assert torch.equal(initial_noise(half, 3, 1), expected)


def test_scheduler_is_the_models_own(small_model: Callable[..., Model]) -> None:
    """'`published` takes index 1 of its timesteps, `paper` index 0': 961 and 981 for v1-4; 'eps =
    sqrt(abar_t) v + sqrt(1 - abar_t) x' for a v-prediction model."""
    for architecture in ("sd1", "sd2", "xl"):
        model = small_model(architecture)
        seen: list[int] = []
        handle = model.unet.register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(int(args[1]))
        )
        try:
            for protocol in ("published", "paper"):
                Detector(model, NoiseSettings(protocol=protocol), rows=2, seed=1).pairwise("a")
        finally:
            handle.remove()
        assert seen == [961, 981]
    assert small_model("sd2").scheduler.config.prediction_type == "v_prediction"


def test_caption_exactly_as_in_the_cell(small_model: Callable[..., Model], tmp_path: Path) -> None:
    """'No stripping; "NA" and "null" are captions; padded and truncated.'"""
    from utils.files import read_prompts

    path = tmp_path / "p.csv"
    path.write_text('Caption;URL\nNA;\n null ;\n"a;""b""";\n')
    captions = [prompt.caption for prompt in read_prompts(path)]
    assert captions == ["NA", " null ", 'a;"b"']
    model = small_model("sd1")
    long = "x" * 500
    for caption in [*captions, long]:
        tokens = model.pipeline.tokenizer(
            caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        expected = model.pipeline.text_encoder(tokens)[0]
        assert torch.equal(encode_prompt(model, caption).embedding, expected)
    assert torch.equal(
        encode_prompt(model, long).embedding, encode_prompt(model, long + "y").embedding
    )


class TestActivations:
    """'Activations in float32, whatever the U-Net's dtype: |value|, mean over tokens, |a - mean| /
    std against the float32 statistics, strictly above theta.'"""

    def test_half_precision_reads_the_same_activations(
        self, small_model: Callable[..., Model]
    ) -> None:
        read = [
            model.value_reader.activations(encode_prompt(model, "a quiet sea").embedding[0])
            for model in (small_model("sd1"), small_model("sd1", "bfloat16"))
        ]
        for exact, half in zip(*read, strict=True):
            assert exact.dtype == half.dtype == torch.float32
            assert torch.equal(exact, half)

    def test_strictly_above_theta_on_both_sides_of_the_mean(self) -> None:
        statistics = Statistics([torch.tensor([1.0, 1.0, 1.0])], [torch.full((3,), 0.125)])
        activations = [torch.tensor([1.625, 0.375, 1.75])]
        z = z_scores(activations, statistics)
        assert z[0].tolist() == [5.0, 5.0, 6.0]
        assert candidates(activations, z, 5.0, 0) == [[2]]
        assert candidates(activations, z, 4.75, 0) == [[0, 1, 2]]

    def test_std_of_zero(self) -> None:
        """'Infinite if a differs from the mean, else 0.'"""
        z = z_scores([torch.tensor([1.0, 2.0])], Statistics([torch.ones(2)], [torch.zeros(2)]))
        assert z[0].tolist() == [0.0, math.inf]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_statistics_that_are_not_finite_are_bad_input(
        self, tmp_path: Path, value: float
    ) -> None:
        for part in (0, 1):
            content = [[torch.ones(2)], [torch.ones(2)]]
            content[part][0][1] = value
            save_tensors(tuple(content), tmp_path / "s.pt")
            with pytest.raises(InputError, match="NaN or infinity"):
                load_statistics(tmp_path / "s.pt")


# Selection and refinement


class TestTopK:
    """'Largest a, not largest z; min(k, width) per layer; ties go to the lower index. A neuron in
    both groups counts as a top one. The order lives in memory; both CSV columns are sorted.'"""

    def test_largest_activation_not_largest_z(self) -> None:
        assert candidates([torch.tensor([1.0, 3.0, 2.0])], [torch.tensor([9.0, 0, 0])], 99, 1) == [
            [1]
        ]

    def test_ties_go_to_the_lower_index(self) -> None:
        a = torch.zeros(2000)
        a[[1500, 30, 700]] = 1.0
        assert candidates([a], [torch.zeros(2000)], 99, 5) == [[30, 700, 1500, 0, 1]]

    def test_min_of_k_and_width(self) -> None:
        found = candidates([torch.ones(2), torch.ones(5)], [torch.zeros(2), torch.zeros(5)], 99, 3)
        assert found == [[0, 1], [0, 1, 2]]

    def test_in_both_groups_is_a_top_one_and_columns_are_sorted(self) -> None:
        a, z = torch.tensor([0.1, 0.9, 0.2]), torch.tensor([9.0, 9.0, 9.0])
        assert candidates([a], [z], 5.0, 1) == [[0, 2, 1]]
        found = localize(
            [a],
            [z],
            lambda neurons: 1 - 0.2 * len(neurons[0]),
            search=Search(initial_k=1),
            thresholds=Thresholds(0.0, 0.45, 0.45),
        )
        assert found.initial == found.refined == [[0, 1, 2]]


class TestTries:
    """'theta_j = initial_theta - j * step, computed from j, k_j = initial_k + j. Each pair is tried
    before the stop is checked. Fall back if theta_(j+1) <= min_theta or k_(j+1) exceeds the widest
    layer.'"""

    def test_computed_from_j(self) -> None:
        search = Search(initial_theta=5.0, theta_step=0.1, initial_k=2)
        for j in range(40):
            assert search.theta(j) == 5.0 - j * 0.1 and search.k(j) == 2 + j

    @pytest.mark.parametrize(
        ("search", "widest", "tries"),
        [
            (Search(), 1280, 16),
            (Search(initial_theta=0.0), 1280, 1),
            (Search(), 3, 4),
            (Search(use_theta=False), 7, 8),
            (Search(use_top_k=False), 3, 16),
        ],
        ids=["the paper's", "at least one", "k stops first", "no theta", "no top k"],
    )
    def test_stops(self, search: Search, widest: int, tries: int) -> None:
        found = next(j for j in range(100) if search.is_last(j, widest))
        assert found + 1 == tries

    @pytest.mark.parametrize(
        "options",
        [
            ["--no_theta", "--no_top_k"],
            ["--theta_reduction_per_step=0"],
            ["--theta_reduction_per_step=-0.25"],
        ],
        ids=["both together", "step 0", "step below 0"],
    )
    def test_nothing_to_select_by_is_exit_2(self, tmp_path: Path, options: Sequence[str]) -> None:
        (tmp_path / "p.csv").write_text("Caption\na\n")
        save_tensors(([torch.ones(2)], [torch.ones(2)]), tmp_path / "s.pt")
        common = ["--version=v1-4", "-d=p.csv", "-o=out.csv", "--statistics=s.pt", "--dry_run"]

        command = [sys.executable, str(script(3)), *common]
        refused = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
        assert refused.returncode == 2
        assert options[0].partition("=")[0] in refused.stderr


class TestRefinement:
    """'A layer without candidates is skipped. All later decisions are scored with the layers and
    neurons dropped so far re-activated. Relative option: drop if |s - s_all| / (|s_all| + 1e-9)
    < r, s_all the initial set's score, never updated, in place of the absolute test.'"""

    def test_decisions_build_on_each_other(self) -> None:
        asked: list[NeuronSet] = []

        def score(neurons: NeuronSet) -> float:
            asked.append([list(layer) for layer in neurons])
            return 0.25 if 0 in neurons[0] else 1.0

        found = localize(
            [torch.ones(2), torch.ones(1), torch.ones(1)],
            [torch.tensor([9.0, 9.0]), torch.zeros(1), torch.tensor([9.0])],
            score,
            search=Search(),
            thresholds=Thresholds(0.0, 0.5, 0.5),
        )
        assert asked == [
            [[0, 1], [], [0]],
            [[0, 1], [], []],  # layer 2 dropped, layer 1 skipped
            [[], [], []],  # layer 0 kept
            [[1], [], []],  # 0 kept
            [[0], [], []],  # 1 dropped
            [[0], [], []],
        ]
        assert found.refined == [[0], [], []]

    def test_relative_share_of_the_initial_score_never_updated(self) -> None:
        """Each step of 0.04 is within a tenth of 0.5, two are not."""
        found = localize(
            [torch.zeros(3), torch.zeros(1)],
            [torch.full((3,), 9.0), torch.full((1,), 9.0)],
            lambda neurons: 0.5 + 0.04 * (4 - sum(map(len, neurons))),
            search=Search(relative=0.1),
            thresholds=Thresholds(0.0, 0.5, 0.0),
        )
        assert found.initial_score == 0.5
        # The single neuron of the last layer goes as a layer; after it nothing may.
        assert found.refined == [[0, 1, 2], []]


# Files


class TestResultFile:
    """'A seventh column `Row`; files without it: position. Images are named by it; the reference
    `0001_first_image.jpg` is row 1. Scores with six digits; not memorized 0.000000, in no
    median. Equal captions are computed once and written once per row.'"""

    def test_row_is_the_identity(self, tmp_path: Path) -> None:
        six = "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM"
        cells = "c;u;[[1]];0.5;[[1]];0.4"
        (tmp_path / "ours.csv").write_text(f"{six};Row\n{cells};7\n{cells};3\n")
        (tmp_path / "theirs.csv").write_text(f"{six}\n{cells}\n{cells}\n")
        assert [r.row for r in read_results(tmp_path / "ours.csv")] == [7, 3]
        assert [r.row for r in read_results(tmp_path / "theirs.csv")] == [0, 1]
        assert image_name(7, 2) == "img_0007_02.jpg"
        assert image_path(Path("x"), 1).name == "0001_first_image.jpg"

    def test_six_digits_and_no_median_of_what_is_not_memorized(self) -> None:
        found = Result(0, "a", "", [[1, 2, 3]], 0.1234567, [[1, 2]], 1 / 3)
        nothing = Result(1, "b", "", [[]], 0.0, [[]], 0.0)
        assert result_cells(found)[3::2] == ["0.123457", "0.333333"]
        assert result_cells(nothing)[2:6] == ["[[]]", "0.000000", "[[]]", "0.000000"]
        types = {0: "VM", 1: "VM"}
        numbers = summarize_results([found, nothing, nothing], types)
        assert numbers["memorized"] == 1 and numbers["median_neurons"] == {"all": 2, "VM": 2}

    def test_equal_captions_are_computed_once_and_written_once_per_row(
        self,
        run_main: Callable[..., int],
        small_folder: Callable[[str], Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        scored: list[str] = []
        original = Detector.pairwise

        def counted(self: Detector, caption: str) -> torch.Tensor:
            scored.append(caption)
            return original(self, caption)

        monkeypatch.setattr(Detector, "pairwise", counted)
        Path("p.csv").write_text("Caption;URL\nsame;x\nother;y\nsame;z\n")
        code = run_main(
            3,
            f"--version={small_folder('sd1')}",
            "-d=p.csv",
            "-o=out.csv",
            "--detect_only",
            "--pairwise_ssim_threshold=0.5",
            "--samples_per_prompt=2",
        )
        assert code == 0 and scored == ["same", "other"]
        rows = {
            line.rpartition(";")[2]: line.split(";")
            for line in Path("out.csv").read_text().splitlines()[1:]
        }
        assert sorted(rows) == ["0", "1", "2"]
        assert rows["0"][:2] == ["same", "x"] and rows["2"][:2] == ["same", "z"]
        assert rows["0"][2:4] == rows["2"][2:4] != rows["1"][2:4]


class TestThresholdFile:
    """'A dict of plain tensors (scores: prompts x n(n-1)/2); std over prompts unbiased; at least
    two prompts. In its record the value is called `threshold`. The published 0.428 is the one
    threshold accepted without a file: v1-4, `published`, no guidance, any dtype.'"""

    def test_summary_by_numpy(self) -> None:
        scores = np.random.default_rng(0).random((7, 6))
        largest = scores.max(axis=1)
        result = summary(scores.tolist())
        mean, std = largest.mean(), largest.std(ddof=1)
        assert result["threshold"] == pytest.approx(mean + std, abs=1e-12)
        assert result["largest_pair_per_prompt"] == pytest.approx(
            {"mean": mean, "std": std, "threshold": mean + std}
        )
        assert result["all_pairs"] == pytest.approx(
            {
                "mean": scores.mean(),
                "std": scores.std(ddof=1),
                "threshold": scores.mean() + scores.std(ddof=1),
            }
        )
        with pytest.raises(InputError, match="at least two"):
            summary(scores[:1].tolist())

    def test_file_and_record(
        self, run_main: Callable[..., int], small_folder: Callable[[str], Path]
    ) -> None:
        Path("p.csv").write_text("Caption\none dog\ntwo boats\nRAIN\n")
        options = [f"--version={small_folder('sd1')}", "--prompts=p.csv", "-o=t.pt"]
        assert run_main(2, *options, "--samples_per_prompt=3") == 0
        content = torch.load("t.pt", weights_only=True)
        assert all(isinstance(value, torch.Tensor) for value in content.values())
        assert content["scores"].shape == (3, 3) == (3, len(pairs(3)))
        model = load_model(resolve(str(small_folder("sd1"))), device="cpu", dtype="float32")
        detector = Detector(model, NoiseSettings(), rows=3, seed=1)
        for row, caption in enumerate(("one dog", "two boats", "RAIN")):
            assert torch.equal(content["scores"][row], detector.pairwise(caption))
        record = json.loads(Path("t.json").read_text())
        expected = summary(content["scores"].tolist())["threshold"]
        assert record["threshold"] == expected == content["threshold"].item()

    @pytest.mark.parametrize(
        ("change", "applies"),
        [
            ({}, True),
            ({"dtype": "float16"}, True),
            ({"protocol": "paper"}, False),
            ({"guidance_scale": 7.0}, False),
            ({"num_inference_steps": 20}, False),
        ],
    )
    def test_published_value_applies_to_v1_4_alone(
        self, change: dict[str, Any], applies: bool
    ) -> None:
        settings = {
            "protocol": "published",
            "num_inference_steps": 50,
            "guidance_scale": 1.0,
            "exchanged_guidance": False,
            "dtype": "float32",
            **change,
        }
        assert published_threshold(resolve("v1-4"), settings) == (PUBLISHED if applies else None)
        assert PUBLISHED == 0.428
        for other in ("v1-5", "v2-1", "xl"):
            assert published_threshold(resolve(other), settings) is None
        assert published_threshold(resolve("v1-4", "abc"), settings) is None


def test_the_small_folder_helper_is_deterministic(tmp_path: Path) -> None:
    """All that is above compares folders by their weights: the same seed must give the same."""
    shas = {
        resolve(str(save_small_model(tmp_path / name, "sd1", seed=seed))).identity["sha256"]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    }
    assert len(shas) == 2
