import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer_processing import Conversation, ConversationError, Message, Picture, PictureError, Text

SHA = "0123456789abcdef" * 4
PICTURE = Picture(SHA, 4, 3)
USER = Message("user", (Text("?"),))
ASSISTANT = Message("assistant", (Text("!"),))
SYSTEM = Message("system", (Text("."),))


@pytest.mark.parametrize("sha256", ["", SHA[:-1], SHA.upper(), SHA + "0", SHA[:-1] + "g"])
def test_a_picture_is_named_by_a_sha256(sha256: str) -> None:
    with pytest.raises(PictureError, match="64 lower-case hexadecimal digits"):
        Picture(sha256, 4, 3)


@pytest.mark.parametrize(("width", "height"), [(0, 3), (4, 0), (-1, 3)])
def test_a_picture_has_pixels(width: int, height: int) -> None:
    with pytest.raises(PictureError, match=f"got {width}x{height}"):
        Picture(SHA, width, height)


@pytest.mark.parametrize(
    "rgb", [np.zeros((4, 3, 3), np.uint8), np.zeros((3, 4, 4), np.uint8), np.zeros((3, 4, 3), np.float32)]
)
def test_pixels_are_rgb_of_the_pictures_size(rgb: np.ndarray) -> None:
    with pytest.raises(PictureError, match=r"uint8 of shape \(3, 4, 3\)"):
        Picture(SHA, 4, 3, rgb)


def test_resized_pixels_have_three_axes() -> None:
    with pytest.raises(PictureError, match="must have shape"):
        Picture.resized(SHA, np.zeros((4, 3), np.uint8))


def test_the_same_bytes_with_another_size_or_form_are_another_picture() -> None:
    pixels = np.zeros((3, 4, 3), np.uint8)
    assert Picture(SHA, 4, 3, pixels) == PICTURE
    assert len({PICTURE, Picture(SHA, 4, 3, pixels), Picture(SHA, 3, 4), Picture.resized(SHA, pixels)}) == 3


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_a_lone_surrogate_is_no_text(text: str) -> None:
    with pytest.raises(ConversationError, match=r"lone surrogate '\\ud[8f]"):
        Text(text)


def test_any_other_text_is_taken_as_it_is() -> None:
    assert Text("\0 \u2028 \U0010ffff").text == "\0 \u2028 \U0010ffff"


def test_a_message_has_a_known_role() -> None:
    with pytest.raises(ConversationError, match="system, user, assistant, got 'tool'"):
        Message("tool", (Text("?"),))  # type: ignore[arg-type]


def test_a_message_has_parts() -> None:
    with pytest.raises(ConversationError, match="role user has no part"):
        Message("user", ())


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_a_user_shows_pictures(role: str) -> None:
    with pytest.raises(ConversationError, match=f"role {role}"):
        Message(role, (Text("?"), PICTURE))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "messages",
    [
        (),
        (SYSTEM,),
        (ASSISTANT,),
        (SYSTEM, ASSISTANT),
        (SYSTEM, SYSTEM, USER),
        (ASSISTANT, USER),
    ],
)
def test_a_conversation_begins_with_a_user_after_at_most_one_system_message(
    messages: tuple[Message, ...],
) -> None:
    with pytest.raises(ConversationError, match="begins with a user's message"):
        Conversation(messages)


@given(before=st.lists(st.sampled_from([USER, ASSISTANT])), first=st.sampled_from([(), (SYSTEM,)]))
def test_a_later_system_message_is_named(before: list[Message], first: tuple[Message, ...]) -> None:
    messages = (*first, USER, *before)
    with pytest.raises(ConversationError, match=rf"messages\[{len(messages)}\]: a system message stands first"):
        Conversation((*messages, SYSTEM, USER))


def test_pictures_come_in_order() -> None:
    other = Picture("1" * 64, 5, 5)
    conversation = Conversation((Message("user", (other, Text("?"), PICTURE)), ASSISTANT, Message("user", (other,))))
    assert list(conversation.pictures) == [other, PICTURE, other]
