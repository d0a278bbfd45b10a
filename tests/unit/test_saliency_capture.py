"""The one forward pass: what it returns, and that it leaves nothing behind."""

import copy
import threading

import pytest
import torch
from asked import asked, asked_each
from reference.models import CLASSES, HEIGHT, WIDTH, build
from torch import nn

from camserve.errors import InvalidOption, Unsupported
from camserve.saliency.arrangement import CHANNELS_LAST, PLANES, Arrangement, token_grid
from camserve.saliency.capture import capture


def images(count: int = 1, dtype=torch.float64) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(count, 3, HEIGHT, WIDTH, dtype=dtype)


def state(module: nn.Module) -> list:
    """Everything that a run could leave on a module."""
    return [
        (name, child.training, len(child._forward_hooks), len(child._forward_pre_hooks), len(child._backward_hooks))
        for name, child in module.named_modules()
    ] + [(name, p.requires_grad, p.grad is None, p._version) for name, p in module.named_parameters()]


def test_activations_and_gradients_are_those_of_a_plain_backward():
    module, x = build("perceptron", dtype=torch.float64), images(3)
    captured = capture(module, x, "features.8")
    features = module.features(x).detach().requires_grad_()
    logits = module.head(features)
    torch.testing.assert_close(captured.logits, logits)
    torch.testing.assert_close(captured.activations, features)
    classes = torch.tensor([[0, 6], [3, 2], [1, 1]])
    found = captured.gradients(asked_each(classes))
    assert found.shape == (3, 2, *features.shape[1:])
    for row in range(3):
        for column in range(2):
            (expected,) = torch.autograd.grad(logits[row, classes[row, column]], features, retain_graph=True)
            torch.testing.assert_close(found[row, column], expected[row], rtol=1e-10, atol=1e-14)


def test_gradients_can_be_asked_twice():
    captured = capture(build("perceptron", dtype=torch.float64), images(), "features.8")
    classes = torch.tensor([[4]])
    torch.testing.assert_close(
        captured.gradients(asked_each(classes)), captured.gradients(asked_each(classes)), rtol=0, atol=0
    )


def backward_passes(module: nn.Module) -> list[int]:
    """Returns a list that gets an entry for each backward pass through this module from now on."""
    passes: list[int] = []
    module.register_full_backward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize(
    ("count", "targets", "together", "expected"),
    [(1, 5, 8, 1), (1, 8, 8, 1), (1, 20, 8, 3), (3, 5, 8, 3), (9, 3, 8, 3), (1, 5, 4, 2), (1, 5, 1, 5)],
)
def test_several_targets_share_a_backward_pass_of_bounded_memory(count, targets, together, expected):
    module = build("perceptron", dtype=torch.float64)
    passes = backward_passes(module.head)
    captured = capture(module, images(count), "features.8")
    classes = asked([number % CLASSES for number in range(targets)])
    one_by_one = torch.stack(list(captured.each_gradient(classes)), dim=1)
    passes.clear()
    found = captured.gradients(classes, together)
    assert len(passes) == expected  # at most so many images times targets, or one target of all images
    torch.testing.assert_close(found, one_by_one, rtol=1e-12, atol=1e-16)


class Restless(nn.Module):
    """Clips its gradients by their norm, which it reads; there is no such operation for several at once."""

    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradients):
            return gradients / max(1.0, gradients.norm().item())

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.Clip.apply(self.features(x)).square().mean(dim=(2, 3)))


def test_a_backward_pass_that_reads_its_gradients_is_made_for_each_target():
    captured = capture(Restless().double().eval(), images(2), "features")
    classes = asked([0, 3, 5])
    one_by_one = torch.stack(list(captured.each_gradient(classes)), dim=1)
    torch.testing.assert_close(captured.gradients(classes, 8), one_by_one, rtol=0, atol=0)


def test_a_backward_pass_that_fails_is_the_same_failure_for_several_targets():
    class Failing(Restless):
        class Clip(Restless.Clip):
            @staticmethod
            def backward(ctx, gradients):
                raise RuntimeError("no gradients today")

    captured = capture(Failing().double().eval(), images(), "features")
    for classes in (asked([1]), asked([0, 3])):
        with pytest.raises(RuntimeError, match="no gradients today"):
            captured.gradients(classes, 8)


class Twice(nn.Module):
    """Runs one activation on two branches."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.act, self.head = nn.Sigmoid(), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head((self.act(self.first(x)) * self.act(self.second(x))).mean(dim=(2, 3)))


def test_several_targets_of_a_layer_that_runs_several_times_share_a_backward_pass():
    module = Twice().double().eval()
    passes = backward_passes(module.head)
    captured = capture(module, images(), "act", (1, 2))
    one_by_one = torch.stack(list(captured.each_gradient(asked([0, 2, 4]))), dim=1)
    passes.clear()
    torch.testing.assert_close(captured.gradients(asked([0, 2, 4]), 8), one_by_one, rtol=1e-12, atol=1e-16)
    assert len(passes) == 1


def test_an_in_place_operation_after_the_layer_does_not_change_what_was_captured():
    module, x = build("signed", dtype=torch.float64), images()
    captured = capture(module, x, "features.7")
    expected = nn.Sequential(*list(module.features)[:8])(x)
    torch.testing.assert_close(captured.activations, expected)
    assert captured.activations.min() < 0


class PassedOn(nn.Module):
    """The layer returns the very tensor it was given, which is changed in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.same, self.head = nn.Conv2d(3, 4, 3), nn.Identity(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        y = self.same(x).mean(dim=(2, 3))
        x.zero_()
        return self.head(y)


def test_a_layer_that_returns_its_input_is_captured_as_it_was():
    torch.manual_seed(0)
    module = PassedOn().requires_grad_(False)
    x = images(dtype=torch.float32)
    torch.testing.assert_close(capture(module, x, "same").activations, module.conv(x))


@pytest.mark.parametrize("calls", [(), (3,)], ids=str)
def test_a_module_that_runs_several_times_is_captured_at_its_last_call(calls):
    module, x = build("reused", dtype=torch.float64), images()
    captured = capture(module, x, "act", calls)
    y = module.first(x).relu()
    features = module.third(y + module.second(y).relu()).relu().detach().requires_grad_()
    torch.testing.assert_close(captured.activations, features)
    logits = module.head(features.mean(dim=(2, 3)))
    (expected,) = torch.autograd.grad(logits[0, 2], features)
    torch.testing.assert_close(captured.gradients(asked([2]))[0, 0], expected[0], rtol=1e-10, atol=1e-14)


def test_the_graph_starts_at_the_layer():
    module, x = build("pooled", dtype=torch.float64), images().requires_grad_()
    module.requires_grad_(True)
    captured = capture(module, x, "features.8")
    captured.gradients(asked([0]))
    assert x.grad is None
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not captured.activations.requires_grad
    assert not captured.logits.requires_grad


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("layer", ["features.8", "features.2", "head"])
def test_nothing_is_left_on_the_module(layer, frozen):
    module = build("pooled").requires_grad_(not frozen)
    before, weights = state(module), copy.deepcopy(module.state_dict())
    if layer == "head":
        with pytest.raises(Unsupported, match="'head' does not return"):
            capture(module, images(dtype=torch.float32), layer)
    else:
        capture(module, images(dtype=torch.float32), layer).gradients(asked([1]))
    assert state(module) == before
    assert torch.is_grad_enabled()
    torch.testing.assert_close(module.state_dict(), weights, rtol=0, atol=0)


class Trouble(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("trouble")


@pytest.mark.parametrize("place", [0, 5, 9])
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_nothing_is_left_after_a_failing_forward(place, grad_enabled):
    module = build("pooled")
    module.features.insert(place, Trouble())
    before = state(module)
    with torch.set_grad_enabled(grad_enabled):
        with pytest.raises(RuntimeError, match="trouble"):
            capture(module, images(dtype=torch.float32), "features.2")
        assert torch.is_grad_enabled() == grad_enabled
    assert state(module) == before


def test_an_unknown_layer_is_refused_by_name():
    with pytest.raises(InvalidOption, match=r"features\.99"):
        capture(build("pooled"), images(dtype=torch.float32), "features.99")


def test_a_layer_that_does_not_run_is_refused_by_name():
    module = build("pooled")
    module.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(InvalidOption, match="'spare' does not run"):
        capture(module, images(dtype=torch.float32), "spare")


def test_a_layer_that_the_logits_do_not_depend_on_is_refused():
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.aside = build("pooled"), nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.aside(x)
            return self.main(x)

    captured = capture(Aside(), images(dtype=torch.float32), "aside")
    with pytest.raises(Unsupported, match="the methods that need no gradients work"):
        captured.gradients(asked([0]))


def test_a_network_that_returns_no_logits_is_refused():
    with pytest.raises(Unsupported, match=r"logits of shape \(batch, classes\)"):
        capture(build("pooled").features, images(dtype=torch.float32), "8")


class Rendezvous(nn.Module):
    """Holds a forward until the other thread's has come as far."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.barrier.wait(timeout=30)
        return x


@pytest.mark.parametrize("layers", [("features.2", "features.7"), ("features.7", "features.7")])
def test_two_threads_in_one_module_at_once_do_not_see_each_other(layers):
    module = build("perceptron", dtype=torch.float64)
    inputs = images(2)[:, None]
    expected = [results(module, x, layer) for x, layer in zip(inputs, layers, strict=True)]
    barrier = threading.Barrier(2)
    meeting = copy.deepcopy(module)
    for place in (9, 5, 0):  # after, between and before the two layers, whose names grow with what stands before them
        meeting.features.insert(place, Rendezvous(barrier))
    renamed = {"features.2": "features.3", "features.7": "features.9"}
    found: list = [None, None]

    def work(row: int) -> None:
        found[row] = results(meeting, inputs[row], renamed[layers[row]])

    threads = [threading.Thread(target=work, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert not any(child._forward_hooks for child in meeting.modules())


def results(module: nn.Module, x: torch.Tensor, layer: str) -> list[torch.Tensor]:
    captured = capture(module, x, layer)
    return [captured.logits, captured.activations, captured.gradients(asked(range(CLASSES)))]


# Outputs that are no planes


class Tokens(nn.Module):
    """Two tokens of its own and 5 x 6 patches; the head reads all of them."""

    def __init__(self, channels_last_4d: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.channels_last_4d = channels_last_4d
        self.patches, self.norm = nn.Conv2d(3, 9, 8, stride=8), nn.LayerNorm(9)
        self.own, self.head = nn.Parameter(torch.randn(1, 2, 9)), nn.Linear(9, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patches(x).movedim(1, -1)  # (B, 5, 6, 9)
        if self.channels_last_4d:
            return self.head(self.norm(patches)[:, 1:] ** 2).mean(dim=(1, 2))
        tokens = torch.cat([self.own.expand(len(x), -1, -1), patches.flatten(1, 2)], dim=1)
        tokens = self.norm(tokens)
        return self.head(tokens**2 * tokens[:, :1]).mean(dim=1)


@pytest.mark.parametrize("arrangement", [token_grid(5, 6, 2), CHANNELS_LAST], ids=["tokens", "channels last"])
def test_activations_and_gradients_of_other_arrangements_come_as_maps(arrangement):
    module, x = Tokens(arrangement == CHANNELS_LAST).double(), images(3)
    kept: list[torch.Tensor] = []
    handle = module.norm.register_forward_hook(lambda _m, _x, output: kept.append(output))
    logits = module(x)
    handle.remove()
    captured = capture(module, x, "norm", arrangement=arrangement)
    torch.testing.assert_close(captured.logits, logits)
    found = captured.gradients(asked_each([[0, 6], [3, 2], [1, 1]]))
    (expected,) = torch.autograd.grad(logits[1, 2], kept[0])
    assert captured.activations.shape == (3, 9, 5, 6)
    assert found.shape == (3, 2, 9, 5, 6)
    for row in range(5):
        for column in range(6):
            place = (row, column) if arrangement == CHANNELS_LAST else (2 + 6 * row + column,)
            torch.testing.assert_close(captured.activations[:, :, row, column], kept[0][(slice(None), *place)])
            torch.testing.assert_close(found[1, 1, :, row, column], expected[(1, *place)])


@pytest.mark.parametrize("arrangement", [PLANES, CHANNELS_LAST, token_grid(4, 5, 0), token_grid(4, 5, 3)], ids=str)
def test_maps_turn_back_into_the_raw_output(arrangement):
    torch.manual_seed(0)
    own = len(arrangement.own)
    shape = (2, 4, 5, 6) if arrangement.grid is None else (2, own + 20, 6)
    raw = torch.randn(shape)
    assert arrangement.fits(raw)
    maps = arrangement.maps(raw)
    torch.testing.assert_close(arrangement.raw(maps, raw), raw, rtol=0, atol=0)
    altered = arrangement.raw(torch.zeros(3, *maps.shape[1:]), raw[:1])  # several alterations of one image
    assert altered.shape == (3, *raw.shape[1:])
    assert not arrangement.maps(altered).any()
    if arrangement.grid is not None:
        torch.testing.assert_close(altered[:, :own], raw[:1, :own].expand(3, -1, -1), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arrangement", "wanted"),
    [
        (PLANES, r"\(batch, channels, height, width\) larger"),
        (CHANNELS_LAST, r"\(batch, height, width, channels\) larger"),
        (token_grid(5, 5, 1), r"\(batch, 1 \+ 5 x 5 tokens, channels\)"),
    ],
    ids=str,
)
def test_another_arrangement_than_said_is_refused(arrangement: Arrangement, wanted):
    with pytest.raises(Unsupported, match=f"'norm' does not return {wanted}"):
        capture(Tokens(channels_last_4d=False), images(dtype=torch.float32), "norm", arrangement=arrangement)


def test_windows_that_were_folded_into_the_batch_are_refused():
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.head = nn.Identity(), nn.Linear(3, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            windows = self.same(x.unflatten(-1, (2, -1)).movedim(-2, 1).flatten(0, 1))
            return self.head(windows.mean(dim=(2, 3)).unflatten(0, (-1, 2)).mean(dim=1))

    with pytest.raises(Unsupported, match="'same' does not return"):
        capture(Windows(), images(dtype=torch.float32), "same")
