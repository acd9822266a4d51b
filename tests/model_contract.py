"""What every model must do to be searched: subclass ``ModelContract`` and name its folder.

    class TestMyModel(ModelContract):
        @pytest.fixture(scope="class")
        def folder(self) -> Path:
            return Path("/where/my/model/is")

The folder is loaded as a user's is. See docs/adding_a_model.md.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from utils.activation_statistics import Statistics
from utils.localization import Search, Thresholds
from utils.neuron_sets import check_neurons
from utils.noise_difference import NoiseSettings, noise_difference
from utils.scoring import Detector
from utils.stable_diffusion import (
    Model,
    decode,
    encode_prompt,
    encode_unconditional,
    initial_noise,
    load_model,
    sample_latents,
    to_noise_prediction,
    unet_output,
)
from utils.value_layers import ValueReader, deactivated, find_value_layers, layer_widths
from utils.versions import resolve, stored_layer_widths


class ModelContract:
    """Tests that hold for every supported model; class attributes say what differs."""

    caption = "A small house by the sea"
    other_caption = "Zebra crossing, seen from above"
    rows = 3
    tolerance = 1e-4  # of our latents against the diffusers pipeline's

    @pytest.fixture(scope="class")
    def folder(self) -> Path:
        """The model's diffusers folder."""
        raise NotImplementedError("name the model's folder")

    @pytest.fixture(scope="class")
    def model(self, folder: Path) -> Model:
        return load_model(resolve(str(folder)), device="cpu", dtype="float32")

    @pytest.fixture(scope="class")
    def neurons(self, model: Model) -> list[list[int]]:
        """A few neurons of every layer."""
        return [list(range(0, width, 7)) for width in layer_widths(model.value_layers)]

    def difference(self, model: Model, caption: str) -> torch.Tensor:
        noise = initial_noise(model, self.rows, 1)
        return noise_difference(model, encode_prompt(model, caption), None, noise, NoiseSettings())

    def test_value_layers_are_known_before_a_weight_is_loaded(
        self, model: Model, folder: Path
    ) -> None:
        layers = model.value_layers
        walked = list(zip(layers, layer_widths(layers), strict=True))
        assert stored_layer_widths(folder) == walked

    def test_value_layers_are_in_forward_order(self, model: Model) -> None:
        called: list[str] = []
        handles = [
            layer.register_forward_hook(lambda *_, name=name: called.append(name))
            for name, layer in find_value_layers(model.unet, ("down", "mid", "up")).items()
        ]
        try:
            self.difference(model, self.caption)
        finally:
            for handle in handles:
                handle.remove()
        assert called[: len(model.value_layers)] == list(model.value_layers)
        assert not any(name.startswith("up") for name in model.value_layers)

    def test_values_come_from_the_text_alone(self, model: Model) -> None:
        """What the layers put out in a pass is what is read without one."""
        seen: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(lambda module, args, out: seen.append(out[0]))
            for layer in model.value_layers.values()
        ]
        try:
            self.difference(model, self.caption)
        finally:
            for handle in handles:
                handle.remove()
        embedding = encode_prompt(model, self.caption).embedding[0]
        read = ValueReader(model.value_layers).activations(embedding)
        for values, activations in zip(seen, read, strict=True):
            torch.testing.assert_close(values.abs().mean(dim=0), activations, atol=1e-5, rtol=1e-4)

    def test_noise_difference_is_a_difference_in_noise_space(self, model: Model) -> None:
        """In [0, 1], from one pass, different for other texts; a model that predicts velocity is no
        other case for anybody but ``to_noise_prediction``."""
        passes: list[int] = []
        handle = model.unet.register_forward_pre_hook(lambda *_: passes.append(1))
        try:
            difference = self.difference(model, self.caption)
        finally:
            handle.remove()
        assert len(passes) == 1
        assert difference.shape == (self.rows, *model.latent_shape)
        assert difference.min() == 0 and difference.max() == 1
        assert not torch.equal(difference, self.difference(model, self.other_caption))
        # eps and x give a clean latent; adding noise to it again gives x.
        scheduler = model.scheduler
        x = initial_noise(model, 1, 1)
        timestep = scheduler.timesteps[1]
        encoded = encode_prompt(model, self.caption)
        output = unet_output(model, x, timestep, encoded)
        noise = to_noise_prediction(model, output, x, timestep)
        clean = scheduler.step(output, timestep, x).pred_original_sample
        torch.testing.assert_close(
            scheduler.add_noise(clean, noise, timestep[None]), x, atol=1e-3, rtol=1e-3
        )

    def test_neurons_switched_off_matter_and_come_back(
        self, model: Model, neurons: list[list[int]]
    ) -> None:
        before = self.difference(model, self.caption)
        with deactivated(model.value_layers, [neurons]):
            during = self.difference(model, self.caption)
        assert not torch.equal(before, during)
        assert torch.equal(before, self.difference(model, self.caption))

    def test_latents_are_those_of_the_diffusers_pipeline(self, model: Model) -> None:
        ours = self.latents(model, guidance=7.0)
        theirs = self.pipeline_latents(model, guidance=7.0)
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours / scale, theirs / scale, atol=self.tolerance, rtol=0)
        unguided = self.latents(model, guidance=1.0)
        theirs = self.pipeline_latents(model, guidance=1.0)
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(unguided / scale, theirs / scale, atol=self.tolerance, rtol=0)
        assert not torch.allclose(unguided, ours, atol=1e-3)

    def latents(self, model: Model, *, guidance: float) -> torch.Tensor:
        return sample_latents(
            model,
            encode_prompt(model, self.caption).repeat(2),
            encode_unconditional(model),
            initial_noise(model, 2, 2),
            steps=4,
            guidance_scale=guidance,
        )

    def pipeline_latents(self, model: Model, *, guidance: float) -> torch.Tensor:
        """What the diffusers pipeline makes of the same noise, with its scheduler set to ours."""
        pipe: Any = model.pipeline
        kept = pipe.scheduler
        pipe.scheduler = type(model.scheduler).from_config(model.scheduler.config)
        _, height, width = model.latent_shape
        try:
            return pipe(
                self.caption,
                height=height * pipe.vae_scale_factor,
                width=width * pipe.vae_scale_factor,
                num_images_per_prompt=2,
                num_inference_steps=4,
                guidance_scale=guidance,
                latents=initial_noise(model, 2, 2),
                output_type="latent",
            ).images
        finally:
            pipe.scheduler = kept

    def test_pictures_have_the_models_size(self, model: Model) -> None:
        _, height, width = model.latent_shape
        pictures = decode(model, 0.1 * initial_noise(model, 2, 2))
        scale = model.pipeline.vae_scale_factor
        assert [picture.size for picture in pictures] == [(width * scale, height * scale)] * 2

    def test_localization_finds_neurons_of_this_model(self, model: Model) -> None:
        """The whole search, at levels at which every prompt is memorized; both forms agree."""
        widths = layer_widths(model.value_layers)
        reader = ValueReader(model.value_layers)
        embeddings = [encode_prompt(model, text).embedding[0] for text in ("a", "dog", "no text")]
        read = [reader.activations(embedding) for embedding in embeddings]
        layers = [torch.stack(layer) for layer in zip(*read, strict=True)]
        statistics = Statistics([x.mean(0) for x in layers], [2 * x.std(0) for x in layers])
        detector = Detector(model, NoiseSettings(), rows=self.rows, seed=1)
        search = Search(initial_theta=8.0, theta_step=0.5, min_theta=7.0, initial_k=1)
        findings = [
            detector.find(
                self.caption,
                statistics,
                search=search,
                thresholds=Thresholds(-1.0, 0.5, 0.5),
                method=method,
            )
            for method in ("plain", "exact")
        ]
        for finding in findings:
            assert finding.rows == list(range(self.rows)) and finding.outcome is not None
            assert any(finding.outcome.initial)
            check_neurons(finding.outcome.initial, widths, where="initial")
            check_neurons(finding.outcome.refined, widths, where="refined")
        assert findings[0].outcome == findings[1].outcome
