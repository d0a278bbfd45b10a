"""Which requests share a kept explanation, and how many are kept."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from camserve.gateway.pool.fake import MODEL
from camserve.gateway.requests.reply_cache import ReplyCache
from camserve.methods import Auto, GradCam, GroupCam, HiresCam, ScoreCam
from camserve.types import (
    BoxOptions,
    Cost,
    Explanation,
    Faithfulness,
    InputView,
    Prediction,
    SaliencyMap,
    StreamOptions,
    Target,
    TextInput,
)
from camserve.types.request import ExplainRequest, FittedRequest, OutputOptions, RequestLimits

IMAGE = np.zeros((32, 48, 3), np.uint8)
LIMITS = RequestLimits(auto=True)
ASKED = replace(MODEL, text=TextInput("question", "which is left?", required=True, most_tokens=8))
CACHE = ReplyCache(10**6, shared=False)


def fitted(image=IMAGE, model=MODEL, **fields) -> FittedRequest:
    return ExplainRequest(image, **fields).fit(model, LIMITS)


def key(found: FittedRequest, caller: str = "", cache: ReplyCache = CACHE):
    return cache.key_of(found, caller)


SHAPING = [
    {"image": IMAGE + 1},
    {"image": IMAGE.astype(np.float32)},
    {"methods": (HiresCam(),)},
    {"methods": (GradCam(), HiresCam())},
    {"methods": (GradCam(), GradCam())},
    {"methods": (ScoreCam(),)},
    {"methods": (ScoreCam(tolerance=0.05),)},
    {"methods": (ScoreCam(tolerance=0.1),)},
    {"methods": (GroupCam(groups=4),)},
    {"methods": (GroupCam(groups=5),)},
    {"targets": (Target(index=0),)},
    {"targets": (Target(index=1),)},
    {"targets": (Target(top_k=2),)},
    {"targets": (Target(index=1), Target(index=0))},
    {"layers": ("stem",)},
    {"layers": ("stem", "features")},
    {"layers": ("stem", "features"), "fusion": "max"},
    {"layers": ("features", "stem")},
    {"output": OutputOptions(size="layer")},
    {"output": OutputOptions(size="original")},
    {"output": OutputOptions(boxes=BoxOptions())},
    {"output": OutputOptions(boxes=BoxOptions(0.2))},
    {"output": OutputOptions(boxes=BoxOptions(0.2, all_components=True))},
    {"top_predictions": 3},
    {"precision": "bfloat16"},
    {"evaluate": True},
    {"evaluate": True, "evaluation_steps": 5},
    {"model": ASKED, "text": "which is left?"},
    {"model": ASKED, "text": "which is right?"},
    {"model": replace(MODEL, name="other")},
    {"model": replace(MODEL, version="2.0")},
    {"model": replace(MODEL, weights="abc")},
    {"model": replace(MODEL, labels=("other", *MODEL.labels[1:]))},
]
"""Fields of requests that all have different explanations."""


@pytest.mark.parametrize("place", range(len(SHAPING)))
def test_what_shapes_an_explanation_is_in_the_key(place):
    own = key(fitted(**SHAPING[place]))
    assert own == key(fitted(**SHAPING[place]))
    assert hash(own) == hash(key(fitted(**SHAPING[place])))
    others = [key(fitted(**fields)) for fields in ({}, *SHAPING[:place], *SHAPING[place + 1 :])]
    assert own not in others


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": (Target(top_k=1),)},
        {"layers": ("features",)},
        {"version": "1.0"},
        {"output": OutputOptions(encoding="png")},
        {"output": OutputOptions(encoding="overlay_png", colormap="viridis", opacity=0.1)},
        {"output": OutputOptions(stacked=True)},
        {"evaluation_steps": 5},
        {"priority": "batch"},
        {"allow_partial": True},
        {"stream": StreamOptions(max_maps=1)},
        {"top_predictions": 5},
        {"image": IMAGE.copy()},
    ],
)
def test_what_does_not_shape_it_is_not(fields):
    assert key(fitted(**fields)) == key(fitted())


def test_a_class_is_the_same_by_index_and_by_label():
    assert key(fitted(targets=(Target(label="Tiger-cat"),))) == key(fitted(targets=(Target(index=1),)))


def test_a_chosen_method_is_not_the_same_as_one_that_was_named():
    """They say different things of themselves: `choice`."""
    auto = fitted(methods=(Auto(),))
    chosen = auto.with_methods([ScoreCam()], {0: "in time"})
    named = fitted(methods=(ScoreCam(),))
    assert chosen.methods == named.methods
    assert key(chosen) != key(named)
    assert key(chosen) == key(auto.with_methods([ScoreCam()], {0: "in time"}))
    assert key(chosen) != key(auto.with_methods([ScoreCam()], {0: "for another reason"}))


def test_callers_are_kept_apart_unless_they_share():
    assert key(fitted(), "one") != key(fitted(), "other")
    shared = ReplyCache(10**6, shared=True)
    assert key(fitted(), "one", shared) == key(fitted(), "other", shared)


# What is kept

VIEW = InputView((4, 4), (0.0, 0.0, 4.0, 4.0), (4, 4))


def explanation(size_bytes: int, curves: Faithfulness | None = None) -> Explanation:
    saliency = SaliencyMap(
        method=GradCam(),
        target=Prediction(1, "tabby", 0.5),
        layers=("features",),
        array=np.zeros((1, size_bytes // 4), np.float32),
        value_range=(0.0, 1.0),
        degenerate=False,
        complete=True,
        faithfulness=curves,
    )
    return Explanation("fake", "1.0", (), (saliency,), VIEW, Cost(3, {"queries": 1.0}, 2, "exact", "w"))


def test_a_kept_explanation_says_that_it_was_kept():
    cache, given = ReplyCache(10**6, shared=False), explanation(400)
    assert cache.get("key") is None
    cache.keep("key", given)
    found = cache.get("key")
    assert found is not None
    assert found.cost == replace(given.cost, cached=True)
    assert found.maps is given.maps
    assert cache.get("other") is None


def test_the_least_recently_used_goes_first():
    cache = ReplyCache(250_000, shared=False)
    for name in "ab":
        cache.keep(name, explanation(100_000))
    cache.get("a")
    cache.keep("c", explanation(100_000))
    assert [cache.get(name) is not None for name in "abc"] == [True, False, True]


def test_what_is_kept_anew_counts_once():
    cache = ReplyCache(250_000, shared=False)
    for _ in range(10):
        cache.keep("a", explanation(100_000))
    cache.keep("b", explanation(100_000))
    assert cache.get("a") is not None
    assert cache.get("b") is not None


def test_what_is_larger_than_the_cache_is_not_kept_and_nothing_goes_for_it():
    cache = ReplyCache(250_000, shared=False)
    cache.keep("a", explanation(100_000))
    cache.keep("b", explanation(260_000))
    assert cache.get("a") is not None
    assert cache.get("b") is None


def test_curves_and_the_number_of_explanations_count_as_well():
    cache = ReplyCache(250_000, shared=False)
    curves = Faithfulness("rise", np.zeros(8000), np.zeros(8000))
    for name in "ab":
        cache.keep(name, explanation(400, curves))
    assert [cache.get(name) is not None for name in "ab"] == [False, True]
    small = ReplyCache(100_000, shared=False)
    for number in range(1000):
        small.keep(number, explanation(4))
    assert 10 < sum(small.get(number) is not None for number in range(1000)) < 100


def test_without_room_nothing_is_kept():
    assert not ReplyCache(0, shared=False).keeps
    assert CACHE.keeps
    cache = ReplyCache(0, shared=False)
    cache.keep("a", explanation(4))
    assert cache.get("a") is None


def test_threads_do_not_spoil_the_accounts():
    cache = ReplyCache(1_000_000, shared=False)

    def work(start: int) -> None:
        for number in range(start, start + 300):
            cache.keep(number % 97, explanation(40_000))
            cache.get(number % 89)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in range(97, 97 + 20):
        cache.keep(name, explanation(40_000))
    assert all(cache.get(name) is not None for name in range(97, 97 + 20)), "as many as fit are kept"
