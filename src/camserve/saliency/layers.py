"""Finds which layers a network has to explain, and which one to take, in two forward passes.

The first one, of one picture, is watched: see `camserve.saliency.watch`. The second one, of several that differ in
patches, tells which layers change where the picture does: see `camserve.saliency.locality`. What is not offered is
refused with a reason.

A layer that runs several times counts at its last call that the scores depend on. Calls that do not depend on one
another, and reach the scores side by side, are views of the picture: where all are upright and of one size, the layer's
maps are those of all of them; else the layer is refused.

The default layer is the last feature layer that the scores depend on, before the head. The head is the last linear or
convolution layer, if no way from the image to the scores leads past it: a linear layer behind pooling, or a 1 x 1
convolution with one map for each score, or for each class of a network that tells the class of every place. Where the
last such layer is part of a block, there is no head of modules (cosine heads, features alone). One exception: where a
class token stands in the sequence, the logits are read off that token, and after the last attention nothing of the
other tokens reaches it: their gradients there are zero, and a map made of them would be empty. So the default is then
what the last attention looks at: the first norm of the last block (`encoder.layers.encoder_layer_11.ln_1` in
torchvision, `blocks.11.norm1` in timm).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from camserve.errors import Unsupported
from camserve.methods.spec import Asset
from camserve.saliency.arrangement import PLANES, Arrangement
from camserve.saliency.capture import Tap, address, is_spatial
from camserve.saliency.flow import Node, reached
from camserve.saliency.head import is_pooled_linear
from camserve.saliency.locality import CONTRAST, ROUNDING, Response, is_local, is_told, pictures
from camserve.saliency.run import failed, run
from camserve.saliency.watch import Event, HeadCall, Watch
from camserve.types import Layer

NOT_LOCAL = "a patch of the picture that changes is not found at its place there, so its places are none of the picture"
NOT_DEPENDED = "the scores do not depend on it"

WITNESSES = 5
"""Number of layers before one whose grid is too coarse to tell where its places are, most of which speak for it."""

SAME = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Share of the largest score by which those of a picture may differ between two passes: rounding is a tenth of it, in
deep networks of half precision too."""


@dataclass(frozen=True)
class FoundLayer:
    """Describes a layer, the calls that count, and how its output holds its maps."""

    layer: Layer
    calls: tuple[int, ...] = (1,)
    """Numbers of the calls whose maps are taken, from 1, among those with a spatial output."""
    arrangement: Arrangement = PLANES
    cut: bool = False
    """Whether the forward cuts gradients between this layer and the scores."""


@dataclass(frozen=True)
class Survey:
    """Holds what was found out about a network."""

    layers: tuple[FoundLayer, ...]
    """Every layer that is offered, in forward order."""
    default: str
    """Name of the default layer."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why each other layer that returns maps is not offered, by name."""
    classifier: str = ""
    """Name of the last linear layer that the scores depend on; empty where there is none."""
    scores: int = 0
    """Number of scores."""
    keeps: bool = False
    """Whether the forward must be kept from switching gradients off."""
    alone: bool = False
    """Whether pictures of one batch change each other's scores, so that each must be asked alone."""
    lacks: Mapping[Asset, str] = field(default_factory=dict)
    """Why the network does not offer what methods may need: "layer", where no layer was found."""

    @property
    def tokens(self) -> Arrangement | None:
        """The arrangement of the last layer that returns a sequence of tokens; None where no layer does."""
        found = [each.arrangement for each in self.layers if each.arrangement.grid is not None]
        return found[-1] if found else None


def survey(module: nn.Module, example: Tensor, maps: int | None = None) -> Survey:
    """Returns what is found out about a network in two forward passes, or some more where pictures must go alone.

    Args:
        module: in eval mode; nothing is left on it.
        example: (1, 3, H, W) of the size that will be used; of its values nothing is taken. On the device "meta", where
            there are no values, nothing is known of places.
        maps: number of maps that a convolution makes the scores of; None: one for each score.

    Raises:
        Unsupported: the network fails, or is random.
    """
    seen = pictures(example)
    watch = _watched(module, seen[-1:])
    depended = watch.depended()
    calls = {name: _calls(watch, events, depended) for name, events in _by_name(watch.events).items()}
    sites = {name: some for name, some in calls.items() if some}
    refused = {name: NOT_DEPENDED for name, some in calls.items() if not some}
    alone, responses = (False, {}) if example.is_meta else _responses(module, watch.scores, seen, sites)
    sites = _with_own_tokens(sites, responses)
    refused |= _misplaced(watch, sites, responses)
    offered = {name: events for name, events in sites.items() if name not in refused}
    default = _default(watch, offered, depended, watch.scores.shape[1] if maps is None else maps)
    if default is None:
        return Survey(
            layers=(),
            default="",
            refused=refused,
            scores=watch.scores.shape[1],
            keeps=watch.interfered,
            alone=alone,
            lacks={"layer": _nothing(refused)},
        )
    classifier = _classifier(watch, depended)
    uncut = watch.depended(stops=tuple(watch.cuts))
    names = {id(child): name for name, child in module.named_modules()}
    return Survey(
        layers=tuple(_found(name, events, classifier, watch.scores, uncut) for name, events in offered.items()),
        default=default,
        refused=refused,
        classifier="" if classifier is None else names[id(classifier)],
        scores=watch.scores.shape[1],
        keeps=watch.interfered,
        alone=alone,
    )


def survey_of_outputs(module: nn.Module, example: Tensor, reason: str) -> Survey:
    """Returns what is found out about a network none of whose layers is looked at, in two forward passes or more.

    Args:
        module: in eval mode.
        example: (1, 3, H, W) of the size that will be used; of its values nothing is taken.
        reason: why its layers are not looked at.

    Raises:
        Unsupported: the network fails, or is random.
    """
    seen = pictures(example)
    try:
        with torch.no_grad():
            scores = run(module, seen[-1:].clone())
    except Exception as error:
        raise failed(seen[-1:], error) from error
    alone, _ = _responses(module, scores, seen, {})
    return Survey(layers=(), default="", scores=scores.shape[1], alone=alone, lacks={"layer": reason})


def _watched(module: nn.Module, picture: Tensor) -> Watch:
    watch = Watch(picture)
    try:
        watch.run(module)
        return watch
    except Exception as error:
        # What is done to keep gradients on may be what fails, such as an array made of a tensor with a graph.
        first = error
    watch = Watch(picture)
    try:
        watch.run(module, graph=False)
    except Exception:
        raise failed(picture, first) from first
    return watch


def _by_name(events: Sequence[Event]) -> dict[str, list[Event]]:
    """Returns the calls of each layer, the layers in the order of their last call.

    Functional activations that a module's own name stands for are left out, such as the ReLU inside nn.ReLU.
    """
    last = {event.name: index for index, event in enumerate(events)}
    of_modules = {id(event.output): index for index, event in enumerate(events) if not address(event.name)[1]}
    calls: dict[str, list[Event]] = {name: [] for name in sorted(last, key=last.__getitem__)}
    for index, event in enumerate(events):
        if not address(event.name)[1] or of_modules.get(id(event.output), -1) < index:
            calls[event.name].append(event)
    return {name: some for name, some in calls.items() if some}


def _calls(watch: Watch, events: Sequence[Event], depended: Collection[Node] | None) -> list[Event]:
    """Returns the calls that count, in forward order: the last one, and others that are views beside it."""
    if depended is None:
        return [events[-1]]
    kept: list[Event] = []
    for event in reversed([event for event in events if event.node in depended]):
        if kept:
            past = watch.depended(stops=[other.node for other in kept])
            if past is None or event.node not in past or any(event.node in reached(other.node) for other in kept):
                continue
        kept.insert(0, event)
    return kept


class _Measure(Tap):
    """Measures how a layer's outputs change with the picture, call by call."""

    def __init__(self, events: Sequence[Event]) -> None:
        arrangement, self._batch = events[-1].arrangement, 1
        super().__init__(
            events[-1].name,
            [event.number for event in events],
            lambda output: is_spatial(output, self._batch, arrangement),
        )
        self._arrangement = arrangement
        self._first: dict[int, Tensor] = {}
        self._changes: dict[int, list[Tensor]] = {}
        self._rounding: dict[int, float] = {}

    def restart(self, batch: int) -> None:
        """Expects another pass, of a batch of this size."""
        self._batch, self._number = batch, 0

    def at(self, output: Tensor, index: int) -> None:
        """Takes the differences of each picture's output to that of the first one."""
        output = output.detach()
        axis = -1 if self._arrangement.channels_last else 1
        if index not in self._first:
            self._first[index] = output[:1].clone()
            size = float(output[:1].float().abs().sum(dim=axis).mean())
            self._rounding[index] = ROUNDING * torch.finfo(output.dtype).eps * size
            output = output[1:]
        change = (output.float() - self._first[index].float()).abs().sum(dim=axis)
        self._changes.setdefault(index, []).extend(change)

    @property
    def responses(self) -> tuple[Response, ...]:
        """The responses, in the order of the calls."""
        changes = sorted(self._changes.items())
        return tuple(Response(torch.stack(some[:-1]), some[-1], self._rounding[index]) for index, some in changes)


def _responses(
    module: nn.Module, last: Tensor, seen: Tensor, sites: Mapping[str, Sequence[Event]]
) -> tuple[bool, dict[str, tuple[Response, ...]]]:
    """Returns whether pictures must go alone, and the responses of each layer; `last` has the last one's scores."""
    try:
        scores, responses = _measured(module, seen, sites, len(seen))
        if _are_same(scores[-1:], last):
            return False, responses
    except torch.OutOfMemoryError:  # which says nothing of the network
        raise
    except Exception:  # a network that takes fewer pictures at a time is asked again, one by one
        pass
    scores, responses = _measured(module, seen, sites, 1)
    if not _are_same(scores[-1:], last):
        raise Unsupported(
            "the network gives another answer each time that it sees the same picture, so that no map can be made of "
            "its answers: some dropout or noise is on in eval mode (`F.dropout` needs `training=self.training`)"
        )
    return True, responses


def _measured(
    module: nn.Module, seen: Tensor, sites: Mapping[str, Sequence[Event]], batch: int
) -> tuple[Tensor, dict[str, tuple[Response, ...]]]:
    taps = {name: _Measure(events) for name, events in sites.items()}
    scores = []
    with torch.no_grad(), ExitStack() as stack:
        for tap in taps.values():
            stack.enter_context(tap.installed(module))
        for pictures_ in torch.split(seen, batch):
            for tap in taps.values():
                tap.restart(batch)
            scores.append(run(module, pictures_.clone()))
    return torch.cat(scores), {name: tap.responses for name, tap in taps.items()}


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Tells whether scores are equal but for rounding; also where they are no numbers."""
    one, other = one.detach(), other.detach()
    if not (one.isfinite().all() and other.isfinite().all()):
        return True
    return bool((one - other).abs().max() <= SAME[one.dtype] * torch.maximum(one.abs().max(), other.abs().max()))


def _with_own_tokens(
    sites: Mapping[str, Sequence[Event]], responses: Mapping[str, Sequence[Response]]
) -> dict[str, list[Event]]:
    """Returns the sites with the positions of the network's own tokens.

    Before the first attention a token of the network's own does not change with the picture.
    """
    known: dict[int, tuple[int, ...]] = {}
    placed: dict[str, list[Event]] = {}
    for name, events in sites.items():
        arrangement = events[-1].arrangement
        if arrangement.own and name in responses and responses[name]:
            length = events[-1].output.shape[1]
            still = responses[name][-1].own_tokens()
            if length not in known and len(still) == len(arrangement.own):
                known[length] = still
            if length in known:
                own = arrangement.with_own(known[length])
                events = [replace(event, arrangement=own) for event in events]
        placed[name] = list(events)
    return placed


def _misplaced(
    watch: Watch, sites: Mapping[str, Sequence[Event]], responses: Mapping[str, Sequence[Response]]
) -> dict[str, str]:
    """Returns why layers are not offered whose places are none of the picture, by name."""
    pairs = {name: list(zip(events, responses.get(name, ()), strict=False)) for name, events in sites.items()}
    height, width = watch.example.shape[-2:]
    means = watch.means()
    told: dict[int, bool] = {}
    """Whether a call is local, by identity of its output, where its own grid tells."""
    for event, response in (pair for some in pairs.values() for pair in some):
        changes = response.placed(event.arrangement)
        if is_told(changes, response.rounding):
            contrast = CONTRAST if event.node in means else 1.0
            told[id(event.output)] = is_local(changes, (height, width), contrast)
    found = {}
    for name, some in pairs.items():
        wrong = [event.number for event, _ in some if not _is_right(watch, event, told)]
        if reason := _reason(sites[name], wrong):
            found[name] = reason
    return found


def _is_right(watch: Watch, event: Event, told: Mapping[int, bool]) -> bool:
    """Tells whether a call is local; where its own maps do not tell, most of the last ones before it that do."""
    if id(event.output) in told or event.node is None:
        return told.get(id(event.output), True)
    before = reached(event.node)
    finer = [told[id(other.output)] for other in watch.events if other.node in before and id(other.output) in told]
    return sum(finer[-WITNESSES:]) * 2 >= len(finer[-WITNESSES:])


def _reason(events: Sequence[Event], wrong: Sequence[int]) -> str:
    """Returns why a layer is not offered; empty where it is."""
    numbers = _and(event.number for event in events)
    if len({(event.output.shape, event.arrangement) for event in events}) > 1:
        sizes = _and("x".join(map(str, event.output.shape[1:])) for event in events)
        return f"it sees several views of the picture, in its calls {numbers}, whose sizes differ ({sizes})"
    if wrong and len(events) > 1:
        return (
            f"it sees several views of the picture, in its calls {numbers}: the places of {_and(wrong)} are other ones"
        )
    return NOT_LOCAL if wrong else ""


def _and(parts: Iterable[object]) -> str:
    return " and ".join(map(str, parts))


def _default(
    watch: Watch, offered: Mapping[str, Sequence[Event]], depended: Collection[Node] | None, maps: int
) -> str | None:
    """Returns the name of the default layer; None where there is none."""
    attentions = [one for one in watch.attentions if depended is None or one.node in depended]
    inside = attentions[-1].inside if attentions else range(0)
    stop = _before_head(watch, depended, maps)
    found = _features(watch, offered, [index for index in range(stop) if index not in inside])
    if found and found[-1].arrangement.own:
        found = _features(watch, offered, range(inside.start)) or found
    found = found or _features(watch, offered, range(stop))  # an attention that no module of its own holds
    return found[-1].name if found else None


def _features(watch: Watch, offered: Mapping[str, Sequence[Event]], indices: Iterable[int]) -> list[Event]:
    """Returns the calls of feature layers that are offered, among the events of these indices."""
    outputs = {id(event.output) for events in offered.values() for event in events}
    events = [watch.events[index] for index in indices]
    return [event for event in events if event.is_feature and event.name in offered and id(event.output) in outputs]


def _before_head(watch: Watch, depended: Collection[Node] | None, maps: int) -> int:
    """Returns the number of events before the head; of all events where no module is the head."""
    if depended is None:
        return watch.heads[-1].start if watch.heads else len(watch.events)
    heads: list[HeadCall] = []
    for call in reversed([call for call in watch.heads if call.node in depended]):
        if not _may_be_head(watch, call, maps) or any(call.node in reached(head.node) for head in heads):
            break
        heads.append(call)
        past = watch.depended(stops=[head.node for head in heads])
        if past is None or not any(event.node in past for event in watch.events[: call.start]):
            return call.start
    return len(watch.events)


def _may_be_head(watch: Watch, call: HeadCall, maps: int) -> bool:
    """Tells whether a layer may end the features: it returns no maps, or those of the scores and nothing normalises."""
    if all(event.node is not call.node for event in watch.events):
        return True
    makes_scores = call.width == maps and call.is_pointwise
    return makes_scores and not any(event.is_norm for event in watch.events[call.start :])


def _classifier(watch: Watch, depended: Collection[Node] | None) -> nn.Linear | None:
    linear = [
        call.module
        for call in watch.heads
        if isinstance(call.module, nn.Linear) and (depended is None or call.node in depended)
    ]
    return linear[-1] if linear else None


def _found(
    name: str, events: Sequence[Event], classifier: nn.Linear | None, scores: Tensor, uncut: Collection[Node] | None
) -> FoundLayer:
    last = events[-1]
    _, channels, height, width = last.arrangement.maps(last.output).shape
    pooled = False
    if len(events) == 1 and last.pooled is not None:
        pooled = bool(is_pooled_linear(classifier, last.pooled[..., None, None], scores.detach()).all())
    return FoundLayer(
        Layer(name, channels * len(events), height, width, pooled_head=pooled),
        tuple(event.number for event in events),
        last.arrangement,
        cut=uncut is not None and not all(event.node in uncut for event in events),
    )


def _nothing(refused: Mapping[str, str]) -> str:
    """Returns the text that says why no layer is offered."""
    text = "the network has no layer with a spatial output before its head that can be explained"
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        reasons.setdefault(reason, []).append(name)
    parts = [f"{', '.join(names[-3:])}: {reason}" for reason, names in list(reasons.items())[-3:]]
    return f"{text} ({'; '.join(parts)})" if parts else text
