"""The text decoder over packed tokens.

Owns its layers and the place where deepstack features join. It does not know which sequence a token belongs
to: positions and attention come from the caller.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer_vlm import native
from veneer_vlm.attention import Attention
from veneer_vlm.config import TextConfig
from veneer_vlm.linear import Adapters, FusedLinear, Linear, embedding
from veneer_vlm.pointwise import made_again, rms_norm, swiglu
from veneer_vlm.rotary import Rotation, rotate, text_rotation


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape and dtype; reduced in float32."""
        return rms_norm(hidden, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Grouped-query attention with normed, rotated queries and keys."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.qkv = FusedLinear(config.hidden_size, {"q_proj": queries, "k_proj": keys, "v_proj": keys})
        self.o_proj = Linear(queries, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, hidden_T_D: Tensor, rotation: Rotation, attention: Attention, layer: int, lora: Adapters | None
    ) -> Tensor:
        """(T, D)."""
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(hidden_T_D, lora))
        query, key = rotate(self.q_norm(query), rotation), rotate(self.k_norm(key), rotation)
        gathered_T_H_K = attention(layer, query, key, value)
        output_T_D: Tensor = self.o_proj(gathered_T_H_K.flatten(1), lora)
        return output_T_D


class GatedMLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up = FusedLinear(config.hidden_size, {"gate_proj": width, "up_proj": width})
        self.down_proj = Linear(width, config.hidden_size)

    def forward(self, hidden_T_D: Tensor, lora: Adapters | None, *, remake: bool) -> Tensor:
        """(T, D)."""
        gate_up_T_2W = self.gate_up.adapted(hidden_T_D, lora)
        gated_T_W = swiglu(gate_up_T_2W)
        with made_again(gated_T_W, swiglu, gate_up_T_2W, wanted=remake):
            output_T_D: Tensor = self.down_proj(gated_T_W, lora)
        return output_T_D


class DecoderLayer(nn.Module):
    """Attention, then MLP, each on a normed input and added to the stream."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self,
        hidden_T_D: Tensor,
        rotation: Rotation,
        attention: Attention,
        layer: int,
        lora: Adapters | None,
        *,
        remake: bool = False,
    ) -> Tensor:
        """(T, D); `remake` has autograd make what a pointwise function gives again, in place of keeping it."""
        normed_T_D = self.input_layernorm(hidden_T_D)
        with made_again(normed_T_D, self.input_layernorm, hidden_T_D, wanted=remake):
            hidden_T_D = hidden_T_D + self.self_attn(normed_T_D, rotation, attention, layer, lora)
        normed_T_D = self.post_attention_layernorm(hidden_T_D)
        with made_again(normed_T_D, self.post_attention_layernorm, hidden_T_D, wanted=remake):
            mlp_T_D: Tensor = self.mlp(normed_T_D, lora, remake=remake)
        return hidden_T_D + mlp_T_D


class Decoder(nn.Module):
    """Embedding, layers and last norm.

    Attributes:
        recompute: whether a layer is computed again for its gradients instead of its activations being kept: the same
            numbers, less memory, a third more time (https://arxiv.org/abs/1604.06174).
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_T_D: Tensor,
        positions_3_T: Tensor,
        attention: Attention,
        visual_index_M: Tensor,
        deepstack_M_D: Sequence[Tensor],
        lora: Adapters | None,
    ) -> Tensor:
        """The last hidden state, (T, D), normed.

        Args:
            hidden_T_D: embedded tokens, the visual ones already replaced by the picture's features.
            positions_3_T: time, row and column of every token.
            attention: who sees whom.
            visual_index_M: which of the T tokens are visual.
            deepstack_M_D: features added to the visual tokens after the first layers, one tensor a layer
                (DeepStack, https://arxiv.org/abs/2406.04334).
            lora: what the tokens wear.
        """
        config = self.config
        rotation = text_rotation(
            positions_3_T, config.head_dim, config.rope_theta, config.mrope_section, hidden_T_D.dtype
        )
        for number, layer in enumerate(self.layers):
            inputs = (hidden_T_D, rotation, attention, number, lora)
            if self.recompute and torch.is_grad_enabled():
                # Dropout masks are a function of their key: no generator's state is to be kept.
                hidden_T_D = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_T_D = layer(*inputs, remake=True)
            if number < len(deepstack_M_D):
                hidden_T_D = hidden_T_D.index_add(0, visual_index_M, deepstack_M_D[number])
        normed_T_D: Tensor = self.norm(hidden_T_D)
        return normed_T_D

    def kept_bytes(self, tokens: int) -> int:
        """About what the activations of a pass take until its gradients are known, unless they are computed again.

        A layer keeps gate and up, its stream, queries, keys and values: 27,400 numbers a token at Qwen3-VL-2B's shape
        by the compiled library, by what memory grows; some 32,000 in bfloat16 and 22,000 in float32 without it.
        """
        config = self.config
        numbers = 2 * config.intermediate_size + (7 if native.AVAILABLE else 10) * config.hidden_size
        return tokens * config.num_hidden_layers * numbers * self.norm.weight.element_size()
