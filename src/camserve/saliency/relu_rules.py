"""Gives ReLUs other gradients while a network runs, whether they are modules or functions.

A function mode watches the calls of one thread, so that no module is replaced, nothing is left behind and other threads
see nothing of it. Every call that is a ReLU, with or without a ceiling (ReLU6), in place or not, is given another
backward; what it computes stays the same:

    guided         f'(z) ReLU(gradient of the output)    https://arxiv.org/abs/1412.6806, section 3.4
    deconvolution  ReLU(gradient of the output)          https://arxiv.org/abs/1311.2901, section 2.1
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Rule = Literal["guided", "deconvolution"]


class ReluRule(TorchFunctionMode):
    """Gives the ReLUs that this thread calls while it is entered the gradient of a rule, also in a later backward."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self._rule = rule
        self.applied = 0
        """Number of ReLUs seen so far, of those that gradients flow through."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _as_relu(func, args, kwargs or {})
        if call is None or not call.argument.requires_grad:
            return func(*args, **(kwargs or {}))
        self.applied += 1
        return _Relu.apply(call.argument, call.ceiling, call.in_place, self._rule)  # type: ignore[no-untyped-call]


class _Relu(torch.autograd.Function):
    """Computes min(max(z, 0), ceiling), with a rule for its gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, ceiling: float, in_place: bool, rule: Rule) -> Tensor:
        if rule == "guided":
            ctx.save_for_backward((z <= 0) | (z >= ceiling))
        if in_place:
            # Autograd must be told of the alteration, so that z has this function's gradient from now on.
            ctx.mark_dirty(z)
            return z.clamp_(0, ceiling)
        return z.clamp(0, ceiling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        kept = gradient.masked_fill(gradient < 0, 0)
        for flat in ctx.saved_tensors:
            kept = kept.masked_fill(flat, 0)
        return kept, None, None, None


@dataclass(frozen=True)
class _ReluCall:
    """Holds the arguments of a call that is a ReLU."""

    argument: Tensor
    ceiling: float
    in_place: bool


def _as_relu(func: Callable[..., Any], args: Any, kwargs: Any) -> _ReluCall | None:
    """Returns the arguments of a call that is a ReLU; None where it is none."""
    reader = _READERS.get(func)
    return None if reader is None or "out" in kwargs else reader(*args, **kwargs)


# One reader for each signature; the names of the arguments are those of torch.


def _relu(input: Tensor, inplace: bool = False) -> _ReluCall:  # noqa: A002  (torch's name)
    return _ReluCall(input, math.inf, inplace)


def _relu6(input: Tensor, inplace: bool = False) -> _ReluCall:  # noqa: A002  (torch's name)
    return _ReluCall(input, 6.0, inplace)


def _hardtanh(
    input: Tensor,  # noqa: A002  (torch's name)
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> _ReluCall | None:
    return _ReluCall(input, max_val, inplace) if min_val == 0 < max_val else None


def _clamp(input: Tensor, min: Any = None, max: Any = None, *, inplace: bool) -> _ReluCall | None:  # noqa: A002  (torch's names)
    ceiling = math.inf if max is None else max
    if any(isinstance(bound, Tensor) or bound is None for bound in (min, ceiling)):
        return None
    return _ReluCall(input, ceiling, inplace) if min == 0 < ceiling else None


_READERS: dict[Callable[..., Any], Callable[..., _ReluCall | None]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), partial(_relu, inplace=True)),
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.hardtanh_: partial(_hardtanh, inplace=True),
    **dict.fromkeys(
        (torch.clamp, Tensor.clamp, torch.clip, Tensor.clip, torch.clamp_min, Tensor.clamp_min),
        partial(_clamp, inplace=False),
    ),
    **dict.fromkeys(
        (torch.clamp_, Tensor.clamp_, torch.clip_, Tensor.clip_, torch.clamp_min_, Tensor.clamp_min_),
        partial(_clamp, inplace=True),
    ),
}
"""Functions that are a ReLU, or may be, each with the one that reads its arguments."""
