"""The shipped fake answers as a worker does: an item that fails leaves its neighbours alone."""

import io

import numpy as np
from PIL import Image

from camserve.errors import Internal, InvalidImage
from camserve.gateway.pool.fake import MODEL
from camserve.gateway.pool.fake_answers import answer
from camserve.methods import GradCam
from camserve.types import Item, ItemResult, Task


def photo(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (80, 60), grey).save(file, "PNG")
    return file.getvalue()


def test_an_item_that_fails_leaves_its_neighbours_alone():
    """A file that is cut off has an error of its own; at an array of texts, which no door lets in, numpy fails."""
    sent = [photo(1), photo(2)[:60], photo(3), np.array([["a"]]), photo(4)]
    items = [Item(image, (), (Task(0, GradCam(), 0, 0),)) for image in sent]
    outcomes = answer(MODEL, items).outcomes
    assert [type(outcome) for outcome in outcomes] == [ItemResult, InvalidImage, ItemResult, Internal, ItemResult]
    assert str(outcomes[3]) == "internal error; the server's log has the details"
