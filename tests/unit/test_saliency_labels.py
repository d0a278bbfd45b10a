"""Clusters of channels are found once for all steps of a request, because another worker might find others."""

import functools
import itertools

import numpy as np
import pytest
from reference.models import CHANNELS, PREPROCESSING, build, picture

from camserve.errors import InvalidOption
from camserve.methods import GroupCam
from camserve.saliency import group_cam
from camserve.types import Item, ItemResult, Partial, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

TARGETS = (5, 1)
GROUPS = 6
SPECS = {grouping: GroupCam(groups=GROUPS, grouping=grouping) for grouping in ("kmeans", "agglomerative")}
each_grouping = pytest.mark.parametrize("grouping", SPECS)


@pytest.fixture
def executor() -> Executor:
    return Executor(Network(build("perceptron", 2), preprocessing=PREPROCESSING, micro_batch=8))


def answer(executor: Executor, spec: GroupCam, start: int, stop: int, **options) -> Partial:
    task = Task(0, spec, start, stop, **options)
    (outcome,) = executor.execute([Item(picture(2), tuple(map(Target, TARGETS)), (task,))]).outcomes
    if not isinstance(outcome, ItemResult):
        raise outcome
    return outcome.partials[0]


@each_grouping
def test_a_worker_returns_the_clusters_that_it_found_and_none_that_it_was_given(executor, grouping):
    spec = SPECS[grouping]
    labels = answer(executor, spec, 0, 3).labels
    assert len(labels) == len(TARGETS) * CHANNELS == spec.labels(executor.network.info.layer(""), len(TARGETS))
    assert set(labels) <= set(range(GROUPS))
    assert answer(executor, spec, 0, 3, labels=labels).labels == ()
    assert answer(executor, GroupCam(groups=GROUPS), 0, 3).labels == ()


@each_grouping
def test_a_worker_that_would_cluster_otherwise_keeps_to_the_labels_given(executor, grouping, monkeypatch):
    spec, total = SPECS[grouping], GROUPS * len(TARGETS)
    whole, opening = answer(executor, spec, 0, total), answer(executor, spec, 0, 3, ordered=True)
    calls: list[int] = []

    def labels(rows: np.ndarray, spec: GroupCam) -> np.ndarray:
        calls.append(len(rows))
        return np.arange(len(rows)) % spec.groups

    monkeypatch.setattr(group_cam, "clusters", labels)
    cuts = list(itertools.pairwise([3, 4, 9, total]))

    def later(**options) -> Partial:
        parts = [answer(executor, spec, *cut, numbers=opening.order[slice(*cut)], **options) for cut in cuts]
        return functools.reduce(Partial.merge, parts, opening)

    found = later(labels=opening.labels)
    assert calls == []
    np.testing.assert_allclose(found.sums, whole.sums, rtol=0, atol=1e-5 * np.abs(whole.sums).max())
    assert found.labels == opening.labels == whole.labels
    assert np.abs(later().sums - whole.sums).max() > 1e-2 * np.abs(whole.sums).max()


def test_clusters_are_found_once_in_a_step(executor, monkeypatch):
    """Although both the order and the masks are made of them."""
    calls: list[int] = []
    find = group_cam.clusters
    monkeypatch.setattr(group_cam, "clusters", lambda *given: calls.append(1) or find(*given))
    answer(executor, SPECS["kmeans"], 0, 3, ordered=True)
    assert len(calls) == len(TARGETS)


@pytest.mark.parametrize(("label", "number"), [(0, 2 * CHANNELS - 1), (GROUPS, 2 * CHANNELS)], ids=["few", "large"])
def test_labels_that_do_not_fit_are_refused(executor, label, number):
    with pytest.raises(InvalidOption, match=f"{2 * CHANNELS} labels below {GROUPS} fit"):
        answer(executor, SPECS["kmeans"], 0, 3, labels=(label,) * number)
