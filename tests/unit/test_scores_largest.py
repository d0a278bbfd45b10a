"""The largest of some values, in order: as a stable sort has them."""

import pytest
import torch

from camserve.scores.score import largest


@pytest.mark.parametrize("most", [0, 1, 3, 5, 49, 50, 51, 1000])
@pytest.mark.parametrize("levels", [1, 2, 7, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_they_are_the_first_of_a_stable_sort(most, levels, dtype):
    values = torch.randint(levels, (50,), generator=torch.Generator().manual_seed(levels)).to(dtype)
    assert largest(values, most) == values.argsort(descending=True, stable=True)[:most].tolist()


def test_there_are_as_many_where_some_are_not_finite():
    nan, inf = float("nan"), float("inf")
    assert largest(torch.tensor([nan, 1.0, -inf, nan, inf]), 2) == [4, 1]
    assert len(largest(torch.full((9,), nan), 3)) == 3
    assert len(largest(torch.tensor([nan, 1.0, nan]), 2)) == 2


def test_of_no_values_there_are_none():
    assert largest(torch.empty(0), 5) == []


def test_values_with_a_graph_are_taken():
    assert largest(torch.tensor([1.0, 2.0], requires_grad=True), 1) == [1]
