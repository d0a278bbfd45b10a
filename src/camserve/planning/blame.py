"""Judges who is to blame for a step that got no answer: its backend, or a request that breaks workers.

A backend loses a step when a worker dies over it, is silent for too long, or answers nonsense. That says nothing yet:
the backend may be broken, or the request be one that breaks any worker. Both are told apart by comparison.

1. The same backend, another image: after a loss the backend is asked for the same work on an image of our own, the
   *control*. Where that is answered the backend is *proven*, and the loss is explained by its request. Where it is not,
   the backend is no longer proven.
2. Another backend, the same work: a slice that was lost alone at one backend and is answered by another was not to
   blame: the loss is not explained.
3. Another request: a backend that has lost steps which have no request in common, and are not explained, is to blame
   for all of them.

So a backend is a *witness* against a request if it is proven and the request was in every step that it has lost without
an explanation. Its losses count against the request then. `Limits.losses` without an explanation in a row quarantine a
backend. Where very many requests in a row are at fault and none is answered in between, it is the backend after all.

In quarantine a backend gets no work for a pause, and after that has to answer a canary. While it has not shown that it
does better, one loss is enough to quarantine it again, and the pause is twice as long each time.

What ends a row of losses is an answer to work about as large as what was lost: a backend that breaks down over large
steps does not clear itself by small ones. Losses are forgotten in the end, so that accidents never add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from camserve.planning.limits import Limits

_AS_LARGE = 0.5
"""Part of the predicted time of a lost step from which on an answered step counts as about as large."""
_FORGOTTEN = 32
"""Number of answered steps of any size after which a loss, or a quarantine that is over, no longer counts."""
_TOO_MANY = 10
"""Number of requests at fault in a row, nothing being answered in between, from which on their backend is suspect."""
_REMEMBERED = 64
"""Number of losses that a row has at most, those that requests are to blame for included."""


@dataclass
class _Loss:
    """A step that a backend has lost."""

    requests: frozenset[int]
    size_s: float
    """Predicted time of the step."""
    explained: bool = False
    """Whether the control was answered, so that the request is to blame as far as can be seen."""
    answered: int = 0
    """Number of steps that the backend has answered since."""

    def is_outdone_by(self, size_s: float) -> bool:
        """Counts an answered step; returns whether the loss no longer counts."""
        self.answered += 1
        return size_s >= _AS_LARGE * self.size_s or self.answered >= _FORGOTTEN


@dataclass
class _Record:
    """Keeps what speaks for and against one backend."""

    proven: bool = False
    """Whether it has answered a step or a control, and nothing since has spoken against it."""
    row: list[_Loss] = field(default_factory=list)
    """Losses that no answer has outdone yet, the last one last."""
    lost_s: float = -math.inf
    """Time of the last loss that was one of its own."""
    answered: int = 0
    """Number of steps answered so far."""
    quarantines: int = 0
    """Number of quarantines in a row."""
    worst: _Loss | None = None
    """The largest loss that led to one of them; an answer that outdoes it ends their row."""
    until_s: float = -math.inf
    """End of the pause of the last quarantine."""
    excused: int = 0
    """Number of requests in a row that were to blame for losses, without an answer to any other in between."""
    away: bool = False
    """Whether it is in quarantine: the pause may be over, but no canary was answered yet."""


class Blame:
    """Keeps what speaks for and against the backends of one model.

    Args:
        limits: how many losses in a row quarantine a backend, and for how long.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._records: dict[str, _Record] = {}

    @property
    def quarantined(self) -> int:
        """Number of backends in quarantine."""
        return sum(record.away for record in self._records.values())

    def answered(self, backend: str, size_s: float) -> None:
        """Notes that a backend has answered a step that was predicted to take `size_s` seconds."""
        record = self._record(backend)
        record.answered += 1
        record.excused = 0
        record.proven = True
        record.row = [loss for loss in record.row if not loss.is_outdone_by(size_s)]
        if record.worst is not None and not record.away and record.worst.is_outdone_by(size_s):
            record.quarantines, record.worst = 0, None

    def controlled(self, backend: str, answered: bool) -> None:
        """Notes whether a backend has answered the control that follows its last loss."""
        record = self._record(backend)
        record.proven = answered
        for loss in record.row[-1:]:
            loss.explained = answered

    def contradicted(self, backend: str, request: int) -> None:
        """Notes that a slice of a request which the backend had lost alone was answered by another backend."""
        for loss in self._record(backend).row:
            if loss.requests == {request}:
                loss.requests, loss.explained = frozenset(), False  # the request was not to blame

    def lost(self, backend: str, requests: Iterable[int], size_s: float, began_s: float, now_s: float) -> bool:
        """Notes that a backend has lost a step; too many in a row put it into quarantine.

        Args:
            backend: name of the backend.
            requests: numbers of the requests in the step.
            size_s: predicted time of the step.
            began_s: time at which it was sent.
            now_s: time at which it was found to be lost.

        Returns:
            Whether the loss is one of its own. A step that was on its way when the backend lost another may only have
            waited behind that one, or have died of the same cause.
        """
        record = self._record(backend)
        if began_s <= record.lost_s:
            return False
        record.lost_s = now_s
        self._judge(record, _Loss(frozenset(requests), size_s), now_s)
        return True

    def _judge(self, record: _Record, loss: _Loss, now_s: float) -> None:
        """Adds a loss to the row of a backend, and puts the backend into quarantine where that is due."""
        record.row.append(loss)
        del record.row[:-_REMEMBERED]
        suspect = record.quarantines > 0 or record.excused >= _TOO_MANY
        allowed = 1 if suspect else self._limits.losses
        if record.away or sum(not loss.explained for loss in record.row) < allowed:
            return
        record.away, record.proven = True, False
        pause_s = self._limits.pause_s * 2.0**record.quarantines
        record.until_s = now_s + min(pause_s, self._limits.most_pause_s)
        record.quarantines += 1
        record.worst = max([*record.row, *filter(None, [record.worst])], key=lambda loss: loss.size_s)
        record.worst.answered = 0

    def is_witness(self, backend: str, request: int) -> bool:
        """Tells whether the losses of a backend count against a request that was lost there."""
        record = self._records.get(backend)
        if record is None or not record.proven:
            return False
        return all(request in loss.requests for loss in record.row if not loss.explained)

    def excuse(self, request: int) -> None:
        """Takes the losses that a request is to blame for off the records of all backends."""
        for record in self._records.values():
            others = [loss for loss in record.row if request not in loss.requests]
            record.excused += len(others) < len(record.row)
            record.row = others

    def answers(self, backend: str) -> int:
        """Returns how many steps a backend has answered so far: as long as the number grows, it is alive."""
        return self._record(backend).answered

    def pause_until_s(self, backend: str) -> float | None:
        """Returns when a backend in quarantine may be asked a canary; None where it is not in quarantine."""
        record = self._record(backend)
        return record.until_s if record.away else None

    def greeted(self, backend: str, now_s: float) -> bool:
        """Notes that a backend has answered a canary; returns whether it may get work.

        That ends a quarantine whose pause is over. The backend is on probation then.
        """
        record = self._record(backend)
        if record.away and now_s >= record.until_s:
            record.away, record.row = False, []
        return not record.away

    def remove(self, backend: str) -> None:
        """Forgets a backend."""
        self._records.pop(backend, None)

    def _record(self, backend: str) -> _Record:
        return self._records.setdefault(backend, _Record())
