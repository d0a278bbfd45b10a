"""Pieces of queries: where they are cut, and that they are added up in their order, whenever they come."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from test_finalise_results import IMAGE, answered

from camserve.finalise.results import Results
from camserve.gateway.pool.fake import MODEL
from camserve.methods import GradCam, GroupCam, MethodSpec, Rise, ScoreCam
from camserve.types import Item, ItemResult, Target
from camserve.types.request import PIECE_BYTES, PIECE_QUERIES, ExplainRequest, FittedRequest

RISE = Rise(masks=100, grid=4)


def fitted(*methods: MethodSpec, targets: int = 1, **fields) -> FittedRequest:
    asked = tuple(Target(index=number) for number in range(targets))
    options = {"evidence": True, "precision": "exact", **fields}
    return ExplainRequest(IMAGE, methods, asked, **options).fit(MODEL)


def uneven(item: Item, seed: int) -> ItemResult:
    """An answer whose sums are of all sizes, so that float64 adds them otherwise in another order."""
    found = answered(item)
    rng = np.random.default_rng(seed)
    sizes = [
        rng.standard_normal(one.sums.shape) * 10.0 ** rng.integers(-9, 9, one.sums.shape) for one in found.partials
    ]
    partials = [replace(one, sums=size.astype(np.float32)) for one, size in zip(found.partials, sizes, strict=True)]
    return replace(found, partials=tuple(partials))


def added(order: list[int], pieces: dict[int, tuple[Item, ItemResult]], request: FittedRequest) -> np.ndarray:
    results = Results(request)
    results.take(pieces[0][1])
    for number in order:
        results.merge(*pieces[number])
    assert results.answered == RISE.masks
    return results.snapshot().partials[0].sums


@pytest.mark.parametrize("seed", range(8))
def test_sums_are_the_same_in_whichever_order_pieces_come(seed: int):
    request = fitted(RISE)
    opening = Results(request)
    starts = range(0, RISE.masks, PIECE_QUERIES)
    items = [opening.item([(0, start, min(RISE.masks, start + PIECE_QUERIES))]) for start in starts]
    pieces = {number: (item, uneven(item, number)) for number, item in enumerate(items)}
    order = list(pieces)
    random.Random(seed).shuffle(order)
    expected = added(list(pieces), pieces, request)
    np.testing.assert_array_equal(added(order, pieces, request), expected)
    other = replace(request, request=replace(request.request, evidence=False))
    assert not other.piece
    assert not np.array_equal(added(order[::-1], pieces, other), added(list(pieces), pieces, other))


def test_what_is_answered_before_its_turn_does_not_count_yet():
    results = Results(fitted(RISE))
    first, second, third = (results.item([(0, start, start + 16)]) for start in (0, 16, 32))
    outcome = answered(first)
    results.take(outcome)
    results.merge(third, answered(third))
    assert results.answered == 0
    results.merge(first, outcome)
    assert results.answered == 16
    results.merge(second, answered(second))
    assert results.answered == 48


def test_a_range_is_one_task_for_each_piece_and_nothing_is_ordered():
    results = Results(fitted(ScoreCam(), GradCam(), GroupCam(groups=10)))
    item = results.item([(0, 32, 80), (1, 0, 0), (2, 0, 10)])
    assert item.reproducible
    assert [(task.position, task.start, task.stop, task.ordered) for task in item.tasks] == [
        (0, 32, 48, False),
        (0, 48, 64, False),
        (0, 64, 80, False),
        (1, 0, 0, False),
        (2, 0, 10, False),
    ]


@pytest.mark.parametrize("fields", [{"evidence": False}, {"precision": "auto"}, {"precision": "bfloat16"}])
def test_other_requests_have_no_pieces(fields: dict[str, object]):
    request = fitted(RISE, **fields)
    assert request.piece == 0
    item = Results(request).item([(0, 3, 90)])
    assert not item.reproducible
    assert [(task.start, task.stop, task.ordered) for task in item.tasks] == [(3, 90, True)]


def test_a_piece_grows_with_its_sums_so_that_those_of_a_step_fit_a_message():
    large = replace(MODEL, input_size=(640, 512))
    one, many = (
        ExplainRequest(
            IMAGE, (RISE,), tuple(Target(index=number) for number in range(targets)), evidence=True, precision="exact"
        )
        for targets in (1, 10)
    )
    sizes = [request.fit(replace(large, input_size=IMAGE.shape[:2])).piece for request in (one, many)]
    assert sizes == [PIECE_QUERIES] * 2
    big = np.zeros((640, 512, 3), np.uint8)
    fits = [replace(request, image=big).fit(large) for request in (one, many)]
    assert [request.piece for request in fits] == [2 * PIECE_QUERIES, 13 * PIECE_QUERIES]
    for request in fits:
        assert 512 / request.piece * request.sums_bytes <= 32 * PIECE_BYTES + request.sums_bytes
        assert request.step_bytes >= request.sums_bytes * min(100 // request.piece, 512 // request.piece)
