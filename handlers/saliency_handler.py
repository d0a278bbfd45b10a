"""Connects TorchServe with `camserve.worker`: a model archive points at the one thin class of this module.

TorchServe wants exactly one class in this module. It does not inherit from TorchServe's own base handler, which changes
the float32 precision at import.
"""

from typing import Any

import torch

from camserve.errors import CamserveError
from camserve.worker.executor import MEMORY_BYTES, Executor
from camserve.worker.network import load_network
from camserve.worker.service import Refusal, WorkerService


class SaliencyHandler:
    """Answers the gateway's steps, and plain clients with predictions and saliency maps."""

    def initialize(self, context: Any) -> None:
        """Loads the archive that TorchServe unpacked; settings are under `handler:` of model-config.yaml."""
        settings = (context.model_yaml_config or {}).get("handler", {})
        if settings.get("threads"):
            torch.set_num_threads(int(settings["threads"]))
        gpu = context.system_properties.get("gpu_id")
        device = settings.get("device") or (f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu")
        self._service: Refusal | WorkerService
        try:
            network = load_network(
                context.system_properties["model_dir"], device=device, micro_batch=settings.get("micro_batch")
            )
        except CamserveError as error:
            self._service = Refusal(error)
            return
        executor = Executor(network, memory_bytes=int(settings.get("memory_bytes", MEMORY_BYTES)))
        executor.warm_up()
        self._service = WorkerService(executor)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Returns one reply for each request of the batch, errors included: see `camserve.worker.service`."""
        answers = self._service.answer(data)
        for index, answer in enumerate(answers):
            context.set_response_content_type(index, answer.content_type)
            context.set_response_status(code=answer.status, idx=index)
        return [answer.body for answer in answers]
