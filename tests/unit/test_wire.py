"""Our types to protobuf and back."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from camserve import methods, wire
from camserve.errors import KINDS, CamserveError, Internal, InvalidImage, InvalidInput, InvalidOption
from camserve.types import (
    FUSIONS,
    InputView,
    Item,
    ItemResult,
    Layer,
    MapCurves,
    ModelInfo,
    Partial,
    Prediction,
    StepResult,
    Target,
    Task,
)
from camserve.v1 import explain_pb2 as pb
from camserve.worker.v1 import step_pb2

u32 = st.integers(0, 2**32 - 1)
counts = st.integers(0, 10_000)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)  # surrogates are not Unicode text
float32s = st.floats(width=32, allow_nan=False)
seconds = st.floats(0, 1e6)

parameters = {
    "integer": lambda p: st.integers(int(p.minimum), int(p.maximum or 2**32 - 1)),
    "number": lambda p: st.floats(p.minimum, p.maximum),
    "choice": lambda p: st.sampled_from(p.choices),
}
specs = st.one_of(
    [
        st.fixed_dictionaries({p.name: parameters[p.type](p) for p in spec.parameters()}).map(lambda v, s=spec: s(**v))
        for spec in methods.METHODS.values()
    ]
)
targets = st.one_of(
    st.builds(Target, index=u32), st.builds(Target, label=texts), st.builds(Target, top_k=st.integers(1, 2**32 - 1))
)
pixels = hnp.arrays(
    st.sampled_from([np.dtype(np.uint8), np.dtype(np.float32)]),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(3)),
)
images = st.one_of(st.binary(max_size=50), pixels)
ranges = st.tuples(u32, u32).map(sorted)
tasks = st.builds(lambda position, method, span, layer: Task(position, method, *span, layer), u32, specs, ranges, texts)
items = st.builds(
    Item,
    image=images,
    targets=st.lists(targets, max_size=3).map(tuple),
    tasks=st.lists(tasks, max_size=3).map(tuple),
    top_predictions=u32,
    precision=st.sampled_from(["exact", "bfloat16"]),
)
predictions = st.builds(Prediction, index=u32, label=texts, probability=float32s)
views = st.builds(
    InputView,
    original_size=st.tuples(u32, u32),
    crop=st.tuples(float32s, float32s, float32s, float32s),
    size=st.tuples(u32, u32),
)
partials = st.builds(
    Partial,
    position=u32,
    queries=u32,
    sums=hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=4)),
)
results = st.builds(
    ItemResult,
    predictions=st.lists(predictions, max_size=3).map(tuple),
    targets=st.lists(predictions, max_size=3).map(tuple),
    view=views,
    partials=st.lists(partials, max_size=3).map(tuple),
)
errors = st.builds(lambda kind, text: kind(text), st.sampled_from(list(KINDS.values())), texts)
step_results = st.builds(
    StepResult,
    outcomes=st.lists(st.one_of(results, errors), max_size=4).map(tuple),
    stage_seconds=st.dictionaries(texts, seconds, max_size=3),
    worker=texts,
    memory_hits=u32,
    memory_misses=u32,
)
models = st.builds(
    ModelInfo,
    name=texts,
    version=texts,
    labels=st.lists(texts, max_size=4).map(tuple),
    input_size=st.tuples(u32, u32),
    layers=st.lists(st.builds(Layer, name=texts, channels=u32, height=u32, width=u32), max_size=3).map(tuple),
    default_layer=texts,
    source=texts,
    licence=texts,
    evaluation=st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
)


def resent(message):
    """The message after a journey as bytes."""
    return type(message).FromString(message.SerializeToString())


def same_image(one, other) -> bool:
    if isinstance(one, bytes):
        return one == other
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@given(specs)
def test_method_round_trip(spec):
    assert wire.method_from_proto(resent(wire.method_to_proto(spec))) == spec


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_without_parameters_has_its_defaults(name):
    message = pb.MethodSpec()
    getattr(message, name).SetInParent()
    assert wire.method_from_proto(resent(message)) == methods.parse_method(name)


@pytest.mark.parametrize("name", methods.METHODS)
def test_proto_and_catalogue_have_the_same_methods_and_parameters(name):
    fields = pb.MethodSpec.DESCRIPTOR.fields_by_name
    assert sorted(fields) == sorted([*methods.METHODS, methods.AUTO])
    parameters = methods.METHODS[name].parameters()
    body = fields[name].message_type.fields_by_name
    assert list(body) == [parameter.name for parameter in parameters]
    for parameter in parameters:
        if parameter.choices:
            values = [value.name.lower() for value in body[parameter.name].enum_type.values]
            assert values[0].endswith("_unspecified")
            assert values[1:] == list(parameter.choices)


def test_a_parameter_set_to_zero_is_not_taken_for_unset():
    spec = wire.method_from_proto(resent(pb.MethodSpec(group_cam=pb.GroupCam(theta=0))))
    assert spec == methods.GroupCam(theta=0)
    with pytest.raises(InvalidOption, match="groups must be at least 1, got 0"):
        wire.method_from_proto(resent(pb.MethodSpec(group_cam=pb.GroupCam(groups=0))))


def test_no_method_is_refused_with_the_names_that_exist():
    with pytest.raises(InvalidOption, match="there are cam, grad_cam, hires_cam, "):
        wire.method_from_proto(pb.MethodSpec())


def test_an_unknown_enum_value_is_refused():
    with pytest.raises(InvalidOption, match=r"variant.*77"):
        wire.method_from_proto(resent(pb.MethodSpec(group_cam=pb.GroupCam(variant=77))))


@pytest.mark.parametrize("theta", [math.nan, -1.0, 101.0, math.inf])
def test_a_parameter_out_of_range_is_refused(theta):
    with pytest.raises(InvalidOption, match="theta"):
        wire.method_from_proto(resent(pb.MethodSpec(group_cam=pb.GroupCam(theta=theta))))


@given(targets)
def test_target_round_trip(target):
    assert wire.target_from_proto(resent(wire.target_to_proto(target))) == target


def test_an_empty_target_is_refused():
    with pytest.raises(InvalidOption, match="exactly one, got 0"):
        wire.target_from_proto(pb.Target())


@pytest.mark.parametrize("number", [-1, 2**32, 10**30])
def test_a_number_that_no_field_holds_is_the_callers_fault(number):
    with pytest.raises(InvalidOption, match=str(number)):
        wire.target_to_proto(Target(index=number))
    with pytest.raises(InvalidOption, match=str(abs(number) + 2**32)):
        wire.method_to_proto(methods.GroupCam(groups=abs(number) + 2**32))


@given(predictions)
def test_prediction_round_trip(prediction):
    assert wire.prediction_from_proto(resent(wire.prediction_to_proto(prediction))) == prediction


@given(views)
def test_view_round_trip(view):
    assert wire.view_from_proto(resent(wire.view_to_proto(view))) == view


@pytest.mark.parametrize("precision", ["exact", "bfloat16"])
def test_precision_round_trip(precision):
    assert wire.precision_from_proto(wire.precision_to_proto(precision)) == precision


def test_unspecified_precision_is_exact():
    assert wire.precision_from_proto(pb.PRECISION_UNSPECIFIED) == "exact"


def test_unknown_precision_is_refused():
    with pytest.raises(InvalidOption, match="exact, bfloat16, got 'float16'"):
        wire.precision_to_proto("float16")
    with pytest.raises(InvalidOption, match="99"):
        wire.precision_from_proto(99)


@given(errors)
def test_error_round_trip(error):
    received = wire.error_from_proto(resent(wire.error_to_proto(error)))
    assert type(received) is type(error)
    assert str(received) == str(error)


def test_an_error_of_unknown_kind_is_internal():
    received = wire.error_from_proto(step_pb2.Error(kind="FromTheFuture", message="text"))
    assert type(received) is Internal
    assert str(received) == "text"


def test_every_error_class_can_travel():
    assert KINDS["InvalidImage"] is InvalidImage
    assert all(issubclass(kind, CamserveError) for kind in KINDS.values())


# Images


@given(images)
def test_image_round_trip(image):
    assert same_image(wire.image_from_proto(resent(wire.image_to_proto(image))), image)


def test_an_array_of_any_layout_arrives_as_it_looks():
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for view in (array[:, ::-1], array.transpose(1, 0, 2), np.asfortranarray(array)):
        np.testing.assert_array_equal(wire.image_from_proto(wire.image_to_proto(view)), view)
    big_endian = np.linspace(0, 1, 24, dtype=">f4").reshape(2, 4, 3)
    np.testing.assert_array_equal(wire.image_from_proto(wire.image_to_proto(big_endian)), big_endian)


@pytest.mark.parametrize("dtype", ["float64", "int64", "float16", "bool"])
def test_an_array_of_another_type_is_refused(dtype):
    with pytest.raises(InvalidImage, match=f"uint8 or float32, got {dtype}"):
        wire.image_to_proto(np.zeros((2, 2, 3), dtype=dtype))


def tensor(shape=(2, 2, 3), data=b"\0" * 12, data_type=pb.Tensor.UINT8) -> pb.Image:
    return pb.Image(tensor=pb.Tensor(data_type=data_type, shape=shape, data=data))


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (pb.Image(), "no image"),
        (tensor(data_type=pb.Tensor.DATA_TYPE_UNSPECIFIED), "UINT8 or FLOAT32"),
        (tensor(data_type=9), "UINT8 or FLOAT32"),
        (tensor(shape=(2, 2)), r"\[height, width, 3\], got \[2, 2\]"),
        (tensor(shape=(2, 2, 4)), r"got \[2, 2, 4\]"),
        (tensor(shape=(1, 2, 2, 3)), r"got \[1, 2, 2, 3\]"),
        (tensor(shape=(0, 2, 3), data=b""), r"got \[0, 2, 3\]"),
        (tensor(shape=()), r"got \[\]"),
        (tensor(data=b"\0" * 11), "has 12 bytes, got 11"),
        (tensor(data=b"\0" * 13), "has 12 bytes, got 13"),
        (tensor(data_type=pb.Tensor.FLOAT32), "has 48 bytes, got 12"),
        (tensor(shape=(2**32 - 1, 2**32 - 1, 3)), "got 12"),  # nothing of that size is made
    ],
)
def test_an_image_that_contradicts_itself_is_refused(message, match):
    with pytest.raises(InvalidImage, match=match):
        wire.image_from_proto(resent(message))


# Steps


@given(st.lists(items, max_size=3))
def test_step_round_trip(sent):
    received = [wire.item_from_proto(message) for message in resent(wire.step_to_proto(sent)).items]
    assert len(received) == len(sent)
    for one, other in zip(sent, received, strict=True):
        assert same_image(one.image, other.image)
        names = ("targets", "tasks", "top_predictions", "precision")
        assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]


@pytest.mark.parametrize("broken", ["image", "target", "method", "precision"])
def test_a_broken_item_is_the_clients_fault(broken):
    message = wire.step_to_proto([Item(b"x", (Target(index=0),), (Task(0, methods.GradCam(), 0, 0),))]).items[0]
    {
        "image": lambda: message.ClearField("image"),
        "target": lambda: message.targets.add(),
        "method": lambda: message.tasks.add(),
        "precision": lambda: setattr(message, "precision", 55),
    }[broken]()
    with pytest.raises(InvalidInput):
        wire.item_from_proto(resent(message))


@given(step_results)
def test_step_result_round_trip(sent):
    received = wire.step_result_from_proto(resent(wire.step_result_to_proto(sent)))
    assert replace(received, outcomes=()) == replace(sent, outcomes=())
    assert len(received.outcomes) == len(sent.outcomes)
    for one, other in zip(sent.outcomes, received.outcomes, strict=True):
        assert type(one) is type(other)
        if isinstance(one, CamserveError):
            assert str(one) == str(other)
        else:
            assert_same_result(one, other)


def assert_same_result(one: ItemResult, other: ItemResult) -> None:
    names = ("predictions", "targets", "view")
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    assert [(p.position, p.queries) for p in one.partials] == [(p.position, p.queries) for p in other.partials]
    for sent, received in zip(one.partials, other.partials, strict=True):
        np.testing.assert_array_equal(sent.sums, received.sums)
        assert sent.sums.shape == received.sums.shape


def test_a_reply_that_contradicts_itself_is_a_value_error():
    message = step_pb2.StepReply()
    message.items.add().result.partials.add(targets=1, height=2, width=2, sums=b"\0" * 12)
    with pytest.raises(ValueError, match="reshape"):
        wire.step_result_from_proto(message)


@given(models)
def test_model_round_trip(info):
    assert wire.model_from_proto(resent(wire.model_to_proto(info))) == info


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


def test_an_unknown_layer_is_refused_with_the_default_and_close_ones():
    info = ModelInfo("m", "1", (), (8, 8), (Layer("layer4.1", 2, 2, 2), Layer("layer3.1", 2, 2, 2)), "layer4.1")
    assert info.layer("") == info.layer("layer4.1") == info.layers[0]
    with pytest.raises(InvalidOption, match=r"unknown layer 'layer4\.2'; the default is 'layer4\.1'.*layer3\.1"):
        info.layer("layer4.2")


def test_curves_of_a_map_survive_the_journey():
    saliency = np.random.default_rng(0).random((5, 7), np.float32)
    item = Item(b"x", (Target(index=0),), (Task(4, MapCurves(saliency, 3, 9), 2, 6, "body"),))
    (task,) = wire.item_from_proto(resent(wire.step_to_proto([item])).items[0]).tasks
    assert (task.position, task.start, task.stop, task.layer) == (4, 2, 6, "body")
    assert isinstance(task.method, MapCurves)
    assert (task.method.target, task.method.steps) == (3, 9)
    np.testing.assert_array_equal(task.method.saliency, saliency)


def test_a_map_with_another_number_of_bytes_is_refused():
    message = wire.step_to_proto([Item(b"x", (), (Task(0, MapCurves(np.zeros((5, 7), np.float32), 3), 0, 2),))]).items[
        0
    ]
    message.tasks[0].curves.height = 6
    with pytest.raises(InvalidOption, match=r"\[6, 7\]"):
        wire.item_from_proto(message)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusion_survives_the_journey(fusion):
    assert wire.fusion_from_proto(wire.fusion_to_proto(fusion)) == fusion


def test_an_unknown_fusion_is_refused():
    with pytest.raises(InvalidOption, match="mean, max, got 'median'"):
        wire.fusion_to_proto("median")
    with pytest.raises(InvalidOption, match="unknown fusion 9"):
        wire.fusion_from_proto(9)
