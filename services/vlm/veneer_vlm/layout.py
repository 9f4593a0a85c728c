"""Names and shapes of a checkpoint's tensors, and which of its linears an adapter may target.

Owns what follows from a `ModelConfig` alone, without torch and without weights: the tensors of the checkpoint
as its authors name them, PEFT's rule for target names, and the count of trainable parameters.
"""

import math
from collections.abc import Iterable, Mapping

from veneer_vlm.config import ModelConfig
from veneer_vlm.errors import TargetError

DECODER = "model.language_model."
TOWER = "model.visual."
HEAD = "lm_head"

Shape = tuple[int, ...]


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a checkpoint of this shape, by name, in the order of the forward pass.

    The head's weight is absent where it is tied to the embedding.
    """
    text, vision = config.text, config.vision
    width, hidden, merged = vision.hidden_size, text.hidden_size, vision.merged_size
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes: dict[str, Shape] = {}

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = (size,)
        shapes[f"{name}.bias"] = (size,)

    def linear(name: str, outputs: int, inputs: Shape, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, *inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def merger(name: str, norm_size: int) -> None:
        norm(f"{name}.norm", norm_size)
        linear(f"{name}.linear_fc1", merged, (merged,), bias=True)
        linear(f"{name}.linear_fc2", hidden, (merged,), bias=True)

    linear(f"{TOWER}patch_embed.proj", width, patch, bias=True)
    shapes[f"{TOWER}pos_embed.weight"] = (vision.num_position_embeddings, width)
    for layer in range(vision.depth):
        block = f"{TOWER}blocks.{layer}."
        norm(f"{block}norm1", width)
        norm(f"{block}norm2", width)
        linear(f"{block}attn.qkv", 3 * width, (width,), bias=True)
        linear(f"{block}attn.proj", width, (width,), bias=True)
        linear(f"{block}mlp.linear_fc1", vision.intermediate_size, (width,), bias=True)
        linear(f"{block}mlp.linear_fc2", width, (vision.intermediate_size,), bias=True)
    merger(f"{TOWER}merger", norm_size=width)
    for level in range(len(vision.deepstack_visual_indexes)):
        merger(f"{TOWER}deepstack_merger_list.{level}", norm_size=merged)

    shapes[f"{DECODER}embed_tokens.weight"] = (text.vocab_size, hidden)
    for layer in range(text.num_hidden_layers):
        block = f"{DECODER}layers.{layer}."
        linear(f"{block}self_attn.q_proj", queries, (hidden,), bias=False)
        linear(f"{block}self_attn.k_proj", keys, (hidden,), bias=False)
        linear(f"{block}self_attn.v_proj", keys, (hidden,), bias=False)
        linear(f"{block}self_attn.o_proj", hidden, (queries,), bias=False)
        shapes[f"{block}self_attn.q_norm.weight"] = (text.head_dim,)
        shapes[f"{block}self_attn.k_norm.weight"] = (text.head_dim,)
        linear(f"{block}mlp.gate_proj", text.intermediate_size, (hidden,), bias=False)
        linear(f"{block}mlp.up_proj", text.intermediate_size, (hidden,), bias=False)
        linear(f"{block}mlp.down_proj", hidden, (text.intermediate_size,), bias=False)
        shapes[f"{block}input_layernorm.weight"] = (hidden,)
        shapes[f"{block}post_attention_layernorm.weight"] = (hidden,)
    shapes[f"{DECODER}norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        linear(HEAD, text.vocab_size, (hidden,), bias=False)
    return shapes


def adaptable_linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linears that an adapter may sit on: all but embeddings and the head."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2 and not name.endswith(("embed.weight", "embed_tokens.weight", f"{HEAD}.weight"))
    }


def target_linears(config: ModelConfig, target_modules: Iterable[str]) -> dict[str, tuple[int, int]]:
    """The linears that target names select, by PEFT's rule: a whole name, or its end after a dot.

    Returns:
        (outputs, inputs) by module name, in the order of the forward pass.

    Raises:
        TargetError: a name selects nothing, or a module that is not an adaptable linear.
    """
    linears = adaptable_linears(config)
    parents = {
        ".".join(name.split(".")[:depth]) for name in tensor_shapes(config) for depth in range(1, name.count(".") + 1)
    } | {HEAD}
    selected: set[str] = set()
    violations = []
    for target in target_modules:
        matches = {name for name in parents if name == target or name.endswith(f".{target}")}
        if not matches:
            violations.append(f"target module {target!r} names nothing in this model")
        elif strangers := sorted(matches - linears.keys()):
            violations.append(f"target module {target!r} selects {strangers[0]}, which is not an adaptable linear")
        selected |= matches
    if violations:
        raise TargetError("target_modules", violations)
    return {name: shape for name, shape in linears.items() if name in selected}


def adapter_size(linears: Mapping[str, tuple[int, int]], rank: int) -> int:
    """How many parameters an adapter of this rank on these linears trains."""
    return sum(rank * (outputs + inputs) for outputs, inputs in linears.values())


def parameter_count(config: ModelConfig) -> int:
    """How many parameters a checkpoint of this shape stores."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())
