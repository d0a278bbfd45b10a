"""What a step explains where the passes at its layers round otherwise, so that another class comes first."""

import dataclasses

import numpy as np
import pytest
from tiny import pixels, tiny_network

from camserve.methods import GradCam, LayerCam, ScoreCam
from camserve.types import Item, Target, Task
from camserve.worker.executor import MEMORY_BYTES, Executor

LAYERS = ("2", "4")


class Rounding:
    """Passes whose two largest outputs change places at one layer, as those of equal classes may by rounding."""

    def __init__(self, network, layer: str) -> None:
        self._capture, self._layer = network.capture, layer
        network.capture = self

    def __call__(self, x, layer, gradients=False):
        found = self._capture(x, layer, gradients)
        if layer != self._layer:
            return found
        logits = found.logits.clone()
        first, second = logits[0].topk(2).indices.tolist()
        logits[:, [first, second]] = logits[:, [second, first]]
        return dataclasses.replace(found, logits=logits)


@pytest.mark.parametrize("memory", [0, MEMORY_BYTES])
@pytest.mark.parametrize("method", [GradCam(), LayerCam(), ScoreCam()])
def test_all_layers_of_a_request_explain_the_class_that_it_tells(method, memory):
    network = tiny_network()
    tasks = tuple(Task(at, method, 0, 12, layer) for at, layer in enumerate(LAYERS))
    _, plain = Executor(network).answer(Item(pixels(1), (Target(top_k=1),), tasks))
    (named,) = (one.target for one in plain.targets)
    Rounding(network, LAYERS[1])
    executor = Executor(network, memory)
    for _ in range(2):  # the second time from the memory, where there is one
        _, found = executor.answer(Item(pixels(1), (Target(top_k=1),), tasks))
        assert [one.target for one in found.targets] == [named]
        for mine, other in zip(found.partials, plain.partials, strict=True):
            np.testing.assert_allclose(mine.sums, other.sums, rtol=1e-5, atol=1e-6)
