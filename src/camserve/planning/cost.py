"""How long a step takes, learnt while steps come back: seconds = a * queries + b * images + c."""

from __future__ import annotations

FIRST_QUERIES = 16
"""Queries of the first steps, before anything is known."""
MANY_QUERIES = 1_000_000
"""More than any step has."""
_MEMORY = 0.97  # forgetting: what was seen 33 steps ago counts a third
_SWEEPS = 4  # per observation; the coefficients start where the last ones ended, so that few are enough
_DOUBT = 0.01  # weight of the prior, beside 1 for each observation
_CLIP = 4.0  # an error counts as at most so many usual ones
_USUAL = 0.05  # errors below 5 % are never taken for outliers
_LEARN = 0.1
_SHORTEST_S = 1e-6


class StepCost:
    """The fitted time of a step.

    Recursive least squares with exponential forgetting (Ljung, System Identification, 2nd ed., sec. 11.2) in the form
    of its normal equations. They are solved under the bounds a, b, c >= 0 by projected Gauss-Seidel sweeps, which stay
    feasible at every moment. An observation far from its prediction is pulled in to four times the usual relative
    error before it counts (Huber's pseudo-values), so that one slow step changes little, while a lasting change is
    followed within some 30 steps. A weak prior keeps the equations sound when queries and images hardly vary: the time
    is then attributed to the queries.

    Args:
        query_s: prior of a, in seconds for each query.
    """

    def __init__(self, query_s: float) -> None:
        self.query_s = query_s
        self.image_s = 0.0
        self.step_s = 0.0
        self.observed = 0
        self._largest = FIRST_QUERIES // 2
        self._error = 1.0  # the usual relative error; at first anything may come
        self._prior_s = query_s
        self._qq = self._qi = self._q = self._ii = self._i = self._n = 0.0  # moments of queries, images and 1
        self._qs = self._is = self._s = 0.0  # their products with the seconds

    def predict(self, queries: int, images: int) -> float:
        """Seconds of a step, at least a microsecond."""
        return max(_SHORTEST_S, self.query_s * queries + self.image_s * images + self.step_s)

    def queries_within(self, seconds: float, images: int) -> int:
        """The most queries of a step that takes at most so long; at least 1.

        No more than twice of what was observed so far: the line is not trusted far beyond its points.
        """
        left_s = seconds - self.image_s * images - self.step_s
        most = left_s / self.query_s if self.query_s > 0 else MANY_QUERIES
        return max(1, int(min(most, 2 * self._largest)))

    def observe(self, queries: int, images: int, seconds: float) -> None:
        """One step has taken so long."""
        self._remember(queries, images, self._plausible(self.predict(queries, images), seconds))
        self._largest = max(self._largest, queries)
        self.observed += 1
        for _ in range(_SWEEPS):
            self._sweep()
        self._prior_s += (1 - _MEMORY) * (self.query_s - self._prior_s)  # what is not seen for long is not forgotten

    def _plausible(self, predicted_s: float, seconds: float) -> float:
        """The observation, pulled in where it is an outlier. Errors are relative to a step of the usual length, so that
        a short step (an opening without queries) is not an outlier for being 10 ms late.
        """
        scale_s = max(predicted_s, self._s / self._n if self._n else seconds)
        error = (seconds - predicted_s) / scale_s
        bound = _CLIP * self._error
        clipped = max(-bound, min(bound, error))
        self._error = max(_USUAL, self._error + _LEARN * (abs(clipped) - self._error))
        return predicted_s + clipped * scale_s

    def _remember(self, queries: int, images: int, seconds: float) -> None:
        self._qq = _MEMORY * self._qq + queries * queries
        self._qi = _MEMORY * self._qi + queries * images
        self._q = _MEMORY * self._q + queries
        self._ii = _MEMORY * self._ii + images * images
        self._i = _MEMORY * self._i + images
        self._n = _MEMORY * self._n + 1
        self._qs = _MEMORY * self._qs + queries * seconds
        self._is = _MEMORY * self._is + images * seconds
        self._s = _MEMORY * self._s + seconds

    def _sweep(self) -> None:
        """Minimises the squared error in each coefficient in turn, the prior being one more observation of each."""
        prior = _DOUBT * FIRST_QUERIES**2
        rest = self._qs - self._qi * self.image_s - self._q * self.step_s + prior * self._prior_s
        self.query_s = max(0.0, rest / (self._qq + prior))
        rest = self._is - self._qi * self.query_s - self._i * self.step_s
        self.image_s = max(0.0, rest / (self._ii + _DOUBT))
        rest = self._s - self._q * self.query_s - self._i * self.image_s
        self.step_s = max(0.0, rest / (self._n + _DOUBT))


def in_words(seconds: float) -> str:
    """Two digits below a second, tenths above: "0.034 s", "12.1 s"."""
    return f"{seconds:.2g} s" if abs(seconds) < 1 else f"{seconds:.1f} s"
