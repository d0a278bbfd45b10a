"""Resolves `method: auto`: finds the most faithful method of the ladder that will fit into the time of a request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from camserve.errors import InvalidOption, Unsupported
from camserve.gateway.requests.demands import UsualShare, all_queries, demands_of, opening_of
from camserve.methods import Auto, MethodSpec, method_text
from camserve.methods.work import Kind
from camserve.planning import Candidate, Owner, Planner, choose
from camserve.types.offered import offered
from camserve.types.request import FittedRequest


def resolved(
    fitted: FittedRequest,
    ladder: Sequence[MethodSpec],
    planner: Planner,
    deadline_s: float,
    budget_s: float,
    owner: Owner,
    usual: UsualShare = all_queries,
) -> FittedRequest:
    """Returns the request with a method instead of each `Auto`, and the reasons in `choices`.

    Args:
        fitted: the request as it came.
        ladder: methods from the cheapest to the most faithful; the model's own evaluation, if it has one, orders them
            anew. Methods that do not fit the request are left out.
        planner: predicts how long a request would take now.
        deadline_s: when the request has to be answered, on the event loop's clock.
        budget_s: seconds that the request may take.
        owner: who asks.
        usual: says how much is usually enough for a method that may stop early.

    Raises:
        InvalidOption: nothing of the ladder fits the layers.
    """
    if not any(isinstance(method, Auto) for method in fitted.methods):
        return fitted
    candidates = [
        one for method in ranked(ladder, fitted.model.evaluation) for one in _candidates(fitted, method, planner, usual)
    ]
    if not candidates:
        works = ", ".join(offered(fitted.model))
        raise InvalidOption(
            f"auto: no method of the server's ladder fits the model and its layers; name one of {works}"
        )

    def predicted_s(candidate: Candidate[FittedRequest]) -> float | None:
        would_be, priority = candidate.spec, fitted.request.priority
        demands, opening = demands_of(would_be, usual=usual), opening_of(would_be)
        return planner.predicted_s(demands, opening=opening, priority=priority, deadline_s=deadline_s, owner=owner)

    choice = choose(candidates, predicted_s, budget_s)
    autos = [index for index, method in enumerate(fitted.methods) if isinstance(method, Auto)]
    return choice.candidate.spec.with_methods(choice.candidate.spec.methods, dict.fromkeys(autos, choice.reason))


def ranked(ladder: Sequence[MethodSpec], evaluation: Mapping[str, float]) -> Sequence[MethodSpec]:
    """Returns the ladder, sorted by the scores of an evaluation that has all of its methods, else unchanged.

    A method that may stop early is as good as the same one that asks all, and comes just before it.
    """
    titles = {method: method_text(method.asking_all) for method in ladder}
    if not all(title in evaluation for title in titles.values()):
        return ladder
    return sorted(ladder, key=lambda method: (evaluation[titles[method]], -method.accepted_difference))


def _candidates(
    fitted: FittedRequest, method: MethodSpec, planner: Planner, usual: UsualShare
) -> list[Candidate[FittedRequest]]:
    """Returns the request with this method instead of each `Auto` as the only candidate; none where it does not fit."""
    methods = [method if isinstance(each, Auto) else each for each in fitted.methods]
    try:
        would_be = fitted.with_methods(methods, {})
    except (InvalidOption, Unsupported):
        return []
    units: Counter[Kind] = Counter()
    for work in opening_of(would_be):
        units[work.kind] += work.units
    for demand in demands_of(would_be, usual=usual):
        units[demand.kind] += (demand.most if demand.usual is None else demand.usual) * demand.weight
    return [Candidate(method_text(method), would_be, planner.seconds_of(units))]
