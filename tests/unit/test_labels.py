"""Class names to class indices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.errors import InvalidOption
from camserve.labels import resolve_label

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


@given(st.lists(st.from_regex(r"[a-z]{1,6}", fullmatch=True), min_size=1, max_size=20, unique=True), st.data())
def test_every_distinct_label_leads_to_its_own_index(labels, data):
    index = data.draw(st.integers(0, len(labels) - 1))
    assert resolve_label(labels[index].upper(), labels) == index
