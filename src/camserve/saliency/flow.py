"""Keeps gradients on inside a network's forward, and tells what its scores depend on.

A forward may switch gradients off (`no_grad`, `set_grad_enabled(False)`, `inference_mode`), or save memory by
checkpoints, which do not allow gradients of a layer inside of them. None of that says anything about the function that
the network computes: people freeze a backbone that way. So gradients are kept on. `detach` is another matter: it is
part of what the network is, when it is differentiated, and is only looked through to see what depends on what.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

Node = Any
"""A node of autograd's graph: PyTorch has no public name for what `Tensor.grad_fn` returns."""

_SET_MODE: Callable[..., Any] = torch._C._set_grad_enabled
_AS_ARRAY = (Tensor.numpy, Tensor.__array__)
_DETACHING = (Tensor.detach, torch.detach)


class KeptGradients(TorchFunctionMode):
    """Holds the gradient mode of the thread that entered it, whatever the code inside does to it.

    Args:
        on: whether gradients are on from the beginning; else `open` switches them on.
    """

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on = on
        self.interfered = False
        """Whether the code inside has tried to switch gradients off, or used checkpoints."""
        self._stack = ExitStack()

    def __enter__(self) -> KeptGradients:
        self._stack.enter_context(torch.set_grad_enabled(self.on))
        self._stack.enter_context(_without_checkpoints(self))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    def open(self) -> None:
        """Switches gradients on from here to the end."""
        self.on = True
        if not torch.is_inference_mode_enabled():
            with torch._C.DisableTorchFunction():
                _SET_MODE(True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SET_MODE:
            self.interfered = self.interfered or not (args and args[0])
            return None
        if func in _AS_ARRAY and args[0].requires_grad:  # which autograd forbids, and the network could do without it
            args = (args[0].detach(), *args[1:])
        if torch.is_inference_mode_enabled():
            self.interfered = True
            with torch.inference_mode(False), torch.set_grad_enabled(self.on):
                return self.call(func, args, kwargs)
        if torch.is_grad_enabled() != self.on:  # inference mode has set it back when it was left
            _SET_MODE(self.on)
        return self.call(func, args, kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Returns what the function returns; a subclass may look at it."""
        return func(*args, **kwargs)


class SeenThrough(KeptGradients):
    """Keeps gradients on, and has `detach` and `data` hand on the graph, so that it tells what depends on what."""

    def __init__(self, on: bool = True) -> None:
        super().__init__(on)
        self.cuts: set[Node] = set()
        """Nodes at which the network's own gradients end."""

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Returns what the function returns, but no detached tensor."""
        detaching = func in _DETACHING or getattr(func, "__self__", None) is Tensor.data
        if detaching and isinstance(args[0], Tensor) and args[0].grad_fn is not None:
            copy = args[0].view_as(args[0])
            self.cuts.add(copy.grad_fn)
            return copy
        return func(*args, **kwargs)


def reached(root: Node | None, stops: Collection[Node] = ()) -> set[Node]:
    """Returns the nodes on the ways from `root` to the graph's ends; no way goes beyond one of the stops."""
    found: set[Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if node not in stops:
            waiting.extend(following for following, _ in node.next_functions)
    return found


_lock = threading.Lock()
_owners: dict[int, list[KeptGradients]] = {}
"""The modes that are entered, by the thread that entered them."""


@contextmanager
def _without_checkpoints(mode: KeptGradients) -> Iterator[None]:
    """Has this thread's checkpoints call their function directly; those of other threads stay what they are."""
    owner = threading.get_ident()
    with _lock:
        if not _owners:
            _install()
        _owners.setdefault(owner, []).append(mode)
    try:
        yield
    finally:
        with _lock:
            _owners[owner].remove(mode)
            if not _owners[owner]:
                del _owners[owner]
            if not _owners:
                _uninstall()


def _is_direct() -> bool:
    modes = _owners.get(threading.get_ident(), ())
    for mode in modes:
        mode.interfered = True
    return bool(modes)


_reentrant = checkpoint.CheckpointFunction.apply
_not_reentrant = checkpoint._checkpoint_without_reentrant_generator


def _apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    if _is_direct():
        return function(*args)
    return _reentrant(function, preserve_rng_state, *args)  # type: ignore[no-untyped-call]


def _around(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Runs before and after the function of a checkpoint: `torch.utils.checkpoint.checkpoint` calls that in between."""
    if _is_direct():
        yield
    else:
        yield from _not_reentrant(*args, **kwargs)


def _install() -> None:
    # `checkpoint` looks both up at each call; it has itself been imported by name into many a network's file.
    checkpoint.CheckpointFunction.apply = _apply  # type: ignore[method-assign]
    checkpoint._checkpoint_without_reentrant_generator = _around


def _uninstall() -> None:
    del checkpoint.CheckpointFunction.apply  # it is inherited
    checkpoint._checkpoint_without_reentrant_generator = _not_reentrant
