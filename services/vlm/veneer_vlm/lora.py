"""LoRA as PEFT applies it, several adapters side by side in one pass.

Owns an adapter's tensors, their initialisation, and the arithmetic y = Wx + s B A dropout(x) with s = alpha /
r, or alpha / sqrt(r) where rank-stabilised (LoRA: https://arxiv.org/abs/2106.09685, rsLoRA:
https://arxiv.org/abs/2312.03732). Files are `peft_folder`'s; which adapter is resident where is an engine's
business.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from veneer_vlm.config import ModelConfig
from veneer_vlm.layout import target_linears
from veneer_vlm.lora_update import Update, updated


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What of PEFT's `LoraConfig` the forward pass reads, under PEFT's own names.

    Attributes:
        r: rank.
        lora_alpha: numerator of the scale.
        lora_dropout: share of an adapter's inputs that training drops.
        target_modules: by PEFT's rule; see `layout.target_linears`. Sorted.
        use_rslora: divide by sqrt(r) rather than r.
        base_model_name_or_path: the base's name, for people.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    use_rslora: bool = False
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(sorted(set(self.target_modules))))

    @property
    def scale(self) -> float:
        """s, the factor of an adapter's part."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclasses.dataclass(frozen=True)
class LowRankPair:
    """The two factors of one linear's update."""

    a_R_I: Tensor
    b_O_R: Tensor


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank update of some of the base's linears.

    Attributes:
        config: its settings.
        pairs: factors by the linear's name in the checkpoint, in the order of the forward pass.
    """

    config: AdapterConfig
    pairs: dict[str, LowRankPair]

    @classmethod
    def new(
        cls,
        model: ModelConfig,
        config: AdapterConfig,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Adapter":
        """An adapter that changes nothing yet: A uniform within 1 / sqrt(I) and B zero, as in PEFT.

        Drawn in float32 on the CPU from a generator of its own, so that a seed means the same everywhere.

        Raises:
            TargetError: a target name selects no linear of the model.
        """
        generator = torch.Generator().manual_seed(seed)
        pairs = {}
        for name, (outputs, inputs) in target_linears(model, config.target_modules).items():
            bound = 1 / math.sqrt(inputs)
            a_R_I = torch.empty(config.r, inputs).uniform_(-bound, bound, generator=generator)
            pairs[name] = LowRankPair(
                a_R_I.to(device, dtype), torch.zeros(outputs, config.r, dtype=dtype, device=device)
            )
        return cls(config, pairs)

    def to(self, device: torch.device | str) -> "Adapter":
        """The same adapter with its factors on a device; they themselves where they are there already."""
        pairs = {name: LowRankPair(pair.a_R_I.to(device), pair.b_O_R.to(device)) for name, pair in self.pairs.items()}
        return Adapter(self.config, pairs)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every factor with its name: the linear's, then `lora_A.weight` or `lora_B.weight`."""
        for name, pair in self.pairs.items():
            yield f"{name}.lora_A.weight", pair.a_R_I
            yield f"{name}.lora_B.weight", pair.b_O_R


@dataclasses.dataclass(frozen=True)
class DropoutKey:
    """Names the dropout masks of one training step; with the linear's name it fixes each mask.

    Attributes:
        seed: the job's.
        step: the number of the forward pass within the job.
    """

    seed: int
    step: int

    def drop(self, name: str, values: Tensor, share: float) -> None:
        """Sets a `share` of `values`, contiguous, to zero: which, is a function of key, name and shape alone."""
        digest = hashlib.sha256(f"{self.seed}/{self.step}/{name}".encode()).digest()
        if values.device.type != "cpu":
            on_device = torch.Generator(values.device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
            values.masked_fill_(torch.rand(values.shape, generator=on_device, device=values.device) < share, 0)
            return
        # As many hits at random places as leave out each value with probability 1 - share, independently (a Poisson
        # process): a draw for each of the few that drop out, not for all.
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "big")))
        hits = generator.poisson(-math.log1p(-share) * values.numel())
        places = torch.from_numpy(generator.integers(values.numel(), size=hits))
        values.view(-1).index_fill_(0, places, 0)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens `start` to `stop` of a pass wear `adapter`; with a `dropout` key its dropout is on."""

    adapter: Adapter
    start: int
    stop: int
    dropout: DropoutKey | None = None

    def update(self, columns: Mapping[str, slice]) -> tuple[Update, list[Tensor]] | None:
        """What it adds to those of the linears that it adapts, with its factors; None where there is nothing."""
        config, pairs = self.adapter.config, self.adapter.pairs
        names = [name for name in columns if name in pairs]
        if not names or self.start == self.stop:
            return None
        scale, drop = config.scale, None
        if self.dropout is not None and config.lora_dropout > 0:
            share = config.lora_dropout
            scale, drop = scale / (1 - share), functools.partial(self.dropout.drop, names[0], share=share)
        update = Update(slice(self.start, self.stop), tuple(columns[name] for name in names), scale, drop)
        return update, [*(pairs[name].a_R_I for name in names), *(pairs[name].b_O_R for name in names)]


class AdapterBatch:
    """Adapters of one pass: one base product over all tokens, then a small product for each segment.

    An adapter's part is computed in the adapter's dtype, as PEFT does, and rounded once into the output's.
    Gradients flow to A and B and to the inputs.

    Args:
        segments: in the order of their tokens; tokens in none wear nothing.

    Raises:
        ValueError: segments overlap, run backwards or are out of order.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        bounds = [bound for segment in segments for bound in (segment.start, segment.stop)]
        if any(left > right for left, right in itertools.pairwise([0, *bounds])):
            raise ValueError(f"segments must grow and not overlap, got bounds {bounds}")
        self.segments = tuple(segments)

    @classmethod
    def uniform(cls, adapter: Adapter | None, tokens: int, dropout: DropoutKey | None = None) -> "AdapterBatch | None":
        """All tokens of a pass wear the same adapter, or nothing."""
        return None if adapter is None else cls([Segment(adapter, 0, tokens, dropout)])

    def add(self, columns: Mapping[str, slice], input_T_I: Tensor, output_T_O: Tensor) -> Tensor:
        """See `veneer_vlm.linear.Adapters`."""
        worn = [worn for segment in self.segments if (worn := segment.update(columns)) is not None]
        if not worn:
            return output_T_O
        factors = [factor for _, own in worn for factor in own]
        return updated([update for update, _ in worn], factors, input_T_I, output_T_O)

    def merged(self, size: int) -> "AdapterBatch":
        """See `veneer_vlm.linear.Adapters`."""
        return AdapterBatch(
            [
                dataclasses.replace(segment, start=segment.start // size, stop=segment.stop // size)
                for segment in self.segments
            ]
        )

    def rows(self, start: int, stop: int) -> "AdapterBatch":
        """See `veneer_vlm.linear.Adapters`."""
        bounds = [(max(segment.start, start), min(segment.stop, stop), segment) for segment in self.segments]
        return AdapterBatch(
            [
                dataclasses.replace(segment, start=first - start, stop=last - start)
                for first, last, segment in bounds
                if first < last
            ]
        )
