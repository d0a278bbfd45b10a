"""What travels between the gateway and a worker, in both directions, without either."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from codec_values import (
    float32s,
    images,
    models,
    precisions,
    predictions,
    same_image,
    seconds,
    several,
    specs,
    targets,
    texts,
    u32,
    views,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from camserve.codecs import step
from camserve.errors import KINDS, CamserveError, ImageMissing, Internal, InvalidImage, InvalidInput, InvalidOption
from camserve.gateway.pool.fake import MODEL
from camserve.methods import GradCam
from camserve.methods.work import KINDS as WORK_KINDS
from camserve.types import (
    DeviceMemory,
    Explained,
    InputView,
    Item,
    ItemResult,
    MapCurves,
    Partial,
    Ranking,
    StepResult,
    Target,
    Task,
)
from camserve.worker.v1 import step_pb2

VIEW = InputView((4, 4), (0.0, 0.0, 4.0, 4.0), (4, 4))

numbers = st.lists(u32, max_size=4).map(tuple)


def float32_arrays(dimensions: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, hnp.array_shapes(min_dims=dimensions, max_dims=dimensions, max_side=4))


works = (
    specs
    | st.builds(MapCurves, saliency=float32_arrays(2), target=targets, steps=u32)
    | st.builds(Ranking, attribution=float32_arrays(3))
)


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    start, stop = sorted((draw(u32), draw(u32)))
    asked = draw(numbers)
    if asked:
        start, stop = 7, 7 + len(asked)
    return Task(draw(u32), draw(works), start, stop, draw(texts), asked, draw(st.booleans()), draw(numbers))


items = st.builds(
    Item,
    image=st.none() | images,
    targets=st.lists(targets, max_size=3).map(tuple),
    tasks=st.lists(tasks(), max_size=3).map(tuple),
    text=texts,
    top_predictions=u32,
    precision=precisions,
    digest=st.binary(max_size=16),
)
partials = st.builds(
    Partial,
    position=u32,
    queries=u32,
    sums=st.one_of(map(float32_arrays, range(2, 6))),
    order=numbers,
    context=st.none() | float32_arrays(3),
    labels=numbers,
    energies=st.lists(st.floats(0, allow_infinity=False), min_size=1, max_size=3).map(tuple),
)
explained = st.builds(Explained, target=targets, score=float32s, classes=several(predictions))
results = st.builds(
    ItemResult,
    predictions=st.lists(predictions, max_size=3).map(tuple),
    targets=st.lists(explained, max_size=3).map(tuple),
    view=views,
    partials=st.lists(partials, max_size=3).map(tuple),
)
failures = st.builds(lambda kind, text: kind(text), st.sampled_from(list(KINDS.values())), texts)
step_results = st.builds(
    StepResult,
    outcomes=st.lists(st.one_of(results, failures), max_size=4).map(tuple),
    stage_seconds=st.dictionaries(texts, seconds, max_size=3),
    worker=texts,
    memory_hits=u32,
    memory_misses=u32,
    device_memory=st.none() | st.builds(DeviceMemory, texts, st.integers(0, 2**63), st.integers(0, 2**63)),
    made=st.dictionaries(st.sampled_from(WORK_KINDS), u32),
    version=texts,
    weights=texts,
    keeps_images=st.booleans(),
)


def assert_same_array(one: np.ndarray | None, other: np.ndarray | None) -> None:
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.shape == other.shape
        np.testing.assert_array_equal(one, other)


def assert_same_work(one: object, other: object) -> None:
    assert type(one) is type(other)
    if isinstance(one, MapCurves) and isinstance(other, MapCurves):
        assert (one.target, one.steps) == (other.target, other.steps)
        assert_same_array(one.saliency, other.saliency)
    elif isinstance(one, Ranking) and isinstance(other, Ranking):
        assert_same_array(one.attribution, other.attribution)
    else:
        assert one == other


def journey(*sent: Item) -> tuple[Item | CamserveError, ...]:
    received = step.request_from_bytes(step.request_to_bytes(sent))
    assert received is not None
    return received


def test_an_image_is_not_copied_into_the_request_of_a_step():
    sent = Item(bytes(10_000), (), ())
    assert any(piece is sent.image for piece in step.request_pieces([sent]))


@given(st.lists(items, max_size=3))
def test_the_items_of_a_step_arrive_as_they_were_sent(sent):
    received = journey(*sent)
    assert len(received) == len(sent)
    for one, other in zip(sent, received, strict=True):
        assert isinstance(other, Item)
        assert same_image(one.image, other.image)
        assert replace(other, image=None, tasks=()) == replace(one, image=None, tasks=())
        for left, right in zip(one.tasks, other.tasks, strict=True):
            assert_same_work(left.method, right.method)
            assert replace(right, method=GradCam()) == replace(left, method=GradCam())


@pytest.mark.parametrize("remaining_s", [1e-6, 3.0, 4000.0])
def test_only_the_time_that_remains_travels(remaining_s, monkeypatch):
    """The clocks of two machines may be far apart."""
    item = Item(b"x", (), ())
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    data = step.request_to_bytes([replace(item, expires_s=1000.0 + remaining_s)])
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    (received,) = step.request_from_bytes(data)
    assert received.expires_s == pytest.approx(5.0 + remaining_s, abs=1e-9)


def test_what_has_expired_stays_expired_and_what_never_does_stays_so(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    data = step.request_to_bytes([Item(b"x", (), (), expires_s=990.0), Item(b"x", (), ())])
    monkeypatch.setattr(time, "monotonic", lambda: 50.0)
    late, never = step.request_from_bytes(data)
    assert late.expires_s == pytest.approx(50.0, abs=1e-6)
    assert late.expires_s < math.inf
    assert never.expires_s == math.inf


def test_an_image_that_the_worker_should_have_does_not_travel():
    whole, light = Item(b"x" * 10_000, (), (), digest=b"name"), Item(None, (), (), digest=b"name")
    assert len(step.request_to_bytes([light])) < 100 < 10_000 < len(step.request_to_bytes([whole]))
    (received,) = journey(light)
    assert (received.image, received.digest) == (None, b"name")


def test_a_request_for_the_description_is_no_step():
    assert step.request_from_bytes(step.DESCRIBE) is None


def test_bytes_that_are_no_request_are_refused():
    with pytest.raises(InvalidInput, match=r"not a camserve\.worker\.v1\.WorkerRequest"):
        step.request_from_bytes(b"\xff\xff\xff")


def harm_tensor(item: step_pb2.Item) -> None:
    item.image.tensor.shape.append(3)


def harm_image(item: step_pb2.Item) -> None:
    item.image.ClearField("encoded")


def harm_target(item: step_pb2.Item) -> None:
    item.targets.add()


def harm_method(item: step_pb2.Item) -> None:
    item.tasks.add()


def harm_parameter(item: step_pb2.Item) -> None:
    item.tasks.add().method.group_cam.theta = 200


def harm_range(item: step_pb2.Item) -> None:
    item.tasks.add(start=3, stop=2).method.grad_cam.SetInParent()


def harm_numbers(item: step_pb2.Item) -> None:
    item.tasks.add(start=0, stop=2, numbers=[1]).method.score_cam.SetInParent()


def harm_precision(item: step_pb2.Item) -> None:
    item.precision = 55


def harm_curves(item: step_pb2.Item) -> None:
    item.tasks.add().curves.saliency.CopyFrom(step_pb2.Array(shape=[6, 7], data=b"\0" * 4 * 41))


def harm_ranking(item: step_pb2.Item) -> None:
    item.tasks.add().ranking.attribution.CopyFrom(step_pb2.Array(shape=[1, 2, 2], data=b"\0" * 15))


@pytest.mark.parametrize(
    ("harm", "kind", "text"),
    [
        (harm_image, InvalidImage, "no image"),
        (harm_tensor, InvalidImage, "data_type must be"),
        (harm_target, InvalidOption, "exactly one, got 0"),
        (harm_method, InvalidOption, "names no method"),
        (harm_parameter, InvalidOption, r"theta must be 0\.\.100, got 200"),
        (harm_range, InvalidOption, r"0 <= start <= stop, got 3\.\.2"),
        (harm_numbers, InvalidOption, "2 queries, 1 numbers"),
        (harm_precision, InvalidOption, "unknown precision 55"),
        (harm_curves, InvalidInput, r"shape \(6,7\)"),
        (harm_ranking, InvalidInput, "multiple of element size"),
    ],
)
def test_an_item_that_cannot_be_read_is_its_own_error(harm, kind, text):
    item = Item(b"x", (Target(index=0),), (Task(0, GradCam(), 0, 0),))
    message = step_pb2.WorkerRequest.FromString(step.request_to_bytes([item] * 3))
    harm(message.step.items[1])
    first, broken, last = step.request_from_bytes(message.SerializeToString())
    assert first == last == item
    assert isinstance(broken, kind)
    with pytest.raises(kind, match=text):
        raise broken


# Results


@given(step_results)
def test_the_result_of_a_step_arrives_as_it_was_sent(sent):
    received = step.result_from_bytes(step.result_to_bytes(sent))
    assert replace(received, outcomes=()) == replace(sent, outcomes=())
    assert len(received.outcomes) == len(sent.outcomes)
    for one, other in zip(sent.outcomes, received.outcomes, strict=True):
        assert type(one) is type(other)
        if isinstance(one, CamserveError):
            assert str(one) == str(other)
        else:
            assert_same_result(one, other)


def assert_same_result(one: ItemResult, other: ItemResult) -> None:
    assert replace(one, partials=()) == replace(other, partials=())
    assert len(one.partials) == len(other.partials)
    for sent, received in zip(one.partials, other.partials, strict=True):
        assert_same_array(sent.sums, received.sums)
        assert_same_array(sent.context, received.context)
        names = ("position", "queries", "order", "energies", "labels")
        assert [getattr(sent, name) for name in names] == [getattr(received, name) for name in names]


def test_sums_are_sent_as_float32_whatever_they_are_kept_as():
    sums = np.linspace(0, 1, 12).reshape(1, 3, 4)
    for dtype in ("<f8", ">f4", "<f2"):
        partial = Partial(0, 1, sums.astype(dtype))
        sent = StepResult((ItemResult((), (), VIEW, (partial,)),), {}, "w")
        (outcome,) = step.result_from_bytes(step.result_to_bytes(sent)).outcomes
        assert outcome.partials[0].sums.dtype == np.float32
        np.testing.assert_array_equal(outcome.partials[0].sums, sums.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([1, 2, 2], b"\0" * 12),
        ([1, 2, 2], b"\0" * 20),
        ([1, 2, 2], b"\0" * 15),
        ([], b"\0" * 8),
        ([2**31] * 3, b"\0" * 4),
    ],
)
def test_an_array_whose_shape_does_not_fit_is_a_value_error(shape, data):
    message = step_pb2.StepReply()
    message.items.add().result.partials.add().sums.CopyFrom(step_pb2.Array(shape=shape, data=data))
    with pytest.raises(ValueError, match=r"reshape|size"):
        step.result_from_bytes(step_pb2.WorkerReply(step=message).SerializeToString())


def test_a_kind_of_work_that_this_side_does_not_know_is_left_out():
    message = step_pb2.WorkerReply(step=step_pb2.StepReply(made={"masked_forward": 3, "from_the_future": 5}))
    assert step.result_from_bytes(message.SerializeToString()).made == {"masked_forward": 3}


@pytest.mark.parametrize(
    "data", [b"\xff\xff", b"", step.description_to_bytes(replace(MODEL, name="other"), "worker")], ids=len
)
def test_an_answer_that_is_no_result_is_a_value_error(data):
    with pytest.raises(ValueError, match=r"no WorkerReply|expected step, got (None|describe)"):
        step.result_from_bytes(data)


# Errors and descriptions


@given(failures)
def test_an_error_of_the_whole_step_arrives_as_it_was_sent(error):
    data = step.error_to_bytes(error)
    for read in (step.result_from_bytes, step.description_from_bytes):
        with pytest.raises(CamserveError) as received:
            read(data)
        assert type(received.value) is type(error)
        assert str(received.value) == str(error)


def test_an_error_of_unknown_kind_is_internal():
    message = step_pb2.WorkerReply(error=step_pb2.Error(kind="FromTheFuture", message="text"))
    with pytest.raises(CamserveError, match=r"^text$") as received:
        step.result_from_bytes(message.SerializeToString())
    assert type(received.value) is Internal


def test_every_error_class_can_travel():
    assert KINDS["InvalidImage"] is InvalidImage
    assert KINDS["ImageMissing"] is ImageMissing
    assert all(issubclass(kind, CamserveError) for kind in KINDS.values())


@given(models)
def test_a_description_arrives_as_it_was_sent(info):
    assert step.description_from_bytes(step.description_to_bytes(info, "worker")) == info


def test_a_result_is_no_description():
    with pytest.raises(ValueError, match="expected describe, got step"):
        step.description_from_bytes(step.result_to_bytes(StepResult((), {}, "w")))


# The monoid


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_merging_partials_does_not_depend_on_the_order(sizes, random):
    rng = np.random.default_rng(sum(sizes))
    parts = [Partial(3, size, rng.standard_normal((2, 3, 3)).astype(np.float32)) for size in sizes]
    shuffled = parts[:]
    random.shuffle(shuffled)
    one, other = merged(parts), merged(shuffled)
    assert (one.position, one.queries) == (other.position, other.queries) == (3, sum(sizes))
    # Sums of float32 in float64: what is lost lies 29 bits below.
    np.testing.assert_allclose(one.sums, other.sums, rtol=1e-12, atol=1e-14)


def merged(parts: list[Partial]) -> Partial:
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


@pytest.mark.parametrize("reverse", [False, True])
def test_what_only_one_partial_has_is_kept(reverse):
    context = np.ones((2, 2, 2), np.float32)
    first = Partial(3, 1, np.ones((1, 2, 2)), order=(1, 0), energies=(2.0, 1.0), context=context, labels=(4, 5))
    parts = [first, Partial(3, 2, np.ones((1, 2, 2)))]
    one = merged(parts[::-1] if reverse else parts)
    assert (one.order, one.energies, one.labels) == ((1, 0), (2.0, 1.0), (4, 5))
    assert one.context is context


def test_an_answer_that_explains_no_target_cannot_be_read():
    """It is the worker's fault, so it must not look like the client's."""
    reply = step_pb2.WorkerReply()
    reply.step.items.add().result.targets.add(score=0.5)
    with pytest.raises(ValueError, match="a worker explains no target"):
        step.result_from_bytes(reply.SerializeToString())


def test_an_order_without_energies_is_that_of_a_worker_from_before_they_were_sent():
    partial = Partial(0, 3, np.ones((1, 2, 2), np.float32), order=(2, 0, 1))
    outcome = ItemResult((), (), VIEW, (partial,))
    (received,) = step.result_from_bytes(step.result_to_bytes(StepResult((outcome,), {}, "w"))).outcomes
    assert isinstance(received, ItemResult)
    assert (received.partials[0].order, received.partials[0].energies) == ((2, 0, 1), (1.0, 1.0, 1.0))
