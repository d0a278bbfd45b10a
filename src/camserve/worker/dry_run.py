"""Explains one picture for nobody, to see whether a network can be explained at all."""

from __future__ import annotations

import numpy as np

from camserve.errors import CamserveError, Unsupported
from camserve.types import Item, Task
from camserve.types.offered import sample_method
from camserve.types.target_forms import sample_target
from camserve.worker.executor import Executor
from camserve.worker.network import Network


def dry_run(network: Network) -> None:
    """Asks one query of a picture of the network's own input size, which takes no gradients.

    The picture is noise: a plain one has no deviation, by which some networks divide.

    Raises:
        Unsupported: the network cannot be explained; the text says why.
    """
    size = (*network.preprocessing.crop_px, network.preprocessing.channels)
    noise = np.random.default_rng(0).random(size, np.float32)
    try:
        info, task = network.info, Task(0, sample_method(network.info), 0, 1)
        Executor(network).answer(Item(noise, (sample_target(info),), (task,), info.sample_text))
    except CamserveError as error:
        raise Unsupported(f"the network cannot be explained: {error}") from error
