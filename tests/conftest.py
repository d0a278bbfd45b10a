"""Fixtures of the whole suite."""

from __future__ import annotations

import pytest
import tiny

from camserve.worker.network import Network


@pytest.fixture
def tiny_network() -> Network:
    return tiny.tiny_network()
