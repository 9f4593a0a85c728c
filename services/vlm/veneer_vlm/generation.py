"""Greedy decoding of one sequence.

Owns just enough to ask a model one question: a prefill and a step at a time over the cached attention.
Batching, sampling and stop strings belong to an engine.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from veneer_vlm.cache import CachedAttention, KeyValueCache
from veneer_vlm.lora import Adapter, AdapterBatch
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.vision import VisualFeatures


@torch.inference_mode()
def generate(
    model: VisionLanguageModel,
    ids_T: Tensor,
    positions_3_T: Tensor,
    *,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    visual: VisualFeatures | None = None,
    adapter: Adapter | None = None,
) -> Iterator[int]:
    """Yield the likeliest token after the prompt, then the likeliest after that.

    Args:
        model: the base.
        ids_T: the prompt.
        positions_3_T: of the prompt's tokens; the answer goes on from the greatest, the same on all three
            axes.
        max_tokens: how many tokens to yield at most.
        stop_ids: ends the answer, and is not yielded.
        visual: features of the prompt's image tokens.
        adapter: what the decoder wears.
    """
    cache = KeyValueCache(model.config.text, 1, len(ids_T) + max_tokens, model.dtype, model.device)
    for _ in range(max_tokens):
        attention = CachedAttention(cache, [(0, len(ids_T))])
        lora = AdapterBatch.uniform(adapter, len(ids_T))
        hidden_T_D = model(ids_T, positions_3_T, attention, visual, lora)
        attention.commit()
        ids_T = model.logits(hidden_T_D[-1:]).argmax(-1)
        token = int(ids_T)
        if token in stop_ids:
            return
        yield token
        positions_3_T = (positions_3_T.max() + 1).expand(3, 1)
        visual = None
