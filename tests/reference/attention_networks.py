"""Vision transformers of three libraries, and the same networks written out by hand from their weights.

Nothing here is shared with camserve. All take (n, 3, 40, 40) in 25 patches; attention is made uneven.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

SIDE, CLASSES, PATCHES = 40, 5, 5
SMALL = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 12, "intermediate_size": 20}
TIMM = {"img_size": SIDE, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2, "num_classes": CLASSES}


@dataclass(frozen=True)
class Block:
    """One block: what comes before attention, query, key and value as (rows, columns) weights, what comes after."""

    before: Callable[[Tensor], Tensor]
    weights: Sequence[tuple[Tensor, Tensor | None]]
    out: nn.Linear
    after: Callable[[Tensor], Tensor]
    """What is added to the stream behind attention."""


@dataclass(frozen=True)
class ByHand:
    """A network written out: tokens (N, C) of an image, blocks, and the head, from tokens to logits."""

    tokens: Callable[[Tensor], Tensor]
    blocks: Sequence[Block]
    head: Callable[[Tensor], Tensor]
    read: Sequence[int]
    """Tokens that the head looks at."""
    own: int
    """How many tokens in front are no patches."""
    heads: int = 2


def uneven(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Large weights of queries and keys, tokens and heads that are not zero, so that maps are not flat."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() > 1 or name.endswith("bias"):
                weight.normal_(0, 0.6 if any(part in name for part in ("in_proj", "qkv", "q_proj", "k_proj")) else 0.3)
    return module.to(dtype).eval()


def torchvision_vit() -> nn.Module:
    return VisionTransformer(SIDE, 8, 3, 2, hidden_dim=12, mlp_dim=20, num_classes=CLASSES)


def timm_vit(**options: Any) -> nn.Module:
    return TimmTransformer(**TIMM, **options)


def timm_distilled() -> nn.Module:
    return timm.create_model("deit_tiny_distilled_patch16_224", **TIMM)


def hugging_face(config: type, network: type, attention: str = "sdpa", **options: Any) -> nn.Module:
    size = {"image_size": SIDE, "patch_size": 8, "num_labels": CLASSES}
    return network(config(**SMALL, **size, **options, attn_implementation=attention))


def of_torchvision(module: Any) -> ByHand:
    def block(layer: Any) -> Block:
        attention = layer.self_attention
        pairs = list(zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True))
        return Block(layer.ln_1, pairs, attention.out_proj, lambda x: layer.mlp(layer.ln_2(x)))

    def tokens(image: Tensor) -> Tensor:
        return with_own(module.class_token, module.conv_proj(image[None])) + module.encoder.pos_embedding[0]

    return ByHand(
        tokens,
        [block(one) for one in module.encoder.layers],
        lambda x: module.heads(module.encoder.ln(x)[0]),
        [0],
        1,
        module.encoder.layers[0].num_heads,
    )


def of_timm(module: Any, own: Sequence[str], read: Sequence[int] | None = None) -> ByHand:
    def block(layer: Any) -> Block:
        qkv, bias = layer.attn.qkv, layer.attn.qkv.bias
        pairs = list(zip(qkv.weight.chunk(3), bias.chunk(3), strict=True))
        return Block(layer.norm1, pairs, layer.attn.proj, lambda x: layer.mlp(layer.norm2(x)))

    def tokens(image: Tensor) -> Tensor:
        patches = module.patch_embed.proj(image[None])
        if module.pos_embed.shape[1] == PATCHES**2:  # positions of patches alone
            placed = with_own(None, patches) + module.pos_embed[0]
            return torch.cat([getattr(module, name)[0] for name in own] + [placed])
        return with_own(torch.cat([getattr(module, name) for name in own], dim=1), patches) + module.pos_embed[0]

    def head(x: Tensor) -> Tensor:
        if hasattr(module, "head_dist"):
            x = module.norm(x)
            return (module.head(x[0]) + module.head_dist(x[1])) / 2
        count = sum(getattr(module, name).shape[1] for name in own)
        pooled = module.norm(x)[0] if read is not None else module.fc_norm(module.norm(x)[count:].mean(dim=0))
        return module.head(pooled)

    count = sum(getattr(module, name).shape[1] for name in own)
    places = range(count, count + PATCHES**2) if read is None else read
    return ByHand(tokens, [block(one) for one in module.blocks], head, list(places), count)


def of_hugging_face(module: Any, name: str, own: Sequence[str], heads: Sequence[str]) -> ByHand:
    inner = getattr(module, name)

    def block(layer: Any) -> Block:
        attention = layer.attention
        pairs = [(one.weight, one.bias) for one in (attention.q_proj, attention.k_proj, attention.v_proj)]
        return Block(layer.layernorm_before, pairs, attention.o_proj, lambda x: layer.mlp(layer.layernorm_after(x)))

    def tokens(image: Tensor) -> Tensor:
        patches = inner.embeddings.patch_embeddings.projection(image[None])
        first = torch.cat([getattr(inner.embeddings, each) for each in own], dim=1)
        return with_own(first, patches) + inner.embeddings.position_embeddings[0]

    def head(x: Tensor) -> Tensor:
        x = inner.layernorm(x)
        return sum(getattr(module, each)(x[at]) for at, each in enumerate(heads)) / len(heads)

    return ByHand(tokens, [block(one) for one in inner.layers], head, list(range(len(heads))), len(own))


def with_own(own: Tensor | None, patches: Tensor) -> Tensor:
    """(1, own, C) and (1, C, u, v) to (own + u v, C), the patches row by row."""
    rows = [patches[0, :, row, column] for row in range(patches.shape[2]) for column in range(patches.shape[3])]
    return torch.stack([*(own[0] if own is not None else []), *rows])


def attended(block: Block, x: Tensor, heads: int) -> tuple[Tensor, list[Tensor]]:
    """What attention adds to the stream x (N, C), and the probabilities (N, N) of each head, with graph."""
    normed, width = block.before(x), x.shape[1] // heads
    outputs, attention = [], []
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        query, key, value = (
            normed @ weight[rows].T + (0 if bias is None else bias[rows]) for weight, bias in block.weights
        )
        weights = F.softmax(query @ key.T / math.sqrt(width), dim=1)
        attention.append(weights)
        outputs.append(weights @ value)
    return block.out(torch.cat(outputs, dim=1)), attention


def forward(net: ByHand, image: Tensor) -> tuple[Tensor, list[list[Tensor]], list[Tensor]]:
    """Logits (classes,), attention[block][head] (N, N), and the tokens (N, C) behind each block, all with graph."""
    x, attention, stages = net.tokens(image), [], []
    for block in net.blocks:
        added, heads = attended(block, x, net.heads)
        x = x + added
        x = x + block.after(x)
        attention.append(heads)
        stages.append(x)
    return net.head(x), attention, stages


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], ByHand]]] = {
    "torchvision": (torchvision_vit, of_torchvision),
    "timm": (timm_vit, lambda module: of_timm(module, ["cls_token"], [0])),
    "timm with two registers": (
        lambda: timm_vit(reg_tokens=2),
        lambda module: of_timm(module, ["cls_token", "reg_token"], [0]),
    ),
    "timm without class token": (
        lambda: timm_vit(class_token=False, global_pool="avg"),
        lambda module: of_timm(module, []),
    ),
    "timm, patches averaged beside a register": (
        lambda: timm_vit(class_token=False, reg_tokens=1, no_embed_class=True, global_pool="avg"),
        lambda module: of_timm(module, ["reg_token"]),
    ),
    "timm, patches averaged beside a class token": (
        lambda: timm_vit(global_pool="avg"),
        lambda module: of_timm(module, ["cls_token"]),
    ),
    "timm DeiT, distilled": (timm_distilled, lambda module: of_timm(module, ["cls_token", "dist_token"], [0, 1])),
    "Hugging Face": (
        lambda: hugging_face(ViTConfig, ViTForImageClassification),
        lambda module: of_hugging_face(module, "vit", ["cls_token"], ["classifier"]),
    ),
    "Hugging Face DeiT, distilled": (
        lambda: hugging_face(DeiTConfig, DeiTForImageClassificationWithTeacher),
        lambda module: of_hugging_face(
            module, "deit", ["cls_token", "distillation_token"], ["cls_classifier", "distillation_classifier"]
        ),
    ),
}
"""Networks by name, each with what writes it out by hand."""

IN_TWO_WAYS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "ViT": (ViTConfig, ViTForImageClassification, {}),
    "BEiT": (BeitConfig, BeitForImageClassification, {"use_relative_position_bias": True}),
    "DINOv2 with registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification, {}),
}
"""Networks of Hugging Face that can be made with PyTorch's attention and with their own."""


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, ByHand]:
    make, by_hand = NETWORKS[name]
    module = uneven(make(), dtype)
    return module, by_hand(module)
