from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from camserve import Engine
from camserve.saliency import passes
from camserve.saliency.folded import FoldedProducts
from camserve.types import Preprocessing


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Transposed(nn.Module):
    """Reads sequences that lie transposed in memory, with a product of its own or PyTorch's linear layer."""

    def __init__(self, linear: bool, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=bias)
        self.calls_linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.linear(x) if self.calls_linear else x @ self.linear.weight.T


class Crossed(nn.Module):
    """Asks the first half of the tokens about all of them, so that queries and keys are two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x[:, :3], x, x, need_weights=False)[0]
        return found


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


NETWORKS = {
    "encoder": encoder,
    "crossed": Crossed,
    "linear": lambda: Transposed(linear=True),
    "without bias": lambda: Transposed(linear=True, bias=False),
    "product": lambda: Transposed(linear=False),
}


def frozen(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval().double().requires_grad_(False)


def gradients(network: nn.Module, folds: bool) -> tuple[Tensor, Counter[str]]:
    x = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with Products() as products:
        if folds:
            with FoldedProducts():
                output = network(x)
        else:
            output = network(x)
        (found,) = torch.autograd.grad(output.pow(2).sum(), x)
    return found, products.made


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_a_network_by_itself(name: str) -> None:
    network = frozen(name)
    torch.testing.assert_close(gradients(network, folds=True)[0], gradients(network, folds=False)[0])


@pytest.mark.parametrize("name", ["linear", "without bias", "product"])
def test_sequences_that_lie_transposed_take_one_product_forwards_and_one_back(name: str) -> None:
    made = gradients(frozen(name), folds=True)[1]
    assert made["bmm"] == 0
    assert made["mm"] + made["addmm"] == 2
    assert gradients(frozen(name), folds=False)[1]["bmm"] > 0  # else this test would show nothing


def test_attention_makes_queries_keys_and_values_in_one_product() -> None:
    made, unfolded = (gradients(frozen("encoder"), folds=folds)[1] for folds in (True, False))
    # Four linear layers: of queries, keys and values together, of what attention returns, and the two behind it.
    assert made["mm"] + made["addmm"] == 8
    assert unfolded["bmm"] - made["bmm"] == 2


def test_queries_of_other_tokens_take_a_product_of_their_own() -> None:
    # Three linear layers: of queries, of keys and values, and of what attention returns.
    assert gradients(frozen("crossed"), folds=True)[1]["addmm"] == 3


def test_a_call_by_names_is_left_as_it_is() -> None:
    linear = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(6, 4, 8).transpose(0, 1)
    with FoldedProducts():
        found = nn.functional.linear(input=x, weight=linear.weight, bias=linear.bias)
        of_numbers = torch.matmul(x[0], other=linear.weight.T)
    torch.testing.assert_close(found, linear(x))
    assert of_numbers.shape == (6, 8)


class Tokens(nn.Module):
    """Classifies pictures by a transformer over their 4 x 4 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.encoder = encoder()
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.classifier(self.encoder(tokens).mean(dim=1))
        return logits


@pytest.mark.parametrize("method", ["smooth_grad", "integrated_gradients"])
def test_gradients_of_pixels_are_made_so(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    prepared = Preprocessing(32, (32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")
    engine = Engine(Tokens(), preprocessing=prepared, labels=("a", "b", "c"), outputs="softmax", micro_batch=4)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)

    def explained() -> tuple[np.ndarray, int]:
        with Products() as products:
            answer = engine.explain(image, [method], ["a"])
        return answer.maps[0].array, products.made["bmm"]

    explained()  # what is set up once
    folded, few = explained()
    monkeypatch.setattr(passes, "FoldedProducts", nullcontext)
    apart, many = explained()
    assert few < many
    np.testing.assert_allclose(folded, apart, atol=1e-4)  # float32 sums in another order, and a map scaled to [0, 1]
