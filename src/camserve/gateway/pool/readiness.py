"""Looks at one model at one backend: counts its workers there, and finds out whether they answer.

Workers that are READY are asked a *canary*, a step that is as small as can be, when they come and after each lost step.
After a lost step they are also asked the *control*: the same work as was lost, on an image of our own. The canary says
whether the backend may get work, the control whether the lost step may have been to blame (see
`camserve.planning.blame`).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from camserve.errors import INTERNAL_MESSAGE, CamserveError, Internal, ModelChanged, Unavailable
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.check_answer import check_answer
from camserve.gateway.pool.replacements import Replacements
from camserve.gateway.pool.torchserve import Backend, Workers
from camserve.images import digest
from camserve.planning import Blame
from camserve.types import Item, ModelInfo, StepResult, Task
from camserve.types.offered import sample_method
from camserve.types.target_forms import sample_target

_log = logging.getLogger(__name__)


def canary(model: ModelInfo) -> Item:
    """Returns an item that asks one query of Score-CAM, or of RISE where there is no layer, of the control's pattern
    upside down.

    It takes no gradients, which a network's forward may cut: its other methods work all the same. The pattern is not
    plain, because some networks divide by an image's own deviation.
    """
    image = np.ascontiguousarray(pattern(model.input_size, model.channels)[::-1])
    tasks = (Task(0, sample_method(model), 0, 1),)
    return Item(
        image=image,
        digest=digest(image),
        targets=(sample_target(model),),
        tasks=tasks,
        text=model.sample_text,
        top_predictions=1,
    )


def pattern(size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """Returns the image of the control: (height, width, channels), of many colours."""
    rows, columns = np.indices(size)
    waves = (rows * 7 + columns, columns * 5, rows * 3 + columns * 11)
    return _sendable(np.stack([waves[channel % 3] for channel in range(channels)], axis=-1).astype(np.uint8))


def _sendable(pixels: np.ndarray) -> np.ndarray:
    """Returns pixels of 0..255 as a network of their channels takes them: of other than 1 and 3 channels in [0, 1]."""
    return pixels if pixels.shape[2] in (1, 3) else pixels.astype(np.float32) / np.float32(255)


def control(model: ModelInfo, items: Sequence[Item]) -> list[Item]:
    """Returns items that ask the same work as others, but of the same pattern, of the network's own input size."""
    image = pattern(model.input_size, model.channels)
    name = digest(image)
    return [replace(item, image=image, digest=name, expires_s=math.inf) for item in items]


def device_of(worker: str) -> str:
    """Returns "cuda" for "host/process/cuda:0"; "cpu" where the name does not say."""
    return worker.rpartition("/")[2].partition(":")[0] if "/" in worker else "cpu"


class Readiness:
    """Keeps the state of one model at one backend.

    Args:
        model: name of the model.
        name: name of the backend.
        backend: connection to it.
        settings: bounds of a step, and how many unanswered looks count.
        blame: what speaks for and against the backends of the model.
    """

    def __init__(self, model: str, name: str, backend: Backend, settings: Settings, blame: Blame) -> None:
        self.workers: int | None = None
        """Number of workers that are READY; None when nobody can tell."""
        self.wanted = 0
        """Number of workers that there should be, by the last look that could tell."""
        self.replaced = 0
        """Number of workers by which the last look found others replaced."""
        self._replacements = Replacements()
        self.ready = False
        self.failure = ""
        """Why workers that are READY get no work; empty while they get some, or have not been asked anything yet."""
        self.in_doubt = False
        """Whether the workers must answer again before they get more work."""
        self.lost: Sequence[Item] = ()
        """Items of the step that was lost last, as long as no control was asked for them."""
        self.device = "cpu"
        """The device of the worker that answered the canary."""
        self.wake = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._model = model
        self._name = name
        self._backend = backend
        self._settings = settings
        self._blame = blame
        self._unanswered = 0  # looks in a row
        self._answers = 0  # steps that the backend had answered at the last look

    def cancel(self) -> None:
        """Stops watching."""
        if self.task is not None:
            self.task.cancel()

    def next_look_s(self, now_s: float) -> float:
        """Returns in how many seconds somebody should look again."""
        until_s = self._blame.pause_until_s(self._name)
        left_s = math.inf if until_s is None or until_s <= now_s else until_s - now_s
        return min(self._settings.poll_s, left_s)

    async def look(self, check: Callable[[ModelInfo], None]) -> None:
        """Counts the workers, and greets them once they are back, or in doubt.

        Args:
            check: function that raises a CamserveError where the model that a worker describes cannot be used.
        """
        seen = await self._seen()
        if seen is not None:
            self._unanswered = 0
        elif self._may_be_alive():
            return
        self.workers = None if seen is None else len(seen.ready)
        self.wanted = self.wanted if seen is None else seen.wanted
        self.replaced = 0 if seen is None else self._replacements.found(seen.ready)
        if not self.workers:
            self.ready = False
        elif self._is_paused():
            self.ready = False
            self._fails("it has lost its last steps")
        elif self.in_doubt or not self.ready:
            self.in_doubt = False  # before the greeting: a doubt that comes up while it waits must stay
            self.ready = await self._greeted(check)

    async def _seen(self) -> Workers | None:
        """Returns the workers of the model; None when nobody can tell."""
        try:
            return await self._backend.look(self._model)
        except Unavailable as error:
            _log.debug("model %s: %s", self._model, error)
        except Exception:
            _log.exception("looking at the workers of model %s", self._model)
        return None

    def _may_be_alive(self) -> bool:
        """Counts an unanswered look; returns whether everything stays as it is.

        One unanswered look is no verdict, and a backend that answers steps meanwhile is alive. One that has just lost a
        step is taken at its word.
        """
        answers = self._blame.answers(self._name)
        self._unanswered = 1 if answers > self._answers else self._unanswered + 1
        self._answers = answers
        return self.ready and not self.in_doubt and self._unanswered < self._settings.backend_losses

    def _is_paused(self) -> bool:
        until_s = self._blame.pause_until_s(self._name)
        return until_s is not None and asyncio.get_running_loop().time() < until_s

    async def _greeted(self, check: Callable[[ModelInfo], None]) -> bool:
        """Returns whether the workers describe a model that can be used, and answer a canary; asks a control, too."""
        try:
            info = await self._backend.describe(self._model, self._settings.step_timeout_s)
            result = await self._asked(info, [canary(info)])
            if isinstance(result.outcomes[0], CamserveError):
                raise result.outcomes[0]
            if not result.is_of(info):
                raise ModelChanged("one worker describes another model than the one that answers")
            check(info)
        except CamserveError as error:
            self._fails(str(error))
            return False
        except Exception:
            self._fails(INTERNAL_MESSAGE, trace=True)
            return False
        self.device = device_of(result.worker)
        self.failure = ""
        await self._control(info)
        return self._blame.greeted(self._name, asyncio.get_running_loop().time())

    async def _control(self, info: ModelInfo) -> None:
        """Finds out whether the workers answer the work of the step that was lost last, and notes it as evidence."""
        lost, self.lost = self.lost, ()
        if not lost:
            return
        try:
            result = await self._asked(info, control(info, lost))
            answered = not all(isinstance(outcome, Unavailable | Internal) for outcome in result.outcomes)
        except CamserveError as error:
            _log.warning("model %s at %s does not answer a step like the lost one: %s", self._model, self._name, error)
            answered = False
        except Exception:
            _log.exception("a control of model %s at %s", self._model, self._name)
            answered = False
        self._blame.controlled(self._name, answered)

    async def _asked(self, info: ModelInfo, items: Sequence[Item]) -> StepResult:
        """Returns the answer to a step that is nobody's."""
        result = await self._backend.step(self._model, items, self._settings.step_timeout_s)
        check_answer(info, items, result)
        return result

    def _fails(self, reason: str, trace: bool = False) -> None:
        """Notes why the workers get no work; logs it once, and not with every look."""
        if reason != self.failure:
            self.failure = reason
            _log.warning("model %s at %s gets no work: %s", self._model, self._name, reason, exc_info=trace)
