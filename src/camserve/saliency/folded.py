"""Has PyTorch multiply a batch of sequences with a weight in one matrix product, where it would make one for each.

`torch.matmul` folds (n, tokens, channels) to (n * tokens, channels) only where that needs no copy, or the weight wants
a gradient (`should_fold` of PyTorch 2.x). Weights are frozen here, and `nn.MultiheadAttention` with `batch_first` hands
a transposed view on, so that a pass with graph makes n products, and as many in its backward. A copy of the view is
cheap: on two cores a ViT-B/16 takes 0.74 of the time for the gradients of four images.

A function mode watches the calls of one thread, so that no module is altered and other threads see nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_PRODUCTS = (F.linear, torch.matmul, Tensor.matmul)


class FoldedProducts(TorchFunctionMode):
    """Has the products that this thread makes while it is entered read contiguous sequences.

    Values and gradients are the same, but for rounding.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) > 1 and args[0].dim() > args[1].dim() == 2:
            args = (args[0].contiguous(), *args[1:])
        elif func is F.multi_head_attention_forward and len(args) > 2:  # its products are made where no mode is asked
            query, key, value = args[:3]
            # Where they are one tensor they must stay one, so that one product makes all three.
            same = {id(each): each.contiguous() for each in (query, key, value)}
            args = (same[id(query)], same[id(key)], same[id(value)], *args[3:])
        return func(*args, **(kwargs or {}))
