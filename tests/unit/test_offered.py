"""Tests of networks that do not offer everything: no layer, no gradients. The methods that need none of it work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import TINY_SIZE, pixels, tiny_module
from torch import Tensor, nn

from camserve.archive import build_archive
from camserve.codecs import step as step_codec
from camserve.codecs import v1
from camserve.engine import Engine
from camserve.errors import InvalidOption, Unsupported
from camserve.methods import METHODS, AblationCam, GradCam, IntegratedGradients, MethodSpec, Rise, ScoreCam
from camserve.saliency.layers import survey_of_outputs
from camserve.saliency.registry import REGISTRY
from camserve.types import Item, ModelInfo, Preprocessing, Task
from camserve.types.offered import check_offered, offered, sample_method, why_not
from camserve.types.request import make_request
from camserve.worker.executor import Executor
from camserve.worker.network import Network, load_network

PREPROCESSING = Preprocessing(resize_px=64, crop_px=TINY_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
WITHOUT_LAYER = {
    "guided_backprop",
    "deconvolution",
    "integrated_gradients",
    "smooth_grad",
    "xrai",
    "rise",
    "d_rise",
    "occlusion",
}
"""Methods of the catalogue whose definition names no layer, and no attention."""
FEW = {
    "rise": {"masks": 30},
    "d_rise": {"masks": 30},
    "smooth_grad": {"samples": 2},
    "xrai": {"steps": 2},
    "integrated_gradients": {"steps": 4},
}


def of_pixels() -> nn.Module:
    """A network that makes its scores of all pixels at once, with a ReLU between: no output of it has places."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * TINY_SIZE[0] * TINY_SIZE[1], 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(of_pixels().eval(), preprocessing=PREPROCESSING)


def test_a_network_without_layers_has_the_methods_that_name_none(engine):
    info = engine.info
    assert (info.layers, info.default_layer) == ((), "")
    assert set(offered(info)) >= WITHOUT_LAYER
    assert not {"grad_cam", "score_cam", "cam", "ablation_cam", "attention_rollout"} & set(offered(info))


@pytest.mark.parametrize("method", sorted(WITHOUT_LAYER))
def test_each_of_them_makes_a_map_of_a_network_without_layers(method, engine):
    answer = engine.explain(pixels(0), [(method, FEW.get(method, {}))], [1], evaluate=True, evaluation_steps=4)
    (found,) = answer.maps
    assert found.array.shape == TINY_SIZE
    assert np.ptp(found.array) > 0
    assert (found.layers, found.layer) == ((), "")
    assert len(answer.predictions) == 4
    assert len(found.faithfulness.insertion) == 5


def test_rise_of_it_is_that_of_the_same_network_whose_layers_are_known(monkeypatch):
    """None of the layers is looked at for RISE, so hiding them changes nothing."""
    plain = Engine(tiny_module().eval(), preprocessing=PREPROCESSING)
    hidden = Network(tiny_module().eval(), preprocessing=PREPROCESSING, lacks={"layer": "they are hidden"})
    image, task = pixels(1), Task(0, Rise(masks=40), 0, 40)
    _, ours = Executor(hidden).answer(Item(image, (v1.Target(index=2),), (task,)))
    _, theirs = Executor(plain.network).answer(Item(image, (v1.Target(index=2),), (task,)))
    np.testing.assert_array_equal(ours.partials[0].sums, theirs.partials[0].sums)
    assert ours.predictions == theirs.predictions


@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "group_cam", "eigen_cam", "gradient_weighted_attention"])
def test_the_others_say_why_not_and_what_works(method, engine):
    with pytest.raises(
        Unsupported, match=f"{method}: it needs a layer with maps: .*no layer.* work: .*rise, d_rise, occlusion"
    ):
        engine.explain(pixels(0), [method], [1])


def test_a_worker_refuses_them_by_itself_and_spares_the_neighbour(engine):
    executor, image = Executor(engine.network), pixels(0)
    bad, good = (Item(image, (v1.Target(index=0),), (Task(0, spec, 0, 1),)) for spec in (GradCam(), Rise()))
    refused, answered = executor.execute([bad, good]).outcomes
    assert isinstance(refused, Unsupported)
    assert "the methods that work" in str(refused)
    assert answered.partials[0].queries == 1


def test_a_layer_that_is_named_is_refused_where_there_is_none(engine):
    with pytest.raises(Unsupported, match="there is no layer '0': the network has no layer with a spatial output"):
        engine.explain(pixels(0), ["rise"], [1], layer="0")
    with pytest.raises(Unsupported, match="there is no layer '1'"):
        Network(of_pixels().eval(), preprocessing=PREPROCESSING, layer="1")


class Untouchable(nn.Module):
    """Makes its scores outside of PyTorch, as a foreign runtime does: there are no gradients, and no modules."""

    def forward(self, x: Tensor) -> Tensor:
        means = np.from_dlpack(x.detach()).mean(axis=(2, 3))
        return torch.from_numpy(np.concatenate([means, means.max(axis=1, keepdims=True)], axis=1))


def test_a_network_that_offers_scores_alone_has_the_methods_of_masked_images():
    lacks = dict.fromkeys(("layer", "gradients", "tail", "modules"), "a foreign runtime gives scores alone")
    network = Network(Untouchable(), preprocessing=PREPROCESSING, lacks=lacks)
    assert network.info.lacks == lacks
    made_of_pixels = {name for name, each in METHODS.items() if each.resolution == "input" and not each.uses_layer}
    assert set(offered(network.info)) == {name for name in made_of_pixels if METHODS[name].kind == "masked_forward"}
    Executor(network).warm_up()


def test_gradients_that_are_lacking_leave_the_methods_of_activations(tiny_network):
    lacks = {"gradients": "its runtime computes none"}
    network = Network(tiny_module().eval(), preprocessing=PREPROCESSING, lacks=lacks)
    assert {"score_cam", "eigen_cam", "ablation_cam", "cam", "rise"} <= set(offered(network.info))
    for spec in (GradCam(), IntegratedGradients()):
        with pytest.raises(Unsupported, match="it needs gradients of the scores: its runtime computes none"):
            check_offered(spec, network.info)
    assert offered(tiny_network.info) == tuple(METHODS)


def test_what_a_method_requires_covers_what_its_functions_ask_for():
    """The registry says by itself which methods are given gradients at the layer; the kind says which make some."""
    for name, spec in METHODS.items():
        method = REGISTRY[spec]
        asks = method.needs_gradients or spec.kind in ("layer_gradient", "pixel_gradient")
        assert ("gradients" in spec.requires) == asks, name
        assert "layer" in spec.requires or not spec.uses_layer, name
        assert ("tail" in spec.requires) == (spec.kind == "tail"), name


def test_looks_at_workers_ask_what_the_model_has(engine, tiny_network):
    assert isinstance(sample_method(engine.info), Rise)
    assert isinstance(sample_method(tiny_network.info), ScoreCam)


def test_a_served_model_says_which_methods_it_has(engine):
    served = v1.served_model_from_proto(v1.served_model_to_proto(engine.info, ready=True))
    assert served.lacks == engine.info.lacks
    assert not served.layers
    refused = {method.name: method.refused for method in served.methods}
    assert {name for name, reason in refused.items() if not reason} == set(offered(engine.info))
    assert refused["grad_cam"] == why_not(GradCam, engine.info)


def test_what_a_worker_says_of_it_arrives(engine):
    read = step_codec.description_from_bytes(step_codec.description_to_bytes(engine.info, "w"))
    assert read == engine.info


def test_a_network_without_layers_can_be_packed(tmp_path, monkeypatch, caplog):
    (tmp_path / "flat_networks.py").write_text("from unit.test_offered import of_pixels as build\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"store": tmp_path, "preprocessing": PREPROCESSING, "name": "flat"}
    path = build_archive("flat_networks:build", **options)
    assert "the methods that work: " in caplog.text
    loaded = load_network(path)
    assert not loaded.info.layers
    assert loaded.info.runtime.name == "eager"
    with pytest.raises(InvalidOption, match="there is no layer '1'"):
        build_archive("flat_networks:build", **options, layer="1")


def test_a_random_network_is_refused_also_where_no_layer_is_looked_at():
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.rand(len(x), 4)

    with pytest.raises(Unsupported, match="another answer each time"):
        survey_of_outputs(Random(), torch.zeros(1, 3, 32, 32), "nobody looks")


def test_a_request_for_a_model_without_layers_fits_it(engine):
    fitted = make_request(pixels(0), ["rise", "occlusion"], [1], size="layer").fit(engine.info)
    assert [part.layer.name for part in fitted.parts] == ["", ""]
    assert fitted.map_size(Rise()) == TINY_SIZE


def test_ablation_needs_the_tail():
    info = ModelInfo("m", "1", ("a", "b"), (8, 8), (), "", lacks={"tail": "it cannot be cut"})
    assert "it cannot be cut" in why_not(AblationCam, info)
    assert not why_not(MethodSpec, ModelInfo("m", "1", ("a",), (8, 8), (), ""))
