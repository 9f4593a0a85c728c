"""Why a job cannot go on, as the trainer is told."""


class Refused(Exception):
    """A job cannot go on.

    Args:
        reason: UPPER_SNAKE, stable.
        message: for people: place, limit and actual value.
        transient: True where trying again may help without a change.
    """

    def __init__(self, reason: str, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.transient = transient
