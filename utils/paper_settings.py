"""The settings that the paper's tables compare, by the names in ``metrics/paper_tables.csv``.

Public: ``SETTINGS``, ``DEFAULT``, ``REPEATED``, ``UNBLOCKED``, ``HOLDOUT_UNBLOCKED``, ``BLOCKED``,
``FACTORS``, ``PAPER_PROTOCOL``, ``BLOCKS``, ``methods``, ``pruning``, ``most_frequent``.
"""

from collections.abc import Iterable
from dataclasses import asdict

from utils.localization import Search
from utils.mitigations import METHODS, described
from utils.paper_runs import ALL_ON, HOLDOUT_ALL_ON, MAIN, Setting

DEFAULT = "default: tau = mean + 1 std, scaling factor 0"
REPEATED = 5  # draws of random neurons at the most
FACTORS = (0.75, 0.5, 0.25, -0.25, -0.5, -0.75, -1)
_ORIGINAL = {"mode": "original_images", "mitigation": None}
_OFF = {"scaling_factor": 0.0}
_REFINED = {"mode": "refined_neurons", **_OFF}
# What the paper's search does, where a setting does not say otherwise.
_SEARCH = {
    "samples_per_prompt": 10,
    "num_inference_steps": 50,
    "guidance_scale": 1.0,
    "exchanged_guidance": False,
    "threshold_stds": None,
    **_OFF,
    **asdict(Search()),
}
UNBLOCKED = Setting(ALL_ON, pictures=_ORIGINAL)
HOLDOUT_UNBLOCKED = Setting(HOLDOUT_ALL_ON, pictures=_ORIGINAL, reference=HOLDOUT_ALL_ON)
BLOCKED = Setting(MAIN, MAIN, pictures=_REFINED, search=_SEARCH)


def _other(run: str, method: str, **options: object) -> Setting:
    """Another method against memorization: no neurons; its published options but for these."""
    published = described(method, METHODS[method].settings)
    published["mitigation_options"] |= options
    return Setting(run, pictures=published)


def _found(run: str, **search: object) -> Setting:
    """A search of its own."""
    return Setting(run, run, pictures=_REFINED, search={**_SEARCH, **search})


def _random(seed: int) -> Setting:
    wanted = {"mode": "block_random_neurons", "k": None, "random_seed": seed, **_OFF}
    return Setting(f"random_{seed}", MAIN, pictures=wanted, search=_SEARCH)


# Table -> name of the setting -> its run, or several repetitions of it.
SETTINGS: dict[str, dict[str, list[Setting]]] = {
    "1": {
        "all neurons active": [UNBLOCKED],
        "prompt embedding adjustment (Wen et al.)": [
            _other("embedding_adjustment", "embedding_adjustment")
        ],
        "random neurons": [_random(seed) for seed in range(REPEATED)],
        "attention scaling (Ren et al.)": [_other("attention_scaling", "attention_scaling")],
        "1 random token (Somepalli et al.)": [
            _other("random_tokens_1", "random_tokens", count=1),
        ],
        "4 random tokens (Somepalli et al.)": [
            _other("random_tokens_4", "random_tokens", count=4),
        ],
        "10 random tokens (Somepalli et al.)": [
            _other("random_tokens_10", "random_tokens", count=10),
        ],
        "memorization neurons (NeMo)": [BLOCKED],
        # Not in the paper's table.
        "4 random numbers (Somepalli et al.)": [_other("random_numbers", "random_numbers")],
        "4 repeated words (Somepalli et al.)": [_other("repeated_words", "repeated_words")],
        "embedding noise (Somepalli et al.)": [_other("embedding_noise", "embedding_noise")],
        "guidance held back, static (Jain et al.)": [
            _other("guidance_static", "guidance_static"),
        ],
        "guidance held back, dynamic (Jain et al.)": [
            _other("guidance_dynamic", "guidance_dynamic"),
        ],
        "opposite guidance (Jain et al.)": [_other("guidance_opposite", "guidance_opposite")],
        "Wanda pruning (Chavhan et al.)": [_other("wanda", "wanda")],
    },
    "4": {
        # Not in the paper's table: what the others differ from, of the same prompts.
        DEFAULT: [BLOCKED],
        "with classifier-free guidance": [_found("guidance", guidance_scale=7.0)],
        "tau = mean - 1 std = 0.288": [_found("tau_minus_1_std", threshold_stds=-1.0)],
        "tau = mean = 0.358": [_found("tau_mean", threshold_stds=0.0)],
        "tau = mean + 2 std = 0.498": [_found("tau_plus_2_std", threshold_stds=2.0)],
        "no refinement": [
            Setting(
                "no_refinement",
                MAIN,
                initial=True,
                pictures={"mode": "initial_neurons", **_OFF},
                search=_SEARCH,
            )
        ],
        "no top-k selection": [_found("no_top_k", use_top_k=False)],
        **{
            f"scaling factor {factor:g}": [
                Setting(
                    f"factor_{factor:g}",
                    MAIN,
                    pictures={"mode": "refined_neurons", "scaling_factor": float(factor)},
                    search=_SEARCH,
                )
            ]
            for factor in FACTORS
        },
    },
}
PAPER_PROTOCOL = Setting(
    "paper_protocol", "paper_protocol", pictures=_REFINED, search=_SEARCH, protocol="paper"
)
BLOCKS = {
    "down, mid": BLOCKED,
    **{
        blocks.replace(",", ", "): Setting(
            f"blocks_{blocks.replace(',', '_')}",
            f"blocks_{blocks.replace(',', '_')}",
            pictures=_REFINED,
            search=_SEARCH,
            blocks=blocks,
        )
        for blocks in ("down,mid,up", "up")
    },
}


def methods(shares: Iterable[float]) -> dict[str, list[Setting]]:
    """The settings of table 1, and Wanda with these further shares."""
    return {**SETTINGS["1"], **{name: [run] for name, run in map(pruning, shares)}}


def pruning(share: float) -> tuple[str, Setting]:
    """Wanda with another share of the weights than the published: name and run."""
    name = f"Wanda pruning, {share * 100:g}% (Chavhan et al.)"
    return name, _other(f"wanda_{share:g}", "wanda", share=share)


def most_frequent(k: int, *, holdout: bool = False) -> Setting:
    """The k neurons that were located most often, blocked for all prompts."""
    return Setting(
        f"holdout_top_{k}" if holdout else f"top_{k}",
        MAIN,
        pictures={"mode": "block_top_k_neurons", "k": k, **_OFF},
        search=_SEARCH,
        reference=HOLDOUT_ALL_ON if holdout else ALL_ON,
    )
