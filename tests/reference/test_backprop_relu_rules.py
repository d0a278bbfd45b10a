"""The rules for ReLUs: every way to call one, in place or not, on batches, and nothing left behind."""

import threading

import numpy as np
import pytest
import torch
from asked import asked
from reference import twins_backprop as twin
from reference.models import PREPROCESSING, build, picture
from torch import Tensor, nn
from torch.nn import functional as F

from camserve import Engine
from camserve.errors import Unsupported
from camserve.saliency.relu_rules import ReluRule
from camserve.worker.network import Network

EXACT = {"rtol": 1e-12, "atol": 1e-14}
RULES = {"guided": twin.GuidedReLU, "deconvolution": twin.DeconvolutionReLU}
PLAIN = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda z: F.relu(z, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda z: z.relu(),
    "Tensor.relu_": lambda z: z.relu_(),
    "torch.clamp": lambda z: torch.clamp(z, min=0),
    "Tensor.clamp": lambda z: z.clamp(0),
    "Tensor.clamp_": lambda z: z.clamp_(min=0.0),
    "Tensor.clamp_min": lambda z: z.clamp_min(0),
    "Tensor.clamp_min_": lambda z: z.clamp_min_(0),
    "torch.clip": lambda z: torch.clip(z, 0),
}
WITH_CEILING = {
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "F.relu6": F.relu6,
    "F.relu6 in place": lambda z: F.relu6(z, inplace=True),
    "nn.Hardtanh": nn.Hardtanh(0, 6),
    "F.hardtanh": lambda z: F.hardtanh(z, 0, 6),
    "F.hardtanh_": lambda z: F.hardtanh_(z, min_val=0.0, max_val=6.0),
    "Tensor.clamp": lambda z: z.clamp(0, 6),
    "Tensor.clamp_": lambda z: z.clamp_(min=0, max=6),
}
NO_RELU = {
    "silu": F.silu,
    "gelu": F.gelu,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "clamp from above": lambda z: z.clamp(max=0),
    "clamp from -1": lambda z: z.clamp(-1, 1),
    "clamp by tensors": lambda z: z.clamp(min=torch.zeros(())),
    "clamp to nothing": lambda z: z.clamp(0, 0),
}


class Net(nn.Module):
    """Ten times the activations, so that a ceiling of 6 is reached; `activation` is any callable."""

    def __init__(self, activation) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, stride=2)
        self.head = nn.Linear(8, 5)
        self.activation = activation
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(10 * x) + 0
        before = first + 1
        first = self.activation(before)
        return self.head(self.activation(self.second(first)).mean(dim=(2, 3)))


def batch(size: int = 3) -> Tensor:
    return torch.randn(size, 3, 14, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(module: nn.Module, x: Tensor, rule: str | None, target: int = 2) -> Tensor:
    x = x.clone().requires_grad_()
    if rule is None:
        return torch.autograd.grad(module(x)[:, target].sum(), x)[0]
    with ReluRule(rule) as relus:
        (found,) = torch.autograd.grad(module(x)[:, target].sum(), x)
    assert relus.applied == 2
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("ceiling", "name"), [(None, n) for n in PLAIN] + [(6.0, n) for n in WITH_CEILING])
def test_every_way_to_call_a_relu_has_the_rule(name, ceiling, rule):
    module = Net(WITH_CEILING[name] if ceiling else PLAIN[name])
    expected = gradients(Net(RULES[rule](ceiling or float("inf"))), batch(), None)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradients(module, batch(), rule), expected, **EXACT)
    assert (gradients(module, batch(), None) - expected).abs().max() > 0  # outside, the gradient is its own again


@pytest.mark.parametrize("name", NO_RELU)
def test_what_is_no_relu_keeps_its_gradient(name):
    x = batch().requires_grad_()
    with ReluRule("deconvolution") as relus:
        (found,) = torch.autograd.grad(NO_RELU[name](x).sum(), x)
    assert relus.applied == 0
    torch.testing.assert_close(found, torch.autograd.grad(NO_RELU[name](x).sum(), x)[0])


def test_a_relu_that_no_gradient_flows_through_is_none():
    constant, result = torch.tensor([-1.0, 2.0]), torch.empty(2)
    with ReluRule("guided") as relus:
        assert F.relu(constant).tolist() == [0, 2]
        assert torch.arange(-1, 2).clamp(min=0).tolist() == [0, 0, 1]
        torch.clamp(constant, 0, out=result)
    assert result.tolist() == [0, 2]
    assert relus.applied == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [*PLAIN, *WITH_CEILING])
def test_values_stay_the_same(name, rule):
    module = Net({**PLAIN, **WITH_CEILING}[name])
    expected = module(batch())
    with ReluRule(rule):
        torch.testing.assert_close(module(batch().requires_grad_()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_an_image_does_not_know_its_batch(rule):
    module = Net(nn.ReLU(inplace=True))
    one_by_one = torch.cat([gradients(module, image[None], rule) for image in batch()])
    torch.testing.assert_close(gradients(module, batch(), rule), one_by_one, **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_in_place_on_a_view_whose_base_is_used(rule):
    """The result of the call is thrown away; the tensor behind the view goes on."""

    def through_the_base(z: Tensor) -> Tensor:
        z = z * 1
        z[:, :].relu_()
        return z

    expected = gradients(Net(RULES[rule](float("inf"))), batch(), None)
    torch.testing.assert_close(gradients(Net(through_the_base), batch(), rule), expected, **EXACT)


def test_a_backward_after_the_rule_was_left_has_it_still():
    module, x = Net(nn.ReLU()), batch().requires_grad_()
    with ReluRule("guided"):
        logit = module(x)[:, 2].sum()
    (found,) = torch.autograd.grad(logit, x)
    torch.testing.assert_close(found, gradients(module, batch(), "guided"), rtol=0, atol=0)


def test_another_thread_sees_nothing_of_the_rule():
    module, found = Net(nn.ReLU(inplace=True)), []
    expected = gradients(module, batch(), None)
    with ReluRule("guided") as relus:
        thread = threading.Thread(target=lambda: found.append(gradients(module, batch(), None)))
        thread.start()
        thread.join()
    assert relus.applied == 0
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["guided_backprop", "deconvolution", "guided_grad_cam"])
def test_two_threads_with_two_rules_on_one_module(method):
    engine = Engine(build("perceptron", 2), preprocessing=PREPROCESSING, layer="features.8")
    expected = engine.explain(picture(2), methods=[method]).maps[0].array
    other = "deconvolution" if method != "deconvolution" else "guided_backprop"
    found: dict[str, list] = {method: [], other: []}

    def work(name: str) -> None:
        found[name] = [engine.explain(picture(2), methods=[name]).maps[0].array for _ in range(10)]

    threads = [threading.Thread(target=work, args=(name,)) for name in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found[method]) == 10
    for array in found[method]:
        np.testing.assert_allclose(array, expected, atol=1e-6)


class Trouble(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("trouble")


def test_nothing_is_left_after_a_failing_forward():
    x = batch().requires_grad_()
    with pytest.raises(RuntimeError, match="trouble"), ReluRule("guided"):
        Trouble()(F.relu(x))
    assert torch.overrides._len_torch_function_stack() == 0


@pytest.mark.parametrize("method", ["guided_backprop", "deconvolution", "guided_grad_cam"])
def test_a_network_without_relus_is_refused_with_the_reason(method):
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    engine = Engine(module, preprocessing=PREPROCESSING)
    with pytest.raises(Unsupported, match="a rule for ReLUs, and this network has none"):
        engine.explain(picture(2), methods=[method])
    assert engine.explain(picture(2), methods=["integrated_gradients"]).maps[0].array.any()


def test_gradients_that_do_not_reach_the_input_are_refused():
    class Cut(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    module = Cut(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    for frozen in (False, True):
        engine = Engine(module.requires_grad_(not frozen), preprocessing=PREPROCESSING)
        with pytest.raises(Unsupported, match="no gradient of the scores reaches the network"):
            engine.explain(picture(2), methods=["smooth_grad"])


def test_a_network_that_changes_its_input_in_place():
    class Shifted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    module = Shifted(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)).eval()
    network = Network(module, preprocessing=PREPROCESSING)
    x, classes = torch.randn(2, 3, 40, 48), torch.tensor([[0, 3], [1, 3]])
    before = x.clone()
    found = torch.stack([*network.passes(network.info.default_layer).input_gradients(x, asked(classes[0]))], dim=1)
    assert torch.equal(x, before)
    for row, column in ((0, 0), (1, 1)):
        alone = x[row : row + 1].clone().requires_grad_()
        logit = nn.Sequential.forward(module, alone * 2)[0, classes[row, column]]
        torch.testing.assert_close(found[row, column], torch.autograd.grad(logit, alone)[0][0], rtol=1e-5, atol=1e-6)
