"""One model that cannot be explained, or not by every method, never keeps the others from being ready."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from gateway_harness import QUICK
from torch import nn
from worker_backend import WorkerBackend

from camserve.client import AsyncClient
from camserve.errors import Unavailable, Unsupported
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.server import Gateway
from camserve.types import Preprocessing
from camserve.worker.network import Network
from camserve.worker.service import Refusal

HANDLER = Path(__file__).parents[2] / "handlers" / "saliency_handler.py"
REASON = "the network cannot be explained: its calls 1 and 2 see two views"


class Cut(nn.Module):
    """Its forward lets no gradient through."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.tiny_module()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[5:](self.net[:5](x).detach())


class Refusing(WorkerBackend):
    """A worker that answers why its model cannot be served."""

    def __init__(self) -> None:
        super().__init__(tiny.tiny_network())
        self.service = Refusal(Unsupported(REASON))

    async def models(self) -> Sequence[str]:
        return ("refused",)


def cut_network() -> Network:
    preprocessing = Preprocessing(64, tiny.TINY_SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return Network(Cut().eval(), preprocessing=preprocessing, labels=tiny.TINY_LABELS, name="cut")


async def test_a_bad_model_fails_alone_and_says_why():
    backends = {"good": WorkerBackend(tiny.tiny_network()), "cut": WorkerBackend(cut_network()), "bad": Refusing()}
    image = tiny.png(tiny.pixels(0))
    async with Gateway(Settings(**QUICK), fixed(backends)) as gateway, AsyncClient(gateway.address) as client:
        await client.wait_ready(30)
        ready = {model.name: (model.ready, model.failure) for model in await client.models()}
        assert ready == {"tiny": (True, ""), "cut": (True, ""), "refused": (False, REASON)}
        assert (await client.explain(image, ["grad_cam"], model="tiny")).maps
        assert (await client.explain(image, ["score_cam", "rise"], model="cut")).maps
        with pytest.raises(Unsupported, match=r"forward cuts it.*score_cam"):
            await client.explain(image, ["grad_cam"], model="cut")
        with pytest.raises(Unavailable, match=REASON):
            await client.explain(image, ["score_cam"], model="refused")


def test_a_worker_whose_model_cannot_be_loaded_stays_and_says_why(tmp_path):
    spec = importlib.util.spec_from_file_location("handler_under_test", HANDLER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler, types = module.SaliencyHandler(), []
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "labels.json").write_text("[]")
    context = SimpleNamespace(
        model_yaml_config={},
        system_properties={"model_dir": str(tmp_path)},
        set_response_content_type=lambda index, kind: types.append(kind),
        set_response_status=lambda code, idx: None,
    )
    handler.initialize(context)
    (reply,) = handler.handle([{"body": b"image"}], context)
    assert json.loads(reply)["error"]["kind"] == "InvalidInput"
    assert types == ["application/json"]
