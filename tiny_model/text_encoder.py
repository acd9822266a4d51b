"""The text encoder: CLIP's architecture with random weights, never trained.

Public names: new_text_encoder, embed, embed_tokens.

Random weights are enough: the captions of this world need to be told apart, not understood. Initial
weights three times CLIP's make attention uneven, so that every caption gets tokens of its own.
"""

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiny_model.captions import MAX_TOKENS
from tiny_model.training_loop import Workers

TEXT_WIDTH = 256


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Call within `seeded_weights`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        initializer_factor=3.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


@torch.no_grad()
def embed(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, captions: list[str], *, batch: int = 256
) -> Tensor:
    """Text embeddings as a Stable Diffusion pipeline computes them, (n, 77, width) float32."""
    parts = []
    for start in range(0, len(captions), batch):
        tokens = tokenizer(
            captions[start : start + batch],
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        parts.append(text_encoder(tokens.input_ids).last_hidden_state)
    return torch.cat(parts)


@torch.no_grad()
def embed_tokens(text_encoder: CLIPTextModel, workers: Workers, ids: Tensor) -> Tensor:
    """(n, 77) token ids -> (n, 77, width); each worker reads its share, and all get all."""
    embeddings = torch.zeros(*ids.shape, TEXT_WIDTH)
    mine = slice(workers.rank, None, workers.count)
    if len(ids[mine]):  # the encoder takes no empty batch
        embeddings[mine] = text_encoder(ids[mine]).last_hidden_state
    if len(ids):
        workers.add_up(embeddings)
    return embeddings
