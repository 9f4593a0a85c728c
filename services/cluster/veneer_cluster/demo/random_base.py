"""A base of Qwen3-VL-2B's published shape without knowledge: for speed and memory without real weights.

    python -m veneer_cluster.demo.random_base DIRECTORY

Runs in a process of its own: it holds all weights (4.3 GB) until they are written.
"""

import json
import sys
from pathlib import Path

# The published configuration of Qwen3-VL-2B-Instruct, as far as the model reads it.
FULL_SIZE = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5_000_000,
        "max_position_embeddings": 262_144,
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 2048,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
        "hidden_act": "gelu_pytorch_tanh",
    },
}


def write(directory: Path) -> None:
    """Writes a base with random weights, and the small files that belong to Qwen's vocabulary."""
    import torch
    from safetensors.torch import save_file

    from veneer_base.tokenizer import tokenizer_json
    from veneer_base.unfold import surroundings
    from veneer_vlm.config import ModelConfig
    from veneer_vlm.layout import tensor_shapes
    from veneer_vlm.weights import random_model

    directory.mkdir(parents=True)
    config = ModelConfig.from_dict(FULL_SIZE)
    shapes = tensor_shapes(config)
    model = random_model(config, seed=0, dtype=torch.bfloat16)
    # Fused linears are views of one tensor, and safetensors refuses to write shared memory.
    tensors = {name: slot.clone().view(shapes[name]) for name, slot in model.slots().items()}
    del model
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    texts = {
        "config.json": json.dumps(FULL_SIZE, indent=2),
        "tokenizer.json": tokenizer_json(),
    } | surroundings()
    for name, text in texts.items():
        (directory / name).write_text(text, "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
