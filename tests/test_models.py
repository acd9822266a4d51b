"""Models: the three architectures under one contract, other folders, and what is refused."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from model_contract import ModelContract
from safetensors.torch import load_file, save_file
from small_models import small_pipeline

from utils.errors import InputError
from utils.stable_diffusion import (
    Model,
    decode,
    encode_prompt,
    encode_unconditional,
    initial_noise,
    load_model,
)
from utils.value_layers import layer_widths
from utils.versions import (
    VERSIONS,
    check_steps,
    read_header,
    resolve,
    stored_layer_widths,
)


class TestStableDiffusion1(ModelContract):
    @pytest.fixture(scope="class")
    def folder(self, small_folder: Callable[[str], Path]) -> Path:
        return small_folder("sd1")


class TestStableDiffusion2(ModelContract):
    """Predicts velocity."""

    @pytest.fixture(scope="class")
    def folder(self, small_folder: Callable[[str], Path]) -> Path:
        return small_folder("sd2")


class TestStableDiffusionXL(ModelContract):
    """Two text encoders, pooled embedding, time ids, several transformer blocks per attention."""

    @pytest.fixture(scope="class")
    def folder(self, small_folder: Callable[[str], Path]) -> Path:
        return small_folder("xl")


class TestNotSquare(ModelContract):
    """A U-Net made for latents that are wider than high, with a scheduler as v1-4's."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        pipeline = small_pipeline("sd1", sample_size=[16, 24])
        pipeline.scheduler = PNDMScheduler.from_config(
            {**pipeline.scheduler.config, "skip_prk_steps": True}
        )
        folder = tmp_path_factory.mktemp("wide") / "model"
        pipeline.save_pretrained(folder)
        return folder


# Text.


def test_caption_goes_to_the_tokenizer_as_it_is(
    small_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stripping, no "NA" turned into nothing; padded and truncated to the tokenizer's length."""
    model = small_model("sd1")
    tokenizer = type(model.pipeline.tokenizer)
    seen: list[object] = []
    original = tokenizer.__call__

    def spy(self: object, text: object, **options: object) -> object:
        seen.append((text, options["padding"], options.get("truncation")))
        return original(self, text, **options)

    monkeypatch.setattr(tokenizer, "__call__", spy)
    for caption in ("  two  spaces ", "NA", "null", "x" * 500):
        seen.clear()
        encoded = encode_prompt(model, caption)
        assert encoded.embedding.shape == (1, 77, 32)
        assert seen[0] in [(text, "max_length", True) for text in (caption, [caption])]


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "xl"])
def test_embeddings_are_those_the_pipeline_uses(
    small_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """Caught at the U-Net while the diffusers pipeline runs: text, empty text, pooled, time ids."""
    model = small_model(architecture)
    caught: list[dict] = []
    original = model.unet.forward

    def spy(*args: object, **options: object) -> object:
        caught.append(options)
        return original(*args, **options)

    monkeypatch.setattr(model.unet, "forward", spy)
    side = 16 * model.pipeline.vae_scale_factor
    model.pipeline(
        "a caption",
        height=side,
        width=side,
        num_inference_steps=1,
        guidance_scale=7.0,
        output_type="latent",
    )
    without, with_text = encode_unconditional(model), encode_prompt(model, "a caption")
    for row, ours in enumerate((without, with_text)):
        assert torch.equal(caught[0]["encoder_hidden_states"][row], ours.embedding[0])
        added = caught[0]["added_cond_kwargs"] or {}
        assert added.keys() == ours.added.keys()
        for name, value in ours.added.items():
            assert torch.equal(added[name][row], value[0]), name
    assert not torch.equal(without.embedding, with_text.embedding)


# Other folders.


@pytest.fixture
def copy(small_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A small SD 1 folder of one's own, to be changed."""
    return Path(shutil.copytree(small_folder("sd1"), tmp_path / "model"))


def load(folder: Path) -> Model:
    return load_model(resolve(str(folder)), device="cpu", dtype="float32")


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_sharded_weights(copy: Path, small_model: Callable[..., Model]) -> None:
    """A U-Net in several safetensors files is found whole, with and without loading it."""
    before = stored_layer_widths(copy)
    unet = UNet2DConditionModel.from_pretrained(copy / "unet")
    shutil.rmtree(copy / "unet")
    unet.save_pretrained(copy / "unet", max_shard_size="500KB")
    assert len(list((copy / "unet").glob("*.safetensors"))) > 2
    assert stored_layer_widths(copy) == before
    model = load(copy)
    for ours, theirs in zip(
        model.value_layers.values(), small_model("sd1").value_layers.values(), strict=True
    ):
        assert torch.equal(ours.weight, theirs.weight)


def test_another_autoencoder(copy: Path) -> None:
    """Fine-tuned VAEs come as folders of their own: another scale factor, another picture size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 32),
            latent_channels=4,
            scaling_factor=0.5,
        )
    shutil.rmtree(copy / "vae")
    vae.save_pretrained(copy / "vae")
    model = load(copy)
    latents = 0.3 * initial_noise(model, 1, 1)
    (picture,) = decode(model, latents)
    assert picture.size == (32, 32)
    with torch.no_grad():
        expected = model.pipeline.image_processor.postprocess(
            vae.eval().decode(latents / 0.5).sample, output_type="pil"
        )
    assert picture.tobytes() == expected[0].tobytes()
    # The method itself knows nothing of it: the same model as before, by its weights.
    assert layer_widths(model.value_layers) == [32, 32, 64, 64, 96, 96, 96]


def test_a_picture_that_is_not_finite_is_none_and_leaves_the_others(
    small_model: Callable[..., Model],
) -> None:
    model = small_model("sd1")
    latents = 0.1 * initial_noise(model, 3, 2)
    alone = decode(model, latents)
    latents[1, 0, 0, 0] = torch.nan
    first, missing, last = decode(model, latents)
    assert missing is None and first is not None and last is not None
    assert alone[0] is not None and first.tobytes() == alone[0].tobytes()
    assert alone[2] is not None and last.tobytes() == alone[2].tobytes()


def test_identity_is_that_of_the_weights(copy: Path, small_folder: Callable[[str], Path]) -> None:
    original = resolve(str(small_folder("sd1"))).identity
    assert resolve(str(copy)).identity["sha256"] == original["sha256"]
    assert original["sha256"] != resolve(str(small_folder("sd2"))).identity["sha256"]
    unet = UNet2DConditionModel.from_pretrained(copy / "unet")
    with torch.no_grad():
        unet.conv_out.bias[0] += 1
    unet.save_pretrained(copy / "unet")
    assert resolve(str(copy)).identity["sha256"] != original["sha256"]


def test_identity_is_that_of_the_scheduler_too(copy: Path) -> None:
    original = resolve(str(copy)).identity["sha256"]
    path = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_diffusers_version": "0.1"}, indent=4))
    assert resolve(str(copy)).identity["sha256"] == original, "who saved it does not matter"
    path.write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    assert resolve(str(copy)).identity["sha256"] != original


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("text_encoder/config.json", {"hidden_act": "gelu"}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 60}),
        ("tokenizer/tokenizer.json", {"added_tokens": []}),
    ],
)
def test_identity_is_that_of_what_turns_a_caption_into_an_embedding_too(
    name: str, changes: dict[str, object], copy: Path
) -> None:
    original = resolve(str(copy)).identity["sha256"]
    change_json(copy / name, transformers_version="0", _name_or_path="/home/x", is_local=False)
    assert resolve(str(copy)).identity["sha256"] == original, "who saved it does not matter"
    change_json(copy / name, **changes)
    assert resolve(str(copy)).identity["sha256"] != original


def test_another_decoder_is_the_same_model_and_makes_other_pictures(copy: Path) -> None:
    before = resolve(str(copy))
    assert before.vae_sha256 is not None
    change_json(copy / "vae" / "config.json", scaling_factor=0.5)
    after = resolve(str(copy))
    assert after.identity["sha256"] == before.identity["sha256"]
    assert after.vae_sha256 != before.vae_sha256


def test_the_folder_that_one_is_in_has_a_name(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    assert resolve(".").tag == resolve(str(copy)).tag != ""


def test_a_unet_that_does_not_say_how_large_latents_are_is_refused(copy: Path) -> None:
    change_json(copy / "unet" / "config.json", sample_size=None)
    with pytest.raises(InputError, match=r"unet/config\.json sets no sample_size"):
        load_model(resolve(str(copy)), device="cpu", dtype="float32")


def drop_a_weight(part: Path) -> str:
    """Takes one tensor out of a part's file; its name."""
    (path,) = part.glob("*.safetensors")
    tensors = load_file(path)
    gone = [name for name in tensors if name.endswith("bias")][-1]
    save_file({name: t for name, t in tensors.items() if name != gone}, path, {"format": "pt"})
    return gone


def test_the_commit_of_a_hub_model_is_known_and_its_weights_are_looked_for(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a cache as the hub's client leaves it, without a network."""
    commit = "0123456789" * 4
    repository = tmp_path / "cache" / "models--someone--a-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    copy.rename(repository / "snapshots" / commit)
    for module in (huggingface_hub.constants, transformers.utils.hub):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = load_model(resolve("someone/a-model"), device="cpu", dtype="float32")
    assert model.commit == commit
    drop_a_weight(repository / "snapshots" / commit / "text_encoder")
    with pytest.raises(InputError, match="someone/a-model: the weights of text_encoder lack "):
        load_model(resolve("someone/a-model"), device="cpu", dtype="float32")


def test_a_folder_of_float16_files_alone_is_loaded(copy: Path) -> None:
    """Their names say so: model.fp16.safetensors."""
    for path in [
        path for part in ("unet", "text_encoder", "vae") for path in (copy / part).iterdir()
    ]:
        if path.suffix == ".safetensors":
            path.rename(path.with_suffix(".fp16.safetensors"))
    source = resolve(str(copy))
    source.check()
    assert layer_widths(load(copy).value_layers) == source.widths
    # The decoder is often one's own, and under its usual name.
    (copy / "vae/diffusion_pytorch_model.fp16.safetensors").rename(
        copy / "vae/diffusion_pytorch_model.safetensors"
    )
    load(copy)


def test_float16_weights_load_as_float32(copy: Path, small_model: Callable[..., Model]) -> None:
    """The folder of the tiny model is in float16; a CPU runs it in float32."""
    pipeline = small_pipeline("sd1").to(torch.float16)
    shutil.rmtree(copy)
    pipeline.save_pretrained(copy)
    model = load(copy)
    for part in (model.unet, model.pipeline.vae, model.pipeline.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    layer = next(iter(model.value_layers.values()))
    exact = next(iter(small_model("sd1").value_layers.values()))
    assert torch.equal(layer.weight, exact.weight.half().float())


@pytest.mark.parametrize("architecture", ["sd1", "xl"])
def test_text_encoders_stay_in_float32(
    small_model: Callable[..., Model], architecture: str
) -> None:
    model = small_model(architecture, "bfloat16")
    assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.pipeline.vae.parameters()} == {torch.bfloat16}
    for name in ("text_encoder", "text_encoder_2"):
        part = getattr(model.pipeline, name, None)
        if part is not None:
            assert {p.dtype for p in part.parameters()} == {torch.float32}
    assert encode_prompt(model, "a").embedding.dtype == torch.float32
    assert not model.unet.training and not any(p.requires_grad for p in model.unet.parameters())


@pytest.mark.parametrize(
    ("architecture", "asks", "expected"),
    [
        ("xl", True, torch.float32),
        ("xl", False, torch.float16),
        ("sd1", True, torch.float16),  # every autoencoder asks unless it says otherwise
    ],
)
def test_an_xl_decoder_that_asks_for_it_runs_in_float32(
    small_folder: Callable[[str], Path], architecture: str, asks: bool, expected: torch.dtype
) -> None:
    """And is in half precision again, whether it made a picture or failed."""
    source = resolve(str(small_folder(architecture)))
    model = load_model(source, device="cpu", dtype="float16")
    vae = model.pipeline.vae
    vae.register_to_config(force_upcast=asks)
    latents = 0.1 * initial_noise(model, 1, 2)
    seen: list[set[torch.dtype]] = []

    def dtypes() -> set[torch.dtype]:
        return {p.dtype for p in vae.parameters()}

    def fail(*_: object) -> None:
        seen.append(dtypes())
        raise RuntimeError("looked at")

    handle = vae.post_quant_conv.register_forward_pre_hook(fail)  # a decoder's first layer
    with pytest.raises(RuntimeError, match="looked at"):
        decode(model, latents)
    assert seen == [{expected}] and dtypes() == {torch.float16}
    if expected == torch.float32:  # not every CPU multiplies in half precision
        handle.remove()
        (picture,) = decode(model, latents)
        assert picture is not None and dtypes() == {torch.float16}


# What a GPU may do on its own: round float32, sum halves in half precision, choose anew each time.
ON_GPU = [
    (torch.backends.cuda.matmul, "allow_tf32", False),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    (torch.backends.cudnn, "allow_tf32", False),
    (torch.backends.cudnn, "deterministic", True),
]


def test_loading_settles_what_a_gpu_may_round(small_folder: Callable[[str], Path]) -> None:
    before = [getattr(part, name) for part, name, _ in ON_GPU]
    try:
        for part, name, wanted in ON_GPU:
            setattr(part, name, not wanted)
        load(small_folder("sd1"))
        assert all(getattr(part, name) == wanted for part, name, wanted in ON_GPU)
    finally:
        for (part, name, _), value in zip(ON_GPU, before, strict=True):
            setattr(part, name, value)


# What is refused.


@pytest.mark.parametrize(
    "name", ["StableDiffusion3Pipeline", "FluxPipeline", "PixArtAlphaPipeline"]
)
def test_transformers_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    index = {"_class_name": name, "transformer": ["diffusers", "SomeTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"{name} is not supported.*is a transformer"):
        resolve(str(tmp_path))


def test_other_pipelines_are_refused_without_being_called_transformers(tmp_path: Path) -> None:
    index = {"_class_name": "KandinskyPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="KandinskyPipeline is not supported") as caught:
        resolve(str(tmp_path))
    assert "is a transformer" not in str(caught.value)


def test_prediction_type_sample_is_refused(copy: Path) -> None:
    change_json(copy / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(InputError, match="prediction type 'sample' gives no noise difference"):
        load(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    """Safetensors only: unpickling a stranger's file runs the stranger's code."""
    unet = UNet2DConditionModel.from_pretrained(copy / "unet")
    shutil.rmtree(copy / "unet")
    unet.save_pretrained(copy / "unet", safe_serialization=False)
    assert list((copy / "unet").glob("*.bin"))
    with pytest.raises(InputError, match="cannot load"):
        load(copy)
    with pytest.raises(InputError, match="no cross-attention value layers"):
        stored_layer_widths(copy)


def test_model_without_cross_attention_is_refused(tmp_path: Path) -> None:
    pipeline = small_pipeline(
        "sd1",
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        mid_block_type=None,
    )
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="UNet2DConditionModel has no cross-attention"):
        load(tmp_path / "model")
    with pytest.raises(InputError, match="no cross-attention value layers"):
        stored_layer_widths(tmp_path / "model")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "model_index.json"])
def test_folder_with_a_part_missing(copy: Path, part: str) -> None:
    path = copy / part
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(InputError) as caught:
        load(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_short_names_and_hub_ids_are_resolved_without_a_network() -> None:
    for name, version in VERSIONS.items():
        if name == "tiny":
            continue
        source = resolve(name, revision="abc")
        assert (source.id, source.revision, source.folder) == (version.source, "abc", None)
    assert resolve("someone/some-model").id == "someone/some-model"
    with pytest.raises(InputError, match="not a short name"):
        resolve("v9")
    with pytest.raises(InputError, match="not a short name"):
        resolve("no/such/folder")


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("text_encoder", "cut off"),
        ("text_encoder", "empty"),
        ("vae", "cut off"),
        ("vae", "rubbish"),
        ("tokenizer", "empty"),
    ],
)
def test_a_damaged_part_is_refused_with_and_without_loading(
    part: str, damage: str, copy: Path
) -> None:
    for path in (copy / part).iterdir():
        data = path.read_bytes()
        if damage == "empty":
            path.unlink()
        elif path.suffix == ".safetensors":
            path.write_bytes(data[:-8] if damage == "cut off" else b"\xff" * 99)
    with pytest.raises(InputError, match=f"{part}.*restore it"):
        resolve(str(copy)).check()
    with pytest.raises(InputError, match=re.escape(str(copy))):
        load(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_weight_that_no_file_holds_is_refused(copy: Path, part: str) -> None:
    """And not drawn at random."""
    gone = drop_a_weight(copy / part)
    with pytest.raises(InputError, match=f"the weights of {part} lack ") as caught:
        load_model(resolve(str(copy)), device="cpu", dtype="float32")
    assert gone.removeprefix("text_model.") in str(caught.value)


def test_a_tokenizer_without_a_length_is_refused(copy: Path) -> None:
    change_json(copy / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    with pytest.raises(InputError, match="sets no model_max_length"):
        load(copy)


def test_a_scheduler_of_few_timesteps_is_refused_with_and_without_loading(copy: Path) -> None:
    change_json(copy / "scheduler" / "scheduler_config.json", num_train_timesteps=30)
    source = resolve(str(copy))
    source.check(steps=29)
    with pytest.raises(InputError, match="30 steps asked for, but the model has 30 timesteps"):
        source.check(steps=30)
    with pytest.raises(InputError, match="50 steps asked for, but the model has 30 timesteps"):
        load_model(source, device="cpu", dtype="float32", steps=50)


def test_folder_has_no_revision(copy: Path) -> None:
    with pytest.raises(InputError, match="local folder and has no revisions"):
        resolve(str(copy), revision="main")


def test_a_text_encoder_that_is_not_its_configurations_is_one_line(copy: Path) -> None:
    change_json(copy / "text_encoder" / "config.json", intermediate_size=40)
    with pytest.raises(InputError, match=r"cannot load .*; check the name"):
        load_model(resolve(str(copy)), device="cpu", dtype="float32")


def test_timesteps_that_are_no_number_are_one_line() -> None:
    with pytest.raises(InputError, match="num_train_timesteps is '1000'"):
        check_steps(50, {"num_train_timesteps": "1000"}, where="a model")


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}',
        b'{"a": []}',
        b"[]",
    ],
    ids=["too deep", "shape", "cut off", "entry", "no object"],
)
def test_a_header_of_another_kind_is_one_line(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="not a safetensors file, or cut off"):
        read_header(path)
