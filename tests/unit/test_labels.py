"""Class names to class indices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.errors import InvalidOption
from camserve.labels import resolve_label, resolve_target, with_label
from camserve.types import Prediction, Target

LABELS = ("tench", "tabby", "tiger cat", "crane", "Egyptian_cat", "crane", "T-shirt")


@pytest.mark.parametrize(
    ("label", "index"),
    [
        ("tench", 0),
        ("TABBY", 1),
        ("tiger_cat", 2),
        ("Tiger-Cat", 2),
        ("  tiger   cat ", 2),
        ("egyptian cat", 4),
        ("t shirt", 6),
    ],
)
def test_label_is_found_whatever_its_case_and_separators(label, index):
    assert resolve_label(label, LABELS) == index
    assert resolve_target(Target(label=label), LABELS) == Target(index=index)


def test_label_shared_by_classes_is_refused_with_their_indices():
    with pytest.raises(InvalidOption, match=r"'crane' names classes 3, 5: use the index"):
        resolve_label("crane", LABELS)


def test_unknown_label_is_refused_with_close_ones():
    with pytest.raises(InvalidOption, match=r"unknown label 'tigr cat'.*'tiger cat'"):
        resolve_label("tigr cat", LABELS)


@pytest.mark.parametrize("label", ["", "   ", "zzzzzzzz", "tiger"])
def test_unknown_label_is_refused(label):
    with pytest.raises(InvalidOption, match="unknown label"):
        resolve_label(label, LABELS)


@pytest.mark.parametrize("index", [0, 6])
def test_index_in_range_is_kept(index):
    assert resolve_target(Target(index=index), LABELS) == Target(index=index)


@pytest.mark.parametrize("index", [-1, 7, 10**9])
def test_index_out_of_range_is_refused_with_range_and_value(index):
    with pytest.raises(InvalidOption, match=rf"class index must be 0\.\.6, got {index}"):
        resolve_target(Target(index=index), LABELS)


@pytest.mark.parametrize("top_k", [1, 7])
def test_top_k_in_range_is_kept(top_k):
    assert resolve_target(Target(top_k=top_k), LABELS) == Target(top_k=top_k)


def test_top_k_beyond_the_classes_is_refused_with_range_and_value():
    with pytest.raises(InvalidOption, match=r"top_k must be 1\.\.7, got 8"):
        resolve_target(Target(top_k=8), LABELS)


@pytest.mark.parametrize("top_k", [0, -3])
def test_top_k_below_one_is_refused_with_the_value(top_k):
    with pytest.raises(InvalidOption, match=rf"at least 1, got {top_k}"):
        Target(top_k=top_k)


@pytest.mark.parametrize("given_fields", [{}, {"index": 1, "label": "tabby"}, {"index": 0, "top_k": 1}])
def test_a_target_is_exactly_one_thing(given_fields):
    with pytest.raises(InvalidOption, match=f"exactly one, got {len(given_fields)}"):
        Target(**given_fields)


def test_what_callers_pass_becomes_a_target():
    assert Target.of(3) == Target(index=3)
    assert Target.of("tabby") == Target(label="tabby")
    assert Target.of(Target(top_k=2)) == Target(top_k=2)


def test_with_label_fills_in_the_name_alone():
    assert with_label(Prediction(4, "", 0.25), LABELS) == Prediction(4, "Egyptian_cat", 0.25)


@given(st.lists(st.from_regex(r"[a-z]{1,6}", fullmatch=True), min_size=1, max_size=20, unique=True), st.data())
def test_every_distinct_label_leads_to_its_own_index(labels, data):
    index = data.draw(st.integers(0, len(labels) - 1))
    assert resolve_label(labels[index].upper(), labels) == index
