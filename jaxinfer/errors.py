"""What is raised to whoever asked for something that cannot be done; the doors turn it into their own kind of answer."""

from __future__ import annotations


class RequestError(ValueError):
    """A request that cannot be honoured. `param` names the field, the message says what, why and what to do."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
