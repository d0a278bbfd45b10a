"""`method: auto`: the most faithful method of the ladder that will fit into a request's time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from camserve.errors import InvalidOption
from camserve.gateway.request import Request
from camserve.methods import Auto, MethodSpec, method_text
from camserve.parts import Parts
from camserve.planning import Rung, choose


def resolved(
    request: Request,
    ladder: Sequence[MethodSpec],
    predicted_s: Callable[[int], float | None],
    budget_s: float,
) -> Request:
    """The request with a method in the place of each `Auto`, and the reasons in `choices`.

    Args:
        request: as it came.
        ladder: from the cheapest to the most faithful; the model's own evaluation, if it has one, orders it anew. What
            does not fit the request's layers is left out.
        predicted_s: seconds that so many queries would take now; None while nothing was measured.
        budget_s: time that the request has.

    Raises:
        InvalidOption: nothing of the ladder fits the layers.
    """
    if not any(isinstance(method, Auto) for method in request.parts.methods):
        return request
    others = sum(part.queries(request.max_targets) for part in request.parts)
    rungs = [rung for method in ranked(ladder, request.model.evaluation) for rung in _rungs(request, method)]
    if not rungs:
        raise InvalidOption("auto: no method of the server's ladder fits these layers; name one")
    choice = choose(rungs, lambda queries: predicted_s(others + queries), budget_s)
    methods = tuple(choice.rung.spec if isinstance(method, Auto) else method for method in request.parts.methods)
    reasons = {number: choice.reason for number, method in enumerate(request.parts.methods) if isinstance(method, Auto)}
    return replace(request, parts=replace(request.parts, methods=methods), choices=reasons)


def ranked(ladder: Sequence[MethodSpec], evaluation: Mapping[str, float]) -> Sequence[MethodSpec]:
    """The ladder by the scores of an evaluation that knows all of it, else as it is."""
    titles = [method_text(method) for method in ladder]
    if not all(title in evaluation for title in titles):
        return ladder
    return sorted(ladder, key=lambda method: evaluation[method_text(method)])


def _rungs(request: Request, method: MethodSpec) -> list[Rung[MethodSpec]]:
    """The method as a rung; none where its parameters do not fit a layer."""
    parts = Parts((method,), request.parts.layers)
    try:
        return [Rung(method_text(method), method, sum(part.queries(request.max_targets) for part in parts))]
    except InvalidOption:
        return []
