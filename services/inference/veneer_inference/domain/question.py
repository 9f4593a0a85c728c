"""A request for an answer, checked: who is asked what, and how the answer is drawn."""

from dataclasses import dataclass

from veneer_processing import Role
from veneer_rpc.names import AdapterAliasName, AdapterName, AdapterVersionName, ModelName

Asked = ModelName | AdapterName | AdapterAliasName | AdapterVersionName


@dataclass(frozen=True, slots=True)
class PictureRef:
    """A picture as it was sent: its file's bytes, or a digest.

    Attributes:
        place: the field it came in, for errors.
        data: the file; empty where `blob` names it.
        blob: SHA-256 of a blob of the caller's tenant; empty where `data` is the file.
    """

    place: str
    data: bytes = b""
    blob: str = ""


@dataclass(frozen=True, slots=True)
class MessageDraft:
    """A message whose pictures are not opened yet."""

    role: Role
    parts: tuple[str | PictureRef, ...]
    supervised: bool = True


@dataclass(frozen=True, slots=True)
class PromptDraft:
    """A conversation whose pictures are not opened yet; `max_pixels` is 0 for the default."""

    messages: tuple[MessageDraft, ...]
    max_pixels: int = 0


@dataclass(frozen=True, slots=True)
class Draw:
    """How an answer is drawn, as it was asked for; see SamplingParams.

    Attributes:
        max_tokens: None for the default, which gives way to the context.
        stops: texts before which the answer ends.
        logprobs: likeliest tokens beside each; None for no log-probabilities.
    """

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
    stops: tuple[str, ...]
    logprobs: int | None
    json_schema: str


@dataclass(frozen=True, slots=True)
class Question:
    """Who is asked what; `routing_key` is empty for a drawn side of a traffic split."""

    asked: Asked
    prompt: PromptDraft
    routing_key: str = ""
