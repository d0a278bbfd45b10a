"""Scores: what each kind of outputs says, which targets it takes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from camserve.errors import CamserveError, InvalidOption, Unsupported
from camserve.saliency.masks import loss
from camserve.scores import SCORES, find_outputs, make_score
from camserve.scores.classes import SUM_TOLERANCE
from camserve.scores.score import QUERY_SIZE
from camserve.types import OUTPUTS, Against, Contrast, Finer, Prediction, Target, Value, Vector
from camserve.types.tokenisers import Words

LOGITS = torch.tensor([0.5, -1.0, 3.0, 2.0, 3.0])


def of(index: int) -> Target:
    return Target(index=index)


def test_every_kind_of_outputs_has_a_score():
    assert tuple(SCORES) == OUTPUTS
    assert [kind.kind for kind in SCORES.values()] == list(OUTPUTS)
    with pytest.raises(InvalidOption, match=r"outputs must be one of softmax, .*, got 'logits'"):
        make_score("logits")


def test_the_most_probable_class_comes_first_and_of_equal_ones_that_of_lower_index():
    for kind in ("softmax", "sigmoid"):
        said = make_score(kind).predictions(LOGITS)
        assert [one.index for one in said.top(9)] == [2, 4, 3, 0, 1]
    (first,) = make_score("softmax").predictions(LOGITS).top(1)
    assert first == Prediction(2, "", probability=pytest.approx(LOGITS.softmax(0)[2].item()))
    assert make_score("sigmoid").predictions(LOGITS).of([1])[0].probability == pytest.approx(1 / (1 + np.exp(1)))


def test_a_contrast_that_weighs_others_twice_is_not_taken_for_the_opposite_of_a_class():
    """1 - 2 is -1, as the weight of an opposite is, whose probability counts from 1."""
    contrast = Contrast(of(2), (of(3),), 2.0)
    p = LOGITS.softmax(0)
    found = make_score("softmax").targets([contrast, Against(of(2))]).query_value(LOGITS[None])[0]
    torch.testing.assert_close(found, torch.stack([p[2] - 2 * p[3], 1 - p[2]]))


def test_a_small_difference_has_the_rounding_of_what_it_is_a_difference_of():
    """Else a network that answers all queries alike would have a map of rounding errors."""
    targets = make_score("softmax").targets([of(0), Contrast(of(0), (of(1),))])
    before = torch.tensor([[1e-4, 1e-4]])
    after = before + 3e-7  # a few units in the last place of the probabilities 0.5 and 0.4999
    assert (loss(before, after, targets.query_size) != 0).tolist() == [[True, False]]
    outputs = torch.tensor([[300.0, 299.0]])
    values = targets.value(outputs)
    assert targets.size(outputs).tolist() == [[0, 599]]
    assert (loss(values, values + 1e-3, targets.size(outputs)) != 0).tolist() == [[False, False]]


def test_yes_or_no_are_two_classes_of_one_logit():
    score, z = make_score("binary"), torch.tensor([2.0])
    assert score.names(1) == ("no", "yes")
    yes, no = score.predictions(z).top(2)
    assert (yes.index, no.index) == (1, 0)
    assert yes.probability == pytest.approx(0.880797, abs=1e-6)  # the README's: sigmoid(2)
    assert no.probability == pytest.approx(1 - 0.880797, abs=1e-6)


def test_a_sure_no_has_a_probability_that_is_not_rounded_away():
    targets = make_score("binary").targets([of(0)])
    assert targets.query_value(torch.tensor([[40.0]])).item() == pytest.approx(np.exp(-40), rel=1e-6)


def test_a_single_probability_is_that_of_yes():
    score = make_score("probabilities")
    assert (score.classes(1), score.names(1)) == (2, ("no", "yes"))
    assert [one.index for one in score.predictions(torch.tensor([0.2])).top(2)] == [0, 1]


def test_the_logarithm_of_a_probability_of_zero_is_finite_and_so_is_its_gradient():
    probabilities = torch.tensor([[0.0, 1.0, 1e-42]], requires_grad=True)
    value = make_score("probabilities").targets([of(0), of(1), of(2)]).value(probabilities)
    (gradient,) = torch.autograd.grad(value.sum(), probabilities)
    assert value.isfinite().all()
    assert gradient.tolist() == [[0.0, 1.0, 0.0]]


def test_numbers_keep_their_order_and_one_that_is_named_alone_goes_up():
    score = make_score("value")
    said = score.predictions(torch.tensor([3.0, 9.0]))
    assert said.top(5) == (Prediction(0, "", value=3.0), Prediction(1, "", value=9.0))
    assert score.resolved(Target(top_k=1), torch.tensor([3.0, 9.0])) == (Value(of(0)),)
    assert score.resolved(of(1), torch.tensor([3.0, 9.0])) == (Value(of(1)),)


def test_references_are_named_by_index_and_the_nearest_comes_first():
    score = make_score("embedding", np.array([[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0]]))
    outputs = torch.tensor([3.0, 2.9])
    said = score.predictions(outputs).top(2)
    assert [one.index for one in said] == [1, 0]
    assert said[0].similarity == pytest.approx(5.9 / np.sqrt(2 * (9 + 2.9**2)))
    assert score.resolved(Target(top_k=2), outputs) == (of(1), of(0))
    assert score.targets([of(2)]).value(outputs[None]).item() == pytest.approx(-said[1].similarity)
    assert not make_score("embedding").predictions(outputs).top(3)


def test_a_contrast_of_references_is_a_difference_of_cosines_of_vectors_of_length_1():
    held = np.array([[3.0, 0.0], [0.0, 0.5], [-2.0, 0.0]])
    score, outputs = make_score("embedding", held), torch.tensor([[1.0, 1.0], [3.0, 4.0]], dtype=torch.float64)
    asked = [Contrast(of(1), (of(0), of(2)), 0.5), Against(of(1)), of(1), Contrast(of(0), (of(0),))]
    targets = score.targets(asked)
    first, second = np.sqrt(0.5), 0.8
    expected = torch.tensor([[one, -one, one, 0] for one in (first, second)], dtype=torch.float64)  # 0 and 2 cancel
    torch.testing.assert_close(targets.value(outputs), expected)
    torch.testing.assert_close(targets.query_value(outputs), expected)
    torch.testing.assert_close(targets.size(outputs), torch.ones(2, 4).double() * torch.tensor([1.0, 1, 1, 0]))
    assert not targets.score.is_class(targets.asked).any()
    assert score.resolved(Finer(of(0), nearest=1), outputs[0]) == (Contrast(of(0), (of(1),), 0.6),)
    assert score.resolved(Against(Target(top_k=2)), outputs[1]) == (Against(of(1)), Against(of(0)))


def test_top_k_and_nearest_classes_are_resolved_by_the_scores():
    score = make_score("softmax")
    assert score.resolved(Target(top_k=2), LOGITS) == (of(2), of(4))
    assert score.resolved(Against(Target(top_k=2)), LOGITS) == (Against(of(2)), Against(of(4)))
    assert score.resolved(Finer(of(3), nearest=2), LOGITS) == (Contrast(of(3), (of(2), of(4)), 0.6),)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "binary", "value"])
def test_a_linear_score_has_the_derivative_that_autograd_finds(kind):
    """Behind outputs = W x + b."""
    numbers = 1 if kind == "binary" else 4
    weight = torch.randn(numbers, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first = [of(1), of(0), Contrast(of(1), (of(0),), 0.3), Against(of(0))]
    asked = [Value(of(2), "down"), Value(of(0)), Contrast(of(1), (of(0), of(3)))] if kind == "value" else first
    targets = make_score(kind).targets(asked)
    x = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    values = targets.value(x @ weight.T + 0.5)[0]
    expected = torch.stack([torch.autograd.grad(value, x, retain_graph=True)[0][0] for value in values])
    torch.testing.assert_close(targets.through(weight)[0], expected, rtol=1e-12, atol=1e-12)


def test_targets_of_several_images_are_asked_of_their_own_image():
    score = make_score("softmax")
    each = [[of(2)], [Contrast(of(1), (of(0), of(3))), of(4)], []]
    alone = [score.targets(some) for some in each]
    together = type(alone[0]).stacked(alone)
    outputs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for ask in ("value", "query_value"):
        found = getattr(together, ask)(outputs)
        for row, targets in enumerate(alone):
            expected = getattr(targets, ask)(outputs[row : row + 1])[0]
            torch.testing.assert_close(found[row, : len(targets)], expected)
    assert together.through(torch.randn(5, 3)).shape == (3, 2, 3)


def test_vectors_of_several_images_too():
    score = make_score("embedding")
    vectors = [Vector(np.array(some)) for some in ([1.0, 2.0], [0.0, -1.0], [3.0, 3.0])]
    alone = [score.targets(vectors[:2]), score.targets(vectors[2:])]
    outputs = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    found = type(alone[0]).stacked(alone).value(outputs)
    torch.testing.assert_close(found[0], alone[0].value(outputs[:1])[0])
    torch.testing.assert_close(found[1, :1], alone[1].value(outputs[1:])[0])
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("softmax", Value(of(0)), "outputs softmax tell classes, and have no value"),
        ("binary", Vector(np.ones(3)), "outputs binary tell classes, and have no vector"),
        ("value", Against(of(0)), "go up or down, and have no against"),
        ("value", Finer(of(0)), "go up or down, and have no finer"),
        ("embedding", of(0), "are explained for a vector, or another image"),
        ("embedding", Contrast(of(0), (of(1),)), "are explained for a vector, or another image"),
        ("embedding", Vector(np.ones(4)), "the network's vectors have 5 numbers, the target's 4"),
    ],
)
def test_a_target_of_another_kind_is_refused(kind, target, message):
    score = make_score(kind)
    outputs = LOGITS[:1] if kind == "binary" else LOGITS
    with pytest.raises(CamserveError, match=message):
        score.targets(score.resolved(target, outputs))


@pytest.mark.parametrize(
    ("kind", "outputs", "message"),
    [
        ("softmax", torch.zeros(2, 1), "--outputs binary|value"),
        ("binary", torch.zeros(2, 3), "are one logit, and this network has 3 outputs"),
        ("probabilities", torch.tensor([[0.5, 1.5]]), r"in 0\.\.1, and this network gives 0\.5\.\.1\.5"),
        ("embedding", torch.zeros(2, 1), "this network has one output"),
    ],
)
def test_outputs_that_are_not_of_the_kind_are_refused(kind, outputs, message):
    with pytest.raises(InvalidOption, match=message):
        make_score(kind).check(outputs)


def test_references_must_be_as_long_as_the_vectors():
    with pytest.raises(InvalidOption, match="vectors have 3 numbers, its references 2"):
        make_score("embedding", np.ones((4, 2))).check(torch.zeros(1, 3))


NAMES = {
    "softmax": ((4,), ("class 0", "class 1", "class 2", "class 3")),
    "probabilities": ((4,), ("class 0", "class 1", "class 2", "class 3")),
    "value": ((4,), ("value 0", "value 1", "value 2", "value 3")),
    "segmentation": ((2, 1, 2), ("class 0", "class 1")),
}
ALONE = {"binary": ("no", "yes"), "probabilities": ("no", "yes"), "value": ("value",), "sigmoid": ("class 0",)}


def test_what_has_no_names_gets_some():
    for kind, (shape, names) in NAMES.items():
        assert make_score(kind, shape=shape).names(4) == names, kind
    for kind, names in ALONE.items():
        assert make_score(kind, shape=(1,)).names(1) == names, kind
    assert make_score("segmentation", shape=(1, 2, 2)).names(4) == ("no", "yes")
    with pytest.raises(InvalidOption, match="outputs boxes do not tell how many classes there are: give the names of"):
        make_score("boxes", shape=(9, 6)).names(54)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "probabilities", "value"])
def test_what_is_said_of_targets_is_said_of_each(kind):
    one = Value(of(1)) if kind == "value" else of(1)
    targets = make_score(kind).targets([Contrast(of(2), (of(0), of(1))), one, one])
    is_class = targets.score.is_class(targets.asked)
    assert (is_class.dtype, is_class.tolist()) == (torch.bool, [[False, *[kind != "value"] * 2]])
    assert targets.query_size.tolist() == [[0 if kind == "value" else QUERY_SIZE, 0, 0]]


def test_a_network_of_an_image_alone_reads_no_text():
    with pytest.raises(Unsupported, match="outputs softmax are of an image alone"):
        make_score("softmax").read(Words(["a"], "a", 3), "a", (), ())


def test_probabilities_and_their_sum_are_taken_with_the_rounding_of_bfloat16():
    check, off, far = make_score("probabilities").check, 0.9 * SUM_TOLERANCE, 1.1 * SUM_TOLERANCE
    check(torch.tensor([[-off, 1 + off], [0.5, 0.5]]))
    for outputs in ([-far, 0.5], [0.5, 1 + far]):
        with pytest.raises(InvalidOption, match=r"numbers in 0\.\.1"):
            check(torch.tensor([[0.5, 0.5], outputs]))
    for more in (off, -off):
        assert find_outputs(torch.tensor([[0.5, 0.5 + more]])) == "probabilities"
    for more in (far, -far):
        assert find_outputs(torch.tensor([[0.5, 0.5 + more]])) == "softmax"
    assert find_outputs(torch.tensor([[-far, 1 + far]])) == "softmax"  # they sum to 1
    with pytest.raises(InvalidOption, match="one output"):
        find_outputs(torch.ones(2, 1))


def test_the_kind_is_found_where_numbers_tell():
    assert find_outputs(torch.randn(2, 7)) == "softmax"
    assert find_outputs(torch.randn(2, 7).softmax(1)) == "probabilities"
    assert find_outputs(torch.tensor([[0.5, 0.5], [0.5, 0.6]])) == "softmax"  # one of two sums to 1 by chance
    assert find_outputs(torch.tensor([[1.5, -0.5], [0.5, 0.5]])) == "softmax"
    with pytest.raises(InvalidOption, match=r"one output: say whether .*--outputs binary\|value\|probabilities"):
        find_outputs(torch.zeros(2, 1))


def test_a_score_that_is_not_linear_says_so():
    with pytest.raises(Unsupported, match="outputs probabilities have a score that is not linear"):
        make_score("probabilities").targets([of(0)]).through(torch.randn(3, 2))
