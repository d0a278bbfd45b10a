"""Packing queries of many sets into micro-batches."""

import pytest
import torch
from asked import asked
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from camserve.queries.pack import ask, micro_batches
from camserve.saliency.masks import make_masks

sizes_of_sets = st.lists(st.integers(0, 30), max_size=6)


@given(sizes_of_sets, st.integers(1, 12))
def test_every_query_is_in_one_micro_batch_and_in_order(sizes, limit):
    batches = list(micro_batches(sizes, limit))
    asked = [(which, query) for batch in batches for which, start, stop in batch for query in range(start, stop)]
    assert asked == [(which, query) for which, size in enumerate(sizes) for query in range(size)]


@given(sizes_of_sets, st.integers(1, 12))
def test_every_micro_batch_but_the_last_is_full(sizes, limit):
    filled = [sum(stop - start for _, start, stop in batch) for batch in micro_batches(sizes, limit)]
    assert all(count == limit for count in filled[:-1])
    assert all(0 < count <= limit for count in filled)


class Classifier(nn.Module):
    """Logits from the mean colour; remembers the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 5).double()
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        return self.linear(x.mean(dim=(2, 3)))


def sets_of(sizes, columns=(0, 3)):
    torch.manual_seed(1)
    return [
        make_masks(torch.randn(3, 9, 9).double(), torch.rand(size, 3, 4).double(), asked(columns)) for size in sizes
    ]


@pytest.mark.parametrize("micro_batch", [1, 3, 7, 64])
def test_scores_are_softmax_probabilities_of_each_query_asked_alone(micro_batch):
    network, sets = Classifier(), sets_of([4, 0, 9, 1])
    scores = ask(network, sets, micro_batch)
    assert max(network.batches) <= micro_batch
    assert [tuple(answer.shape) for answer in scores] == [(4, 2), (0, 2), (9, 2), (1, 2)]
    for masks, answer in zip(sets, scores, strict=True):
        for query in range(len(masks)):
            expected = network(masks.blend(query, query + 1))[0].softmax(dim=0)[[0, 3]]
            torch.testing.assert_close(answer[query], expected, rtol=1e-12, atol=0)


def test_sets_may_ask_for_different_classes():
    network = Classifier()
    few, many = sets_of([2], columns=[4]) + sets_of([3], columns=[0, 1, 2, 3, 4])
    one, other = ask(network, [few, many], micro_batch=4)
    assert one.shape == (2, 1)
    torch.testing.assert_close(other.sum(dim=1), torch.ones(3).double())


def test_progress_counts_up_to_the_total():
    seen: list[tuple[int, int]] = []
    ask(Classifier(), sets_of([4, 6]), 3, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 10), (6, 10), (9, 10), (10, 10)]


def test_nothing_to_ask_asks_nothing():
    network = Classifier()
    assert ask(network, [], 4) == []
    assert [len(answer) for answer in ask(network, sets_of([0, 0]), 4)] == [0, 0]
    assert network.batches == []


def test_no_graph_is_built():
    network = Classifier()
    graphs: list[bool] = []
    network.register_forward_hook(lambda _module, _inputs, output: graphs.append(output.requires_grad))
    ask(network, sets_of([3]), 2)
    assert graphs == [False, False]
