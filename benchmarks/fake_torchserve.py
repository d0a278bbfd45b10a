"""Runs a TorchServe that is none, so that a real gateway can be put under load without a network's cost.

    python benchmarks/fake_torchserve.py --slow 20   # prints its address as CAMSERVE_UPSTREAMS takes it
    python benchmarks/fake_torchserve.py --broken    # one whose worker is READY, answers canaries, and fails each step

The model is that of `camserve.gateway.pool.fake`, behind one worker. A step takes the time that its answer says,
`slow` times that of the fake's own table. It ends with its standard input.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

from camserve.codecs import step
from camserve.gateway.pool.fake import MODEL
from camserve.gateway.pool.fake_answers import answer
from camserve.gateway.pool.readiness import canary
from camserve.gateway.pool.torchserve import KEY
from camserve.images import ImageContent
from camserve.torchserve import inference_pb2, inference_pb2_grpc
from camserve.types import Item

REMEMBERED = 64
"""Number of images that the worker remembers."""


class Inference(inference_pb2_grpc.InferenceAPIsServiceServicer):
    """Answers steps one after the other, as one worker does."""

    def __init__(self, slow: float, broken: bool) -> None:
        self._slow = slow
        self._broken = broken
        self._images: dict[bytes, ImageContent] = {}
        self._worker = threading.Lock()

    def Predictions(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802  # gRPC's name
        asked = request.input[KEY]
        if asked == step.DESCRIBE:
            return self._response(step.description_to_bytes(MODEL, "fake:0:cpu"))
        items = step.request_from_bytes(asked)
        assert items is not None
        if self._broken and items[0].digest != canary(MODEL).digest:
            context.abort(grpc.StatusCode.INTERNAL, "Worker died.")
        with self._worker:
            began_s = time.perf_counter()
            result = answer(MODEL, [self._with_image(item) for item in items if isinstance(item, Item)])
            seconds = {stage: self._slow * each for stage, each in result.stage_seconds.items()}
            # What the fake itself takes, for decoding above all, is part of the table's time, or comes on top of it.
            taken_s = time.perf_counter() - began_s
            seconds["decode"] += max(0.0, taken_s - sum(seconds.values()))
            time.sleep(max(0.0, sum(seconds.values()) - taken_s))
        return self._response(step.result_to_bytes(replace(result, stage_seconds=seconds)))

    def _with_image(self, item: Item) -> Item:
        if item.image is None:
            return replace(item, image=self._images.get(item.digest))
        while len(self._images) >= REMEMBERED:
            del self._images[next(iter(self._images))]
        self._images[item.digest] = item.image
        return item

    @staticmethod
    def _response(body: bytes) -> Any:
        return inference_pb2.PredictionResponse(prediction=body)


class Management(BaseHTTPRequestHandler):
    """Says that one worker is READY."""

    def do_GET(self) -> None:
        worker = {"pid": 1, "startTime": "2026-01-01T00:00:00Z", "status": "READY"}
        pages: dict[str, object] = {
            f"/models/{MODEL.name}": [{"workers": [worker], "minWorkers": 1}],
            "/models": {"models": [{"modelName": MODEL.name}]},
        }
        found = pages.get(self.path.partition("?")[0])
        body = json.dumps(found).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", type=float, default=1.0, help="times the seconds of the fake's own table")
    parser.add_argument("--broken", action="store_true", help="fail every step but canaries")
    given = parser.parse_args()
    limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(8), options=limits)
    inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server(Inference(given.slow, given.broken), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    management = ThreadingHTTPServer(("127.0.0.1", 0), Management)
    threading.Thread(target=management.serve_forever, daemon=True).start()
    print(f"127.0.0.1:{port}:{management.server_port}", flush=True)
    sys.stdin.read()
    server.stop(None)


if __name__ == "__main__":
    main()
