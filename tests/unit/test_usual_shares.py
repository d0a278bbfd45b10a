"""How much is usually enough of what may stop early: what was seen last, and a guess until anything was."""

from camserve.planning import UsualShares
from camserve.planning.usual import UNSEEN


def test_until_anything_is_seen_there_is_a_guess():
    shares = UsualShares()
    assert shares.of("score_cam") == UNSEEN
    shares.note("rise", 0.9)
    assert shares.of("score_cam") == UNSEEN


def test_the_largest_share_of_those_seen_last_is_the_usual_one():
    """Whoever is taken on for less than the request needs may be late."""
    shares = UsualShares()
    for share in (0.2, 0.3, 0.25):
        shares.note("score_cam", share)
    assert shares.of("score_cam") == 0.3
    for _ in range(15):
        shares.note("score_cam", 0.2)
    assert shares.of("score_cam") == 0.25
    shares.note("score_cam", 0.2)
    assert shares.of("score_cam") == 0.2


def test_a_share_that_was_not_enough_counts_where_it_is_more_than_usual():
    """Else a network that needs more than is guessed would miss its deadlines for ever."""
    shares = UsualShares()
    shares.note("score_cam", 0.3, enough=False)
    assert shares.of("score_cam") == UNSEEN
    shares.note("score_cam", 0.8, enough=False)
    assert shares.of("score_cam") == 0.8
