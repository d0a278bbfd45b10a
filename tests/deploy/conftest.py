"""Fixtures of the tests of deploy/."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import manifests
import pytest


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], None]:
    """Sets the environment of a container: the CAMSERVE_ variables of the image, then these, and no others."""

    def put(values: Mapping[str, str]) -> None:
        for name in [name for name in os.environ if name.startswith("CAMSERVE_")]:
            monkeypatch.delenv(name)
        for name, value in {**manifests.dockerfile_environment(), **values}.items():
            monkeypatch.setenv(name, value)

    return put
