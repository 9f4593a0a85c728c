"""Where a prompt is read: what takes long leaves the event loop to other calls."""

import threading
from typing import Any

import pytest

from veneer_base.unfold import base_directory
from veneer_inference.api.prompts import Prompts
from veneer_inference.domain.question import MessageDraft, PromptDraft
from veneer_processing import Processor


@pytest.mark.parametrize(("characters", "in_thread"), [(512, False), (513, True)])
async def test_a_long_text_is_read_in_a_thread(
    characters: int, in_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = Processor.load(base_directory(), "")
    readers: list[threading.Thread] = []
    encode = processor.encode_prompt

    def watched(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        readers.append(threading.current_thread())
        return encode(*arguments, **named)

    monkeypatch.setattr(processor, "encode_prompt", watched)
    prompts = Prompts(None, 1, 1)  # type: ignore[arg-type]  # no picture is named
    half = characters // 2
    draft = PromptDraft(
        (MessageDraft("system", ("a" * half,)), MessageDraft("user", ("b" * (characters - half - 1), "c")))
    )
    try:
        read = await prompts.read(draft, processor, "", 4096)
    finally:
        prompts.close()
    assert read.counts.prompt > 0
    assert [reader is not threading.current_thread() for reader in readers] == [in_thread]
