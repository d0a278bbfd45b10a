"""Sees the attention of a network while it runs, whoever wrote it, and finds out how its attentions follow each other.

Attention probabilities are no module's output, and fused kernels do not keep them. Inside `SeenAttention` the two
functions that every library calls (`scaled_dot_product_attention`, and the one behind `nn.MultiheadAttention`) are made
of plain operations, which changes nothing but rounding; an attention that a network writes out itself is seen at its
softmax. The probabilities are on the way to the scores, so they have gradients. PyTorch keeps such a mode for the
thread that entered it alone.

What a network of attentions is made of is found out in one pass with its graph: see `find_attentions`.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from camserve.errors import Unsupported
from camserve.saliency.arrangement import Arrangement
from camserve.saliency.flow import Node, SeenThrough, reached
from camserve.saliency.run import dtype_of, run

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
FUSED_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)

_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)

SAME = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Share of the largest score by which those of a batch may differ from those of an image alone, by precision."""


class SeenAttention(TorchFunctionMode):
    """Keeps the probabilities of every attention that runs inside, in the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        """Probabilities (..., queries, keys), each as it is on the way to the scores."""

    def over(self, tokens: int) -> list[Tensor]:
        """Returns the probabilities (..., N, N) of the attentions among that many tokens."""
        return [each for each in self.seen if each.shape[-2:] == (tokens, tokens)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._scaled(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in SOFTMAX and _is_attention(result, *args[1:2], **kwargs):
            self._see(result)
        return result

    def _see(self, probabilities: Tensor) -> Tensor:
        # A network without trainable parameters gives probabilities that need no gradient: then they are the leaves.
        if torch.is_grad_enabled() and not probabilities.requires_grad:
            probabilities.requires_grad_()
        self.seen.append(probabilities)
        return probabilities

    def _scaled(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Returns softmax(Q K^T scale + mask) V, as PyTorch's documentation writes it out; dropout is off."""
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (each.repeat_interleave(groups, dim=-3) for each in (key, value))
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._see(scores.softmax(dim=-1)) @ value

    def _multi_head(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Returns what the function returns, its output made once more of the probabilities.

        The probabilities that PyTorch returns are a copy beside the way to the scores.
        """
        bound = _MULTI_HEAD.bind(*args, **kwargs)
        bound.apply_defaults()
        asked = bound.arguments
        output, probabilities = F.multi_head_attention_forward(
            **{**asked, "need_weights": True, "average_attn_weights": False}
        )
        assert probabilities is not None, "they have been asked for"
        self._see(probabilities)
        if probabilities.shape[-1] == len(asked["value"]):  # else keys were added that no token has
            output = _attended(asked, probabilities)
        if not asked["need_weights"]:
            return output, None
        return output, probabilities.mean(dim=-3) if asked["average_attn_weights"] else probabilities


def _is_attention(result: Tensor, dim: int | None = None, **_: Any) -> bool:
    """Tells whether a softmax is one over as many places as it has rows."""
    return result.dim() > 2 and dim in (-1, result.dim() - 1) and result.shape[-2] == result.shape[-1]


def _attended(asked: dict[str, Any], probabilities: Tensor) -> Tensor:
    """Returns the output (N, B, C) that an `nn.MultiheadAttention` makes of probabilities (B, heads, N, M)."""
    weight, bias = asked["v_proj_weight"], asked["in_proj_bias"]
    if not asked["use_separate_proj_weight"]:
        weight = asked["in_proj_weight"].chunk(3)[2]
    values = F.linear(asked["value"], weight, None if bias is None else bias.chunk(3)[2]).movedim(0, -2)
    heads = values.view(*values.shape[:-1], asked["num_heads"], -1).transpose(-3, -2)
    joined = (probabilities @ heads).transpose(-3, -2).flatten(-2).movedim(-2, 0)
    return F.linear(joined, asked["out_proj_weight"], asked["out_proj_bias"])


@dataclass(frozen=True)
class Attentions:
    """Describes a network whose attentions follow one another, each among all of its tokens."""

    tokens: Arrangement
    """Arrangement of its sequences: which tokens are places of the picture."""
    length: int
    """Number N of tokens."""
    read: Tensor
    """Tells of which tokens (N,), behind the last attention, the scores are made."""
    pooled: bool
    """Whether another attention, which is none among all tokens, takes part: one that pools them, say."""
    blocks: tuple[str, ...]
    """Names of the modules that hold one attention each and return all that goes on to the next; none where there is
    no such module for each attention."""

    def over(self, seen: SeenAttention) -> list[Tensor]:
        """Returns the probabilities (heads, N, N) of each attention, as they are on the way to the scores."""
        return seen.over(self.length)

    def placed(self, shares: Tensor) -> Tensor:
        """Returns the shares (N,) of the tokens as a map (u, v), the network's own tokens left out."""
        assert self.tokens.grid is not None, "a sequence has a grid"
        return self.tokens.placed(shares[None, :, None])[0, :, 0].reshape(self.tokens.grid)


NO_TOKENS = (
    "attention maps need a vision transformer, in which every token of the picture may attend to every other one: this "
    "network holds no sequence of tokens that are places of the picture"
)
NO_ATTENTION = (
    "attention maps need a vision transformer; no attention was seen in this network: none that calls "
    "scaled_dot_product_attention or nn.MultiheadAttention, or that is a softmax of as many rows as columns"
)
NO_BLOCKS = (
    "LeGrad needs a network of blocks, modules that hold one attention each, and whose output is all that goes on to "
    "the next one and to the head"
)


def find_attentions(module: nn.Module, image: Tensor, tokens: Arrangement | None) -> Attentions:
    """Returns what a network's attentions are, found in one pass, and two where its blocks are modules.

    Args:
        module: in eval mode, its parameters frozen; nothing is left on it.
        image: (C, H, W), a normalised input.
        tokens: how the network's sequences hold places of the picture; None where it has none.

    Raises:
        Unsupported: the network is no transformer whose attentions follow one another, among all tokens.
    """
    watch = _Watch(module)
    start, scores = watch.run(image)
    seen = watch.attention.seen
    if not seen:
        raise Unsupported(NO_ATTENTION)
    if tokens is None or tokens.grid is None:
        raise Unsupported(NO_TOKENS)
    length = len(tokens.own) + math.prod(tokens.grid)
    among = watch.attention.over(length)
    if not among or any(_copies(each) > 1 for each in seen):
        sizes = " and ".join(sorted({"x".join(map(str, each.shape)) for each in seen}))
        raise Unsupported(
            f"attention maps need attention among all {length} tokens at once; this network has attention within "
            f"windows, or among others ({sizes})"
        )
    others = [each for each in seen if each.shape[-2:] != (length, length)]
    if any(each.shape[-2] == each.shape[-1] for each in others):
        raise Unsupported("attention maps need attentions among the same tokens; here the number of tokens changes")
    _check_order([each.grad_fn for each in among], scores.grad_fn)
    (gradient,) = torch.autograd.grad(scores, among[-1], torch.full_like(scores, math.nan), retain_graph=True)
    # What has any part in the scores gets NaN, however small, also where a head of zeros would give it 0.
    read = gradient.isnan().flatten(0, -3).any(dim=0).any(dim=-1)
    blocks = watch.blocks(length)
    if not _are_all(blocks, among, start.grad_fn, scores.grad_fn):
        blocks = {}
    names = tuple(each.name for each in blocks.values())
    if names and not _do_stand_alone(module, image, names, scores.detach()):
        names = ()
    return Attentions(tokens, length, read, bool(others), names)


def _copies(probabilities: Tensor) -> int:
    """Returns how many pictures, or windows of one, an attention was asked for at once."""
    return len(probabilities) if probabilities.dim() > 3 else 1


def _check_order(nodes: Sequence[Node], scores: Node) -> None:
    """Raises Unsupported where an attention does not see what the one before it has made."""
    for earlier, later in zip(nodes, [*nodes[1:], scores], strict=True):
        if earlier not in reached(later):
            raise Unsupported(
                "attention maps need each attention to look at what the one before it has made, and the picture to run "
                f"through the network exactly once; some of this network's {len(nodes)} attentions stand side by side"
            )


@dataclass(frozen=True)
class _Block:
    """Describes a call of a module that holds one attention and returns a sequence."""

    name: str
    node: Node
    """Node of what it returned."""


class _Watch:
    """Watches one pass of a network: its attentions, and which modules hold one each."""

    def __init__(self, module: nn.Module) -> None:
        self.attention = SeenAttention()
        self._module = module
        self._entered: list[int] = []
        """Number of attentions that had been seen when each of the modules that run now was entered."""
        self._calls: list[tuple[str, int, int, Tensor, Node]] = []
        """The calls that returned a tensor: name, attentions seen before and after, output and its node."""

    def run(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the picture that the network was given, (1, C, H, W), and its scores, both with graph."""
        start = image.detach()[None].clone().requires_grad_().clone()
        with ExitStack() as stack:
            for name, child in self._module.named_modules():
                for handle in self._hooks(name, child):
                    stack.callback(handle)
            stack.enter_context(SeenThrough())
            stack.enter_context(self.attention)
            scores = run(self._module, start.clone())
        return start, scores

    def _hooks(self, name: str, module: nn.Module) -> Iterator[Callable[[], None]]:
        owner = threading.get_ident()

        def enter(_module: nn.Module, _inputs: Any) -> None:
            if threading.get_ident() == owner:
                self._entered.append(len(self.attention.seen))

        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if threading.get_ident() != owner:
                return
            before, tensor = self._entered.pop(), _first(output)
            if tensor is not None:
                self._calls.append((name, before, len(self.attention.seen), tensor, tensor.grad_fn))

        yield module.register_forward_pre_hook(enter).remove
        yield module.register_forward_hook(leave).remove

    def blocks(self, length: int) -> dict[int, _Block]:
        """Returns the outermost module that holds each attention alone and returns the sequence, by its attention."""
        among = [at for at, each in enumerate(self.attention.seen) if each.shape[-2:] == (length, length)]
        found = {}
        for name, before, after, output, node in self._calls:
            inside = [at for at in among if before <= at < after]
            if name and len(inside) == 1 and output.dim() == 3 and output.shape[:2] == (1, length):
                found[inside[0]] = _Block(name, node)  # an outer module returns after those inside of it
        return dict(sorted(found.items()))


def _first(output: Any) -> Tensor | None:
    """Returns what a block returns, or the first of several; None where that is no tensor."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


def _are_all(blocks: dict[int, _Block], among: Sequence[Tensor], picture: Node, scores: Node) -> bool:
    """Tells whether each attention has a block, and nothing of the picture goes on past a block's output."""
    nodes = [each.node for each in blocks.values()]
    nexts = [*(each.grad_fn for each in among[1:]), scores]
    return len(nodes) == len(among) and all(
        picture not in reached(following, (node,)) for node, following in zip(nodes, nexts, strict=True)
    )


class Stages:
    """Has all that follows the last block see the output of every block, in one batch: (L, N, C).

    So one pass tells the scores that the network's head gives to what each block has made. The graph of each of them
    begins at its own block.

    Args:
        blocks: names of the L blocks, in the order in which they run; one that runs several times stands several times.
    """

    def __init__(self, blocks: Sequence[str]) -> None:
        self._blocks = blocks
        self._made: list[Tensor] = []

    @contextmanager
    def installed(self, module: nn.Module) -> Iterator[None]:
        """Watches the blocks inside, in this thread alone."""
        owner = threading.get_ident()

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            return self._left(output) if threading.get_ident() == owner else None

        with ExitStack() as stack:
            for name in dict.fromkeys(self._blocks):
                stack.callback(module.get_submodule(name).register_forward_hook(hook).remove)
            yield

    def _left(self, output: Any) -> Any:
        made = _first(output)
        if made is None:
            return None
        self._made.append(made)
        further = made.detach() if len(self._made) < len(self._blocks) else torch.cat(self._made)
        return (further, *output[1:]) if isinstance(output, tuple) else further


def _do_stand_alone(module: nn.Module, image: Tensor, blocks: Sequence[str], scores: Tensor) -> bool:
    """Tells whether what follows the last block gives its output the network's scores, among those of the others."""
    try:
        with torch.no_grad(), Stages(blocks).installed(module):
            found = run(module, image[None])
    except torch.OutOfMemoryError:  # which says nothing of the network
        raise
    except Exception:  # it may not take more tokens than the picture has, or more pictures than it was given
        return False
    difference = (found[-1:] - scores).abs().max()
    return len(found) == len(blocks) and bool(difference <= SAME[dtype_of(module)] * scores.abs().max())
