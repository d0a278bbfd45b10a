"""Attention that is made visible is the attention that PyTorch computes, whatever is asked of it."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from camserve.saliency.seen_attention import SeenAttention

FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}
"""The same products and sums in another order."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": random(5, 5, seed=4)},
        {"attn_mask": random(2, 4, 5, 5, seed=4) > -0.5},
    ],
    ids=["plain", "scale", "causal", "added mask", "mask of truths"],
)
def test_scaled_attention_is_pytorchs_and_its_probabilities_are_on_the_way_to_the_result(options):
    query, key, value = (random(2, 4, 5, 3, seed=seed) for seed in range(3))
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    with SeenAttention() as mode:
        found = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(found, expected, **FLOAT64)
    (seen,) = mode.seen
    torch.testing.assert_close(seen.sum(dim=-1), torch.ones(2, 4, 5, dtype=torch.float64), **FLOAT64)
    torch.testing.assert_close(seen.detach() @ value, expected, **FLOAT64)
    weight = random(2, 4, 5, 3, seed=7)
    (gradient,) = torch.autograd.grad((found * weight).sum(), seen)
    torch.testing.assert_close(gradient, weight @ value.transpose(-2, -1), **FLOAT64)


def test_several_queries_may_share_a_key():
    query, key, value = random(1, 4, 5, 3), random(1, 2, 5, 3, seed=1), random(1, 2, 5, 3, seed=2)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    with SeenAttention() as mode:
        torch.testing.assert_close(
            F.scaled_dot_product_attention(query, key, value, enable_gqa=True), expected, **FLOAT64
        )
    assert mode.seen[0].shape == (1, 4, 5, 5)


@pytest.mark.parametrize(
    ("made", "given"),
    [
        ({}, {}),
        ({}, {"need_weights": False}),
        ({}, {"average_attn_weights": False}),
        ({"bias": False}, {}),
        ({"batch_first": True}, {}),
        ({"vdim": 6, "kdim": 6}, {}),
        ({}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}),
        ({"add_bias_kv": True}, {}),
        ({"add_zero_attn": True}, {}),
    ],
    ids=str,
)
def test_multi_head_attention_is_pytorchs_with_whatever_it_was_made_and_called(made, given):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 2, **made).double().eval().requires_grad_(False)
    tokens = random(5, 5, 6)  # so that either axis may be that of the batch
    expected = module(tokens, tokens, tokens, **given)
    with SeenAttention() as mode:
        output, weights = module(tokens, tokens, tokens, **given)
    torch.testing.assert_close(output, expected[0], **FLOAT64)
    assert (weights is None) == (expected[1] is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected[1], **FLOAT64)
    (seen,) = mode.seen
    added = "add_bias_kv" in made or "add_zero_attn" in made
    assert seen.shape == (5, 2, 5, 6 if added else 5)
    assert output.requires_grad != added
    if not added:
        assert torch.autograd.grad(output.sum(), seen)[0].any()


def test_one_sequence_without_a_batch():
    module = nn.MultiheadAttention(6, 2).double().eval().requires_grad_(False)
    tokens = random(5, 6)
    expected = module(tokens, tokens, tokens)[0]
    with SeenAttention() as mode:
        torch.testing.assert_close(module(tokens, tokens, tokens)[0], expected, **FLOAT64)
    assert mode.seen[0].shape == (2, 5, 5)


@pytest.mark.parametrize(
    ("softmax", "is_seen"),
    [
        (lambda x: x.softmax(-1), True),
        (lambda x: torch.softmax(x, dim=3), True),
        (lambda x: F.softmax(x, dim=-1, dtype=torch.float32), True),
        (lambda x: nn.Softmax(dim=-1)(x), True),
        (lambda x: x.softmax(dim=1), False),
        (lambda x: x[..., :3].softmax(dim=-1), False),
        (lambda x: x[0, 0].softmax(dim=-1), False),
    ],
)
def test_an_attention_that_is_written_out_is_seen_at_its_softmax(softmax, is_seen):
    """Over as many places as there are rows; the scores of a network, (n, classes), are none."""
    with SeenAttention() as mode:
        result = softmax(random(1, 2, 5, 5))
    assert [one is result for one in mode.seen] == [True] * is_seen


def test_fast_kernels_of_whole_layers_are_not_taken_inside():
    """PyTorch has one for `nn.TransformerEncoderLayer`, which keeps no probabilities."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True).double().eval().requires_grad_(False)
    tokens = random(1, 5, 6)
    with torch.no_grad():
        expected = layer(tokens)
        with SeenAttention() as mode:
            torch.testing.assert_close(layer(tokens), expected, **FLOAT64)
    assert [one.shape for one in mode.seen] == [(1, 2, 5, 5)]


def test_another_thread_is_not_seen():
    query = random(1, 2, 5, 3)
    with SeenAttention() as mode:
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(query, query, query))
        thread.start()
        thread.join()
    assert not mode.seen
