"""Explanations without a server: for notebooks, scripts and `camserve explain --local`.

The engine runs the same executor as the worker and the same final step as the gateway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import nn

from camserve.archive import ensure_archive, model_store
from camserve.errors import CamserveError
from camserve.images import ImageLike, read_image
from camserve.methods import MethodLike, as_method
from camserve.types import (
    DEFAULT_CURVE_STEPS,
    BoxOptions,
    Explanation,
    Fusion,
    Item,
    ItemResult,
    MapSize,
    ModelInfo,
    Precision,
    Preprocessing,
    StepResult,
    Target,
    TargetLike,
)
from camserve.worker.answers import curves_item, explanation, whole_request, with_curves
from camserve.worker.executor import Executor
from camserve.worker.network import Network, load_network


class Engine:
    """Explains a classifier in this process.

    >>> engine = Engine.load("lite0")
    >>> answer = engine.explain("cat.jpg", methods=[("group_cam", {"groups": 16})], targets=["tabby"])
    >>> answer.maps[0].overlay().save("tabby.png")

    Args:
        module: (n, 3, H, W) to logits (n, classes). It is left as it was found: no hook or mode
            stays after a call.
        preprocessing: how an image becomes its input.
        labels: name of each class by index.
        layer: default layer by name; None: the last spatial feature layer.
        device: moves the module there; None: it stays where it is.
        micro_batch: masked queries per forward pass; None: a default for the device.

    Raises:
        InvalidOption: labels or layer that do not fit the module.
        Unsupported: a module without spatial layer.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        preprocessing: Preprocessing,
        labels: Sequence[str] = (),
        layer: str | None = None,
        device: str | torch.device | None = None,
        micro_batch: int | None = None,
    ) -> None:
        network = Network(
            module, preprocessing=preprocessing, labels=labels, layer=layer, device=device, micro_batch=micro_batch
        )
        self._executor = Executor(network)

    @classmethod
    def load(
        cls,
        name: str,
        store: str | Path | None = None,
        device: str | torch.device | None = None,
        micro_batch: int | None = None,
    ) -> Self:
        """A model of the model store, built first if the store's `models.toml` lists it and it is missing.

        Args:
            name: of the model, `lite0` for instance.
            store: directory; None: `CAMSERVE_MODEL_STORE`, else `./model_store`.
            device: None: CUDA where there is one, else the CPU.
            micro_batch: as for the class.

        Raises:
            NotFound: no such model.
        """
        path = ensure_archive(name, model_store(store))
        engine = cls.__new__(cls)
        engine._executor = Executor(load_network(path, device=device, micro_batch=micro_batch))
        return engine

    @property
    def network(self) -> Network:
        """The network, for passes of one's own; `camserve.evaluation` asks its masked queries there."""
        return self._executor.network

    @property
    def info(self) -> ModelInfo:
        """Labels, input size and layers."""
        return self._executor.network.info

    def explain(
        self,
        image: ImageLike,
        methods: Sequence[MethodLike] = ("grad_cam",),
        targets: Sequence[TargetLike] = (),
        *,
        layer: str | Sequence[str] = "",
        fusion: Fusion = "mean",
        precision: Precision = "exact",
        size: MapSize = "input",
        boxes: BoxOptions | None = None,
        top_predictions: int = 5,
        evaluate: bool = False,
        evaluation_steps: int = DEFAULT_CURVE_STEPS,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Explanation:
        """Predictions, and one map for each method and target; all share one forward pass.

        Args:
            image: a path, a file's bytes, a PIL image, or uint8 (H, W, 3). A uint8 array of the network's own input
                size is taken as it is; everything else is resized and cropped.
            methods: names, (name, parameters) or method specs.
            targets: class indices, labels or Targets; empty means the most probable class.
            layer: name of the layer; empty means the default layer. Of several, each has its pass, and their maps are
                fused.
            fusion: "mean" or "max" of several layers' maps.
            precision: "exact" is float32 (or the module's own dtype) throughout; "bfloat16" only for masked queries.
            size: of the maps: "input", "layer" or "original".
            boxes: adds bounding boxes to the maps.
            top_predictions: how many of the most probable classes to list.
            evaluate: adds deletion and insertion (RISE protocol) of every map, as further masked queries.
            evaluation_steps: of each curve.
            on_progress: called with masked queries (done, total), without those of the curves.

        Raises:
            InvalidInput: a bad image or option; the text says what was allowed and what came.
            Unsupported: a method that this network cannot serve.
        """
        whole = whole_request(
            self.info,
            read_image(image),
            [as_method(method) for method in methods],
            [Target.of(target) for target in targets],
            layer=layer,
            fusion=fusion,
            precision=precision,
            top_predictions=top_predictions,
            size=size,
            boxes=boxes,
            evaluate=evaluate,
            evaluation_steps=evaluation_steps,
        )
        step, result = self._answer(whole.item, on_progress)
        answer = explanation(whole, result, step.stage_seconds, step.worker)
        curves = curves_item(whole, result)
        return answer if curves is None else with_curves(answer, *self._answer(curves))

    def _answer(
        self, item: Item, on_progress: Callable[[int, int], None] | None = None
    ) -> tuple[StepResult, ItemResult]:
        step = self._executor.execute([item], on_progress)
        (outcome,) = step.outcomes
        if isinstance(outcome, CamserveError):
            raise outcome
        return step, outcome
