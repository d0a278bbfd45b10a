"""Says which methods a model has: those for which its network offers all that they need.

What a method needs is said by its class (`MethodSpec.requires`), what a network does not offer by `ModelInfo.lacks`.
"""

from __future__ import annotations

from camserve.errors import Unsupported
from camserve.methods import METHODS, MethodSpec, Rise, ScoreCam
from camserve.methods.spec import ASSETS
from camserve.types.model import ModelInfo


def why_not(method: MethodSpec | type[MethodSpec], model: ModelInfo) -> str:
    """Returns why a model has not a method; "" where its network offers all that the method needs."""
    lacking = [asset for asset in ASSETS if asset in method.requires and asset in model.lacks]
    return "; ".join(f"it needs {ASSETS[asset]}: {model.lacks[asset]}" for asset in lacking)


def offered(model: ModelInfo) -> tuple[str, ...]:
    """Returns the names of the methods that a model has."""
    return tuple(name for name, method in METHODS.items() if not why_not(method, model))


def check_offered(method: MethodSpec, model: ModelInfo) -> None:
    """Raises Unsupported where a model has not a method; the text has the reason, and the methods that work."""
    if reason := why_not(method, model):
        raise Unsupported(f"{method.name}: {reason}; the methods that work: {', '.join(offered(model))}")


def sample_method(model: ModelInfo) -> MethodSpec:
    """Returns some method of masked queries that the model has, and that takes no gradients, for looks at workers."""
    return Rise() if why_not(ScoreCam, model) else ScoreCam()
