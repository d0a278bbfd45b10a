"""Which workers count as restarted."""

import pytest

from camserve.gateway.pool.replacements import Replacements


def replaced(*looks: str) -> list[int]:
    """Each look names its READY workers by letters."""
    replacements = Replacements()
    return [replacements.found(frozenset(look)) for look in looks]


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        (("", "a", "ab", "ab"), [0, 0, 0, 0]),  # they come up one after the other
        (("ab", "ac"), [0, 1]),
        (("ab", "a", "ac"), [0, 0, 1]),
        (("ab", "", "cd"), [0, 0, 2]),
        (("ab", "", "c", "cd"), [0, 0, 1, 1]),
        (("ab", "a", "ab"), [0, 0, 0]),  # the same one is READY again
        (("a", "", "a", "ab"), [0, 0, 0, 0]),
        (("a", "", "a", "b"), [0, 0, 0, 1]),
        (("ab", "cde"), [0, 2]),  # one more than there were
    ],
)
def test_who_comes_in_the_place_of_another_counts(looks, expected):
    assert replaced(*looks) == expected
