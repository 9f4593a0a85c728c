"""Frames between parent and child, and folders on their way."""

import asyncio
import hashlib
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from veneer_trainer.worker import folders
from veneer_trainer.worker.loop.link import JobLink
from veneer_trainer.worker.messages import (
    Delegation,
    Failed,
    Progressed,
    Stop,
    Stopped,
    Told,
    Trained,
    frame,
    read_from_child,
    read_from_parent,
)


def test_messages_to_the_child() -> None:
    ours, theirs = socket.socketpair()
    long = Delegation("d" * 300_000)  # more than the socket takes at once
    sender = threading.Thread(target=ours.sendall, args=(frame(Stop("here")) + frame(long),))
    sender.start()
    assert read_from_parent(theirs) == Stop("here")
    assert read_from_parent(theirs) == long
    sender.join()
    ours.sendall(frame(Stop("here"))[:6])
    ours.close()
    assert read_from_parent(theirs) is None  # cut off within a message
    theirs.close()


async def test_messages_from_the_child() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    sent = [Failed("ROW_UNUSABLE", "行 3", transient=False), Told("here", Trained("there", "ab" * 32, b"\x00\xff"))]
    theirs.sendall(b"".join(map(frame, sent)))
    assert [await read_from_child(reader), await read_from_child(reader)] == sent
    theirs.sendall(frame(sent[0])[:-1])
    theirs.close()
    assert await read_from_child(reader) is None
    writer.close()
    await writer.wait_closed()


def test_a_rank_that_does_not_lead_says_only_why_it_cannot_go_on() -> None:
    messages = [Progressed(b""), Stopped(), Failed("ROW_UNUSABLE", "row 3", transient=False)]
    for leads, told in ((True, messages), (False, messages[2:])):
        sent: list[Any] = []
        link: Any = SimpleNamespace(leads=leads, send=sent.append)
        task: Any = SimpleNamespace(folder="here")
        for message in messages:
            JobLink(link, task).send(message)
        assert sent == [Told("here", message) for message in told]


def test_a_folder_arrives_as_it_was(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    target.mkdir()
    (source / "large").write_bytes(bytes(range(256)) * 10_000)
    (source / "deep" / "empty").write_bytes(b"")
    files = folders.described(source)
    assert [(file.path, file.size_bytes) for file in files] == [("deep/empty", 0), ("large", 2_560_000)]
    assert files[0].digest == hashlib.sha256(b"").hexdigest()
    for piece in folders.pieces(source, files):
        assert len(piece.data) <= 1 << 20
        folders.append(target, piece.path, piece.data)
    folders.check(target, files)
    with (target / "large").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="large is not what was announced"):
        folders.check(target, files)
    with pytest.raises(ValueError, match="leads out"):
        folders.append(target, "../escaped", b"")
