"""Which layers a network has to explain, and which one is taken."""

from dataclasses import replace

import pytest
import timm
import torch
from asked import asked
from reference.models import HEIGHT, MODELS, WIDTH, build
from torch import nn
from torch.nn import functional as F
from torchvision import models

from camserve.errors import Unsupported
from camserve.saliency.arrangement import CHANNELS_LAST, PLANES, token_grid
from camserve.saliency.capture import capture
from camserve.saliency.layers import FoundLayer, survey
from camserve.types import Layer

TORCHVISION = {
    "alexnet": Layer("features.11", 256, 13, 13),
    "vgg11": Layer("features.19", 512, 14, 14),
    "vgg11_bn": Layer("features.27", 512, 14, 14),
    "resnet18": Layer("layer4.1", 512, 7, 7),
    "resnext50_32x4d": Layer("layer4.2", 2048, 7, 7),
    "squeezenet1_1": Layer("features.12", 512, 13, 13),
    "densenet121": Layer("features.norm5:relu", 1024, 7, 7),  # its last ReLU is a function
    "googlenet": Layer("inception5b", 1024, 7, 7),
    "inception_v3": Layer("Mixed_7c", 2048, 8, 8),
    "mobilenet_v2": Layer("features.18", 1280, 7, 7),
    "mobilenet_v3_small": Layer("features.12", 576, 7, 7),
    "mnasnet0_5": Layer("layers.16", 1280, 7, 7),
    "shufflenet_v2_x0_5": Layer("conv5.2", 1024, 7, 7),
    "efficientnet_b0": Layer("features.8", 1280, 7, 7),
    "efficientnet_v2_s": Layer("features.7", 1280, 7, 7),
    "regnet_y_400mf": Layer("trunk_output.block4", 440, 7, 7),
    "convnext_tiny": Layer("features.7.2", 768, 7, 7),
    "vit_b_16": Layer("encoder.layers.encoder_layer_11.ln_1", 768, 14, 14),  # behind it only the class token is read
    "swin_t": Layer("norm", 768, 7, 7),
    "swin_v2_t": Layer("norm", 768, 7, 7),
    "maxvit_t": Layer("blocks.3", 512, 7, 7),
}
"""The last spatial feature layer after its activation, at 224 x 224 (299 x 299 for Inception)."""

NEEDS_REAL_WEIGHTS = {"regnet_y_400mf", "maxvit_t"}  # their constructors compute with numbers, which meta has not

TIMM = {
    "vit_tiny_patch16_224": (Layer("blocks.11.norm1", 192, 14, 14), token_grid(14, 14, 1)),
    "deit_tiny_distilled_patch16_224": (Layer("blocks.11.norm1", 192, 14, 14), token_grid(14, 14, 2)),
    "vit_small_patch14_reg4_dinov2": (Layer("blocks.11.norm1", 384, 16, 16), token_grid(16, 16, 5)),
    "vit_small_patch16_18x2_224": (Layer("blocks.17.attns.1.norm", 384, 14, 14), token_grid(14, 14, 1)),
    "vit_base_patch16_siglip_224": (Layer("norm", 768, 14, 14), token_grid(14, 14, 0)),  # every token is read
    "cait_xxs24_224": (Layer("blocks_token_only.1.norm1", 192, 14, 14), token_grid(14, 14, 1)),
    "mixer_s32_224": (Layer("norm", 512, 7, 7), token_grid(7, 7, 0)),
    "swin_tiny_patch4_window7_224": (Layer("norm", 768, 7, 7), CHANNELS_LAST),
    "pvt_v2_b0": (Layer("stages.3", 256, 7, 7), PLANES),
    "convnext_atto": (Layer("stages.3", 320, 7, 7), PLANES),
}
"""At 224 x 224."""


def find_layers(module: nn.Module, x: torch.Tensor) -> tuple[tuple[FoundLayer, ...], str]:
    """Every layer offered, without what numbers tell of the head, and the name of the default one."""
    found = survey(module, x)
    return tuple(replace(site, layer=replace(site.layer, pooled_head=False)) for site in found.layers), found.default


def torchvision_model(name: str) -> nn.Module:
    options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    return models.get_model(name, weights=None, **options).eval()


@pytest.mark.parametrize("name", TORCHVISION)
def test_default_layer_of_torchvisions_networks(name):
    side = 299 if name == "inception_v3" else 224
    with torch.device("cpu" if name in NEEDS_REAL_WEIGHTS else "meta"):  # meta: shapes alone, no arithmetic
        sites, default = find_layers(torchvision_model(name), torch.zeros(1, 3, side, side))
    assert default == TORCHVISION[name].name
    assert next(site.layer for site in sites if site.layer.name == default) == TORCHVISION[name]


@pytest.mark.parametrize("name", TIMM)
def test_default_layer_of_timms_networks(name):
    options = {"img_size": 224} if "dinov2" in name else {}  # its own is 518
    module = timm.create_model(name, num_classes=3, **options).eval()
    sites, default = find_layers(module, torch.zeros(1, 3, 224, 224))
    site = next(site for site in sites if site.layer.name == default)
    assert (site.layer, site.arrangement) == TIMM[name]


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"]
)
def test_every_listed_layer_of_a_torchvision_network_can_be_explained(name):
    torch.manual_seed(0)
    every_listed_layer_can_be_explained(torchvision_model(name), torch.randn(1, 3, 64, 64), every=12)


@pytest.mark.parametrize("name", MODELS)
def test_every_listed_layer_of_a_small_network_can_be_explained(name):
    torch.manual_seed(0)
    every_listed_layer_can_be_explained(build(name), torch.randn(1, 3, HEIGHT, WIDTH))


def every_listed_layer_can_be_explained(module: nn.Module, x: torch.Tensor, every: int = 1) -> None:
    sites, default = find_layers(module, x)
    assert len({site.layer.name for site in sites}) == len(sites)
    logits = module(x)
    for site in [*sites[::every], next(site for site in sites if site.layer.name == default)]:
        captured = capture(module, x, site.layer.name, site.calls, site.arrangement)
        layer = site.layer
        assert captured.activations.shape == (1, layer.channels, layer.height, layer.width)
        torch.testing.assert_close(captured.logits, logits)
        assert captured.gradients(asked([0])).shape == (1, 1, *captured.activations.shape[1:])


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_on_the_network(name):
    module = build(name)
    find_layers(module, torch.zeros(1, 3, HEIGHT, WIDTH))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_nothing_is_left_when_the_forward_fails():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(5, 2))
    with pytest.raises(Unsupported, match=r"images alone, 1 x 3 x 8 x 8.*shapes cannot be multiplied"):
        find_layers(module, torch.zeros(1, 3, 8, 8))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


class SharedReLU(nn.Module):
    """One ReLU for the convolutions and for the hidden layer of the head, as much hand-written code has it."""

    def __init__(self, hidden: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.relu, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.hidden, self.head = hidden, nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.second(self.relu(self.first(x)))))
        return self.head(self.relu(self.hidden(x)).flatten(1))


HEADS = {"2-D": nn.Sequential(nn.Flatten(), nn.Linear(6, 5)), "1 x 1": nn.Conv2d(6, 5, 1)}


@pytest.mark.parametrize("hidden", HEADS.values(), ids=HEADS)
def test_an_activation_shared_by_features_and_head_is_the_last_spatial_one(hidden):
    torch.manual_seed(0)
    module, x = SharedReLU(hidden).eval(), torch.randn(1, 3, 8, 8)
    sites, default = find_layers(module, x)
    layer = next(site.layer for site in sites if site.layer.name == default)
    assert (layer.channels, layer.height, layer.width) == (6, 8, 8)
    every_listed_layer_can_be_explained(module, x)


class FunctionalReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.conv(x), inplace=True).mean(dim=(2, 3)))


def test_a_functional_activation_is_a_layer_of_its_own():
    torch.manual_seed(0)
    module, x = FunctionalReLU().eval(), torch.randn(1, 3, 8, 8)
    sites, default = find_layers(module, x)
    assert [site.layer.name for site in sites] == ["conv", "conv:relu"]
    assert default == "conv:relu"
    before, after = (capture(module, x, site.layer.name, site.calls).activations for site in sites)
    assert before.min() < 0  # not changed by the in-place ReLU
    torch.testing.assert_close(after, before.relu(), rtol=0, atol=0)


def test_layers_are_listed_in_the_order_of_their_last_call():
    sites, default = find_layers(build("reused"), torch.zeros(1, 3, HEIGHT, WIDTH))
    calls = {site.layer.name: site.calls for site in sites}
    assert (calls["first"], calls["second"], calls["third"], calls["act"]) == ((1,), (1,), (1,), (3,))
    assert [name for name in calls if ":" not in name] == ["first", "second", "third", "act"]
    assert default == "act"


def test_pooling_dropout_and_containers_are_no_feature_layers():
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(), nn.Identity()),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 2),
    ).eval()
    assert find_layers(module, torch.zeros(1, 3, 16, 16))[1] == "0.1"


def test_a_convolution_as_classifier_is_not_explained():
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    assert find_layers(module, torch.zeros(1, 3, 16, 16))[1] == "1"


def test_a_network_without_spatial_layer_lacks_a_layer():
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))
    found = survey(module, torch.zeros(1, 3, 2, 2))
    assert (found.layers, found.default, found.scores) == ((), "", 2)
    assert "spatial" in found.lacks["layer"]


# Vision transformers


def small_vit(side: int = 32) -> nn.Module:
    """4 x 4 patches and a class token; torchvision sets the head to zero, which would hide everything."""
    torch.manual_seed(0)
    module = models.VisionTransformer(side, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5)
    nn.init.normal_(module.heads.head.weight)
    return module.eval()


def small_swin() -> nn.Module:
    """8 x 8 places of 8 channels, then 4 x 4 of 16: the first could be taken for either arrangement."""
    torch.manual_seed(0)
    return models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=5).eval()


@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_every_listed_layer_of_a_small_transformer_can_be_explained_unless_only_its_class_token_is_read(make):
    every_listed_layer_can_be_explained(make(), torch.randn(1, 3, 32, 32))


def test_behind_the_default_layer_of_a_vit_only_the_class_token_matters():
    module, x = small_vit(), torch.randn(1, 3, 32, 32)
    sites, default = find_layers(module, x)
    names = [site.layer.name for site in sites]
    influence = {}
    for site in sites:
        gradients = capture(module, x, site.layer.name, site.calls, site.arrangement).gradients(asked([0]))
        influence[site.layer.name] = gradients.abs().max().item()
    assert default == "encoder.layers.encoder_layer_1.ln_1"
    assert influence[default] > 0
    assert {influence[name] for name in names[names.index(default) + 1 :]} == {0}


def test_a_vit_whose_tokens_are_averaged_is_explained_at_its_end():
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = timm.create_model(
                "vit_tiny_patch16_224", img_size=64, depth=2, global_pool="avg", class_token=False, num_classes=5
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.vit(x)

    sites, default = find_layers(Averaged().eval(), torch.zeros(1, 3, 64, 64))
    site = next(site for site in sites if site.layer.name == default)
    assert (default, site.arrangement) == ("vit.blocks.1", token_grid(4, 4, 0))


class Unfolded(nn.Module):
    """Cuts its patches by reshaping, and attends with plain matrix products, as much hand-written code does."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.grid = (height // 8, width // 8)
        self.embed, self.first, self.second = nn.Linear(192, 12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention, self.mlp = PlainAttention(), nn.Linear(12, 12)
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 12)), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = x.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.embed(patches)], dim=1)
        tokens = tokens + self.attention(self.first(tokens))
        return self.head((tokens + self.mlp(self.second(tokens)))[:, 0])


class PlainAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x)[:, None].chunk(3, dim=-1)
        return ((query @ key.transpose(-1, -2)).softmax(dim=-1) @ value)[:, 0]


def test_a_hand_written_vit_on_an_input_that_is_not_square():
    torch.manual_seed(0)
    module, x = Unfolded(32, 48).eval(), torch.randn(1, 3, 32, 48)
    sites, default = find_layers(module, x)
    assert default == "first"
    assert next(site.arrangement for site in sites if site.layer.name == default) == token_grid(4, 6, 1)
    every_listed_layer_can_be_explained(module, x)


class Patches(nn.Module):
    """Patches of a convolution that leaves the last columns out, so that the grid has other proportions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 9, 8, stride=8), nn.LayerNorm(9), nn.Linear(9, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x).flatten(2).mT], dim=1)
        return self.head(self.norm(tokens).mean(dim=1))


def test_tokens_lie_on_the_grid_that_was_seen_before_them():
    sites, default = find_layers(Patches(), torch.zeros(1, 3, 40, 50))
    assert default == "norm"
    assert next(site.arrangement for site in sites if site.layer.name == default) == token_grid(5, 6, 1)


def test_channels_last_is_told_from_planes_where_their_shapes_are_equal():
    sites, default = find_layers(small_swin(), torch.zeros(1, 3, 32, 32))
    found = {site.layer.name: site for site in sites}
    assert (found["features.0.0"].arrangement, found["features.0.2"].arrangement) == (PLANES, CHANNELS_LAST)
    assert found["features.1.1"].arrangement == CHANNELS_LAST
    assert found["features.1.1"].layer == Layer("features.1.1", 8, 8, 8)
    assert default == "norm"


def test_windows_and_heads_are_no_maps():
    torch.manual_seed(0)
    module = models.MaxVit((96, 96), 16, 4, [24, 40], [1, 1], head_dim=8, stochastic_depth_prob=0, num_classes=5).eval()
    sites, default = find_layers(module, torch.zeros(1, 3, 96, 96))
    assert default == "blocks.1"
    sides = {(site.layer.height, site.layer.width) for site in sites}
    assert all(height == width for height, width in sides)
    assert not any(".partition_op" in site.layer.name for site in sites)
    every_listed_layer_can_be_explained(module, torch.randn(1, 3, 96, 96), every=10)


def test_layers_inside_convnexts_blocks_have_their_channels_last():
    with torch.device("meta"):
        sites, _ = find_layers(torchvision_model("convnext_tiny"), torch.zeros(1, 3, 224, 224))
    layers = {site.layer.name: site for site in sites}
    assert layers["features.7.2.block.3"].layer == Layer("features.7.2.block.3", 3072, 7, 7)
    assert layers["features.7.2.block.3"].arrangement == CHANNELS_LAST
    assert layers["features.7.2.block.0"].arrangement == PLANES
    assert layers["features.0.1"].layer == Layer("features.0.1", 96, 56, 56)  # a LayerNorm2d, which returns planes


def test_planes_of_other_proportions_than_the_input_stay_planes():
    """Strides that differ between rows and columns, as in networks for spectrograms."""
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=(4, 1), padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    ).eval()
    sites, default = find_layers(module, torch.zeros(1, 3, 32, 32))
    assert next(site.layer for site in sites if site.layer.name == default) == Layer("1", 8, 8, 32)


SHUFFLED = {
    "hiera_tiny_224": ("blocks.11", {"blocks.0.attn.qkv", "blocks.4.norm1", "unroll"}),  # units, in no order of rows
    "cait_xxs24_224": (
        "blocks_token_only.1.norm1",
        {"blocks.0.attn.attn_drop", "blocks.0.attn.proj_w"},
    ),  # heads x N x N
    "xcit_nano_12_p16_224": ("cls_attn_blocks.1.norm1", {"blocks.0.attn.attn_drop"}),  # heads x channels x channels
    "mobilevitv2_050": ("stages.4.1", {"stages.2.1.transformer.0.norm1", "stages.2.1.transformer.0.mlp"}),  # unfolded
}
"""Networks of timm with layers that have the shape of maps and are none: the default layer, and some of those."""


@pytest.mark.parametrize("name", SHUFFLED)
def test_layers_that_only_have_the_shape_of_maps_are_not_offered(name):
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=3).eval()
    with torch.no_grad():
        for weight in module.parameters():
            if weight.abs().max() < 1e-3:  # layer scales that begin at zero hide what is behind them
                weight.normal_(0, 0.2)
    side = module.default_cfg["input_size"][-1]
    found = survey(module, torch.zeros(1, 3, side, side))
    default, others = SHUFFLED[name]
    assert found.default == default
    assert not others & {site.layer.name for site in found.layers}
    assert others <= {child for child, _ in module.named_modules()}
    places_lie_where_the_picture_changes(module, found.layers, side)


def places_lie_where_the_picture_changes(module: nn.Module, sites: tuple[FoundLayer, ...], side: int) -> None:
    """Changes other patches of another picture than the probe does: in 3 of 4 the layer changes most at the patch."""
    raw: dict[str, torch.Tensor] = {}
    modules = dict(module.named_modules())
    some = [site for site in sites[::7] if ":" not in site.layer.name]
    for site in some:
        modules[site.layer.name].register_forward_hook(
            lambda _m, _x, out, name=site.layer.name: raw.update({name: out})
        )
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 16), (side, side), mode="bilinear") * 4 - 2
    pictures = [x]
    size = side // 8
    corners = [
        (int(top * side), int(left * side)) for top, left in ((0.08, 0.12), (0.15, 0.75), (0.7, 0.3), (0.55, 0.85))
    ]
    for top, left in corners:
        pictures.append(x.clone())
        pictures[-1][..., top : top + size, left : left + size] *= -1
        pictures[-1][..., top : top + size, left : left + size] += 3
    with torch.no_grad():
        module(torch.cat(pictures))
    for site in some:
        maps = site.arrangement.maps(raw[site.layer.name])
        changes = (maps[1:] - maps[:1]).abs().sum(dim=1)
        right = 0
        for change, (top, left) in zip(changes, corners, strict=True):
            row, column = divmod(int(change.argmax()), site.layer.width)
            y, x_ = (row + 0.5) * side / site.layer.height, (column + 0.5) * side / site.layer.width
            reach = [max(1.5 * side / cells, 12) for cells in (site.layer.height, site.layer.width)]
            right += top - reach[0] <= y <= top + size + reach[0] and left - reach[1] <= x_ <= left + size + reach[1]
        assert right >= 3, site.layer.name
