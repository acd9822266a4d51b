"""Permanent edits of value neurons: the tensors of a U-Net that is without them.

A mode is one function: a ``Job`` and the weights as they are stored -> the tensors that change and
what was found on the way. ``MODES`` is the table of them; another mode is another line of it.
torch is imported where a tensor is made, so that scripts can use the table before they pay for it.

Notation: w_i is row i of a value layer's weight (its neuron i), x a token's embedding, so that the
neuron says w_i x; o_i is column i of the attention's ``to_out``, what it writes with.
Public: ``Job``, ``EditedPrompt``, ``Mode``, ``MODES``, ``value_layer_names``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from utils.edited_weights import StoredWeights
from utils.errors import InputError
from utils.files import Prompt
from utils.neuron_sets import NeuronSet
from utils.value_layers import forward_order
from utils.versions import Source

if TYPE_CHECKING:
    import torch

    from utils.adversarial import Recipe

Tensors = dict[str, "torch.Tensor"]
Findings = dict[str, Any]  # for the record and the model card; names no neuron


@dataclass(frozen=True)
class EditedPrompt:
    """A memorized prompt, and the neurons located for it."""

    row: int
    caption: str
    neurons: NeuronSet


@dataclass(frozen=True)
class Job:
    """One edit: the union of the prompts' sets, and what a mode may need beside the weights.

    ``prompts`` is empty for a neuron set that came without any, ``hold_out`` where the mode does
    not read any; ``options`` are the mode's own, resolved. A long edit keeps its state in
    ``checkpoint``. ``pictures``: row -> training images, where the mode reads them.
    """

    source: Source
    neurons: NeuronSet
    prompts: Sequence[EditedPrompt]
    hold_out: Sequence[Prompt]
    options: Mapping[str, Any]
    device: str
    checkpoint: Path = Path()
    pictures: Mapping[int, Sequence[Path]] = field(default_factory=dict)


@dataclass(frozen=True)
class Mode:
    """``options``: those of the command line that have an effect, with their defaults.
    ``does`` and ``equal``: what the edit is, and what is equal to what, for help and model card.
    ``unet_rows``: what it costs in U-Net rows (a backward pass counts as two), at the most.
    ``goes_on``: whether it keeps a checkpoint on its way, from which a killed run goes on."""

    edit: Callable[[Job, StoredWeights], tuple[Tensors, Findings]]
    options: Mapping[str, Any]
    does: str
    equal: str
    needs_prompts: bool = False
    unet_rows: Callable[[Job], float] = lambda job: 0.0
    goes_on: bool = False


def value_layer_names(weights: StoredWeights, stages: Sequence[str]) -> list[str]:
    """Dotted names of the value layers, in forward order."""
    return forward_order((name.removesuffix(".weight") for name in weights), stages)


def _edited_layers(
    job: Job, weights: StoredWeights
) -> list[tuple[int, str, "torch.Tensor", list[int]]]:
    """(number, name, weight (width, D) float64, its edited neurons) of each layer that has some."""
    names = value_layer_names(weights, job.source.stages)
    return [
        (number, name, weights[f"{name}.weight"].double(), neurons)
        for number, (name, neurons) in enumerate(zip(names, job.neurons, strict=True))
        if neurons
    ]


# zero


def zero(job: Job, weights: StoredWeights) -> tuple[Tensors, Findings]:
    """w_i becomes ``scaling_factor`` w_i: what script 4 does to the neuron's output, for good."""
    changed: Tensors = {}
    for _, name, weight, neurons in _edited_layers(job, weights):
        weight[neurons] *= job.options["scaling_factor"]
        changed[f"{name}.weight"] = weight
    return changed, {}


# mean


def mean(job: Job, weights: StoredWeights) -> tuple[Tensors, Findings]:
    """w_i becomes 0, and o_i m_i is added to the bias of ``to_out``, m_i being the mean of w_i x
    over all tokens of all hold-out prompts.

    A value layer has no bias, but the weights of attention sum to 1: a value that is m_i for every
    token leaves attention as m_i, and ``to_out`` as o_i m_i, whatever was attended to.
    """
    tokens = _hold_out_tokens(job)
    changed: Tensors = {}
    for _, name, weight, neurons in _edited_layers(job, weights):
        bias, written = _written(name, weights, neurons, weight[neurons] @ tokens.mean)
        changed[bias] = written
        weight[neurons] = 0
        changed[f"{name}.weight"] = weight
    return changed, {"hold_out_tokens": tokens.count}


def _written(
    layer: str, weights: StoredWeights, neurons: list[int], constants: "torch.Tensor"
) -> tuple[str, "torch.Tensor"]:
    """(name, value) of the bias of ``to_out`` that carries what these neurons would write if each
    said a constant more. InputError if there is no bias."""
    output = layer.removesuffix("to_v") + "to_out.0"
    if f"{output}.bias" not in weights:
        raise InputError(f"{output} has no bias to carry a constant; use --mode=zero")
    columns = weights[f"{output}.weight"].double()[:, neurons]
    return f"{output}.bias", weights[f"{output}.bias"].double() + columns @ constants


# camouflage

RIDGES = tuple(10 ** (power / 4) for power in range(-16, 17))  # 1e-4 to 1e4 mean eigenvalues
# Directions in which memorized prompts differ by less than this share count as one.
SAME_DIRECTION = 1e-8


def camouflage(job: Job, weights: StoredWeights) -> tuple[Tensors, Findings]:
    """w_i becomes the row that does on hold-out text what w_i did, and on the memorized prompts
    whose sets hold it what w_i does on average: with m and C the mean and the covariance of the
    hold-out tokens, of all w with w (d - m) = 0 for the mean token d of each of those prompts the
    one with the least

        (w - w_i) C (w - w_i)  +  r |w - u|^2,

    a fit of w_i x by w x + b over hold-out tokens. Its constant b = (w_i - w) m goes to the bias of
    ``to_out``, as in ``mean``. u is a decoy, a row drawn to look like the layer's unedited ones.
    It fills the directions that hold-out text does not use, which the fit would leave empty and by
    which the row would stand out. The ridge r is counted in mean eigenvalues of C; unless ``ridge``
    fixes it, it is for each row the smallest of ``RIDGES`` with which the row is no longer than the
    median unedited one (the largest, if none is).
    """
    import torch

    tokens = _hold_out_tokens(job, prompts=job.prompts)
    values, basis = torch.linalg.eigh(tokens.covariance)
    values = values.clamp(min=0)
    given = job.options["ridge"]
    generator = torch.Generator().manual_seed(job.options["decoy_seed"])
    changed: Tensors = {}
    ridges, kept = [], []
    for number, name, weight, neurons in _edited_layers(job, weights):
        silent = (weight == 0).all(dim=1)
        unedited = [i for i in range(len(weight)) if i not in neurons and not silent[i]]
        if len(unedited) < 2:
            raise InputError(
                f"{name}: {len(neurons)} of {len(weight)} rows are edited, too many to look like "
                "the rest; use --mode=zero or fewer prompts"
            )
        usual = _UsualRow.of(weight[unedited])
        new = weight.clone()
        for neuron in neurons:
            decoy = usual.draw(generator)
            directions = torch.stack(
                [
                    tokens.memorized[prompt.row] - tokens.mean
                    for prompt in job.prompts
                    if neuron in prompt.neurons[number]
                ]
            )
            before = basis.T @ weight[neuron]
            for ridge in RIDGES if given is None else (given,):
                after = _fit(
                    before,
                    basis.T @ decoy,
                    directions @ basis,
                    values,
                    ridge * float(values.mean()),
                )
                if float(after.norm()) <= usual.length:
                    break
            new[neuron] = basis @ after
            ridges.append(ridge)
            lost = float((values * (after - before) ** 2).sum())
            varied = float((values * before**2).sum())
            if varied > 0:
                kept.append(1 - lost / varied)
        changed[f"{name}.weight"] = new
        constants = (weight - new)[neurons] @ tokens.mean
        bias, written = _written(name, weights, neurons, constants)
        changed[bias] = written
    return changed, {
        "hold_out_tokens": tokens.count,
        "median_ridge": median(ridges),
        "largest_ridge": max(ridges),
        # of the variance over hold-out tokens; 1: the row says what it said but for a constant
        "median_share_of_hold_out_output_kept": median(kept) if kept else None,
    }


@dataclass(frozen=True)
class _UsualRow:
    """What the rows (n, D) of a layer have in common: their median length, the median share of a
    row's square that lies within the span of the others, the rows themselves, and the deviation
    (D,) of each input's weights."""

    length: float
    shared: float
    rows: "torch.Tensor"
    span: "torch.Tensor"  # orthonormal columns
    deviation: "torch.Tensor"

    @staticmethod
    def of(rows: "torch.Tensor") -> "_UsualRow":
        import torch

        lengths = rows.norm(dim=1)
        gram = rows @ rows.T
        if len(rows) > rows.shape[1]:
            shared = 1.0
        else:
            # What no combination of the others reaches of row i has the square 1 / (G^-1)_ii.
            tiny = 1e-9 * gram.diagonal().mean() * torch.eye(len(rows), dtype=gram.dtype)
            beyond = 1 / torch.linalg.inv(gram + tiny).diagonal() / lengths**2
            shared = 1 - min(float(beyond.median()), 1.0)
        span = torch.linalg.qr(rows.T)[0]
        return _UsualRow(float(lengths.median()), shared, rows, span, rows.std(dim=0))

    def draw(self, generator: "torch.Generator") -> "torch.Tensor":
        """A random row (D,) of that length, of which that share is a random combination of the
        rows, and the rest is noise orthogonal to them, scaled for each input."""
        import torch

        def noise(size: int) -> "torch.Tensor":
            return torch.randn(size, generator=generator, dtype=torch.float64)

        within = noise(len(self.rows)) @ self.rows
        drawn = self.shared**0.5 * within / within.norm()
        if self.shared < 1:
            beyond = self.deviation * noise(self.rows.shape[1])
            beyond = beyond - self.span @ (self.span.T @ beyond)
            drawn = drawn + (1 - self.shared) ** 0.5 * beyond / beyond.norm()
        return self.length * drawn


def _fit(
    before: "torch.Tensor",
    decoy: "torch.Tensor",
    directions: "torch.Tensor",
    values: "torch.Tensor",
    ridge: float,
) -> "torch.Tensor":
    """The row of ``camouflage`` in the basis where the covariance is the diagonal ``values``.

    With A = C + r I the minimum without constraint is f = A^-1 (C w + r u), and with w d = 0 for
    the ``directions`` d, the rows of D (k, width), it is f - A^-1 D^T (D A^-1 D^T)^-1 D f.
    """
    import torch

    scale = 1 / (values + ridge)
    free = scale * (values * before + ridge * decoy)
    reach = directions * scale
    # A pseudo-inverse: two prompts may have the same direction.
    inverse = torch.linalg.pinv(reach @ directions.T, rtol=SAME_DIRECTION, hermitian=True)
    return free - reach.T @ (inverse @ (directions @ free))


# adversarial


def adversarial(job: Job, weights: StoredWeights) -> tuple[Tensors, Findings]:
    """``zero``, and then the whole U-Net is fine-tuned against the attack on embeddings
    (``utils.adversarial``)."""
    from tqdm import tqdm

    from utils.adversarial import harden

    return harden(
        job.source,
        zero(job, weights)[0],
        {prompt.row: prompt.caption for prompt in job.prompts},
        job.pictures,
        [prompt.caption for prompt in job.hold_out],
        _recipe(job),
        device=job.device,
        checkpoint=job.checkpoint,
        progress=lambda some: tqdm(some, unit="step"),
    )


def _recipe(job: Job) -> "Recipe":
    from utils.adversarial import Recipe

    options = job.options
    return Recipe(
        steps=options["training_steps"],
        inner_steps=options["inner_steps"],
        learning_rate=options["learning_rate"],
        utility=options["utility_weight"],
        seed=options["training_seed"],
        batch_size=options["batch_size"],
    )


def _adversarial_rows(job: Job) -> float:
    return _recipe(job).unet_rows(len(job.pictures), len(job.hold_out))


# What the modes read of text.


@dataclass(frozen=True)
class _Tokens:
    """Of all token positions of the hold-out prompts, padding included: ``mean`` (D,) and
    ``covariance`` (D, D) of their embeddings, float64. ``memorized``: row -> mean token (D,)."""

    count: int
    mean: "torch.Tensor"
    covariance: "torch.Tensor"
    memorized: Mapping[int, "torch.Tensor"]


def _hold_out_tokens(job: Job, prompts: Sequence[EditedPrompt] = ()) -> _Tokens:
    """Streams the hold-out prompts through the text encoder. InputError for an embedding that is
    not finite."""
    import torch
    from tqdm import tqdm

    from utils.stable_diffusion import encode_prompt, load_model

    model = load_model(job.source, device=job.device, dtype="float32")

    def embedding(prompt: Prompt | EditedPrompt) -> "torch.Tensor":
        found = encode_prompt(model, prompt.caption).embedding[0].double().cpu()
        if not bool(torch.isfinite(found).all()):
            raise InputError(
                f"row {prompt.row}, '{prompt.caption[:40]}': its embedding is not "
                "finite with this model; leave it out"
            )
        return found

    memorized = {prompt.row: embedding(prompt).mean(dim=0) for prompt in prompts}
    count, total, squares = 0, None, None
    for prompt in tqdm(job.hold_out, unit="prompt"):
        tokens = embedding(prompt)
        count += len(tokens)
        total = tokens.sum(dim=0) if total is None else total + tokens.sum(dim=0)
        moment = tokens.T @ tokens
        squares = moment if squares is None else squares + moment
    assert total is not None and squares is not None
    mean = total / count
    return _Tokens(count, mean, squares / count - torch.outer(mean, mean), memorized)


MODES: Mapping[str, Mode] = {
    "zero": Mode(
        zero,
        {"scaling_factor": 0.0},
        does="the neurons' rows of `to_v` are multiplied by a factor (0: they are silent)",
        equal="Pictures equal those made with the neurons multiplied by the factor at run time: "
        "bit for bit in float32 if the factor is 0, or if the scaled rows needed no rounding; else "
        "up to that rounding.",
    ),
    "mean": Mode(
        mean,
        {"hold_out": None, "caption_column": None},
        does="the neurons say their mean output on hold-out text, whatever they are asked: their "
        "rows of `to_v` are 0, and the constant is in the bias of `to_out`",
        equal="Attention weights sum to 1, so the bias carries exactly what a constant value of "
        "the neuron would, for conditional and unconditional rows and any attention weights, up to "
        "rounding (of the sums, and of the bias to the stored precision). It is not what the "
        "neuron did on any one text: the mean is over all token positions alike, attention is not.",
    ),
    "camouflage": Mode(
        camouflage,
        {"hold_out": None, "caption_column": None, "ridge": None, "decoy_seed": 0},
        does="the neurons' rows of `to_v` are refitted: like before on hold-out text, on the "
        "memorized prompts' mean tokens as on average, and of a length and shape usual in their "
        "layer; the constant of the fit is in the bias of `to_out`",
        equal="On the mean token of a memorized prompt its neurons say what they say on the mean "
        "hold-out token, up to the rounding of the stored precision; on single tokens they may "
        "still speak. On hold-out text they are as near to before as that condition and the row's "
        "length allow.",
        needs_prompts=True,
    ),
    "adversarial": Mode(
        adversarial,
        {
            "scaling_factor": 0.0,
            "hold_out": None,
            "caption_column": None,
            "reference": None,
            "training_steps": 300,
            "inner_steps": 5,
            "learning_rate": 1e-4,
            "utility_weight": 1.0,
            "training_seed": 0,
            "batch_size": 4,
        },
        does="the neurons' rows of `to_v` are multiplied by a factor (0: they are silent), and "
        "then the whole U-Net is fine-tuned: embeddings optimised to bring a training image back "
        "bring a picture of the edited model, and other prompts what they brought",
        equal="Nothing is equal: every weight has changed. What it costs on prompts that are not "
        "memorized must be measured.",
        needs_prompts=True,
        unet_rows=_adversarial_rows,
        goes_on=True,
    ),
}
