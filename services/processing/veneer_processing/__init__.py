"""What turns a conversation into exactly what the model reads, in training and in serving alike.

A `Processor` is read from a model directory and follows a `ProcessingContract`; it encodes `Conversation`s,
counts their tokens and decodes ids. `open_picture` makes a `Picture` of a file. No torch here, and no model.
"""

from veneer_processing.contract import ProcessingContract
from veneer_processing.conversation import Conversation, Message, Part, Picture, Role, Text
from veneer_processing.errors import (
    ContractMismatchError,
    ConversationError,
    ModelDirectoryError,
    PictureError,
    PictureTooLargeError,
    ProcessingError,
    TemplateError,
)
from veneer_processing.pictures import MAX_PICTURE_PIXELS, decode_image, decode_rgb, open_picture
from veneer_processing.pixels import DEFAULT_MAX_PIXELS, PixelBounds
from veneer_processing.processor import Encoded, Processor, TokenCounts, read_contract
from veneer_processing.tokenizer import SpecialIds

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "MAX_PICTURE_PIXELS",
    "ContractMismatchError",
    "Conversation",
    "ConversationError",
    "Encoded",
    "Message",
    "ModelDirectoryError",
    "Part",
    "Picture",
    "PictureError",
    "PictureTooLargeError",
    "PixelBounds",
    "ProcessingContract",
    "ProcessingError",
    "Processor",
    "Role",
    "SpecialIds",
    "TemplateError",
    "Text",
    "TokenCounts",
    "decode_image",
    "decode_rgb",
    "open_picture",
    "read_contract",
]
