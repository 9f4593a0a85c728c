"""What this package raises.

    ProcessingError
    ├── ConversationError      a conversation the model cannot be given; names message, part, limit and value
    ├── PictureError           a picture that is refused; names limit and value
    │   └── PictureTooLargeError   a resource limit is exceeded (a bomb, an animation, a huge text chunk)
    ├── ModelDirectoryError    a file of the model's directory is missing or unusable; names file and key
    │   └── TemplateError      its chat template cannot be used; says which property fails
    └── ContractMismatchError  a contract does not fit the directory; lists every difference

Messages carry no path of the machine and stay under 512 bytes, differences of a contract excepted.
"""


class ProcessingError(ValueError):
    """Base of all."""


class ConversationError(ProcessingError):
    """A conversation that the model cannot be given."""


class PictureError(ProcessingError):
    """A picture that is refused."""


class PictureTooLargeError(PictureError):
    """A picture that exceeds a limit on resources."""


class ModelDirectoryError(ProcessingError):
    """A model directory without what processing needs."""


class TemplateError(ModelDirectoryError):
    """A chat template that cannot be used."""


class ContractMismatchError(ProcessingError):
    """A processing contract that does not fit a model directory.

    Attributes:
        differences: one sentence for each field that differs.
    """

    def __init__(self, differences: tuple[str, ...]) -> None:
        super().__init__("the processing contract does not fit this model: " + "; ".join(differences))
        self.differences = differences
