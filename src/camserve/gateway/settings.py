"""The gateway's settings, from environment variables `CAMSERVE_<NAME>` or from the constructor.

A bad or unknown variable stops the start; `load_settings` says which one, what it holds and what is expected.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from camserve.errors import InvalidOption

PREFIX = "CAMSERVE_"

# Read by other parts of camserve.
_OTHER_VARIABLES = frozenset({"CAMSERVE_MODEL_STORE"})

# Kubernetes puts these into every pod of a namespace that has a Service named camserve or camserve-something. No
# setting may have such a name: hence `metrics_listen` and not `metrics_port`.
_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?$")

_Address = Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:.]+\]|[^:\s/]+):\d{1,5}$")]
_Url = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/]+$")]


class Settings(BaseSettings):
    """Everything an operator can set. Frozen."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    listen: _Address = Field("127.0.0.1:8500", description="host:port of the gRPC server; port 0: chosen by the OS")
    metrics_listen: _Address = Field(
        "127.0.0.1:8501", description="host:port where Prometheus scrapes /metrics; port 0: chosen by the OS"
    )
    upstream_grpc: _Address = Field("127.0.0.1:7070", description="host:port of TorchServe's gRPC inference service")
    upstream_management: _Url = Field(
        "http://127.0.0.1:8081", description="TorchServe's management address: http://host:port"
    )

    max_image_bytes: int = Field(
        16 * 2**20, ge=1, description="largest image in bytes, as a file or as a tensor's data"
    )
    max_image_pixels: int = Field(64 * 10**6, ge=1, description="largest image in pixels, checked before decoding")
    max_message_bytes: int = Field(
        64 * 2**20, ge=2**20, description="largest request and reply in bytes; above the image limit with some room"
    )
    max_map_pixels: int = Field(128 * 10**6, ge=1, description="pixels of all maps of one reply together")
    max_methods: int = Field(16, ge=1, description="methods in one request")
    max_targets: int = Field(100, ge=1, description="classes explained in one request")
    max_requests: int = Field(128, ge=1, description="requests taken on at once per model; beyond: RESOURCE_EXHAUSTED")
    max_waiting_queries: int = Field(
        100_000, ge=1, description="masked queries waiting for one model; beyond: RESOURCE_EXHAUSTED"
    )

    step_queries: int = Field(64, ge=2, description="masked queries in one step; small steps share the worker fairly")
    step_items: int = Field(8, ge=2, description="requests that share one step")
    step_bytes: int = Field(
        40 * 2**20,
        ge=2**20,
        le=120 * 2**20,  # `camserve serve` gives TorchServe room for messages of 128 MiB
        description="bytes of images and sums in one step; at least 2 max_image_bytes, at most 120 MiB",
    )
    steps_per_worker: int = Field(2, ge=1, description="steps sent at once per worker: one runs, the next is at hand")
    step_timeout_s: float = Field(60.0, gt=0, description="seconds after which a step counts as lost and is sent again")

    default_deadline_s: float = Field(
        180.0, gt=0, description="deadline in seconds of a request that comes without one; a Score-CAM on a CPU fits"
    )
    worker_wait_s: float = Field(
        30.0, ge=0, description="seconds that running requests wait for a lost worker to come back before UNAVAILABLE"
    )
    poll_s: float = Field(1.0, gt=0, description="seconds between two looks at the state of TorchServe's workers")
    drain_s: float = Field(25.0, ge=0, description="seconds that running requests have to finish after a stop signal")

    @model_validator(mode="after")
    def _fit(self) -> Settings:
        if self.max_message_bytes < self.max_image_bytes + 2**16:
            raise ValueError(
                f"{PREFIX}MAX_MESSAGE_BYTES must be at least max_image_bytes + 65536 = {self.max_image_bytes + 2**16}, "
                f"got {self.max_message_bytes}"
            )
        if self.step_bytes < 2 * self.max_image_bytes:
            raise ValueError(
                f"{PREFIX}STEP_BYTES must be at least twice max_image_bytes = {2 * self.max_image_bytes}, "
                f"got {self.step_bytes}"
            )
        return self


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment; `overrides` win, `None` among them means "not given".

    Raises:
        InvalidOption: a variable is unknown or its value is not of the expected form; the text names all of them.
    """
    _check_names(os.environ)
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        raise InvalidOption("; ".join(_sentence(dict(problem)) for problem in error.errors())) from None


def _check_names(environ: Mapping[str, str]) -> None:
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for variable in environ:
        ours = variable.startswith(PREFIX) and variable not in _OTHER_VARIABLES and not _KUBERNETES.search(variable)
        if ours and variable not in known:
            near = difflib.get_close_matches(variable, known, n=1, cutoff=0.8)  # the prefix alone makes 0.6 alike
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise InvalidOption(f"unknown setting {variable}={environ[variable]!r}{hint}")


def _sentence(problem: Mapping[str, Any]) -> str:
    if not problem["loc"]:
        return str(problem["msg"]).removeprefix("Value error, ")
    name = str(problem["loc"][0])
    field = Settings.model_fields.get(name)
    meaning = f" ({field.description})" if field else ""
    return f"{PREFIX}{name.upper()}={problem['input']!r}: {problem['msg']}{meaning}"
