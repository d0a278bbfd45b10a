"""Asks TorchServe's management API for the state of its workers."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from typing import Any

_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a neighbour: never through a proxy


def worker_states(management_url: str, model: str, timeout_s: float) -> list[str]:
    """Returns the states of a model's workers, such as READY.

    Raises:
        OSError: TorchServe does not answer, or does not know the model.
        ValueError: the answer is no JSON.
    """
    with _http.open(f"{management_url}/models/{urllib.parse.quote(model, safe='')}", timeout=timeout_s) as reply:
        versions: list[dict[str, Any]] = json.load(reply)
    return [worker["status"] for version in versions for worker in version["workers"]]
