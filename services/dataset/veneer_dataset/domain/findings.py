"""Findings: what is known to be wrong or odd about submitted data, and where.

Owns the table of codes. A finding itself holds only what differs from one to the next; severity, what was
expected and how to mend it follow from its code. `docs/findings.md` shows the same table to users.
"""

from dataclasses import dataclass
from enum import IntEnum

MAX_FOUND_CHARS = 200


class Severity(IntEnum):
    """How bad a finding is."""

    INFO = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class Kind:
    """What all findings with one code have in common."""

    severity: Severity
    expected: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding; `line` is 0 and `json_path` empty where it is about a whole file.

    `path` is a file as the client named it; `found` is at most MAX_FOUND_CHARS long.
    """

    code: str
    path: str
    line: int
    json_path: str
    found: str

    @property
    def kind(self) -> Kind:
        """What its code says."""
        return KINDS[self.code]


class Refusal(Exception):  # the word of the contract
    """A row that cannot be accepted: the finding that it becomes, but for file and line."""

    def __init__(self, code: str, json_path: str, found: object) -> None:
        super().__init__(code)
        self.code = code
        self.json_path = json_path
        self.found = shown(found)

    @property
    def expected(self) -> str:
        """What its code expects."""
        return KINDS[self.code].expected


def shown(value: object) -> str:
    """A value as a finding quotes it: one line of at most MAX_FOUND_CHARS characters."""
    if isinstance(value, dict | list):
        text = f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    else:
        text = value if isinstance(value, str) else str(value)
    text = "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in text[: MAX_FOUND_CHARS + 1])
    return text if len(text) <= MAX_FOUND_CHARS else text[: MAX_FOUND_CHARS - 1] + "…"


_E, _W, _I = Severity.ERROR, Severity.WARNING, Severity.INFO

KINDS: dict[str, Kind] = {
    # The line
    "ENCODING_NOT_UTF8": Kind(_E, "UTF-8", "Save the file as UTF-8 without a byte order mark."),
    "BYTE_ORDER_MARK": Kind(_E, "no byte order mark", "Save the file as UTF-8 without a byte order mark."),
    "JSON_INVALID": Kind(_E, "one JSON object a line", "Write the row with a JSON library."),
    "JSON_NOT_OBJECT": Kind(_E, "a JSON object", 'Put the row into an object such as {"image": …, "text": …}.'),
    "JSON_TOO_DEEP": Kind(_E, "lists and objects nested at most 64 deep", "Flatten the row."),
    "JSON_KEY_TWICE": Kind(_E, "each key once in an object", "Keep one of the two values."),
    "JSON_NUMBER": Kind(_E, "finite numbers of the size of a double", "Write the number as a text, or leave it out."),
    "ROW_TOO_LARGE": Kind(_E, "at most 2 MiB of text in a row", "Split the row."),
    # The form
    "DIALECT_UNKNOWN": Kind(
        _E, "a pair (image, text), messages, or conversations", "Use one of the forms in docs/datasets.md."
    ),
    "FIELD_TYPE": Kind(_E, "a value of the field's type", "Put a value of the right type there."),
    "FIELD_MISSING": Kind(_E, "the field, not empty", "Add it, or leave the message out."),
    "ROLE_UNKNOWN": Kind(_E, "system, user or assistant", "Name the speaker by one of the known roles."),
    "ROLE_ORDER": Kind(
        _E, "one system message or none, then a user's, the last one an assistant's", "Put the messages in order."
    ),
    "ANSWER_MISSING": Kind(_E, "an answer to learn", "Give the answer's text, or leave the row out."),
    "PART_UNKNOWN": Kind(_E, "parts of type text or image_url", "Leave the part out."),
    "PARTS_TOO_MANY": Kind(_E, "at most 256 texts and pictures in a message", "Split the message."),
    "SPLIT_INVALID": Kind(_E, "1–32 characters of a–z, 0–9, - and _", "Name the split so, such as train."),
    "TEXT_TOO_LARGE": Kind(_E, "at most 1 MiB in one text", "Shorten the text."),
    "TEXT_LONE_SURROGATE": Kind(_E, "whole characters", "Replace the half of a surrogate pair."),
    "TEXT_NUL": Kind(_E, "no U+0000", "Remove the character."),
    "TEXT_CONTROL_TOKEN": Kind(
        _E, "no control token of the model", "Write the token another way: it would be read as a command."
    ),
    # The pictures
    "PICTURE_TAGS": Kind(_E, "as many <image> tags as pictures", "Add or remove tags or pictures."),
    "PICTURE_PLACE": Kind(_E, "pictures in a user's message only", "Move the picture into the question."),
    "PICTURE_PATH": Kind(_E, "a relative path with / between its parts, inside the data's root", "Mend the path."),
    "PICTURE_URL": Kind(_E, "a path or a data URL", "Download the picture and name the file."),
    "PICTURE_DATA_URL": Kind(_E, "data:image/…;base64,… with valid base64", "Encode the picture's file as base64."),
    "PICTURE_MISSING": Kind(_E, "a file of the picture manifest", "Add the picture, or mend the path."),
    "PICTURE_AMBIGUOUS": Kind(_E, "one file that fits the path", "Write the file's whole path."),
    "PICTURE_NOT_UPLOADED": Kind(_E, "a blob that you have uploaded", "Upload the picture, then try again."),
    "PICTURE_BROKEN": Kind(_E, "a whole JPEG, PNG or WebP file", "Replace the picture."),
    "PICTURE_OVER_LIMIT": Kind(
        _E, "one frame, at most 50 million pixels and 64 MiB", "Make the picture smaller, or keep one frame of it."
    ),
    "PICTURE_DECODER_DIED": Kind(
        _E, "a picture that can be decoded within bounded memory and time", "Save the picture anew, or leave it out."
    ),
    "PICTURE_TOO_THIN": Kind(_E, "at most 200 times as long as wide", "Cut the picture."),
    # The length
    "ROW_OVER_CONTEXT": Kind(_E, "no more tokens than the model's context", "Shorten the row, or lower max_pixels."),
    "ROW_NEAR_CONTEXT": Kind(_W, "less than 90 % of the model's context", "See that nothing is cut by a job's limit."),
    # The file
    "FILE_EMPTY": Kind(_E, "at least one row", "Leave the file out, or send the right one."),
    "DIALECT_MIXED": Kind(_W, "one dialect in a file", "See that the rows are of one kind."),
    "FIELD_UNREAD": Kind(_I, "fields that are read", "Nothing, unless it should have had an effect."),
    # What was probably not meant
    "PATH_CASE": Kind(_W, "the path as the file is named", "Write the path with the file's own letters."),
    "PATH_SEARCHED": Kind(_W, "the whole path, relative to the data's root", "Write the path with its folder."),
    "INSTRUCTION_IN_TEXT": Kind(_W, "the answer alone", "Move the part before the colon into prompt."),
    "ANSWER_BLANK": Kind(_W, "an answer with something in it", "Give the answer, or leave the row out."),
    "ANSWER_VERY_LONG": Kind(_W, "answers of at most 8,000 characters", "See that it is one answer."),
    "ANSWERS_CONSTANT": Kind(_W, "answers that differ", "See that answers were not overwritten."),
    "ANSWERS_IMBALANCED": Kind(_W, "classes of similar size", "Add rows of the rare answers."),
    "LANGUAGES_MIXED": Kind(_I, "answers in one script", "Nothing, if both are meant."),
    "ROW_TWICE": Kind(_W, "each row once", "Leave one of the two out."),
    "PICTURE_TWICE": Kind(_W, "one file for one picture", "Leave one of the two files out."),
    "PICTURE_NEARLY_TWICE": Kind(
        _W,
        "pictures that differ (looked at where both edges have 128 pixels and more)",
        "See that it is not the named picture, saved twice.",
    ),
    "PICTURE_IN_TWO_SPLITS": Kind(
        _W, "a picture in one split only", "Move its rows into one split: a test on trained pictures says little."
    ),
    "PICTURE_TINY": Kind(_W, "edges of at least 28 pixels", "See that it is not a thumbnail."),
    "PICTURE_EXTREME": Kind(_W, "at most 20 times as long as wide", "Cut the picture."),
    "PICTURE_UNUSED": Kind(_W, "files that a row names", "Leave the file out, or add a row."),
    "SPLIT_STRATIFIED": Kind(_I, "splits that stay as they are", "Nothing; more rows may move others."),
}
"""All codes, in the order of the document."""
