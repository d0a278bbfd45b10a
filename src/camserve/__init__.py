"""Serves predictions of an image classifier together with the saliency maps behind them.

Importing this package imports neither torch nor grpc; `Engine`, `Client`, `AsyncClient` and `Tls` come on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from camserve.client import AsyncClient, Client
    from camserve.connection import Tls
    from camserve.engine import Engine

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Engine", "Tls", "__version__"]

_HOME = {
    "AsyncClient": "camserve.client",
    "Client": "camserve.client",
    "Engine": "camserve.engine",
    "Tls": "camserve.connection",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
