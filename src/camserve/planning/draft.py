"""A step while it is being filled."""

from __future__ import annotations

from camserve.planning.places import Place
from camserve.planning.work import Request


class Draft:
    """The requests of one step for one place, and how its queries are shared among them."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._limits = place.limits
        self._members: list[tuple[bool, Request]] = []  # (not aged, request)
        self._size = 0

    def fits(self, request: Request, spare: int = 0) -> bool:
        """The request may come in, with `spare` places left. Two requests always have the time, one also the bytes."""
        count = len(self._members) + 1 + spare
        if not self._members:
            return True
        if count > self._limits.items or self._size + request.size_bytes > self._limits.size_bytes:
            return False
        return count <= 2 or self._place.cost.predict(1, count) <= self._limits.target_s

    def add(self, request: Request, aged: bool = False) -> None:
        """The request comes in; an aged one gets its share before the others."""
        self._members.append((not aged, request))
        self._size += request.size_bytes

    def has_queries_for(self, request: Request) -> bool:
        """Those who come before it would leave something, each taking its share at most."""
        budget, share = self._budget()
        before = [other for young, other in self._members if not young or other.urgency < request.urgency]
        return sum(min(other.waiting, share) for other in before) < budget

    def shares(self) -> list[tuple[Request, int]]:
        """How many queries each request gets: its share at most, then in the same order what is left over."""
        order = [request for _, request in sorted(self._members, key=lambda member: (member[0], member[1].urgency))]
        left, share = self._budget()
        shares = []
        for request in order:
            shares.append(min(request.waiting, share, left))
            left -= shares[-1]
        for index, request in enumerate(order):
            extra = min(request.waiting - shares[index], left)
            shares[index] += extra
            left -= extra
        return list(zip(order, shares, strict=True))

    def _budget(self) -> tuple[int, int]:
        in_haste = any(request.opens_only for _, request in self._members)
        budget = self._place.budget(len(self._members), in_haste)
        return budget, max(1, int(self._limits.share * budget))
