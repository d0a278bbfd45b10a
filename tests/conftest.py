"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import tempfile

import hypothesis
import pytest
import tiny
import torch

from camserve.worker.network import Network

# The tests' tensors are small: several threads mostly wait for each other, and take ten times as long where others use
# the machine as well. Processes that tests start choose for themselves.
torch.set_num_threads(1)

# What runtimes were measured to take is kept for this run, not in the user's cache; its processes share it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="camserve-tests-", ignore_cleanup_errors=True)
    os.environ["CAMSERVE_CACHE"] = cache.name

# How long an example takes depends on who else uses the machine, and is no reason to fail.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.fixture
def tiny_network() -> Network:
    return tiny.tiny_network()
