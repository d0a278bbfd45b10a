"""What a network returns: its scores are found among it or named, and what is no score is refused with its shape."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from reference.models import CLASSES, PREPROCESSING, build, picture
from torch import Tensor, nn

from camserve import Engine
from camserve.errors import InvalidOption, Unsupported
from camserve.methods import METHODS
from camserve.scores.returned import select
from camserve.types import Target

Named = namedtuple("Named", ["aux", "scores"])  # as networks have it


@dataclass
class Fields:
    hidden: Tensor
    scores: Tensor


class HuggingFaceOutput(OrderedDict):
    """Does what `transformers.utils.ModelOutput` (4.57) does: a dict of the fields that are not None.

    Its fields are keys and attributes, it has no length of fields that are None, a number or a slice gives what stands
    at that place of the tuple of its values, and iterating gives keys.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __getitem__(self, key):
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __setattr__(self, name, value):
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __delitem__(self, *given):
        raise TypeError("a ModelOutput is not changed")

    setdefault = pop = update = __delitem__

    def to_tuple(self) -> tuple:
        return tuple(self[key] for key in self.keys())


@dataclass
class ModelOutput(HuggingFaceOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Layers:
    """A plain dataclass that holds tuples of tuples, and one of its own kind."""

    stages: tuple
    inner: Layers | None = None


class Wrapped(nn.Module):
    """Returns the scores of a small network in something else."""

    def __init__(self, returned, name="perceptron", seed=2) -> None:
        super().__init__()
        self.net, self.returned = build(name, seed), returned

    def forward(self, x: Tensor):
        return self.returned(self.net(x))


FOUND = {
    "tensor": (lambda z: z, ""),
    "tuple": (lambda z: (z, z * 0), "0"),
    "tuple with maps": (lambda z: (z[:, :, None, None].expand(-1, -1, 2, 2), z), "1"),
    "tuple with whole numbers": (lambda z: (z.argmax(1), z), "1"),
    "list": (lambda z: [z], "0"),
    "named tuple": (lambda z: Named(None, z), "scores"),
    "dict": (lambda z: {"features": z * 0, "logits": z}, "logits"),
    "dict without logits": (lambda z: {"loss": z.sum(), "scores": z}, "scores"),
    "dict of texts": (lambda z: {"name": "net", "scores": z}, "scores"),
    "nested": (lambda z: ({"logits": z}, None), "0.logits"),
    "dataclass": (lambda z: Fields(z[:, :, None].expand(-1, -1, 3), z), "scores"),
    "ModelOutput": (lambda z: ModelOutput(logits=z, hidden_states=(z, z)), "logits"),
    "one by one": (lambda z: z[:, :, None, None], ""),
    "squeezed": (lambda z: z[:, :, None, None].squeeze(), ""),
}


@pytest.mark.parametrize("kind", FOUND)
def test_the_scores_are_found_and_every_method_answers_as_for_the_plain_network(kind):
    returned, name = FOUND[kind]
    methods = [
        "grad_cam",
        "score_cam",
        ("group_cam", {"groups": 4}),
        "ablation_cam",
        ("integrated_gradients", {"steps": 2}),
    ]
    plain = Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
    expected = plain.explain(picture(2), methods, [3])
    module = Wrapped(returned)
    module.train()
    engine = Engine(module, preprocessing=PREPROCESSING)
    found = engine.explain(picture(2), methods, [3])
    assert engine.network.output == name
    assert engine.info.default_layer == f"net.{plain.info.default_layer}"
    assert len(engine.info.labels) == CLASSES
    for one, other in zip(found.maps, expected.maps, strict=True):
        np.testing.assert_allclose(one.array, other.array, rtol=0, atol=1e-5)  # float32, in passes of other sizes
    assert found.predictions == expected.predictions
    assert all(child.training for child in module.modules())
    assert not any(child._forward_hooks for child in module.modules())


ONE_NUMBER = {
    "(B,)": lambda z: z[:, 0],
    "(B, 1)": lambda z: z[:, :1],
    "(B, 1, 1, 1)": lambda z: z[:, :1, None, None],
    "squeezed": lambda z: z[:, :1].squeeze(),
}


@pytest.mark.parametrize("end", ONE_NUMBER)
def test_one_number_for_each_image_comes_in_many_shapes(end):
    engine = Engine(Wrapped(ONE_NUMBER[end]), preprocessing=PREPROCESSING, outputs="binary")
    with torch.no_grad():
        z = build("perceptron", 2)(engine.network.normalise(torch.from_numpy(picture(2))[None]))[0, 0]
    said = {one.index: one.probability for one in engine.explain(picture(2), []).predictions}
    assert said == pytest.approx({0: torch.sigmoid(-z).item(), 1: torch.sigmoid(z).item()}, rel=1e-5)


def hugging_face(z: Tensor) -> ModelOutput:
    maps = z[:, :, None, None].expand(-1, -1, 2, 3)
    return ModelOutput(loss=None, logits=z, hidden_states=(maps, -2 * z), attentions=(maps,))


def nested(z: Tensor) -> Layers:
    return Layers(stages=((z * 3, z * 4), [z[:, :2], {"a": z * 5}]), inner=Layers(stages=(z * 6,)))


NAMED = {
    "the first": (hugging_face, None, 1, "logits"),
    "an attribute": (hugging_face, "logits", 1, "logits"),
    "an index among those that are not None": (hugging_face, 0, 1, "logits"),
    "a place in a field": (hugging_face, "hidden_states.1", -2, "hidden_states.1"),
    "a place in a place": (hugging_face, "1.1", -2, "hidden_states.1"),
    "from the end": (hugging_face, "-2.-1", -2, "hidden_states.1"),
    "the first of a tree": (nested, None, 3, "stages.0.0"),
    "a place in a tree": (nested, "stages.0.1", 4, "stages.0.1"),
    "places in a tree": (nested, "0.0.1", 4, "stages.0.1"),
    "a key in a tree": (nested, "stages.1.1.a", 5, "stages.1.1.a"),
    "its own kind": (nested, "inner.stages.0", 6, "inner.stages.0"),
}


@pytest.mark.parametrize("name", NAMED)
def test_an_output_is_named_by_attribute_key_or_index_however_deep_it_lies(name):
    returned, output, factor, path = NAMED[name]
    engine = Engine(Wrapped(returned), preprocessing=PREPROCESSING, output=output)
    plain = Engine(Wrapped(lambda z: factor * z), preprocessing=PREPROCESSING)
    assert engine.network.output == path
    found, expected = (one.explain(picture(2), ["grad_cam", "score_cam"], [3]) for one in (engine, plain))
    assert found.predictions == expected.predictions
    for one, other in zip(found.maps, expected.maps, strict=True):
        np.testing.assert_allclose(one.array, other.array, rtol=0, atol=1e-5)  # float32, in passes of other sizes


@pytest.mark.parametrize("output", ["loss", "hidden_states", "hidden_states.2", "2", "logits.0", "keys"])
def test_what_a_model_output_does_not_have_is_refused_with_what_it_has(output):
    with pytest.raises((InvalidOption, Unsupported), match=rf"output '{output}'.*(ModelOutput of 'logits'|is \()"):
        Engine(Wrapped(hugging_face), preprocessing=PREPROCESSING, output=output)


@pytest.mark.parametrize("output", ["1", 1, -1, "scores"])
def test_an_output_is_named_by_field_or_index(output):
    module = Wrapped(lambda z: Named(z[:, :3], -z))
    engine = Engine(module, preprocessing=PREPROCESSING, output=output)
    plain = Engine(Wrapped(lambda z: -z), preprocessing=PREPROCESSING)
    assert engine.explain(picture(2), []).predictions == plain.explain(picture(2), []).predictions
    assert engine.network.other_outputs == ("aux",)


def test_labels_tell_which_of_several_outputs_is_meant():
    module = Wrapped(lambda z: (torch.cat([z, z], dim=1), z))
    assert len(Engine(module, preprocessing=PREPROCESSING).info.labels) == 2 * CLASSES
    labels = [f"number {index}" for index in range(CLASSES)]
    assert Engine(module, preprocessing=PREPROCESSING, labels=labels).network.output == "1"


OF_MAPS = {
    "maps alone": (lambda z: maps_of(z), None, ""),
    "a dict as torchvision's": (lambda z: {"out": maps_of(z), "aux": maps_of(-z)}, None, "out"),
    "numbers beside them": (lambda z: (z, z[:, :, None, None], maps_of(z)), None, "1"),
    "as many as wanted": (lambda z: (maps_of(z)[:, :3], maps_of(z)), 7, "1"),
}


def maps_of(z: Tensor) -> Tensor:
    return z[:, :, None, None] + torch.arange(20.0).reshape(4, 5)


@pytest.mark.parametrize("kind", OF_MAPS)
def test_maps_are_found_where_maps_are_wanted_and_come_in_one_row_for_each_image(kind):
    returned, wanted, name = OF_MAPS[kind]
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    module = Wrapped(returned).eval()
    found = select(module, images, wanted=wanted, axes=3)
    shape = (7, 1, 1) if name == "1" and wanted is None else (7, 4, 5)
    assert (found.output, found.shape) == (name, shape)
    with torch.no_grad():
        one, two = found.network(images[:1]), found.network(images)
    assert one.shape == (1, math.prod(shape))
    plain = build("perceptron", 2)(images).detach()
    expected = plain if shape == (7, 1, 1) else maps_of(plain)
    torch.testing.assert_close(two.reshape(2, *shape), expected.reshape(2, *shape), rtol=0, atol=1e-5)


def test_numbers_are_no_maps():
    images = torch.rand(2, 3, 24, 24)
    with pytest.raises(Unsupported, match=r"\(images, classes, height, width\).* for 2 images; it returned a tensor"):
        select(Wrapped(lambda z: z).eval(), images, axes=3)
    with pytest.raises(Unsupported, match=r"\(images, classes, height, width\).*; output '0' is \(2, 7\)"):
        select(Wrapped(lambda z: (z, maps_of(z))).eval(), images, "0", axes=3)


REFUSED = {
    "nothing": (lambda z: None, {}, "it returned NoneType"),
    "maps": (lambda z: z[:, :, None, None].expand(-1, -1, 4, 5), {}, r"it returned a tensor \(2, 7, 4, 5\) float32"),
    "whole numbers": (lambda z: z.argmax(1), {}, r"it returned a tensor \(2,\) int64"),
    "a mean of the batch": (lambda z: z.mean(), {}, r"it returned a tensor \(\) float32"),
    "no numbers": (lambda z: z[:, :0], {}, r"it returned a tensor \(2, 0\) float32"),
    "a text": (lambda z: "tabby", {}, "it returned str"),
    "dict of maps": (lambda z: {"out": z[:, :, None, None].expand(-1, -1, 4, 5)}, {}, r"dict of 'out' \(2, 7, 4, 5\)"),
    "named maps": (lambda z: (z, z[:, :, None].expand(-1, -1, 9)), {"output": 1}, r"output '1' is \(2, 7, 9\) float32"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_scores_is_refused_with_what_was_wanted_and_what_came(kind):
    returned, options, message = REFUSED[kind]
    with pytest.raises(Unsupported, match=rf"\(images, numbers\).* for 2 images; .*{message}"):
        Engine(Wrapped(returned), preprocessing=PREPROCESSING, **options)


@pytest.mark.parametrize("output", ["boxes", "7", "-3", "--1", "0.1", ""])
def test_an_output_that_is_not_there_is_refused_with_those_that_are(output):
    with pytest.raises(InvalidOption, match=r"no output .*; it returned tuple of '0' \(2, 7\) float32"):
        Engine(Wrapped(lambda z: (z, None)), preprocessing=PREPROCESSING, output=output)


def test_a_network_of_one_output_asks_what_it_is():
    with pytest.raises(InvalidOption, match=r"one output: say whether .* --outputs binary\|value"):
        Engine(Wrapped(lambda z: z[:, :1]), preprocessing=PREPROCESSING)
    with pytest.raises(InvalidOption, match="a softmax of one is always 1"):
        Engine(Wrapped(lambda z: z[:, :1]), preprocessing=PREPROCESSING, outputs="softmax")


def test_outputs_that_sum_to_one_are_probabilities():
    engine = Engine(Wrapped(lambda z: z.softmax(1)), preprocessing=PREPROCESSING)
    plain = Engine(Wrapped(lambda z: z), preprocessing=PREPROCESSING)
    assert (engine.info.outputs, plain.info.outputs) == ("probabilities", "softmax")
    one, other = (each.explain(picture(2), []).predictions for each in (engine, plain))
    assert [each.index for each in one] == [each.index for each in other]
    assert [each.probability for each in one] == pytest.approx([each.probability for each in other], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": "value", "units": ["px", "kg"]}, "7 numbers, got 2 units"),
        ({"outputs": "sigmoid", "units": ["px"]}, "outputs sigmoid have none"),
        ({"outputs": "binary"}, "this network has 7 outputs"),
        ({"outputs": "multi"}, "outputs must be one of softmax"),
        ({"outputs": "value", "labels": ["a"]}, "7 numbers, got 1 labels"),
    ],
)
def test_descriptions_that_do_not_fit_the_outputs_are_refused(options, message):
    with pytest.raises(InvalidOption, match=message):
        Engine(Wrapped(lambda z: z), preprocessing=PREPROCESSING, **options)


# Numbers that are none


class Spoilt(nn.Module):
    """Has NaN or infinity among its activations or its outputs where the image is bright on the whole."""

    def __init__(self, where: str, what: float) -> None:
        super().__init__()
        net = build("perceptron", 2)
        self.features, self.head, self.where, self.what = net.features, net.head, where, what

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean(dim=(1, 2, 3)) > 0.5
        features = self.features(x)
        if self.where == "activations":  # which the outputs do not show
            spoilt = torch.where(bright, self.what, features[:, 0, 0, 0])
            features = torch.cat([features[:, :1].index_fill(2, torch.tensor([0]), 0), features[:, 1:]], dim=1)
            features[:, 0, 0, 0] = spoilt
            return self.head(self.layer(features).nan_to_num(0, 0, 0))
        outputs = self.head(features)
        return torch.cat([outputs[:, :6], torch.where(bright, self.what, outputs[:, 6])[:, None]], dim=1)


class SpoiltLayer(Spoilt):
    """The layer itself has them."""

    def __init__(self, what: float) -> None:
        super().__init__("activations", what)
        self.layer = nn.Identity()


BRIGHT = np.full((40, 48, 3), 250, np.uint8)
ANY_NETWORK = [name for name in METHODS if not METHODS[name].needs and name != "xrai"]


@pytest.mark.parametrize("what", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["outputs", "activations"])
def test_numbers_that_are_not_finite_are_one_error_in_every_method(where, what):
    module = Spoilt(where, what) if where == "outputs" else SpoiltLayer(what)
    layer = "features.8" if where == "outputs" else "layer"
    engine = Engine(module, preprocessing=PREPROCESSING, layer=layer if where == "outputs" else None)
    texts = set()
    for name in ANY_NETWORK:
        spec = METHODS[name](**({"groups": 4} if name == "group_cam" else {}))
        with pytest.raises(Unsupported) as caught:
            engine.explain(BRIGHT, [spec], [Target(index=0)], layer=layer)
        texts.add(str(caught.value))
    (text,) = texts
    assert f"{where}" in text
    assert "are not finite for this image: NaN or infinite" in text
    assert engine.explain(picture(2), ["grad_cam"], [0], layer=layer).maps[0].array.any()


def test_a_single_number_is_no_vector():
    with pytest.raises(InvalidOption, match="are vectors, and this network has one output: its direction is none"):
        Engine(Wrapped(lambda z: z[:, :1]), preprocessing=PREPROCESSING, outputs="embedding")
