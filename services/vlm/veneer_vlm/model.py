"""Decoder and vision tower put together.

Owns the model's outer surface: pictures to features, tokens to hidden states, hidden states to logits.
Weights come from `weights`, which sequence is which from an `Attention`, adapters from `lora`.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from veneer_vlm.attention import Attention
from veneer_vlm.config import ModelConfig
from veneer_vlm.decoder import Decoder
from veneer_vlm.head import Head
from veneer_vlm.layout import HEAD
from veneer_vlm.linear import LARGE, Adapters, FusedLinear
from veneer_vlm.vision import Grid, VisionTower, VisualFeatures

_KERNELS_AT_ONCE = 4  # that are made: each has a weight in float32 meanwhile


class VisionLanguageModel(nn.Module):
    """A dense Qwen3-VL. Its base is frozen: gradients go to adapters and activations only.

    Attributes:
        mapped: weights of the tower that lie in the base's files.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.mapped: list[Tensor] = []
        self.visual = VisionTower(config.vision)
        self.language_model = Decoder(config.text)
        self.lm_head = Head(config.text.hidden_size, config.text.vocab_size)
        for path, module in self.named_modules():
            if isinstance(module, FusedLinear):
                name = checkpoint_name(path)
                parent = name.rpartition(".")[0]
                module.names = tuple(f"{parent}.{part}" if part else name for part in module.parts)

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        stored: torch.dtype | None = None,
    ) -> "VisionLanguageModel":
        """A model of this shape whose parameters hold nothing yet; `weights` fills them.

        Args:
            config: the shape.
            dtype: of hidden states and parameters.
            device: of the parameters.
            stored: of the linears' large weights and of the embedding, in place of `dtype`.
        """
        with torch.device("meta"):
            model = cls(config)
        for module in model.modules():
            # Not by `to_empty`: on the meta device it has torch import its compiler, a second of every process.
            for name, parameter in list(module.named_parameters(recurse=False)):
                large = parameter.numel() >= LARGE and (
                    isinstance(module, FusedLinear) or module is model.language_model.embed_tokens
                )
                values = torch.empty(parameter.shape, dtype=stored or dtype if large else dtype, device=device)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
        if config.tie_word_embeddings:
            # An embedding's weight is a Parameter, though its stub says Tensor.
            model.lm_head.weight = model.language_model.embed_tokens.weight  # type: ignore[assignment]
        model.lm_head.dtype = dtype
        return model.eval()

    def slots(self) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint goes, by its name there: views of the parameters."""
        slots = {}
        for path, module in self.named_modules():
            if isinstance(module, FusedLinear):
                slots.update(module.slots())
            else:
                own = module.named_parameters(prefix=checkpoint_name(path), recurse=False)
                slots.update({name: parameter.data for name, parameter in own})
        if self.config.tie_word_embeddings:
            del slots[f"{HEAD}.weight"]
        return slots

    def compute_by(self, kernel: Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor] | None]) -> None:
        """Gives linears another way to compute, for inference alone; the weights that it replaces are let go of.

        A head that has its distinct rows found (`head`) keeps them as they are: they are few.

        Args:
            kernel: given weight and bias, a linear's `FusedLinear.kernel`, or None where it goes on as it is. Is called
                in threads, a few at once: to pack a weight is work for one.
        """

        def replace(module: FusedLinear) -> None:
            module.kernel = kernel(module.weight.data, None if module.bias is None else module.bias.data)
            # A tied head's weight is the embedding's too.
            if module.kernel is not None and module.weight is not self.language_model.embed_tokens.weight:
                module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)

        whole_head = self.lm_head.distinct() is None
        modules = (module for module in self.modules() if isinstance(module, FusedLinear))
        with ThreadPoolExecutor(min(_KERNELS_AT_ONCE, torch.get_num_threads())) as pool:
            for _ in pool.map(replace, [module for module in modules if whole_head or module is not self.lm_head]):
                pass

    @property
    def dtype(self) -> torch.dtype:
        """That of the hidden states, and of all weights but large ones that are as they were stored."""
        return self.language_model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language_model.embed_tokens.weight.device

    def see(self, patches_P_X: Tensor, grids: Sequence[Grid], lora: Adapters | None = None) -> VisualFeatures:
        """The features of pictures; see `VisionTower.start`. For a pass in slices call `visual` itself."""
        features: VisualFeatures = self.visual(patches_P_X, grids, lora)
        return features

    def let_go_of_tower(self) -> None:
        """Frees the memory of weights that are `mapped`, until they are used again; on Linux alone."""
        if sys.platform != "linux":
            return
        # Pages of a file that were not written to: they are found again as they were.
        madvise = ctypes.CDLL(None).madvise
        for weight in self.mapped:
            start = weight.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            size_bytes = weight.data_ptr() + weight.nbytes - start
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size_bytes), mmap.MADV_DONTNEED)

    def forward(
        self,
        ids_T: Tensor,
        positions_3_T: Tensor,
        attention: Attention,
        visual: VisualFeatures | None = None,
        lora: Adapters | None = None,
    ) -> Tensor:
        """The last hidden state of every token, (T, D).

        Args:
            ids_T: token ids of all sequences, one after another; image tokens stand for the visual ones.
            positions_3_T: time, row and column of every token.
            attention: which tokens see which.
            visual: features of the image tokens among `ids_T`, in order; None where there are none.
            lora: what the tokens wear.

        Raises:
            ValueError: image tokens and features differ in number.
        """
        hidden_T_D = self.language_model.embed_tokens(ids_T).to(self.dtype)
        visual_index_M = (ids_T == self.config.image_token_id).nonzero().squeeze(-1)
        features = 0 if visual is None else len(visual.tokens_M_D)
        if len(visual_index_M) != features:
            raise ValueError(f"{len(visual_index_M)} image tokens, but features for {features}")
        deepstack_M_D: tuple[Tensor, ...] = ()
        if visual is not None:
            hidden_T_D = hidden_T_D.index_copy(0, visual_index_M, visual.tokens_M_D)
            deepstack_M_D = visual.deepstack_M_D
        last_T_D: Tensor = self.language_model(
            hidden_T_D, positions_3_T, attention, visual_index_M, deepstack_M_D, lora
        )
        return last_T_D

    def logits(self, hidden_N_D: Tensor) -> Tensor:
        """Logits (N, V) of the hidden states that the caller picked; never more of them than are wanted."""
        return self.lm_head.project(hidden_N_D)


def checkpoint_name(path: str) -> str:
    """A module's name in the checkpoint, from its path in `VisionLanguageModel`."""
    return path if path.split(".")[0] == HEAD else f"model.{path}"
