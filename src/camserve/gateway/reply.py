"""From merged sums to an ExplainReply: final maps, encoded one after the other to hold one picture at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from camserve import images, wire
from camserve.errors import Cancelled, InvalidOption
from camserve.finalise.encode import encode
from camserve.finalise.maps import final_map
from camserve.finalise.render import background
from camserve.gateway.request import ENCODING_NUMBERS, Request
from camserve.gateway.running import Snapshot
from camserve.gateway.settings import Settings
from camserve.labels import with_label
from camserve.types import DEFAULT_CURVE_STEPS, BoxOptions, Cost, MapCurves, MapSize, SaliencyMap
from camserve.v1 import explain_pb2 as pb


def render(known: Snapshot, settings: Settings, abandoned: threading.Event) -> pb.ExplainReply:
    """The reply without its cost. Runs for as long as the maps need: call it in a thread.

    Args:
        known: what was asked, and what has come in; a map is complete if all of it has.
        settings: for the limits.
        abandoned: once it is set, the next map is not begun.

    Raises:
        InvalidOption: the maps are larger than a reply may be.
        Cancelled: `abandoned` was set.
        Unsupported: the network's answers are not finite.
    """
    request, opening = known.request, known.opening
    return pb.ExplainReply(
        model=request.model.name,
        version=request.model.version,
        predictions=predictions_to_proto(known),
        input=wire.view_to_proto(opening.view),
        maps=render_maps(known, settings, abandoned),
    )


def render_maps(known: Snapshot, settings: Settings, abandoned: threading.Event) -> list[pb.SaliencyMap]:
    """The maps as `render` has them."""
    output = known.request.output
    image = _beneath(known, settings)
    room = settings.max_message_bytes
    maps = []
    for saliency in _maps(known, output.size, output.boxes):
        if abandoned.is_set():
            raise Cancelled("nobody waits for this reply")
        data = encode(saliency, output.encoding, image, output.colormap, output.opacity)
        room -= len(data)
        if room < 0:
            raise InvalidOption(f"a reply may have at most {settings.max_message_bytes} bytes: ask for fewer classes")
        maps.append(_map_to_proto(saliency, output.encoding, data))
    return maps


def predictions_to_proto(known: Snapshot) -> list[pb.Prediction]:
    """The most probable classes, with their labels."""
    labels = known.request.model.labels
    return [wire.prediction_to_proto(with_label(prediction, labels)) for prediction in known.opening.predictions]


def curves_of(known: Snapshot) -> list[MapCurves]:
    """The deletion and insertion curves to ask about the request's maps, in their order. Call it in a thread."""
    steps = known.request.evaluation_steps or DEFAULT_CURVE_STEPS
    return [MapCurves(saliency.array, saliency.target.index, steps) for saliency in _maps(known, "input", None)]


def cost_to_proto(cost: Cost) -> pb.Cost:
    """What an explanation took."""
    return pb.Cost(
        queries=cost.queries,
        evaluation_queries=cost.evaluation_queries,
        stage_seconds=cost.stage_seconds,
        steps=cost.steps,
        precision=wire.precision_to_proto(cost.precision),
        worker=cost.worker,
    )


def _beneath(known: Snapshot, settings: Settings) -> Image.Image | None:
    """What an overlay is laid on; the other encodings do not need the image."""
    request = known.request
    if not request.output.overlay:
        return None
    return background(_sent_image(request, settings), known.opening.view, request.output.size)


def _maps(known: Snapshot, size: MapSize, boxes: BoxOptions | None) -> Iterator[SaliencyMap]:
    """For each method one for each target, with its curves where they were asked."""
    request, opening, parts = known.request, known.opening, known.request.parts
    number = 0
    for place, (method, positions) in enumerate(parts.positions()):
        fraction = known.fraction(positions)
        for row, target in enumerate(opening.targets):
            saliency = final_map(
                [known.sums(position)[row] for position in positions],
                method=method,
                target=with_label(target, request.model.labels),
                layers=[layer.name for layer in parts.layers_of(method)],
                view=opening.view,
                fusion=parts.fusion,
                size=size,
                boxes=boxes,
                complete=fraction == 1,
            )
            choice = request.choices.get(place, "")
            yield replace(saliency, fraction=fraction, choice=choice, faithfulness=known.faithfulness(number))
            number += 1


def _map_to_proto(saliency: SaliencyMap, encoding: str, data: bytes) -> pb.SaliencyMap:
    return pb.SaliencyMap(
        method=wire.method_to_proto(saliency.method),
        target=wire.prediction_to_proto(saliency.target),
        layers=saliency.layers,
        shape=saliency.array.shape,
        encoding=ENCODING_NUMBERS[encoding],
        data=data,
        minimum=saliency.value_range[0],
        maximum=saliency.value_range[1],
        boxes=[
            pb.Box(left=box.left, top=box.top, right=box.right, bottom=box.bottom, score=box.score)
            for box in saliency.boxes
        ],
        degenerate=saliency.degenerate,
        complete=saliency.complete,
        fraction=saliency.fraction,
        choice=saliency.choice,
        faithfulness=None if saliency.faithfulness is None else wire.faithfulness_to_proto(saliency.faithfulness),
    )


def _sent_image(request: Request, settings: Settings) -> Image.Image:
    if isinstance(request.image, bytes):
        return images.decode(request.image, settings.max_image_bytes, settings.max_image_pixels)
    pixels = request.image
    if pixels.dtype != np.uint8:
        pixels = (pixels * 255).round().astype(np.uint8)
    return images.from_array(pixels, settings.max_image_pixels)
