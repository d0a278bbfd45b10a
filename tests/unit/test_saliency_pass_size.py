"""The number of images of a pass is doubled while that pays."""

from collections.abc import Callable

import pytest

from camserve.saliency.pass_size import MOST, TRIES, PassSize


def asked(seconds: Callable[[int], float], passes: int = 40, least: int = 4) -> list[int]:
    """Returns the sizes of passes that take so many seconds for a number of images."""
    found, sizes = PassSize(), []
    for _ in range(passes):
        sizes.append(found.size(least))
        found.add(sizes[-1], seconds(sizes[-1]))
    return sizes


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        (lambda images: 1.0, MOST),  # small operations: as long for many as for one
        (lambda images: 0.04 + 0.001 * images, MOST),  # weights are read once for a pass
        (lambda images: 0.01 * images, 4),  # convolutions
        (lambda images: 0.002 + 0.01 * images, 4),  # a little faster is not worth the memory
        (lambda images: 0.04 + 0.001 * images if images <= 16 else 0.02 * images, 16),  # what no cache holds
    ],
)
def test_the_fastest_size_is_found_and_kept(seconds, best):
    sizes = asked(seconds)
    assert sizes[20:] == [best] * 20
    assert sizes[:TRIES] == [4] * TRIES
    assert max(sizes) <= min(2 * best, MOST)
    assert sum(size > best for size in sizes) in (0, TRIES)  # a size that does not pay is not tried again


@pytest.mark.parametrize(("least", "expected"), [(1, 64), (3, 48), (48, 48), (100, 100)])
def test_sizes_are_doubles_of_the_least_one_and_no_more_than_the_most(least, expected):
    assert max(asked(lambda images: 1.0, least=least)) == expected


def test_a_pass_that_sets_something_up_does_not_count():
    slow = iter([1.0])
    assert asked(lambda images: next(slow, 0.01) if images == 8 else 0.01)[-1] == MOST
    first = iter([1.0])
    assert asked(lambda images: next(first, 0.01 * images))[-1] == 4


def test_passes_of_other_sizes_say_nothing():
    found = PassSize()
    for _ in range(10):
        found.add(3, 0.0)
        found.add(5, 100.0)
    assert found.size(4) == 4
