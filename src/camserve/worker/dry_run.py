"""Explains one picture for nobody, to see whether a network can be explained at all."""

from __future__ import annotations

import numpy as np

from camserve.errors import CamserveError, Unsupported
from camserve.methods import ScoreCam
from camserve.types import Item, Task
from camserve.types.target_forms import sample_target
from camserve.worker.executor import Executor
from camserve.worker.network import Network


def dry_run(network: Network) -> None:
    """Asks one query of Score-CAM, of a grey picture of the network's own input size, which takes no gradients.

    Raises:
        Unsupported: the network cannot be explained; the text says why.
    """
    grey = np.full((*network.preprocessing.crop_px, network.preprocessing.channels), 0.5, np.float32)
    try:
        Executor(network).answer(Item(grey, (sample_target(network.info),), (Task(0, ScoreCam(), 0, 1),)))
    except CamserveError as error:
        raise Unsupported(f"the network cannot be explained: {error}") from error
