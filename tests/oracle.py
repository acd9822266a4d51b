"""The whole localization once more, written from the paper and the specification alone.

It imports nothing from ``utils``: diffusers loads the folder, neurons are switched off by zeroing
rows of `to_v.weight`, torchmetrics scores, and the search is Alg. 2 to 4 word for word, one U-Net
pass at a time. Slow, and meant to stay so.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

BETAS = {64: (0.33, 0.33, 0.33), 32: (0.495, 0.495), 16: (0.99,)}


class Oracle:
    """One model, n seed rows, the `published` protocol without guidance."""

    def __init__(self, folder: Path, rows: int, seed: int = 1) -> None:
        self.pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        unet = self.pipe.unet
        blocks = [block for block in unet.down_blocks if hasattr(block, "attentions")]
        self.weights = [
            transformer.attn2.to_v.weight
            for block in [*blocks, unet.mid_block]
            for attention in block.attentions
            for transformer in attention.transformer_blocks
        ]
        self.size = unet.config.sample_size
        generator = torch.Generator("cpu").manual_seed(seed)
        self.x = torch.randn(
            (rows, unet.config.in_channels, self.size, self.size), generator=generator
        )
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(50)
        self.t = scheduler.timesteps[1]
        self.passes = 0

    @torch.no_grad()
    def text(self, caption: str) -> torch.Tensor:
        tokenizer = self.pipe.tokenizer
        tokens = tokenizer(
            caption,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.pipe.text_encoder(tokens.input_ids)[0]

    @torch.no_grad()
    def delta(self, text: torch.Tensor, off: list[list[int]]) -> torch.Tensor:
        """Alg. 1: the scaled noise difference of all rows with neurons zeroed in the weights."""
        before = [weight.clone() for weight in self.weights]
        for weight, columns in zip(self.weights, off, strict=True):
            weight[columns] = 0
        self.passes += 1
        repeated = text.repeat(len(self.x), 1, 1)
        prediction = self.pipe.unet(self.x, self.t, encoder_hidden_states=repeated).sample
        for weight, old in zip(self.weights, before, strict=True):
            weight.copy_(old)
        difference = (prediction - self.x).flatten(2)
        low, high = difference.min(2, keepdim=True).values, difference.max(2, keepdim=True).values
        return ((difference - low) / (high - low)).view_as(self.x)

    def similarity(self, first: torch.Tensor, second: torch.Tensor) -> list[float]:
        scores = multiscale_structural_similarity_index_measure(
            first,
            second,
            sigma=1.5,
            kernel_size=11,
            data_range=None,
            reduction="none",
            betas=BETAS[self.size],
            normalize="relu",
        )
        return [float(score) for score in scores]

    @torch.no_grad()
    def activation(self, text: torch.Tensor) -> list[np.ndarray]:
        return [(text[0] @ weight.T).abs().mean(0).numpy() for weight in self.weights]

    def pairwise(self, caption: str) -> list[float]:
        delta = self.delta(self.text(caption), [[] for _ in self.weights])
        pairs = list(itertools.combinations(range(len(delta)), 2))
        return self.similarity(delta[[i for i, _ in pairs]], delta[[j for _, j in pairs]])

    def find(
        self,
        caption: str,
        statistics: tuple[list[np.ndarray], list[np.ndarray]],
        *,
        tau_pairwise: float,
        tau_initial: float,
        tau_refinement: float,
        theta: float = 5.0,
        step: float = 0.25,
        min_theta: float = 1.0,
        k: int = 0,
    ) -> dict[str, Any]:
        """All that can be compared, and how near a decision came to its threshold (`closest`)."""
        text, count = self.text(caption), len(self.weights)
        unblocked = self.delta(text, [[] for _ in range(count)])
        n = len(unblocked)
        pairs = list(itertools.combinations(range(n), 2))
        scores = self.similarity(unblocked[[i for i, _ in pairs]], unblocked[[j for _, j in pairs]])
        best = [
            max(s for s, pair in zip(scores, pairs, strict=True) if r in pair) for r in range(n)
        ]
        rows = [r for r in range(n) if best[r] > tau_pairwise]
        closest = min(abs(b - tau_pairwise) for b in best)
        found: dict[str, Any] = {"pairwise": scores, "rows": rows, "memorized": bool(rows)}
        if not rows:
            return {**found, "closest": closest}

        def score(off: list[list[int]]) -> float:
            blocked = self.delta(text, off)
            return max(self.similarity(unblocked[rows], blocked[rows]))

        # Alg. 2 and 3: theta falls from 5, k rises from 0, until the score is low or theta is 1.
        a = self.activation(text)
        z = [np.abs(x - m) / s for x, m, s in zip(a, *statistics, strict=True)]
        fell_back = False
        while True:
            chosen: list[tuple[list[int], list[int]]] = []
            for layer in range(count):
                top = list(np.argsort(-a[layer], kind="stable")[:k])
                unusual = [i for i in np.flatnonzero(z[layer] > theta) if i not in top]
                chosen.append(([int(i) for i in unusual], [int(i) for i in top]))
            s_all = score([unusual + top for unusual, top in chosen])
            closest = min(closest, abs(s_all - tau_initial))
            if s_all <= tau_initial:
                break
            theta, k = theta - step, k + 1
            if theta <= min_theta or k > max(map(len, a)):
                fell_back, tau_refinement = True, s_all
                break

        # Alg. 4: layers, then neurons, from the mid block up.
        on: set[tuple[int, int]] = set()  # re-activated for good

        def without(extra: set[tuple[int, int]]) -> list[list[int]]:
            return [
                [i for i in unusual + top if (layer, i) not in on | extra]
                for layer, (unusual, top) in enumerate(chosen)
            ]

        groups = [
            {(layer, i) for i in chosen[layer][0] + chosen[layer][1]}
            for layer in reversed(range(count))
        ]
        singles = [
            {(layer, i)}
            for layer in reversed(range(count))
            for i in chosen[layer][0] + chosen[layer][1]
        ]
        for group in groups + singles:
            if not group or group <= on:
                continue
            s = score(without(group))
            closest = min(closest, abs(s - tau_refinement))
            if s < tau_refinement:
                on |= group
        refined = without(set())
        return {
            **found,
            "closest": closest,
            "fell_back": fell_back,
            "initial": [sorted(unusual + top) for unusual, top in chosen],
            "initial_score": s_all,
            "refined": [sorted(layer) for layer in refined],
            "refined_score": score(refined),
        }
