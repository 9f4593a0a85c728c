"""Whether a base on disk works here: parity with transformers, one training step, one answer.

Owns the stages, their inputs and what they measure. It is the only module of this package that needs
transformers, and holds one of the two models at a time.
"""

import contextlib
import dataclasses
import gc
import io
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from veneer_processing import Conversation, Encoded, Message, Picture, Processor, Text, open_picture
from veneer_vlm.attention import PackedAttention
from veneer_vlm.config import ModelConfig
from veneer_vlm.generation import generate
from veneer_vlm.lora import Adapter, AdapterBatch, AdapterConfig
from veneer_vlm.loss import token_losses
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.vision import Grid
from veneer_vlm.weights import load

FLOAT32_LIMIT = 1e-4
"""Greatest difference of a logit in float32; more in proportion where logits reach beyond 10."""

BFLOAT16_LIMIT = 0.05
"""Root mean square of differences over that of logits in bfloat16: each side rounds in its own order."""

_ANSWER_TOKENS = 64
_LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage saw.

    Attributes:
        name: for people.
        seconds: that it took.
        peak_bytes: of the process's memory during it, and of the accelerator's where there is one.
        findings: sentences for people.
        passed: whether what must hold held.
    """

    name: str
    seconds: float
    peak_bytes: int
    findings: tuple[str, ...]
    passed: bool


class _Findings:
    """What a running stage notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.passed = True

    def note(self, line: str, *, holds: bool = True) -> None:
        """A finding; one that must hold and does not fails the stage."""
        self.lines.append(line if holds else f"FAILED {line}")
        self.passed &= holds


class _Recorder:
    """Collects stages, each timed and its memory measured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stages: list[Stage] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator["_Findings"]:
        """Time a block, which notes what it finds."""
        gc.collect()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        findings = _Findings()
        yield findings
        seconds = time.perf_counter() - start
        self.stages.append(Stage(name, seconds, self._peak_bytes(), tuple(findings.lines), findings.passed))

    def _peak_bytes(self) -> int:
        accelerator = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        try:
            status = Path("/proc/self/status").read_text(encoding="ascii")
        except OSError:  # not Linux: the peak since the process began, in kilobytes
            return accelerator + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return accelerator + int(line.split()[1]) * 1024


def verify(directory: Path, dtype: torch.dtype, device: torch.device, say: Callable[[str], None]) -> list[Stage]:
    """Run all stages on a model directory.

    Args:
        directory: config, safetensors, tokenizer, template and processor settings.
        dtype: float32 or bfloat16, for both sides.
        device: for both sides.
        say: receives the answer piece by piece.

    Raises:
        RefusedError: see `ModelConfig.from_directory` and `weights.load`.
        ProcessingError: see `veneer_processing.Processor.load`.
    """
    ModelConfig.from_directory(directory)  # what cannot be ours need not be loaded by the peer first
    processor = Processor.load(directory, model_digest="")
    small, large = _drawing("7 4 1", (160, 96)), _drawing("Total 42.50", (288, 192))
    question = Text("What is written here?")
    prompts = {
        "text": _prompt(Text("Name a colour, a number and a city.")),
        "one picture": _prompt(large, question),
        "two pictures": _prompt(small, Text("And here:"), large, question),
    }
    cases = {name: processor.encode_prompt(prompt) for name, prompt in prompts.items()}
    recorder = _Recorder(device)
    with recorder.stage("transformers' logits") as findings:
        expected = _peer_logits(directory, cases, dtype, device)
        findings.note(f"{', '.join(cases)}: {sum(map(len, expected.values()))} tokens")
    with recorder.stage("load") as findings:
        model = load(directory, dtype, device)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        findings.note(f"{parameters / 1e6:,.1f} M parameters, {str(dtype).removeprefix('torch.')}")
    with recorder.stage("parity") as findings:
        for name, case in cases.items():
            _compare(findings, name, _logits(model, [case]), expected[name], dtype)
        together = torch.cat(list(expected.values()))
        _compare(findings, "packed", _logits(model, list(cases.values())), together, dtype)
    with recorder.stage("training step") as findings:
        answer = Message("assistant", (Text("Total 42.50"),))
        row = processor.encode(Conversation((*prompts["one picture"].messages, answer)))
        _train_one_step(findings, model, row)
    with recorder.stage("answer") as findings:
        tokens = _answer(model, processor, cases["one picture"], say)
        findings.note(f"{tokens} tokens")
    return recorder.stages


def _drawing(text: str, size: tuple[int, int]) -> Picture:
    """Black text on white, as a PNG file is read."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.text((size[0] // 2, size[1] // 2), text, "black", ImageFont.load_default(size[1] // 4), anchor="mm")
    file = io.BytesIO()
    image.save(file, "PNG")
    return open_picture(file.getvalue())


def _prompt(*parts: Text | Picture) -> Conversation:
    return Conversation((Message("user", parts),))


def _peer_logits(
    directory: Path, cases: dict[str, Encoded], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Transformers' logits of each case, (T, V) in float32 on the CPU; its model is gone afterwards."""
    from transformers import Qwen3VLForConditionalGeneration

    peer = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=dtype, local_files_only=True)
    torch.nn.Module.to(peer, device)
    logits = {}
    with torch.inference_mode():
        for name, case in cases.items():
            ids_1_T = torch.from_numpy(case.ids_T)[None].to(device)
            pictures = {}
            if len(case.grids_n_3):
                pictures["pixel_values"] = torch.from_numpy(case.patches_N_P).to(device)
                pictures["image_grid_thw"] = torch.from_numpy(case.grids_n_3).to(device)
            mask_1_T = (ids_1_T == peer.config.image_token_id).int()
            logits[name] = peer(input_ids=ids_1_T, mm_token_type_ids=mask_1_T, **pictures).logits[0].float().cpu()
    return logits


def _hidden(model: VisionLanguageModel, cases: Sequence[Encoded], adapter: Adapter | None = None) -> Tensor:
    """Last hidden states (T, D) of all cases in one packed pass."""
    device = model.device
    ids_T = torch.cat([torch.from_numpy(case.ids_T) for case in cases]).to(device)
    positions_3_T = torch.cat([torch.from_numpy(case.positions_3_T) for case in cases], dim=1).to(device)
    attention = PackedAttention([len(case.ids_T) for case in cases])
    patches_P_X = torch.cat([torch.from_numpy(case.patches_N_P) for case in cases]).to(device)
    grids = _grids(cases)
    visual = model.see(patches_P_X, grids) if grids else None
    hidden_T_D: Tensor = model(ids_T, positions_3_T, attention, visual, AdapterBatch.uniform(adapter, len(ids_T)))
    return hidden_T_D


@torch.inference_mode()
def _logits(model: VisionLanguageModel, cases: Sequence[Encoded]) -> Tensor:
    return model.logits(_hidden(model, cases)).float().cpu()


def _compare(findings: _Findings, name: str, ours_T_V: Tensor, expected_T_V: Tensor, dtype: torch.dtype) -> None:
    """Hold logits against the peer's."""
    difference = ours_T_V - expected_T_V
    greatest = difference.abs().max().item()
    if dtype == torch.float32:
        limit = FLOAT32_LIMIT * max(1.0, expected_T_V.abs().max().item() / 10)
        findings.note(f"{name}: greatest logit difference {greatest:.1e}, limit {limit:.1e}", holds=greatest <= limit)
    else:
        relative = (difference.square().mean() / expected_T_V.square().mean()).sqrt().item()
        findings.note(
            f"{name}: relative difference {relative:.3f}, limit {BFLOAT16_LIMIT}; greatest {greatest:.1e}",
            holds=relative <= BFLOAT16_LIMIT,
        )


def _train_one_step(findings: _Findings, model: VisionLanguageModel, row: Encoded) -> None:
    """One AdamW step of a fresh adapter on one row, and what it moved."""
    adapter = Adapter.new(model.config, AdapterConfig(), seed=0, device=model.device)
    tensors = dict(adapter.tensors())
    for tensor in tensors.values():
        tensor.requires_grad_()
    base_before, adapter_before = _fingerprints(model.named_parameters()), _fingerprints(tensors.items())
    optimiser = torch.optim.AdamW(tensors.values(), lr=_LEARNING_RATE, weight_decay=0)
    supervised_N = torch.from_numpy(row.supervised_T).nonzero().squeeze(-1).to(model.device)
    targets_N = torch.from_numpy(row.ids_T).to(model.device)[supervised_N]

    def loss() -> Tensor:
        hidden_T_D = _hidden(model, [row], adapter)
        return token_losses(model.lm_head, hidden_T_D[supervised_N - 1], targets_N).mean()

    first = loss()
    torch.autograd.backward(first)
    optimiser.step()
    with torch.no_grad():
        before, after = first.item(), loss().item()
    moved = [name for name, sum_ in _fingerprints(tensors.items()).items() if sum_ != adapter_before[name]]
    base_after = _fingerprints(model.named_parameters())
    base_moved = [name for name, sum_ in base_after.items() if sum_ != base_before[name]]
    moved_b = sum(name.endswith("lora_B.weight") for name in moved)
    pairs, base = len(adapter.pairs), len(base_before)
    findings.note(f"{len(targets_N)} of {len(row.ids_T)} tokens supervised")
    findings.note(f"loss {before:.4f} before, {after:.4f} after", holds=after < before)
    findings.note(
        f"moved {moved_b} of {pairs} B, {len(moved) - moved_b} of {pairs} A (which waits for a B), "
        f"{len(base_moved)} of {base} of the base",
        holds=moved_b == len(moved) == pairs and not base_moved,
    )


def _fingerprints(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """A sum of each tensor's bits, which a change of any single value changes."""
    views = {2: torch.int16, 4: torch.int32}
    return {
        name: int(tensor.detach().view(views[tensor.element_size()]).sum(dtype=torch.int64)) for name, tensor in tensors
    }


def _answer(model: VisionLanguageModel, processor: Processor, prompt: Encoded, say: Callable[[str], None]) -> int:
    """Stream a greedy answer; the number of its tokens."""
    patches_P_X = torch.from_numpy(prompt.patches_N_P).to(model.device)
    with torch.inference_mode():
        visual = model.see(patches_P_X, _grids([prompt]))
    answer = generate(
        model,
        torch.from_numpy(prompt.ids_T).to(model.device),
        torch.from_numpy(prompt.positions_3_T).to(model.device),
        max_tokens=_ANSWER_TOKENS,
        stop_ids={processor.special.im_end},
        visual=visual,
    )
    ids: list[int] = []
    said = ""
    for token in answer:
        ids.append(token)
        text = processor.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character's bytes are still on their way
            say(text.removeprefix(said))
            said = text
    return len(ids)


def _grids(cases: Sequence[Encoded]) -> list[Grid]:
    return [(int(t), int(h), int(w)) for case in cases for t, h, w in case.grids_n_3]
