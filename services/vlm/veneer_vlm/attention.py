"""How tokens of the decoder attend to one another: the seam to whoever batches sequences.

Owns the protocol and the attention of whole packed sequences, which keeps nothing: training, scoring, prefill
at one go. Attention over remembered tokens is `cache`'s.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_STEP = 32  # tokens


class Attention(Protocol):
    """Called once a layer with the pass's rotated queries and keys."""

    def __call__(self, layer: int, query_T_H_K: Tensor, key_T_G_K: Tensor, value_T_G_K: Tensor) -> Tensor:
        """What each token gathers, (T, H, K)."""
        ...


class PackedAttention:
    """Causal attention within each of several sequences that lie one after another; gradients flow.

    Args:
        lengths: tokens of each sequence; their sum is T.
        causal: False lets every token see its whole sequence (patches of a picture).
    """

    def __init__(self, lengths: Sequence[int], *, causal: bool = True) -> None:
        self.bounds = list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))
        self.causal = causal
        self._counts = [sum(1 for _ in same) for _, same in itertools.groupby(lengths)]  # of neighbours as long
        self._runs = [
            length * count for (length, _), count in zip(itertools.groupby(lengths), self._counts, strict=True)
        ]

    def __call__(self, layer: int, query_T_H_K: Tensor, key_T_G_K: Tensor, value_T_G_K: Tensor) -> Tensor:
        """See `Attention`."""
        # Split, not sliced: a slice's gradient is a tensor of zeros as large as the whole.
        parts = [torch.split(tensor, self._runs) for tensor in (query_T_H_K, key_T_G_K, value_T_G_K)]
        of = _causal if self.causal else attend
        gathered = [of(*each, sequences=count) for *each, count in zip(*parts, self._counts, strict=True)]
        return gathered[0] if len(gathered) == 1 else torch.cat(gathered)

    def rows(self, start: int, stop: int, query_T_H_K: Tensor, key_T_G_K: Tensor, value_T_G_K: Tensor) -> Tensor:
        """What tokens `start` to `stop` gather, (stop - start, H, K), of all that they see.

        Raises:
            ValueError: causal, and the tokens are not all.
        """
        if (start, stop) == (0, len(query_T_H_K)):
            return self(0, query_T_H_K, key_T_G_K, value_T_G_K)
        if self.causal:
            raise ValueError("rows of a causal pass cannot be gathered apart")
        gathered = [
            attend(query_T_H_K[max(a, start) : min(b, stop)], key_T_G_K[a:b], value_T_G_K[a:b])
            for a, b in self.bounds
            if max(a, start) < min(b, stop)
        ]
        return gathered[0] if len(gathered) == 1 else torch.cat(gathered)

    def seen(self, start: int, stop: int) -> int:
        """How many tokens those from `start` to `stop` see, all together, where each sees its whole sequence."""
        return sum(max(0, min(b, stop) - max(a, start)) * (b - a) for a, b in self.bounds)


def _causal(query_T_H_K: Tensor, key_T_G_K: Tensor, value_T_G_K: Tensor, *, sequences: int) -> Tensor:
    """Causal attention of whole sequences of one length, (T, H, K).

    In bfloat16 on a CPU they are padded to whole steps by tokens that no other sees: torch's products there are
    oneDNN's, which makes code for each number of tokens and keeps it, four megabytes a length.
    """
    length = len(query_T_H_K) // sequences
    more = -length % _STEP if query_T_H_K.dtype is torch.bfloat16 and query_T_H_K.device.type == "cpu" else 0
    if not more:
        return attend(query_T_H_K, key_T_G_K, value_T_G_K, causal=True, sequences=sequences)
    padded = [
        F.pad(tensor.reshape(sequences, length, *tensor.shape[1:]), (0, 0, 0, 0, 0, more)).flatten(0, 1)
        for tensor in (query_T_H_K, key_T_G_K, value_T_G_K)
    ]
    gathered = attend(*padded, causal=True, sequences=sequences)
    return gathered.reshape(sequences, length + more, *gathered.shape[1:])[:, :length].flatten(0, 1)


def attend(
    query_T_H_K: Tensor,
    key_C_G_K: Tensor,
    value_C_G_K: Tensor,
    *,
    causal: bool = False,
    mask_T_C: Tensor | None = None,
    sequences: int = 1,
) -> Tensor:
    """Attention of sequences of one length, (T, H, K); query head h reads key/value head h // (H / G).

    Args:
        query_T_H_K: rotated queries.
        key_C_G_K: rotated keys of all C tokens that may be seen.
        value_C_G_K: their values.
        causal: token t sees 0..t of its sequence only; needs T = C.
        mask_T_C: what may be seen, where it is neither everything nor causal; needs one sequence.
        sequences: how many lie one after another.
    """
    query, key, value = (
        tensor.reshape(sequences, -1, *tensor.shape[1:]).transpose(1, 2)
        for tensor in (query_T_H_K, key_C_G_K, value_C_G_K)
    )
    heads, groups = query.shape[1], key.shape[1]
    if query.shape[2] == 1:
        # One token sees everything, so heads that share keys may stand as rows: the keys are then read once a
        # group.
        rows = query.reshape(sequences, groups, heads // groups, -1)
        return F.scaled_dot_product_attention(rows, key, value).reshape(query_T_H_K.shape)
    gathered = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask_T_C, is_causal=causal, enable_gqa=groups != heads
    )
    return gathered.transpose(1, 2).flatten(0, 1)


def attend_to_places(query_1_H_K: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Attention of one token to all keys of several places, (1, H, K), none of which is copied.

    Each place is attended alone, and weighs in the whole what its scores sum to. On a CPU only; without gradients.

    Args:
        query_1_H_K: rotated query.
        keys: rotated keys (C, G, K) of each place, C its own.
        values: theirs.
    """
    if len(keys) == 1:
        return attend(query_1_H_K, keys[0], values[0])
    groups = keys[0].shape[1]
    rows_1_G_R_K = query_1_H_K.reshape(1, groups, -1, query_1_H_K.shape[-1])
    gathered, sums = [], []
    for key_C_G_K, value_C_G_K in zip(keys, values, strict=True):
        # The one kernel of scaled_dot_product_attention that tells the logarithm of a row's sum.
        place, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows_1_G_R_K, key_C_G_K.transpose(0, 1)[None], value_C_G_K.transpose(0, 1)[None]
        )
        gathered.append(place)
        sums.append(log_sum)
    weight_n_1_G_R = torch.stack(sums).softmax(0)
    whole_1_G_R_K = (torch.stack(gathered) * weight_n_1_G_R[..., None]).sum(0)
    return whole_1_G_R_K.to(query_1_H_K.dtype).view(query_1_H_K.shape)
