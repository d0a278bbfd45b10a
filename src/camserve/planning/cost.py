"""Learns how long a step takes on one worker: seconds = sum over kinds (a_kind * units) + b * items + c."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul

from camserve.methods.work import KINDS, Kind

FIRST_UNITS = 16
"""Number of units of a kind that a step may have as long as nothing is known of that kind."""
USUAL: dict[Kind, float] = {
    "decode": 0.5,
    "opening": 3.0,
    "masked_forward": 1.0,
    "layer_gradient": 1.0,
    "pixel_gradient": 4.0,
    "tail": 0.5,
    "closed_form": 0.01,
    "ranking": 20.0,
}
"""Usual time of a unit of each kind, in masked forwards; it is believed as long as the kind has not been seen."""

DECODE_S = 0.015
"""Usual seconds of a megapixel of a PNG. The processor decodes, whatever device forwards the network."""

_COLUMN = {kind: column for column, kind in enumerate(KINDS)}
"""Index of a kind's coefficient among all of them; those of an item and of the step come after the kinds."""
_ITEM, _STEP = len(KINDS), len(KINDS) + 1
_SIZE = len(KINDS) + 2
_MEMORY = 0.97  # forgetting: an observation that is 33 others old counts a third
_SWEEPS = 5  # per observation; the coefficients start where the last ones ended, so that few are enough
_DOUBT = 0.01  # weight of the prior, beside 1 for an observation of the largest size seen
_CLIP = 4.0  # an error counts as at most this many usual ones
_SMALL = 0.05  # errors below 5 % are never taken for outliers
_OPEN = 2.0  # the usual error of a kind that has not been seen: almost everything is believed
_LEARN = 0.1
_UNSURE = 0.02  # fraction by which a kind becomes open again in each step without it
_RESTS = 10  # steps without a kind, after which it is set apart
_MUCH_FASTER = 0.6  # fraction of the prediction by which a step must fall short of it
_SLACK = 0.01  # fraction of the first prior; no unseen kind is ever assumed to cost less
_SHORTEST_S = 1e-9


@dataclass(frozen=True)
class Load:
    """The work of one step, as its cost sees it."""

    units: Mapping[Kind, int]
    """Units of work by kind; a kind that is missing has none."""
    items: int
    """Number of requests, each with an image of its own."""

    @property
    def amounts(self) -> Sequence[float]:
        """Factors of the coefficients of a cost: units of each kind in the order of `KINDS`, items, 1."""
        return [*(self.units.get(kind, 0) for kind in KINDS), self.items, 1]


class StepCost:
    """The learnt cost of one worker.

    Recursive least squares with exponential forgetting (Ljung, System Identification, 2nd ed., sec. 11.2) in the form
    of its normal equations. They are solved under the bounds a, b, c >= 0 by projected Gauss-Seidel sweeps, which stay
    feasible at every moment. Beside that

    - a weak prior keeps the equations sound where columns hardly vary;
    - the coefficient of a kind changes only in steps that have the kind. When it has been absent for long, its equation
      is cut loose from the others, so that their drift is not put down to it;
    - an observation that is slower than predicted by far is pulled in to four times the usual relative error of its
      kinds before it counts (Huber's pseudo-values): one slow step changes little, a lasting change is followed;
    - an observation that is faster by far counts at once. A step can be slower than the truth for many reasons, but
      not faster. So what was measured of its kinds before is forgotten, and no coefficient stays above what the step
      as a whole has taken.

    Args:
        forward_s: prior of a masked forward, in seconds; the other kinds follow in their usual proportion.
        target_s: how long steps shall be; errors are judged beside it.
    """

    def __init__(self, forward_s: float, target_s: float) -> None:
        self.observed = 0
        self._least_s = _SLACK * forward_s
        self._target_s = target_s
        self._cost = [DECODE_S if kind == "decode" else forward_s * USUAL[kind] for kind in KINDS] + [0.0, 0.0]
        self._prior = list(self._cost)
        self._moments = [[0.0] * _SIZE for _ in range(_SIZE)]
        self._products = [0.0] * _SIZE
        self._largest = [FIRST_UNITS // 2] * len(KINDS) + [1, 1]
        self._error = [_OPEN] * _SIZE
        self._absent = [0] * _SIZE  # steps since the kind was there
        self._times = [0] * _SIZE  # observations since the last new start
        self._seen: set[int] = set()
        self._heard: set[int] = set()  # kinds that another worker has seen
        self._mean_s = 0.0

    def __getitem__(self, kind: Kind) -> float:
        """Returns the seconds of a unit of a kind."""
        return self._cost[_COLUMN[kind]]

    @property
    def item_s(self) -> float:
        """Seconds that each item costs beside its units."""
        return self._cost[_ITEM]

    @property
    def step_s(self) -> float:
        """Seconds of a step without any unit or item."""
        return self._cost[_STEP]

    @property
    def coefficients(self) -> Sequence[float]:
        """Seconds of a unit of each kind in the order of `KINDS`, then of an item, then of a step."""
        return self._cost

    def has_seen(self, kind: Kind) -> bool:
        """Tells whether a step with work of this kind was observed."""
        return _COLUMN[kind] in self._seen

    def predict(self, load: Load) -> float:
        """Returns the predicted seconds of a step, at least a nanosecond."""
        return max(_SHORTEST_S, self._seconds(_entries(load)))

    def most_units(self, kind: Kind) -> int:
        """Returns how many units of a kind a step may have: the cost is not trusted far beyond what was observed."""
        return 2 * self._largest[_COLUMN[kind]]

    def observe(self, load: Load, seconds: float) -> None:
        """Learns from a step with this load that has taken `seconds`."""
        entries = _entries(load)
        predicted_s = self.predict(load)
        # Errors are judged beside a step of the usual length: an opening that is 10 ms late is no outlier.
        scale_s = max(predicted_s, min(self._mean_s, self._target_s) if self.observed else seconds, _SHORTEST_S)
        error = (seconds - predicted_s) / scale_s
        # A step may be late for many reasons, but it is never much too early: only the coefficients can be wrong then.
        if error < -_MUCH_FASTER:
            self._start_anew(entries, seconds)
            error = 0.0
        else:
            error = self._pulled_in(entries, error)
            seconds = predicted_s + error * scale_s
        self._remember(entries, seconds)
        self._note(entries, error)
        for _ in range(_SWEEPS):
            self._sweep(entries)
        for column, _ in entries:
            self._prior[column] += (1 - _MEMORY) * (self._cost[column] - self._prior[column])
        self._assume_the_unseen()

    def hear_of(self, other: StepCost) -> None:
        """Takes over from another worker of the backend the costs of the kinds that this one has not seen itself."""
        for column in other._seen - self._seen - {_ITEM, _STEP}:
            self._heard.add(column)
            self._cost[column] = self._prior[column] = other._cost[column]
            self._largest[column] = other._largest[column]

    def _pulled_in(self, entries: Sequence[tuple[int, int]], error: float) -> float:
        """Returns a relative error, bounded by `_CLIP` times the usual one of the least certain kind in the step."""
        bound = _CLIP * max(self._error[column] for column, _ in entries)
        return max(-bound, min(bound, error))

    def _start_anew(self, entries: Sequence[tuple[int, int]], seconds: float) -> None:
        """Forgets what was measured of the kinds in a step, and lowers their costs until the step takes `seconds`."""
        present = [column for column, _ in entries]
        # The absent kinds are cut loose first, while the costs with which their equations hold are still there.
        for row in self._seen.difference(present):
            for column in present:
                self._cut(row, column)
        for column in present:
            self._moments[column] = [0.0] * _SIZE
            self._products[column] = 0.0
            self._error[column], self._times[column] = _OPEN, 0
        for column, amount in entries:
            self._cost[column] = min(self._cost[column], seconds / amount)
        total_s = self._seconds(entries)
        if total_s > seconds:
            for column in present:
                self._cost[column] *= seconds / total_s
        for column in present:
            self._prior[column] = self._cost[column]
        self._mean_s = seconds

    def _cut(self, row: int, column: int) -> None:
        """Takes the coupling to another kind out of the equation of an absent kind, at the present costs, so that the
        solution of that equation stays."""
        self._products[row] -= self._moments[row][column] * self._cost[column]
        self._moments[row][column] = self._moments[column][row] = 0.0

    def _set_apart(self, column: int) -> None:
        """Uncouples the equation of a kind from all others.

        The kind keeps its cost, and the others keep what was measured of them whatever the kind costs (the Schur
        complement of its row).
        """
        own = self._moments[column]
        weight = own[column] + _DOUBT * self._largest[column] ** 2
        for row in self._seen - {column}:
            ratio = own[row] / weight
            self._moments[row] = [moment - ratio * other for moment, other in zip(self._moments[row], own, strict=True)]
            self._products[row] -= ratio * (self._products[column] + (weight - own[column]) * self._prior[column])
            self._moments[row][column] = 0.0  # what the prior leaves of it is dropped
        self._moments[column] = [0.0] * _SIZE
        self._moments[column][column] = own[column]
        self._products[column] = own[column] * self._cost[column]
        self._prior[column] = self._cost[column]

    def _remember(self, entries: Sequence[tuple[int, int]], seconds: float) -> None:
        """Adds an observation to the normal equations, and lets the older ones fade."""
        present = {column for column, _ in entries}
        for row in self._seen | present:
            self._absent[row] = 0 if row in present else self._absent[row] + 1
            if self._absent[row] == _RESTS:
                self._set_apart(row)
            # A kind that is only absent fades with the others, since they share equations; set apart, it fades alone.
            kept = _MEMORY if self._absent[row] < _RESTS else 1 - _UNSURE
            self._moments[row] = [kept * moment for moment in self._moments[row]]
            self._products[row] *= kept
        for row, amount in entries:
            moments = self._moments[row]
            for column, other in entries:
                moments[column] += amount * other
            self._products[row] += amount * seconds

    def _note(self, entries: Sequence[tuple[int, int]], error: float) -> None:
        """Learns the usual error, the largest amount and the number of observations of each kind in a step."""
        self.observed += 1
        self._mean_s = self._mean_s + max(_LEARN, 1 / self.observed) * (self._seconds(entries) - self._mean_s)
        present = {column for column, _ in entries}
        for column, amount in entries:
            self._times[column] += 1
            weight = max(_LEARN, 1 / (1 + self._times[column]))
            self._error[column] = max(_SMALL, self._error[column] + weight * (abs(error) - self._error[column]))
            self._largest[column] = max(self._largest[column], amount)
        for column in (column for column in self._seen if self._absent[column] >= _RESTS):
            self._error[column] += _UNSURE * max(0.0, 1 - self._error[column])
        self._seen |= present
        self._heard -= present

    def _seconds(self, entries: Sequence[tuple[int, int]]) -> float:
        """Returns the predicted seconds of the amounts of a step."""
        seconds = 0.0
        for column, amount in entries:
            seconds += amount * self._cost[column]
        return seconds

    def _sweep(self, entries: Sequence[tuple[int, int]]) -> None:
        """Minimises the squared error in each present coefficient in turn, the prior being one more observation."""
        for column, _ in entries:
            moments = self._moments[column]
            prior = _DOUBT * self._largest[column] ** 2
            rest = self._products[column] - sum(map(mul, moments, self._cost)) + moments[column] * self._cost[column]
            self._cost[column] = max(0.0, (rest + prior * self._prior[column]) / (moments[column] + prior))

    def _assume_the_unseen(self) -> None:
        """Assumes that the kinds nobody has seen cost as usual, in proportion to those that were seen."""
        units = [
            (column, self._moments[column][_STEP])
            for column in self._seen
            if column < len(KINDS) and KINDS[column] != "decode"
        ]
        usual = sum(amount * USUAL[KINDS[column]] for column, amount in units)
        if not usual:
            return
        forward_s = max(self._least_s, sum(amount * self._cost[column] for column, amount in units) / usual)
        for column, kind in enumerate(KINDS):
            if kind != "decode" and column not in self._seen and column not in self._heard:
                self._cost[column] = self._prior[column] = forward_s * USUAL[kind]


def _entries(load: Load) -> list[tuple[int, int]]:
    """Returns (column, amount) of each amount of a load that is not 0; the step itself always has the amount 1."""
    entries = [(_COLUMN[kind], units) for kind, units in load.units.items() if units]
    if load.items:
        entries.append((_ITEM, load.items))
    entries.append((_STEP, 1))
    return entries


def in_words(seconds: float) -> str:
    """Returns seconds as text: "0.034 s" with two digits below a second, "12.1 s" below a hundred, "734 s" above."""
    if abs(seconds) < 1:
        return f"{seconds:.2g} s"
    return f"{seconds:.1f} s" if abs(seconds) < 100 else f"{seconds:.0f} s"
