"""Explains without a server: for notebooks, scripts and `camserve explain --local`.

The engine runs the same executor as the worker and the same final step as the gateway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self, Unpack

import torch
from torch import nn

from camserve.archive import ensure_archive, model_store
from camserve.archive.prompts import PromptsLike, given_prompts
from camserve.archive.references import given_references
from camserve.errors import InvalidOption
from camserve.finalise.results import Results
from camserve.images import ImageLike
from camserve.methods import MethodLike
from camserve.runtimes.choice import RuntimeName
from camserve.types import Explanation, Item, ItemResult, ModelInfo, Outputs, Preprocessing, StepResult, TargetLike
from camserve.types.model import Decoding
from camserve.types.references import References
from camserve.types.request import Options, make_request
from camserve.worker.answers import explanation
from camserve.worker.dry_run import dry_run
from camserve.worker.executor import Executor, Progress
from camserve.worker.network import Network, load_network
from camserve.worker.references import made_references
from camserve.worker.tuning import tune

_THE_IMAGE = b"the image"
"""Name of a request's only image in a memory that is that request's own: its bytes need not be hashed."""


class Engine:
    """Explains a classifier in this process.

    >>> engine = Engine.load("lite0")
    >>> answer = engine.explain("cat.jpg", methods=[("group_cam", {"groups": 16})], targets=["tabby"])
    >>> answer.maps[0].overlay().save("tabby.png")

    Args:
        module: maps (n, 3, H, W) to numbers (n, C), or to a tuple, list, dict or dataclass that holds them. It is left
            as it was found: no hook or mode stays after a call.
        preprocessing: how an image becomes its input.
        labels: name of each class by index; of each number for outputs "value".
        outputs: what the numbers are: "softmax" (logits of classes of which one is true), "sigmoid" (logits of classes
            of which several may be), "binary" (one logit of yes or no), "probabilities", "value" (any numbers) or
            "embedding" (a vector) or "text-image" (a vector beside a `text_encoder`, see `camserve.scores`); None:
            probabilities where they sum to 1, else softmax.
        output: name or index of the tensor among what the module returns; None: `logits`, else the first that fits.
        units: unit of each number of outputs "value"; one is that of all.
        detections: what those of outputs "boxes" are made of, "detr", "detr-sigmoid", "yolo" or "yolo5" (see
            `camserve.scores.decoding`); None: the module gives them as they are.
        references: what outputs "embedding" are compared to, which then are targets by name: pictures or vectors as
            `camserve archive --references` takes them, with `labels` for an `.npy` file; or `References` with names.
        prompts: texts that outputs "text-image" are compared to, which then are targets by name: a list, one or several
            for each name, or a file as `camserve archive --prompts` takes it.
        layer: default layer by name; None: the last spatial feature layer.
        device: device to move the module to; None: it stays where it is.
        micro_batch: masked queries per forward pass; None: a default for the device, or what measuring says.
        runtime: "eager": PyTorch runs the module as it is then. "auto": what measuring finds fastest on the device,
            which takes some seconds now, and answers for the weights that the module has now. "onnx": ONNX Runtime, on
            CPUs. "compiled": the same as "auto" with compiled code for bfloat16, on CPUs. "cuda_graphs": CUDA graphs,
            on GPUs.

    Raises:
        InvalidOption: labels, outputs, units, references or layer that do not fit the module; a module of one output
            whose kind is not said.
        InvalidInput, NotFound: references that cannot be read.
        Unsupported: a module that returns no numbers for each image, or that cannot be explained; the text says why. A
            layer is named, and there is none. A module that the runtime cannot run.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        preprocessing: Preprocessing,
        labels: Sequence[str] = (),
        outputs: Outputs | None = None,
        output: str | int | None = None,
        units: Sequence[str] = (),
        detections: Decoding | None = None,
        references: str | Path | References | None = None,
        prompts: PromptsLike | None = None,
        layer: str | None = None,
        device: str | torch.device | None = None,
        micro_batch: int | None = None,
        runtime: RuntimeName = "eager",
    ) -> None:
        network = Network(
            module,
            preprocessing=preprocessing,
            labels=labels if references is None and prompts is None else (),
            outputs=outputs,
            output=output,
            units=units,
            detections=detections,
            layer=layer,
            device=device,
            micro_batch=micro_batch,
        )
        if references is not None and prompts is not None:
            raise InvalidOption("vectors are compared to references or to prompts: give one of the two")
        if prompts is not None:
            references = made_references(network, given_prompts(prompts))
        if isinstance(references, (str, Path)):
            references = made_references(network, given_references(Path(references), labels))
        if references is not None:
            network = network.with_references(references)
        dry_run(network)
        tune(network, runtime, micro_batch)
        self._executor = Executor(network)

    @classmethod
    def load(
        cls,
        name: str,
        store: str | Path | None = None,
        device: str | torch.device | None = None,
        micro_batch: int | None = None,
        runtime: RuntimeName | None = None,
    ) -> Self:
        """Returns an engine with a model of the model store; a listed model that is missing is built first.

        Args:
            name: name of the model, `lite0` for instance.
            store: directory; None: `CAMSERVE_MODEL_STORE`, else `./model_store`.
            device: device of the model; None: CUDA where there is one, else the CPU.
            micro_batch: masked queries per forward pass; None: a default for the device, or what measuring says.
            runtime: "auto", "eager", "onnx", "compiled" or "cuda_graphs"; None: `CAMSERVE_RUNTIME`, else "auto", the
                fastest on this machine.

        Raises:
            NotFound: no such model.
        """
        path = ensure_archive(name, model_store(store))
        engine = cls.__new__(cls)
        engine._executor = Executor(load_network(path, device, micro_batch, runtime))
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
        on_progress: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> Explanation:
        """Returns predictions, and one map for each method and target; all share one forward pass.

        Args:
            image: a path, a file's bytes, a PIL image, or an array: uint8 (H, W, 3), grey (H, W) of uint8 or uint16,
                or float32 in [0, 1]. A uint8 or float32 array of the network's own input size is taken as it is;
                everything else is resized and cropped.
            methods: names, (name, parameters) or method specs.
            targets: class indices, labels or Targets; empty means the most probable class.
            on_progress: function called with masked queries (done, total), without those of the curves.
            options: layer, size, boxes, evaluate and more: see `camserve.types.request.Options`. Those that concern a
                server (priority, allow_partial, stream) change nothing here.

        Raises:
            InvalidInput: a bad image or option; the text says what was allowed and what came.
            Unsupported: a method that this network cannot serve.
        """
        fitted = make_request(image, methods, targets, **options).fit(self.info, named=False)
        executor = self._executor
        if fitted.goes_on:  # nothing is remembered of the call before: the caller's network may have changed
            executor, fitted = executor.remembering(), replace(fitted, digest=_THE_IMAGE)
        results = Results(fitted)
        item = results.next_item()
        assert item is not None, "the first item of a request asks something"

        def execute(item: Item) -> tuple[StepResult, ItemResult]:
            return executor.answer(item, _progress(results, item, on_progress))

        step, outcome = execute(item)
        found = explanation(results, item, step, outcome, execute)
        if not results.fitted.request.evidence:
            return found
        from camserve.evidence.record import line_of

        return replace(found, evidence=line_of(found, results.fitted))


def _progress(results: Results, item: Item, tell: Progress | None) -> Progress | None:
    """Returns what is told while an item is executed; nothing of curves.

    A request is one item, unless it may stop early: it then has several, of which all queries are counted, those of
    constant masks as well.
    """
    if tell is None or results.follow_ups:
        return None
    before, asked = results.answered, sum(task.stop - task.start for task in item.tasks)
    if asked == results.total:
        return tell
    return lambda done, total: tell(before + asked * done // total, results.total)
