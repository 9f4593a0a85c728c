"""From the domain's values to the contract's messages."""

from collections.abc import Iterable, Sequence

from google.protobuf.duration_pb2 import Duration

from veneer.inference.v1 import inference_pb2
from veneer.trainer.v1 import model_pb2
from veneer_inference.api.answers import Piece, Pinned
from veneer_inference.base import Base
from veneer_inference.domain.token_bytes import TokenBytes
from veneer_inference.ports import TokenScore
from veneer_processing import ProcessingContract, TokenCounts
from veneer_rpc.names import AdapterVersionName

FINISH = {
    "": inference_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
}
_DTYPES = {
    "float32": model_pb2.DTYPE_FLOAT32,
    "bfloat16": model_pb2.DTYPE_BFLOAT16,
    "int8": model_pb2.DTYPE_INT8,
}


def usage(counts: TokenCounts, cached_tokens: int = 0, answer_tokens: int = 0) -> inference_pb2.Usage:
    """Tokens of a request so far."""
    return inference_pb2.Usage(
        prompt_tokens=counts.total,
        visual_tokens=counts.visual,
        cached_tokens=cached_tokens,
        answer_tokens=answer_tokens,
    )


def timings(piece: Piece) -> inference_pb2.Timings:
    """Where the time went, up to a piece."""
    return inference_pb2.Timings(
        queued=_duration(piece.queued_s),
        time_to_first_token=_duration(piece.first_token_s),
        total=_duration(piece.total_s),
    )


def served_by(pinned: Pinned, replica: str) -> inference_pb2.ServedBy:
    """Who answers."""
    info = pinned.base.engine.info
    return inference_pb2.ServedBy(
        adapter_version=str(pinned.release.version) if pinned.release else "",
        adapter_digest=pinned.adapter_digest,
        model=str(pinned.base.name),
        model_digest=info.model_digest,
        contract_digest=pinned.processor.contract.digest,
        dtype=_DTYPES[info.dtype],
        replica=replica,
    )


def logprobs(scores: Iterable[TokenScore], token_bytes: TokenBytes) -> list[inference_pb2.TokenLogprob]:
    """Tokens with their log-probabilities."""
    return [
        inference_pb2.TokenLogprob(
            token_id=score.token_id,
            token=token_bytes[score.token_id],
            logprob=score.logprob,
            top=[
                inference_pb2.TokenLogprob(token_id=token_id, token=token_bytes[token_id], logprob=logprob)
                for token_id, logprob in score.top
            ],
        )
        for score in scores
    ]


def scored_messages(
    supervised_messages: Sequence[int],
    supervised_T: Sequence[bool],
    scores: Sequence[TokenScore],
    token_bytes: TokenBytes,
) -> list[inference_pb2.ScoredMessage]:
    """The scores by message.

    Args:
        supervised_messages: indices of the messages that are scored, in order.
        supervised_T: which tokens are; each such message is one run of them, since a header stands between any two.
        scores: of those tokens, in order.
        token_bytes: bytes by token id.
    """
    lengths: list[int] = []
    before = False
    for supervised in supervised_T:
        if supervised and not before:
            lengths.append(0)
        if supervised:
            lengths[-1] += 1
        before = supervised
    messages, at = [], 0
    for index, length in zip(supervised_messages, lengths, strict=True):
        tokens = logprobs(scores[at : at + length], token_bytes)
        messages.append(inference_pb2.ScoredMessage(message_index=index, tokens=tokens))
        at += length
    return messages


def loaded_adapter(
    version: AdapterVersionName,
    digest: str,
    residence: inference_pb2.Residence.ValueType,
    active_requests: int = 0,
    size_bytes: int = 0,
    last_use_time_s: float | None = None,
    load_time_s: float | None = None,
) -> inference_pb2.LoadedAdapter:
    """A version on this replica; times in seconds since 1970."""
    message = inference_pb2.LoadedAdapter(
        adapter_version=str(version),
        digest=digest,
        residence=residence,
        active_requests=active_requests,
        size_bytes=size_bytes,
    )
    if last_use_time_s is not None:
        message.last_use_time.FromMicroseconds(round(last_use_time_s * 1e6))
    if load_time_s is not None:
        message.load_time.FromMicroseconds(round(load_time_s * 1e6))
    return message


def resident_model(base: Base, replica: str) -> inference_pb2.ResidentModel:
    """The base, with the model's own pixel bounds in its contract."""
    info = base.engine.info
    return inference_pb2.ResidentModel(
        model=str(base.name),
        digest=info.model_digest,
        dtype=_DTYPES[info.dtype],
        device=info.device,
        engine=info.engine,
        contract=_contract(base.own_contract),
        context_length=info.context_length,
        kv_capacity_tokens=info.kv_capacity_tokens,
        adapter_slots=info.adapter_slots,
        max_rank=info.max_rank,
        replica=replica,
    )


def _contract(contract: ProcessingContract) -> model_pb2.ProcessingContract:
    return model_pb2.ProcessingContract(digest=contract.digest, **contract.to_dict())  # type: ignore[arg-type]


def _duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
