"""From merged sums to an ExplainReply: final maps, encoded one after the other to hold one picture at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from camserve import images, wire
from camserve.errors import Cancelled, InvalidOption
from camserve.finalise.encode import encode
from camserve.finalise.maps import final_map
from camserve.finalise.render import background
from camserve.gateway.request import ENCODING_NUMBERS, Request
from camserve.gateway.settings import Settings
from camserve.labels import with_label
from camserve.methods import MethodSpec
from camserve.types import Cost, ItemResult, Partial, Prediction, SaliencyMap
from camserve.v1 import explain_pb2 as pb


def render(
    request: Request,
    opening: ItemResult,
    partials: Mapping[int, Partial],
    settings: Settings,
    abandoned: threading.Event,
) -> pb.ExplainReply:
    """The reply without its cost. Runs for as long as the maps need: call it in a thread.

    Args:
        request: what was asked.
        opening: predictions, targets and view.
        partials: the complete sums of each method, by its position.
        settings: for the limits.
        abandoned: once it is set, the next map is not begun.

    Raises:
        InvalidOption: the maps are larger than a reply may be.
        Cancelled: `abandoned` was set.
        Unsupported: the network's answers are not finite.
    """
    labels = request.model.labels
    reply = pb.ExplainReply(
        model=request.model.name,
        version=request.model.version,
        predictions=[wire.prediction_to_proto(with_label(prediction, labels)) for prediction in opening.predictions],
        input=wire.view_to_proto(opening.view),
    )
    image = _beneath(request, opening, settings)
    room = settings.max_message_bytes
    for method, target, sums in _wanted(request, opening, partials):
        if abandoned.is_set():
            raise Cancelled("nobody waits for this reply")
        message = _map(request, opening, method, target, sums, image)
        room -= len(message.data)
        if room < 0:
            raise InvalidOption(f"a reply may have at most {settings.max_message_bytes} bytes: ask for fewer classes")
        reply.maps.append(message)
    return reply


def cost_to_proto(cost: Cost) -> pb.Cost:
    """What an explanation took."""
    return pb.Cost(
        queries=cost.queries,
        stage_seconds=cost.stage_seconds,
        steps=cost.steps,
        precision=wire.precision_to_proto(cost.precision),
        worker=cost.worker,
    )


def _beneath(request: Request, opening: ItemResult, settings: Settings) -> Image.Image | None:
    """What an overlay is laid on; the other encodings do not need the image."""
    if not request.output.overlay:
        return None
    return background(_sent_image(request, settings), opening.view, request.output.size)


def _wanted(
    request: Request, opening: ItemResult, partials: Mapping[int, Partial]
) -> Iterator[tuple[MethodSpec, Prediction, np.ndarray]]:
    for position, method in enumerate(request.methods):
        for row, target in enumerate(opening.targets):
            yield method, with_label(target, request.model.labels), partials[position].sums[row]


def _map(
    request: Request,
    opening: ItemResult,
    method: MethodSpec,
    target: Prediction,
    sums: np.ndarray,
    image: Image.Image | None,
) -> pb.SaliencyMap:
    output = request.output
    saliency = final_map(
        sums,
        method=method,
        target=target,
        layer=opening.layer,
        view=opening.view,
        size=output.size,
        boxes=output.boxes,
    )
    data = encode(saliency, output.encoding, image, output.colormap, output.opacity)
    return _map_to_proto(saliency, output.encoding, data)


def _map_to_proto(saliency: SaliencyMap, encoding: str, data: bytes) -> pb.SaliencyMap:
    return pb.SaliencyMap(
        method=wire.method_to_proto(saliency.method),
        target=wire.prediction_to_proto(saliency.target),
        layer=saliency.layer,
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
    )


def _sent_image(request: Request, settings: Settings) -> Image.Image:
    if isinstance(request.image, bytes):
        return images.decode(request.image, settings.max_image_bytes, settings.max_image_pixels)
    pixels = request.image
    if pixels.dtype != np.uint8:
        pixels = (pixels * 255).round().astype(np.uint8)
    return images.from_array(pixels, settings.max_image_pixels)
