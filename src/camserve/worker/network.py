"""Holds a classifier with what is needed to explain it: preprocessing, labels, layers, device."""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from camserve.archive import load_package
from camserve.archive.calibration import read_calibration
from camserve.archive.package import read_files
from camserve.archive.references import read_references
from camserve.archive.surveyed import read_survey
from camserve.errors import CamserveError, InvalidOption, Unsupported
from camserve.methods.spec import Asset
from camserve.methods.work import Kind
from camserve.runtimes.choice import RuntimeName, runtime_name
from camserve.runtimes.exported_network import ExportedNetwork
from camserve.runtimes.kept import cache_folder
from camserve.runtimes.modes import Shared, exact_float32
from camserve.runtimes.onnx_network import OnnxNetwork
from camserve.runtimes.precision import why_no_bfloat16
from camserve.runtimes.runtime import Eager, Graph, Runtime, Trunked
from camserve.saliency.asked import Asked
from camserve.saliency.capture import Capture
from camserve.saliency.layers import FoundLayer, Survey, survey, survey_of_outputs
from camserve.saliency.opening import Opening, Trunk, Whole
from camserve.saliency.pass_size import PassSize
from camserve.saliency.passes import Passes
from camserve.saliency.run import dtype_of, failed, run, single
from camserve.scores import Score, TextEncoder, find_outputs, kind_of, make_score
from camserve.scores.decoding import Decoded
from camserve.scores.returned import select
from camserve.scores.score import Reading
from camserve.scores.tokens import encoded
from camserve.types import AnyTarget, ModelInfo, Outputs, Precision, Preprocessing, RuntimeInfo, TextInput
from camserve.types.model import NO_LAYER, OF_VECTORS, Decoding
from camserve.types.references import References, check_takes_references
from camserve.types.tokenisers import Tokeniser, Writer
from camserve.worker.tuning import tune

DEFAULT_MICRO_BATCH = {"cpu": 4, "cuda": 128}
"""Number of queries per forward pass by type of device. It is small on CPUs: glibc gives blocks above 32 MB back to the
system after each use, and fetching them anew costs more than a larger batch gains."""


MOST_REPRODUCIBLE = 16
"""Largest number of queries of a pass that is to give the same numbers again."""


class Network:
    """Holds one module and never changes it for good: modes and hooks are entered in a `with` and gone afterwards.

    Args:
        module: maps (n, 3, H, W) to numbers (n, C), or to something that holds them.
        preprocessing: how an image becomes its input.
        labels: name of each class by index; empty means "class 0", "class 1", ...
        outputs: kind of the numbers, see `camserve.scores`; None: found, where numbers tell.
        output: which of the tensors that the module returns: see `camserve.scores.returned.select`.
        units: unit of each number of outputs "value"; one is that of all.
        detections: what those of outputs "boxes" are made of; None: the module gives them as they are.
        name: name of the model.
        version: version of the model.
        layer: default layer; None means the one that `survey` chooses.
        source: where the weights came from.
        licence: licence of the weights.
        evaluation: overall score of methods by title, if the model was evaluated.
        weights: hash of the weights, see `weights_hash`; empty where nobody needs to tell them from others.
        device: device to move the module to; None leaves it where it is.
        micro_batch: queries per forward pass; None means `DEFAULT_MICRO_BATCH`. Where pictures of a batch change each
            other's scores, it is 1.
        found: what `survey` found out about the module before; None: it is found out now.
        lacks: why the module does not offer what methods may need, by name, beside what is found out.

    Raises:
        InvalidOption: labels, kind or units that do not fit the outputs, an unknown layer or micro-batch below 1; a
            network of one output whose kind is not said.
        Unsupported: the network cannot be run on pictures of this size, or returns no numbers for each image; a layer
            is named, and it has none.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        preprocessing: Preprocessing,
        labels: Sequence[str] = (),
        name: str = "model",
        version: str = "1.0",
        outputs: Outputs | None = None,
        output: str | int | None = None,
        units: Sequence[str] = (),
        detections: Decoding | None = None,
        layer: str | None = None,
        source: str = "",
        licence: str = "",
        evaluation: Mapping[str, float] | None = None,
        weights: str = "",
        device: str | torch.device | None = None,
        micro_batch: int | None = None,
        found: Survey | None = None,
        lacks: Mapping[Asset, str] | None = None,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise InvalidOption(f"micro_batch must be at least 1, got {micro_batch}")
        if detections is not None and outputs != "boxes":
            raise InvalidOption(f"detections are made for outputs boxes, and the outputs are {outputs or 'not said'}")
        module = original(module)
        self.text_encoder: TextEncoder | None = getattr(module, "text_encoder", None)
        """The maker of vectors of texts that stands beside the network, if one does; for outputs "text-image"."""
        self.tokeniser = _tokeniser(module, outputs)
        """Maker of tokens of a text, for a network that takes one beside the image; None where it takes none."""
        self.asked: tuple[str, tuple[tuple[int, ...], ...]] | None = None
        """Text that the network is asked with, and the tokens of its passes; None where it takes none."""
        self.given = self.module = module if device is None else module.to(device)
        """The module as it was given, which may return more than the outputs that are explained."""
        weight = next(self.module.parameters(), torch.zeros(()))
        self.device = weight.device
        self.dtype = torch.promote_types(dtype_of(self.module), torch.float32)
        """Precision of the network's input as it is kept here; `run` hands it on in the module's own."""
        self.preprocessing = preprocessing
        self.runtime: Runtime = _runtime(module, module)
        """Runs the network; `camserve.worker.tuning` may have found a faster one."""
        self.evaluating = Shared(self._evaluate)
        """Context manager: inside, eval mode, frozen parameters and no compiled code; afterwards all is as before."""
        if detections is not None:
            self.module = Decoded(self.module, detections)
        with self.evaluating(), exact_float32():
            returned = self._select(output, len(labels) if outputs in _ONE_LABEL_EACH else None, outputs)
            self.score = make_score(
                outputs or find_outputs(returned), shape=self._shape, text_encoder=self.text_encoder
            )
            """Score of the network: turns its outputs and a target into the number that is explained."""
            self.score.check(returned)
            lacks = {
                **self.score.lacks,
                **(module.lacks if isinstance(module, OnnxNetwork | ExportedNetwork) else {}),
                **(lacks or {}),
            }
            self.survey = found or self._surveyed(lacks)
            classifier = self.survey.classifier
            linear = self.module.get_submodule(classifier) if classifier else None
        self.classifier = linear if isinstance(linear, nn.Linear) else None
        """The last linear layer that the scores depend on; None where there is none."""
        self.micro_batch = micro_batch or DEFAULT_MICRO_BATCH.get(self.device.type, 32)
        if self.survey.alone:
            self.micro_batch = 1
        # On other devices the micro-batch is large already, and what a pass takes is not known when its call returns.
        self._sizes_are_found = not micro_batch and not self.survey.alone and self.device.type == "cpu"
        self.torch_batch = self.micro_batch
        """Number of images of a pass that PyTorch makes; `micro_batch` is that of what runs masked queries."""
        numbers, words = returned.shape[1], _words(self.tokeniser, self.score)
        self._openings = {each.layer.name: self._opening(each) for each in self.survey.layers}
        if not self._openings:
            self._openings = {NO_LAYER.name: Whole(self.module, self.survey.keeps)}
        self.runtime = _runtime(module, self.module)  # `_select` may have made another module of it
        self._bfloat16: Runtime = Eager(self.module, bfloat16=True)
        self.info = ModelInfo(
            name=name,
            version=version,
            labels=_labels(labels or words, self.score, numbers),
            input_size=preprocessing.crop_px,
            layers=tuple(each.layer for each in self.survey.layers),
            default_layer=layer or self.survey.default,
            source=source,
            licence=licence,
            evaluation=evaluation or {},
            weights=weights,
            channels=preprocessing.channels,
            outputs=self.score.kind,
            units=_units(units, self.score, numbers),
            dimension=numbers if self.score.kind in OF_VECTORS else 0,
            refused=self.survey.refused,
            text=_text_input(self.tokeniser, self.score),
            lacks={**self.survey.lacks, **lacks},
            runtime=RuntimeInfo(self.runtime.name, self.micro_batch),
        )
        self.info.layer(self.info.default_layer)  # it exists
        one = (1, 1, 1, preprocessing.channels)
        black, white = (self.normalise(torch.full(one, value, dtype=self.dtype))[0] for value in (0.0, 1.0))
        self._extremes = black, white
        """The pixels 0 and 1 as the network's input, (C, 1, 1)."""
        self._lock = threading.Lock()
        self._bound: dict[tuple[str, tuple[tuple[int, ...], ...]], Network] = {}
        """This network about texts, by text and tokens; the one used last stands last."""
        self.references: References | None = None
        """References that vectors are compared to; None where there are none."""
        self._eager: Network | None = None

    def with_references(self, references: References) -> Network:
        """Returns this network with references that its vectors are compared to; their names are its labels.

        Raises:
            InvalidOption: the outputs are no vectors, or the references are of another length.
        """
        check_takes_references(self.score.kind)
        found = copy.copy(self)
        found.score = make_score(self.score.kind, references.vectors, self.score.shape, self.text_encoder)
        found.score.check(torch.ones(1, self.info.dimension))
        found.info = replace(self.info, labels=references.names)
        found.references = references
        found._eager = None if self._eager is None else self._eager.with_references(references)
        return found

    def about(
        self, text: str, targets: Sequence[AnyTarget], written: Sequence[int] = ()
    ) -> tuple[Network, tuple[AnyTarget, ...]]:
        """Returns this network as one of images alone, asked with a text, and the targets as it knows them.

        The same text and tokens give the same network again, as long as it is kept. Where the network takes no text,
        it is the network itself.

        Args:
            text: the text beside the image.
            targets: what is explained; it may ask for words behind the text.
            written: tokens that the network itself writes behind the text, as far as targets ask for them.

        Raises:
            InvalidOption: the text or a target has words that the network does not know, or more than it takes.
        """
        if self.tokeniser is None:
            return self, tuple(targets)
        reading = self.score.read(self.tokeniser, text, targets, written)
        key = (text, reading.asked)
        with self._lock:
            found = self._bound.pop(key, None) or self._bind(key, reading)
            self._bound[key] = found
            while len(self._bound) > MOST_TEXTS:
                self._bound.pop(next(iter(self._bound)))
        return found, reading.targets

    def _bind(self, key: tuple[str, tuple[tuple[int, ...], ...]], reading: Reading) -> Network:
        found = copy.copy(self)
        found.asked = key
        found.module = Asked(self._takes_tokens, reading.asked, self.device)
        found.score = reading.score
        found.runtime = Eager(found.module)
        found._bfloat16 = Eager(found.module, bfloat16=True)
        found._openings = {each.layer.name: found._opening(each) for each in self.survey.layers}
        return found

    def writes(self, pixels: Tensor, text: str, most: int) -> list[tuple[int, float]]:
        """Returns the tokens that the network itself writes behind a text, the most probable one each time.

        Args:
            pixels: (H, W, C), as `normalise` takes them.
            text: the caption so far.
            most: largest number of tokens; fewer where the caption ends, or is as long as the network takes.

        Returns:
            Each token with its probability given those before it.

        Raises:
            InvalidOption: as `about`.
            Unsupported: the network's outputs are not finite.
        """
        assert isinstance(self.tokeniser, Writer), "outputs that write have one"
        reading, x = self.score.read(self.tokeniser, text, (), ()), self.normalise(pixels[None])
        found: list[tuple[int, float]] = []
        while len(found) < most and len(reading.asked[0]) + len(found) < self.tokeniser.max_length:
            tokens = (*reading.asked[0], *(token for token, _ in found))
            with torch.no_grad():
                logits = run(Asked(self._takes_tokens, (tokens,), self.device), x)[0]
            if not logits.isfinite().all():
                raise Unsupported("the network's outputs are not finite for this image: NaN or infinite")
            token = int(logits.argmax())
            if token == self.tokeniser.end:
                break
            found.append((token, float(logits.softmax(dim=0)[token])))
        return found

    @property
    def eager(self) -> Network:
        """This network as PyTorch runs it, whatever `adopt` has found to be faster on this machine."""
        return self._eager or self

    @property
    def reproducible_pass(self) -> int:
        """Number of queries of a pass that is to give the same numbers again: the kind of device alone decides it."""
        return 1 if self.survey.alone else min(MOST_REPRODUCIBLE, DEFAULT_MICRO_BATCH.get(self.device.type, 32))

    def adopt(self, runtime: Runtime, info: RuntimeInfo, half: Runtime | None = None) -> None:
        """Has a runtime run the network from now on; see `camserve.worker.tuning`.

        Args:
            runtime: a runtime of this network's module.
            info: what is said of it.
            half: what asks masked queries in bfloat16; None: PyTorch.
        """
        if self._eager is None:
            self._eager = copy.copy(self)
            self._eager._openings = dict(self._openings)
        self.runtime, self.micro_batch = runtime, info.micro_batch
        if isinstance(runtime, Eager):
            self.torch_batch = info.micro_batch
        self._bfloat16 = half or self._bfloat16
        self.info = replace(self.info, runtime=info)
        if isinstance(runtime, Trunked):
            (found,) = (each for each in self.survey.layers if each.layer.name == runtime.layer)
            self._openings[runtime.layer] = self._opening(found, runtime.trunk)

    def precision(self, asked: Precision) -> Precision:
        """Returns the precision in which masked queries are asked: "exact" or "bfloat16".

        Raises:
            Unsupported: bfloat16 is asked of a device that does not compute in it.
        """
        if asked == "auto":
            return self.info.runtime.precision
        if asked == "bfloat16" and (reason := self.runtime.fixed or why_no_bfloat16(self.device)):
            raise Unsupported(f"precision bfloat16 is not served: {reason}; exact and auto are")
        return asked

    def _opening(self, found: FoundLayer, trunk: Trunk | None = None) -> Opening:
        size = PassSize() if self._sizes_are_found else None
        return Opening(self.module, found, self.classifier, self.survey.keeps, trunk, self.survey.tokens, size)

    def _surveyed(self, lacks: Mapping[Asset, str]) -> Survey:
        example = self.normalise(self._random_pixels())
        if reason := lacks.get("layer"):
            return survey_of_outputs(self.module, example, reason)
        return survey(self.module, example, self._shape[0])

    def _select(self, output: str | int | None, wanted: int | None, outputs: Outputs | None) -> Tensor:
        """Makes the module one that returns (n, numbers), and returns the outputs of two images that differ."""
        find = select if outputs is None else kind_of(outputs).select
        # No plain image: a network that divides by the image's own deviation would answer with NaN.
        images = self.normalise(self._random_pixels(2)).to(dtype_of(self.module))
        try:
            tokens = None if self.tokeniser is None else self._example_tokens(len(images))
            found = find(self.module, images, None if output is None else str(output), wanted, tokens=tokens)
        except CamserveError:
            raise
        except Exception as error:
            raise failed(images, error) from error
        self.module, self.output, self.other_outputs = found.network, found.output, found.others
        self._shape = found.shape
        self._takes_tokens = self.module
        if tokens is not None:
            self.module = Asked(self._takes_tokens, (tokens[0].tolist(),), self.device)
        return single(found.outputs)

    def _example_tokens(self, images: int) -> Tensor:
        assert self.tokeniser is not None, "the network takes a text"
        tokens = encoded(self.tokeniser, "the tokeniser's example", self.tokeniser.example)
        return torch.tensor([tokens], dtype=torch.long, device=self.device).expand(images, -1)

    def _random_pixels(self, images: int = 1) -> Tensor:
        size = (images, *self.preprocessing.crop_px, self.preprocessing.channels)
        return torch.rand(size, generator=torch.Generator().manual_seed(0))

    def _evaluate(self) -> Callable[[], None]:
        children, with_compilation = _descendants(self.module), _nothing
        if _some_are_compiled(children):
            with_compilation = _without_compilation(children)
            children = _descendants(self.module)  # those that run from now on
        training = [child for child in children if child.training]
        weights = (weight for child in children for weight in child._parameters.values() if weight is not None)
        trained = [weight for weight in weights if weight.requires_grad]
        if training:
            self.module.eval()
        for weight in trained:
            weight.requires_grad_(False)

        def back() -> None:
            for child in training:
                child.training = True
            for weight in trained:
                weight.requires_grad_(True)
            with_compilation()

        return back

    def normalise(self, pixels: Tensor) -> Tensor:
        """Returns the (B, C, H, W) input on the device of (B, H, W, C) pixels, uint8 or float in [0, 1]."""
        planes, memory_format = pixels.to(self.device).permute(0, 3, 1, 2), self.runtime.memory_format
        x = torch.empty_like(planes, dtype=self.dtype, memory_format=memory_format).copy_(planes)
        if pixels.dtype == torch.uint8:
            x /= 255
        mean, std = (x.new_tensor(each)[:, None, None] for each in (self.preprocessing.mean, self.preprocessing.std))
        return x.sub_(mean).div_(std)

    def capture(self, x: Tensor, layer: str, gradients: bool = False) -> Capture:
        """Makes one forward pass whose graph starts at a layer that `info` lists.

        Args:
            x: (n, C, H, W), the images.
            layer: name of the layer.
            gradients: whether gradients are sure to be asked; they may be in any case.
        """
        return self._openings[layer](x, gradients)

    def passes(self, layer: str, work: Counter[Kind] | None = None, micro_batch: int | None = None) -> Passes:
        """Returns what makes further passes at a layer that `info` lists; their work is added to `work`.

        Args:
            layer: name of the layer.
            work: units by kind, to which those of the passes are added.
            micro_batch: images of any pass; None: the network's own number, and behind the layer that which is fastest.
        """
        opening, size = self._openings[layer], micro_batch or self.torch_batch
        return Passes(opening, size, *self._extremes, work, None if micro_batch else opening.tail_size)

    def has_trunk(self, x: Tensor, layer: str, gradients: bool) -> bool:
        """Tells whether another runtime makes the pass of x at a layer that `info` lists, for gradients or without."""
        return self._openings[layer].has_trunk(x, gradients)

    def scores(self, x: Tensor, precision: Precision) -> Tensor:
        """Returns the outputs (n, numbers) of masked images."""
        return self.runtime_of(precision).outputs(x)

    def runtime_of(self, precision: Precision) -> Runtime:
        """Returns what runs masked queries in a precision."""
        return self._bfloat16 if precision == "bfloat16" else self.runtime


def _runtime(module: nn.Module, running: nn.Module) -> Runtime:
    """Returns what runs a network at first: PyTorch, or what an ONNX graph brings along."""
    return Graph(running) if isinstance(module, OnnxNetwork) else Eager(running)


MOST_TEXTS = 32
"""Number of texts for which a network that takes one is kept as a network of images alone."""


def _tokeniser(module: nn.Module, outputs: Outputs | None) -> Tokeniser | None:
    """Returns the tokeniser of a network that takes a text; None for one that takes none.

    Raises:
        InvalidOption: its outputs are those of a network that takes a text, and it has none.
    """
    if outputs is None or not kind_of(outputs).takes_text:
        return None
    found = getattr(module, "tokeniser", None)
    wanted = Writer if kind_of(outputs).writes else Tokeniser
    if not isinstance(found, wanted):
        raise InvalidOption(
            f"outputs {outputs} are of a network of an image and a text, module(images, tokens), which has its "
            f"tokeniser as the attribute `tokeniser`: a {wanted.__name__} of camserve.types.tokenisers"
        )
    return found


def _text_input(tokeniser: Tokeniser | None, score: Score) -> TextInput | None:
    if tokeniser is None:
        return None
    return TextInput(score.takes_text, tokeniser.example, score.needs_text, tokeniser.max_length)


def _words(tokeniser: Tokeniser | None, score: Score) -> tuple[str, ...]:
    """Returns the words of a network that writes, by token; none for other networks.

    Raises:
        InvalidOption: the token that ends a caption is none of the outputs.
    """
    if not score.writes or not isinstance(tokeniser, Writer):
        return ()
    if not 0 <= tokeniser.end < score.shape[0]:
        raise InvalidOption(f"`end` of the tokeniser must be one of {score.shape[0]} outputs, got {tokeniser.end}")
    return tuple(tokeniser.text([token]) for token in range(score.shape[0]))


_ONE_LABEL_EACH = (None, "softmax", "sigmoid", "value", "segmentation", "answers", "tokens")
"""Kinds of outputs that have a label for each number, or map."""


def _labels(labels: Sequence[str], score: Score, numbers: int) -> tuple[str, ...]:
    """Returns the labels, where there are none those of the score.

    Raises:
        InvalidOption: there are not as many as needed.
    """
    wanted = score.classes(numbers)
    if labels and wanted is not None and len(labels) != wanted:
        if score.kind in OF_VECTORS:
            raise InvalidOption("the labels of vectors are the names of their references, and no references are given")
        what = "numbers" if score.kind == "value" else "classes"
        raise InvalidOption(f"the network has {wanted} {what}, got {len(labels)} labels")
    return tuple(labels) or score.names(numbers)


def _units(units: Sequence[str], score: Score, numbers: int) -> tuple[str, ...]:
    """Returns the unit of each number; none where there are none.

    Raises:
        InvalidOption: there are not as many as needed, or the outputs are no numbers.
    """
    units = (units,) if isinstance(units, str) else tuple(units)
    if units and score.kind != "value":
        raise InvalidOption(f"numbers of outputs value have units, and outputs {score.kind} have none")
    if len(units) not in (0, 1, numbers):
        raise InvalidOption(f"the network has {numbers} numbers, got {len(units)} units")
    return units * numbers if len(units) == 1 else units


def load_network(
    path: str | Path,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    runtime: RuntimeName | None = None,
) -> Network:
    """Returns the network of an archive or unpacked archive directory.

    Args:
        path: the archive.
        device: None: CUDA where there is one, else the CPU.
        micro_batch: queries of a pass; None: as many as measuring says.
        runtime: what runs the network; None: what `CAMSERVE_RUNTIME` says, else the fastest one.

    Raises:
        Unsupported: the runtime that is wanted cannot run the network.
    """
    runtime = runtime or runtime_name(os.environ.get("CAMSERVE_RUNTIME", ""))
    module, card = load_package(Path(path))
    references = read_references(Path(path), card)
    files = read_files(Path(path), card)
    weights = weights_hash(module, card.preprocessing, card.outputs, card.output, references, files, card.detections)
    network = Network(
        module.to(memory_format=torch.channels_last),  # type: ignore[call-overload]  # torch's stub lacks this form
        preprocessing=card.preprocessing,
        labels=card.labels if references is None else (),
        outputs=card.outputs,
        output=card.output,
        units=card.units,
        detections=card.detections,
        name=card.name,
        version=card.version,
        layer=card.layer,
        source=card.source,
        licence=card.licence,
        evaluation=card.evaluation,
        weights=weights,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        micro_batch=micro_batch,
        found=read_survey(Path(path), weights),
    )
    network.evaluating.hold()  # the module is nobody else's
    if references is not None:
        network = network.with_references(references)
    tune(network, runtime, micro_batch, cache_folder(), read_calibration(Path(path)))
    return network


def original(module: nn.Module) -> nn.Module:
    """Returns the module that `torch.compile` was given, where it is one of what that returns; else itself.

    Compiled code need not call hooks that are added after it was compiled, so that a layer seems not to run; whether it
    does depends on what was compiled before. The original's result is the same.

    Raises:
        Unsupported: the module is scripted or traced by TorchScript, which runs without Python's hooks.
    """
    while _is_compiled(module):
        module = module._orig_mod  # type: ignore[assignment]
    if any(isinstance(child, torch.jit.ScriptModule) for child in module.modules()):
        raise Unsupported(
            "a TorchScript module runs without the hooks that its layers are watched with; give the nn.Module that it "
            "was scripted or traced from, with the same state dict"
        )
    return module


def _is_compiled(module: nn.Module) -> bool:
    """Tells whether this is what `torch.compile` returns; there is none before its package was imported."""
    package = sys.modules.get("torch._dynamo.eval_frame")
    return package is not None and isinstance(module, package.OptimizedModule)


def _some_are_compiled(modules: Sequence[nn.Module]) -> bool:
    """Tells whether `torch.compile` made some of these, or `Module.compile` changed how they run."""
    one_of_each_type = {type(module): module for module in modules}.values()
    return any(map(_is_compiled, one_of_each_type)) or any(module._compiled_call_impl is not None for module in modules)


def _nothing() -> None:
    """Undoes nothing."""


def _descendants(module: nn.Module) -> list[nn.Module]:
    """Returns a module and all inside it, each once; `modules()` makes names as well, and takes six times as long."""
    root = next(module.modules())  # a `Selected` stands for the network that it runs
    found, waiting = {id(root): root}, [root]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def _without_compilation(modules: Sequence[nn.Module]) -> Callable[[], None]:
    """Has the compiled parts of modules run as they were written; returns the function that undoes it."""
    parts = [
        (parent, name, child)
        for parent in modules
        for name, child in parent._modules.items()
        if child is not None and _is_compiled(child)
    ]
    calls = [(child, child._compiled_call_impl) for child in modules if child._compiled_call_impl is not None]
    for parent, name, child in parts:
        parent._modules[name] = original(child)
    for child, _ in calls:
        child._compiled_call_impl = None

    def back() -> None:
        for parent, name, child in parts:
            parent._modules[name] = child
        for child, implementation in calls:
            child._compiled_call_impl = implementation

    return back


def weights_hash(
    module: nn.Module,
    preprocessing: Preprocessing,
    outputs: Outputs = "softmax",
    output: str | None = None,
    references: References | None = None,
    files: Mapping[str, bytes] | None = None,
    detections: Decoding | None = None,
) -> str:
    """Returns a hash of all that the answers of a network depend on, parameters and buffers with their names first.

    Args:
        module: the network.
        preprocessing: how its input is made.
        outputs: kind of its outputs.
        output: which of its outputs is explained.
        references: what vectors are compared to.
        files: what the network is built of, by name.
        detections: what its detections are made of.

    Returns:
        BLAKE2b of 16 bytes, hexadecimal.
    """
    made = () if detections is None else (detections,)
    found = hashlib.blake2b(repr((preprocessing, outputs, output, *made)).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    if references is not None:
        found.update(repr(references.names).encode())
        found.update(np.ascontiguousarray(references.vectors).data)
    for name, content in sorted((files or {}).items()):
        found.update(f"{name} {len(content)} ".encode() + content)
    return found.hexdigest()
