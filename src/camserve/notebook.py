"""Shows explanations in notebooks: as HTML with pictures inside, as pictures, as matplotlib axes, and while they come.

    >>> from camserve import Client
    >>> from camserve.notebook import live
    >>> with Client("localhost:8500") as client:
    ...     answer = live(client.stream("cat.jpg", "score_cam"))  # the map sharpens below the cell
    >>> answer  # predictions and maps, side by side
    >>> answer.plot()

Front ends ask what a cell returns for `_repr_html_` and `_repr_png_`; those of explanations and maps are made here.
"""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from camserve.errors import Internal, Unsupported
from camserve.finalise.render import Row, overlay, sheet
from camserve.types import Cost, Explanation, Prediction, Progress, SaliencyMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE_PX = 320
"""Longest side of a picture in HTML, in CSS pixels."""

MOST_MAPS = 24
"""Number of maps that an explanation shows of itself; those beyond are counted."""

_STORED_PX = 2 * SIDE_PX
"""Longest side of a picture in its own pixels, enough for screens with two of them for each CSS pixel."""

_LEAST_PX = 224
"""Least longer side of a map that lies on no image: its few cells are enlarged, and stay cells."""

_NEWS = Progress | Explanation


def picture(saliency: SaliencyMap, colormap: str = "jet", opacity: float = 0.5) -> Image.Image:
    """Returns the map in colours over its image, RGB; in colours alone where it lies on none.

    Raises:
        InvalidOption: unknown colormap, or opacity outside 0..1.
    """
    if saliency.image is not None:
        return saliency.overlay(colormap, opacity)
    scale = max(1, _LEAST_PX // max(saliency.array.shape))
    cells = saliency.array.repeat(scale, axis=0).repeat(scale, axis=1)
    black = Image.new("RGB", (cells.shape[1], cells.shape[0]))
    return overlay(black, cells, colormap=colormap, opacity=1.0, signed=saliency.signed)


def map_png(saliency: SaliencyMap) -> bytes:
    """Returns the PNG file of a map's `picture`, with at most 640 pixels on a side."""
    return _png(picture(saliency))


def explanation_png(explanation: Explanation) -> bytes | None:
    """Returns the PNG file of a sheet, a row for each target and a column for each method; None without maps."""
    by_target = _by_target(explanation.maps[:MOST_MAPS])
    if not by_target:
        return None
    widest = max(by_target, key=len)
    blank = Image.new("RGB", (1, 1), "white")
    rows = [Row(_target(row[0]), (*map(picture, row), *[blank] * (len(widest) - len(row)))) for row in by_target]
    file = io.BytesIO()
    sheet([saliency.method.title for saliency in widest], rows, cell_px=SIDE_PX).save(file, "PNG")
    return file.getvalue()


def map_html(saliency: SaliencyMap) -> str:
    """Returns a map's picture with a caption: method, target, score, and what is missing of it."""
    lines = [f"<b>{escape(saliency.method.title)}</b>", escape(_target(saliency))]
    if saliency.degenerate:
        lines.append("no evidence: all zeros")
    if not saliency.complete:
        lines.append(f"{saliency.fraction:.0%} of the masked queries")
    if saliency.faithfulness is not None:
        curves = saliency.faithfulness
        lines.append(f"insertion {curves.insertion_auc:.3f}, deletion {curves.deletion_auc:.3f}")
    return (
        f'<figure style="display:inline-block;vertical-align:top;margin:0 8px 8px 0;max-width:{SIDE_PX}px">'
        f'<img style="max-width:100%;min-width:{SIDE_PX // 2}px" alt="{escape(_alternative(saliency))}" '
        f'src="data:image/png;base64,{base64.b64encode(map_png(saliency)).decode()}">'
        f'<figcaption style="font-size:90%">{"<br>".join(lines)}</figcaption></figure>'
    )


def explanation_html(explanation: Explanation) -> str:
    """Returns predictions, maps with their captions, and what they took."""
    name = f"{explanation.model} {explanation.version}".strip()
    return _page(name, explanation.predictions, explanation.maps, _took(explanation.cost))


def progress_html(progress: Progress) -> str:
    """Returns a bar, the predictions, and the maps as far as they are known."""
    bar = f'<progress max="{max(1, progress.total)}" value="{progress.done}"></progress>'
    text = f"{bar} {progress.done} of {progress.total} masked queries"
    return _page("", progress.predictions, progress.maps, text)


def plot(explanation: Explanation, colormap: str = "jet", opacity: float = 0.5, cell_inches: float = 3.0) -> Any:
    """Draws the image and its maps with matplotlib, one row for each target and one column for each method.

    Args:
        explanation: it has at least one map.
        colormap: colours of the maps.
        opacity: weight of the colours against the image, in 0..1.
        cell_inches: width and height of a picture.

    Returns:
        The axes, an array (targets, 1 + methods); the first column has the image, where the maps lie on one.

    Raises:
        Unsupported: matplotlib is not installed, or there is no map to draw.
        InvalidOption: unknown colormap, or opacity outside 0..1.
    """
    try:
        from matplotlib import pyplot
    except ImportError:
        raise Unsupported("plot draws with matplotlib: pip install 'camserve[notebook]'") from None
    rows = _by_target(explanation.maps)
    if not rows:
        raise Unsupported("an explanation of predictions alone has no map to draw")
    width = 1 + max(map(len, rows))
    size = (cell_inches * width, cell_inches * len(rows))
    _, axes = pyplot.subplots(len(rows), width, squeeze=False, figsize=size, layout="constrained")
    for line, row in zip(axes, rows, strict=True):
        for cell in line:
            cell.set_axis_off()
        _draw(line[0], row[0].image, _target(row[0]))
        for cell, saliency in zip(line[1:], row, strict=False):
            _draw(cell, picture(saliency, colormap, opacity), saliency.method.title)
    return axes


def live(news: Iterable[_NEWS]) -> Explanation:
    """Shows the news of a stream below a notebook's cell, each in place of the one before; returns the explanation.

    Args:
        news: what `Client.stream` returns.

    Raises:
        Unsupported: IPython, which every notebook has, is not installed.
        CamserveError: the request failed.
    """
    show = _display()
    for each in news:
        show(each)
        if isinstance(each, Explanation):
            return each
    raise Internal("the stream ended without a reply")


async def live_async(news: AsyncIterable[_NEWS]) -> Explanation:
    """Does what `live` does, for what `AsyncClient.stream` returns."""
    show = _display()
    async for each in news:
        show(each)
        if isinstance(each, Explanation):
            return each
    raise Internal("the stream ended without a reply")


def _display() -> Callable[[_NEWS], None]:
    """Returns what shows a value in place of the one shown before."""
    try:
        from IPython.display import display
    except ImportError:
        raise Unsupported("live shows in notebooks, and IPython is not installed: pip install ipython") from None
    handle = None

    def show(value: _NEWS) -> None:
        nonlocal handle
        if handle is None:
            handle = display(value, display_id=True)  # type: ignore[no-untyped-call]  # IPython tells no types
        else:
            handle.update(value)

    return show


def _page(name: str, predictions: Sequence[Prediction], maps: Sequence[SaliencyMap], below: str) -> str:
    """Returns HTML whose pictures are inside; `below` is HTML already."""
    heading = f"<b>{escape(name)}</b> " if name else ""
    rows = "".join(
        f'<tr><td style="text-align:left">{escape(each.label)}</td><td>{escape(each.figure)}</td></tr>'
        for each in predictions
    )
    more = f"<p>and {len(maps) - MOST_MAPS} more maps</p>" if len(maps) > MOST_MAPS else ""
    figures = "".join(map(map_html, maps[:MOST_MAPS]))
    return f'<div>{heading}<table>{rows}</table>{figures}{more}<div style="font-size:90%">{below}</div></div>'


def _by_target(maps: Sequence[SaliencyMap]) -> list[list[SaliencyMap]]:
    """Returns the maps of each target, one for each method."""
    found: dict[str, list[SaliencyMap]] = {}
    for saliency in maps:
        found.setdefault(saliency.target_text or str(saliency.target.index), []).append(saliency)
    return list(found.values())


def _target(saliency: SaliencyMap) -> str:
    """Returns the target as people read it, with its score."""
    label, text = saliency.target.label, saliency.target_text
    if text in ("", label, str(saliency.target.index)):
        return _predicted(saliency.target)
    return f"{text} ({saliency.score:.3g})"


def _predicted(prediction: Prediction) -> str:
    return f"{prediction.label} {prediction.figure}".strip()


def _alternative(saliency: SaliencyMap) -> str:
    return f"{saliency.method.title} map of {_target(saliency)}"


def _took(cost: Cost) -> str:
    """Returns what an explanation took, in words."""
    seconds = sum(cost.stage_seconds.values())
    kept = ", kept from an earlier request" if cost.cached else ""
    return escape(f"{cost.queries} masked queries, {seconds:.2f} s, {cost.precision}{kept}")


def _draw(cell: Axes, image: Image.Image | None, title: str) -> None:
    if image is not None:
        cell.imshow(np.asarray(image.convert("RGB")))
        cell.set_title(title, fontsize="small")


def _png(image: Image.Image) -> bytes:
    """Returns a PNG file; a picture that is larger than a screen shows it is made smaller."""
    if max(image.size) > _STORED_PX:
        image = image.copy()
        image.thumbnail((_STORED_PX, _STORED_PX))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
