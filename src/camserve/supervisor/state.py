"""What TorchServe's management API says of its workers."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from typing import Any

_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a neighbour: never through a proxy


def worker_states(management_url: str, model: str, timeout_s: float) -> list[str]:
    """The states of a model's workers, such as READY.

    Raises:
        OSError: it does not answer, or does not know the model.
        ValueError: its answer is no JSON.
    """
    with _http.open(f"{management_url}/models/{urllib.parse.quote(model, safe='')}", timeout=timeout_s) as reply:
        versions: list[dict[str, Any]] = json.load(reply)
    return [worker["status"] for version in versions for worker in version["workers"]]
