"""The base's shape, and how its weights start.

Owns the Qwen3-VL configuration of the small model and its initialisation. The forward pass of training is `reading`.
"""

import math

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from veneer_base.vocabulary import CompactVocabulary

PATCH_PX = 16
MERGE = 2
HEAD_DIM = 32

TEXT = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": HEAD_DIM,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 4,
    "hidden_size": 160,
    "intermediate_size": 480,
    "num_heads": 5,
    "out_hidden_size": TEXT["hidden_size"],
    "patch_size": PATCH_PX,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "num_position_embeddings": 256,
    # Pictures are at most a few dozen patches wide: with the usual 10,000 most rotary phases would hardly turn.
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    "deepstack_visual_indexes": [1],
}


def configuration(vocabulary: CompactVocabulary) -> Qwen3VLConfig:
    """The small model's configuration, with compact token ids."""
    return Qwen3VLConfig(
        text_config=TEXT | {"vocab_size": vocabulary.size},
        vision_config=dict(VISION),
        image_token_id=vocabulary.compact(151_655),
        video_token_id=vocabulary.compact(151_656),
        vision_start_token_id=vocabulary.compact(151_652),
        vision_end_token_id=vocabulary.compact(151_653),
        tie_word_embeddings=True,
    )


def fresh_model(vocabulary: CompactVocabulary, seed: int) -> Qwen3VLForConditionalGeneration:
    """A model at its start: random, but for a tower that begins with useful sight."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(configuration(vocabulary))
    torch.nn.init.normal_(model.model.visual.pos_embed.weight, std=0.02)
    _begin_with_sight(model)
    return model


@torch.no_grad()
def _begin_with_sight(model: Qwen3VLForConditionalGeneration, attention: float = 3.5) -> None:
    """Patches start as cosine coefficients, and each head of the tower starts by looking at one neighbouring patch.

    The look is made with biases alone: the query's bias is the key's turned by the rotary phase of the offset, so that
    their product peaks where the key lies at that offset.
    """
    tower = model.model.visual
    hidden, heads = tower.config.hidden_size, tower.config.num_heads
    at = torch.arange(PATCH_PX) + 0.5
    waves = torch.stack(
        [torch.cos(math.pi * at * u / PATCH_PX) * math.sqrt((1 if u == 0 else 2) / PATCH_PX) for u in range(PATCH_PX)]
    )
    order = sorted(((u, v) for u in range(PATCH_PX) for v in range(PATCH_PX)), key=lambda uv: (uv[0] + uv[1], uv[0]))
    cosines = torch.stack([torch.outer(waves[u], waves[v]) for u, v in order[:hidden]]) * 0.3
    projection = tower.patch_embed.proj
    projection.weight.copy_((cosines / 6)[:, None, None].expand_as(projection.weight))
    projection.weight.add_(torch.randn_like(projection.weight) * 0.002)
    projection.bias.zero_()
    projection.bias[0] = -0.3 * PATCH_PX  # white paper is zero

    near = [(0, -1), (0, 1), (-1, 0), (1, 0), (0, 0)]
    far = [(0, -2), (0, 2), (-1, 0), (1, 0), (0, 0)]
    turns = tower.rotary_pos_emb.inv_freq
    for layer, block in enumerate(tower.blocks):
        bias = torch.zeros(3, heads, HEAD_DIM)
        for head in range(heads):
            down, right = (far if layer == 2 else near)[head]
            angle = torch.cat([turns * down, turns * right])
            bias[0, head] = torch.cat([angle.cos(), angle.sin()]) * attention
            bias[1, head, : HEAD_DIM // 2] = attention
        block.attn.qkv.bias.copy_(bias.view(-1))
