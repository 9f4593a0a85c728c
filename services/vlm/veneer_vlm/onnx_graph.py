"""The model as two ONNX graphs, written operator by operator: `vision.onnx` and `decoder.onnx`.

Owns the graphs and their weights' files. A prompt and a single token go through the same decoder graph; keys and values
of the past come in and those of the new tokens go out, so that whoever runs it keeps them as it likes. What the graphs
take and give is in docs/export.md; `graphs` runs them. Weights are written one by one as they come: no more than one is
in memory.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from veneer_vlm.config import ModelConfig, TextConfig, VisionConfig
from veneer_vlm.head import DistinctRows
from veneer_vlm.layout import DECODER, HEAD, TOWER

VISION_FILE, DECODER_FILE = "vision.onnx", "decoder.onnx"
Precision = Literal["float32", "int8-blocks", "int8-columns"]
"""How linears hold their weights: `int8-blocks` is ONNX Runtime's MatMulNBits, `int8-columns` standard operators."""

_OPSET = 20
_IR_VERSION = 10
_ALIGNED = 4096  # so that a runtime can map a weight
_BLOCK = 32  # weights that share a scale in MatMulNBits


def write(config: ModelConfig, tensors: Iterator[tuple[str, Tensor]], precision: Precision, target: Path) -> None:
    """Writes both graphs with their weights beside them, `*.onnx.data`.

    Args:
        config: the model's shape.
        tensors: every tensor of the checkpoint by its name there, float32.
        precision: of linears; all else is float32.
        target: a folder that is there.
    """
    with (
        (target / f"{VISION_FILE}.data").open("wb") as vision_file,
        (target / f"{DECODER_FILE}.data").open("wb") as decoder_file,
    ):
        vision = _Graph(f"{VISION_FILE}.data", vision_file, precision)
        decoder = _Graph(f"{DECODER_FILE}.data", decoder_file, precision)
        for name, tensor in tensors:
            _store(vision if name.startswith(TOWER) else decoder, name, tensor, config)
    _vision(vision, config.vision)
    vision.save(target / VISION_FILE)
    _decoder(decoder, config)
    decoder.save(target / DECODER_FILE)


@dataclasses.dataclass
class _Graph:
    """A graph that grows operator by operator; every method returns the name of what it made."""

    data_name: str
    data: BinaryIO
    precision: Precision
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    constants: dict[str, TensorProto] = dataclasses.field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = dataclasses.field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = dataclasses.field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:  # noqa: ANN401  # a name, or several
        names = [f"{kind}_{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, values: Any, dtype: Any = np.int64) -> str:  # noqa: ANN401  # what numpy takes
        name = f"constant_{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.asarray(values, dtype), name)
        return name

    def stored(self, name: str, values: NDArray[Any]) -> None:
        """Writes a weight into the file beside the graph."""
        self.data.write(b"\0" * (-self.data.tell() % _ALIGNED))
        offset = self.data.tell()
        self.data.write(np.ascontiguousarray(values).tobytes())
        proto = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.data_name), ("offset", offset), ("length", values.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        self.constants[name] = proto

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, shape: Sequence[int | str]) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def reshape(self, value: str, *shape: int) -> str:
        """A 0 keeps the dimension, a -1 takes the rest."""
        return str(self.op("Reshape", value, self.constant(shape)))

    def linear(self, value: str, name: str) -> str:
        """The product with a stored linear, and its bias where it has one."""
        weight = f"{name}.weight"
        if self.precision == "int8-blocks":
            inputs, outputs = self.sizes[name]
            product = self.op(
                "MatMulNBits", value, weight, f"{weight}.scale", domain="com.microsoft",
                K=inputs, N=outputs, bits=8, block_size=_BLOCK, accuracy_level=4,
            )  # fmt: skip
        else:
            if self.precision == "int8-columns":
                weight = self.op("DequantizeLinear", weight, f"{weight}.scale", axis=1)
            product = self.op("MatMul", value, weight)
        return str(self.op("Add", product, f"{name}.bias") if f"{name}.bias" in self.constants else product)

    def layer_norm(self, value: str, name: str) -> str:
        return str(self.op("LayerNormalization", value, f"{name}.weight", f"{name}.bias", axis=-1, epsilon=1e-6))

    def rms_norm(self, value: str, name: str, epsilon: float) -> str:
        mean = self.op("ReduceMean", self.op("Mul", value, value), self.constant([-1]), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.constant(epsilon, np.float32)))
        return str(self.op("Mul", self.op("Div", value, root), f"{name}.weight"))

    def rotated(self, value: str, cosine: str, sine: str) -> str:
        """As `rotary.rotate`."""
        first, second = self.op("Split", value, outputs=2, axis=-1, num_outputs=2)
        turned = self.op("Concat", self.op("Neg", second), first, axis=-1)
        return str(self.op("Add", self.op("Mul", value, cosine), self.op("Mul", turned, sine)))

    def save(self, path: Path) -> None:
        graph = helper.make_graph(
            self.nodes, path.stem, self.inputs, self.outputs, initializer=list(self.constants.values())
        )
        domains = [helper.make_opsetid("", _OPSET)]
        if self.precision == "int8-blocks":
            domains.append(helper.make_opsetid("com.microsoft", 1))
        model = helper.make_model(graph, opset_imports=domains, ir_version=_IR_VERSION, producer_name="veneer")
        path.write_bytes(model.SerializeToString())


def _store(graph: _Graph, name: str, tensor: Tensor, config: ModelConfig) -> None:
    """Stores one tensor of the checkpoint as the graph reads it."""
    if name == f"{DECODER}embed_tokens.weight":
        _store_rows(graph, "embedding", tensor)
        if config.tie_word_embeddings:
            return
    elif name == f"{HEAD}.weight":
        _store_rows(graph, "head", tensor)
    elif tensor.ndim < 2 or name == f"{TOWER}pos_embed.weight":
        graph.stored(name, tensor.numpy())
    else:
        _store_linear(graph, name, tensor.flatten(1))


def _store_rows(graph: _Graph, name: str, weight_V_D: Tensor) -> None:
    """Rows of the vocabulary; only the distinct ones where they are few, with the row of each id."""
    distinct = DistinctRows.of(weight_V_D)
    graph.stored(name, (weight_V_D if distinct is None else distinct.weight_U_D).numpy())
    if distinct is not None:
        graph.stored(f"{name}.row", distinct.row_V.numpy())


def _store_linear(graph: _Graph, name: str, weight_O_I: Tensor) -> None:
    outputs, inputs = weight_O_I.shape
    graph.sizes[name.removesuffix(".weight")] = (inputs, outputs)
    if graph.precision == "int8-blocks":
        padded = torch.nn.functional.pad(weight_O_I, (0, -inputs % _BLOCK)).view(outputs, -1, _BLOCK)
        scale = padded.abs().amax(-1).clamp_min(1e-10) / 127
        graph.stored(name, ((padded / scale[..., None]).round() + 128).to(torch.uint8).numpy())
        graph.stored(f"{name}.scale", scale.flatten().numpy())
    elif graph.precision == "int8-columns":
        scale_O = weight_O_I.abs().amax(-1).clamp_min(1e-10) / 127
        graph.stored(name, (weight_O_I / scale_O[:, None]).round().to(torch.int8).T.contiguous().numpy())
        graph.stored(f"{name}.scale", scale_O.numpy())
    else:
        graph.stored(name, weight_O_I.T.contiguous().numpy())


def _vision(graph: _Graph, config: VisionConfig) -> None:
    """One picture's patches (P, X) to its visual tokens (M, D) and deepstack levels."""
    width, heads = config.hidden_size, config.num_heads
    patches = graph.input("patches", TensorProto.FLOAT, ["P", config.patch_values])
    corners = graph.input("corners", TensorProto.INT64, [4, "P"])
    shares = graph.input("corner_shares", TensorProto.FLOAT, [4, "P"])
    axes = graph.input("row_and_column", TensorProto.FLOAT, [2, "P"])
    embedded = graph.linear(patches, f"{TOWER}patch_embed.proj")
    near = graph.op("Gather", f"{TOWER}pos_embed.weight", corners, axis=0)
    weighed = graph.op("Mul", near, graph.op("Unsqueeze", shares, graph.constant([-1])))
    hidden = graph.op("Add", embedded, graph.op("ReduceSum", weighed, graph.constant([0]), keepdims=0))

    half = config.head_dim // 2
    frequency = config.rope_theta ** -(np.arange(0, half, 2, dtype=np.float32) / np.float32(half))
    angles = graph.op("Mul", graph.op("Unsqueeze", axes, graph.constant([-1])), graph.constant(frequency, np.float32))
    row, column = (graph.op("Gather", angles, graph.constant(axis), axis=0) for axis in (0, 1))
    twice = graph.op("Unsqueeze", graph.op("Concat", row, column, row, column, axis=-1), graph.constant([1]))
    cosine, sine = graph.op("Cos", twice), graph.op("Sin", twice)

    levels: list[str] = []
    for layer in range(config.depth):
        block = f"{TOWER}blocks.{layer}."
        normed = graph.layer_norm(hidden, f"{block}norm1")
        qkv = graph.reshape(graph.linear(normed, f"{block}attn.qkv"), 0, 3, heads, config.head_dim)
        parts = graph.op("Split", qkv, outputs=3, axis=1, num_outputs=3)
        query, key, value = (graph.op("Squeeze", part, graph.constant([1])) for part in parts)
        query, key = graph.rotated(query, cosine, sine), graph.rotated(key, cosine, sine)
        query, value = (graph.op("Transpose", part, perm=[1, 0, 2]) for part in (query, value))
        gathered = _attended(graph, query, graph.op("Transpose", key, perm=[1, 2, 0]), value, config.head_dim)
        joined = graph.reshape(graph.op("Transpose", gathered, perm=[1, 0, 2]), 0, width)
        hidden = graph.op("Add", hidden, graph.linear(joined, f"{block}attn.proj"))
        inner = graph.linear(graph.layer_norm(hidden, f"{block}norm2"), f"{block}mlp.linear_fc1")
        inner = graph.op("Gelu", inner, approximate="tanh")
        hidden = graph.op("Add", hidden, graph.linear(inner, f"{block}mlp.linear_fc2"))
        if layer in config.deepstack_visual_indexes:
            name = f"{TOWER}deepstack_merger_list.{len(levels)}"
            merged = graph.layer_norm(graph.reshape(hidden, -1, config.merged_size), f"{name}.norm")
            levels.append(_merged(graph, merged, name))
    normed = graph.reshape(graph.layer_norm(hidden, f"{TOWER}merger.norm"), -1, config.merged_size)
    graph.output(_merged(graph, normed, f"{TOWER}merger"), "tokens", ["M", config.out_hidden_size])
    for number, level in enumerate(levels):
        graph.output(level, f"deepstack_{number}", ["M", config.out_hidden_size])


def _merged(graph: _Graph, value: str, name: str) -> str:
    return graph.linear(graph.op("Gelu", graph.linear(value, f"{name}.linear_fc1")), f"{name}.linear_fc2")


def _decoder(graph: _Graph, config: ModelConfig) -> None:
    """New tokens (B, T) after a past of S to the logits of those that are wanted."""
    text, levels = config.text, len(config.vision.deepstack_visual_indexes)
    groups, width = text.num_key_value_heads, text.head_dim
    past_shape: list[int | str] = [text.num_hidden_layers, "B", groups, "S", width]
    ids = graph.input("ids", TensorProto.INT64, ["B", "T"])
    positions = graph.input("positions", TensorProto.INT64, [3, "B", "T"])
    is_visual = graph.input("is_visual", TensorProto.BOOL, ["B", "T", 1])
    visual = graph.input("visual", TensorProto.FLOAT, [1 + levels, "B", "T", text.hidden_size])
    mask = graph.input("mask", TensorProto.FLOAT, ["B", 1, 1, "T", "C"])
    past_keys = graph.input("past_keys", TensorProto.FLOAT, past_shape)
    past_values = graph.input("past_values", TensorProto.FLOAT, past_shape)
    wanted = graph.input("wanted", TensorProto.INT64, ["N"])

    row = graph.op("Gather", "embedding.row", ids, axis=0) if "embedding.row" in graph.constants else ids
    embedded = graph.op("Gather", "embedding", row, axis=0)
    seen = [graph.op("Gather", visual, graph.constant(number), axis=0) for number in range(1 + levels)]
    hidden = graph.op("Where", is_visual, seen[0], embedded)
    cosine, sine = _text_rotation(graph, positions, text)

    keys: list[str] = []
    values: list[str] = []
    for layer in range(text.num_hidden_layers):
        block = f"{DECODER}layers.{layer}."
        normed = graph.rms_norm(hidden, f"{block}input_layernorm", text.rms_norm_eps)
        query, key, value = (
            graph.reshape(graph.linear(normed, f"{block}self_attn.{part}_proj"), 0, 0, -1, width) for part in "qkv"
        )
        query = graph.rotated(graph.rms_norm(query, f"{block}self_attn.q_norm", text.rms_norm_eps), cosine, sine)
        key = graph.rotated(graph.rms_norm(key, f"{block}self_attn.k_norm", text.rms_norm_eps), cosine, sine)
        key, value = (graph.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (key, value))  # B G T K
        keys.append(graph.op("Unsqueeze", key, graph.constant([0])))
        values.append(graph.op("Unsqueeze", value, graph.constant([0])))
        number = graph.constant(layer)
        whole_key = graph.op("Concat", graph.op("Gather", past_keys, number, axis=0), key, axis=2)
        whole_value = graph.op("Concat", graph.op("Gather", past_values, number, axis=0), value, axis=2)
        # Heads that share keys stand in an axis of their own: B G R T K.
        shared = text.num_attention_heads // groups
        query = graph.op("Transpose", query, perm=[0, 2, 1, 3])
        query = graph.op("Reshape", query, _split_heads(graph, query, groups, shared, width))
        whole_key, whole_value = (graph.op("Unsqueeze", part, graph.constant([2])) for part in (whole_key, whole_value))
        turned = graph.op("Transpose", whole_key, perm=[0, 1, 2, 4, 3])
        gathered = _attended(graph, query, turned, whole_value, width, mask)
        gathered = graph.op("Transpose", gathered, perm=[0, 3, 1, 2, 4])  # B T G R K
        joined = graph.reshape(gathered, 0, 0, text.num_attention_heads * width)
        hidden = graph.op("Add", hidden, graph.linear(joined, f"{block}self_attn.o_proj"))
        normed = graph.rms_norm(hidden, f"{block}post_attention_layernorm", text.rms_norm_eps)
        gate = graph.linear(normed, f"{block}mlp.gate_proj")
        gated = graph.op(
            "Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), graph.linear(normed, f"{block}mlp.up_proj")
        )
        hidden = graph.op("Add", hidden, graph.linear(gated, f"{block}mlp.down_proj"))
        if layer < levels:
            hidden = graph.op("Add", hidden, seen[1 + layer])
    last = graph.op("Gather", graph.reshape(hidden, -1, text.hidden_size), wanted, axis=0)
    last = graph.rms_norm(last, f"{DECODER}norm", text.rms_norm_eps)
    head = "embedding" if config.tie_word_embeddings else "head"
    logits = graph.op("Gemm", last, head, transB=1)
    if f"{head}.row" in graph.constants:
        logits = graph.op("Gather", logits, f"{head}.row", axis=1)
    new_shape: list[int | str] = [text.num_hidden_layers, "B", groups, "T", width]
    graph.output(logits, "logits", ["N", text.vocab_size])
    graph.output(graph.op("Concat", *keys, axis=0), "keys", new_shape)
    graph.output(graph.op("Concat", *values, axis=0), "values", new_shape)


def _split_heads(graph: _Graph, query: str, groups: int, shared: int, width: int) -> str:
    """The shape (B, G, R, T, K) of queries (B, H, T, K)."""
    shape = graph.op("Shape", query)
    batch, tokens = (graph.op("Gather", shape, graph.constant([axis]), axis=0) for axis in (0, 2))
    return str(graph.op("Concat", batch, graph.constant([groups, shared]), tokens, graph.constant([width]), axis=0))


def _text_rotation(graph: _Graph, positions: str, text: TextConfig) -> tuple[str, str]:
    """As `rotary.text_rotation`: cosine and sine, (B, T, 1, K) each."""
    half = text.head_dim // 2
    axis = np.zeros(half, np.int64)
    for place in (1, 2):
        axis[place : 3 * text.mrope_section[place] : 3] = place
    frequency = text.rope_theta ** -(np.arange(0, text.head_dim, 2, dtype=np.float32) / np.float32(text.head_dim))
    chosen = graph.op("Gather", graph.op("Cast", positions, to=TensorProto.FLOAT), graph.constant(axis), axis=0)
    angles = graph.op("Mul", graph.op("Transpose", chosen, perm=[1, 2, 0]), graph.constant(frequency, np.float32))
    twice = graph.op("Unsqueeze", graph.op("Concat", angles, angles, axis=-1), graph.constant([2]))
    return graph.op("Cos", twice), graph.op("Sin", twice)


def _attended(graph: _Graph, query: str, key_turned: str, value: str, width: int, mask: str = "") -> str:
    scores = graph.op("MatMul", graph.op("Mul", query, graph.constant(width**-0.5, np.float32)), key_turned)
    if mask:
        scores = graph.op("Add", scores, mask)
    return str(graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value))
