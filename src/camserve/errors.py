"""Defines every failure that camserve reports, as a tree that says whose fault it is.

No class here knows gRPC or HTTP; `camserve.gateway.api.status` has the one table of status codes. A message says what
was allowed and what came, and is safe to show to a client.
"""


class CamserveError(Exception):
    """Something that camserve reports failed; this is the root of the tree.

    Attributes:
        request_id: id under which the server's log has the failed call; "" outside of clients.
    """

    request_id = ""


class InvalidInput(CamserveError):
    """The caller sent something that can never work."""


class InvalidImage(InvalidInput):
    """The image is not an image, is truncated, or is larger than allowed."""


class InvalidOption(InvalidInput):
    """A parameter, target, layer or output option is unknown or out of range."""


class NotFound(CamserveError):
    """The named thing does not exist, a model for instance."""


class Unsupported(CamserveError):
    """The request is sound, but this model cannot serve it: CAM without a pooling head, for instance."""


class Unauthenticated(CamserveError):
    """The caller did not say who it is, or is not known: a bearer token is missing or wrong."""


class Overloaded(CamserveError):
    """More work is waiting than the server, or the caller's token, takes on; try again later.

    Attributes:
        retry_after_s: seconds after which there may be room; None: unknown.
        reason: the bound that was reached, as one word; "": unknown, as on the client's side.
    """

    def __init__(self, message: str = "", retry_after_s: float | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class DeadlineExceeded(CamserveError):
    """The caller's deadline passed before the answer was complete."""


class Cancelled(CamserveError):
    """The caller withdrew the request."""


class Unavailable(CamserveError):
    """No worker could answer; the same request may succeed later."""


class ModelChanged(Unavailable):
    """The model was replaced by another version while the request ran; sums of two models are never merged."""


class WorkerLost(Unavailable):
    """A worker died or fell silent over a step, which a request in it may have caused; this stays in the gateway."""


class ImageMissing(Unavailable):
    """A worker does not have the image of a digest, so it must be sent; this stays between gateway and workers."""


class Internal(CamserveError):
    """Something failed through camserve's own fault; the message is a fixed sentence, the traceback is in the log."""


def _subclasses(cls: type[CamserveError]) -> dict[str, type[CamserveError]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _subclasses(child)
    return found


KINDS: dict[str, type[CamserveError]] = _subclasses(CamserveError)
"""Every class of the tree by its name, which is how an error travels between worker and gateway."""

INTERNAL_MESSAGE = "internal error; the server's log has the details"
"""The message that a client gets of a fault that has no type."""
