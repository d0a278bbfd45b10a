"""Defines the settings of the gateway; `camserve.settings` says where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from camserve.addresses import is_loopback
from camserve.errors import InvalidOption
from camserve.methods import Auto, MethodSpec, parse_method_text
from camserve.planning import Limits
from camserve.settings import PREFIX, Layered
from camserve.types.request import STEP_QUERIES, RequestLimits

CPU_STEP_S, GPU_STEP_S = 0.12, 0.03
"""Seconds that a step shall take on a CPU and on a GPU: long enough that its fixed cost, some 5 ms, hardly counts, and
so short that a Grad-CAM that waits for the step that runs and for its own is answered within a quarter of a second."""

SHORT_STEP_S = 0.1
"""Seconds from which on the 5 ms that a worker waits for its next step do not count beside the step."""

_Address = Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:.]+\]|[^:\s/]+):\d{1,5}$")]
_BackendAddress = Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:.]+\]|[^:\s/]+):\d{1,5}:\d{1,5}$")]


class Settings(Layered):
    """Everything of the gateway that an operator can set; it is frozen."""

    table: ClassVar[str] = "gateway"
    others: ClassVar[frozenset[str]] = frozenset(
        {"CAMSERVE_MODEL_STORE", "CAMSERVE_RUNTIME", "CAMSERVE_CACHE", "CAMSERVE_WORKER_"}
    )
    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    listen: _Address = Field("127.0.0.1:8500", description="host:port of the gRPC server; port 0: chosen by the OS")
    metrics_listen: _Address | Literal["off"] = Field(
        "127.0.0.1:8501", description='host:port where Prometheus scrapes /metrics, or "off"; port 0: chosen by the OS'
    )
    web_listen: _Address | Literal["off"] = Field(
        "off", description='host:port of the HTTP door, extra "web", or "off"; port 0: chosen by the OS'
    )
    upstreams: Annotated[tuple[_BackendAddress, ...], NoDecode] = Field(
        ("127.0.0.1:7070:8081",),
        min_length=1,
        description="TorchServes as host:grpc_port:management_port, separated by commas; a name that resolves to "
        "several addresses stands for all of them",
    )

    allow_plaintext: bool = Field(
        False,
        description="listen without TLS on addresses that other machines reach",
    )
    tls_cert: Path | None = Field(None, description="PEM file of the certificate chain; read again when it changes")
    tls_key: Path | None = Field(None, description="PEM file of the private key that belongs to tls_cert")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of the authorities whose clients are let in (mutual TLS); unset: any client"
    )
    tokens: Path | None = Field(
        None, description="TOML file of bearer tokens, as `camserve token` writes them; unset: nobody needs one"
    )
    reflection: bool = Field(True, description="answer gRPC server reflection, as grpcurl asks it")
    max_connection_age_s: float = Field(
        0.0,
        ge=0,
        description="seconds after which a client is asked to connect anew, perhaps elsewhere; 0: never",
    )

    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="of the log on stderr; auto: console on a terminal, else json"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    tracing: bool = Field(
        False, description="send OpenTelemetry traces over OTLP, as the variables OTEL_* of OpenTelemetry say"
    )

    max_image_bytes: int = Field(
        16 * 2**20, ge=1, description="largest image in bytes, as a file or as a tensor's data"
    )
    max_image_pixels: int = Field(
        64 * 10**6,
        ge=1,
        le=178_956_970,
        description="largest image in pixels, checked before decoding; Pillow takes no more",
    )
    max_message_bytes: int = Field(
        64 * 2**20,
        ge=2**20,
        description="largest reply in bytes, and largest request, which is bounded by 2 max_image_bytes + 1 MiB as "
        "well; above the image limit with some room",
    )
    max_option_bytes: int = Field(
        256 * 2**10,
        ge=4 * 2**10,
        le=2**20,  # what protobuf parses in one go, while nothing else runs
        description="largest request in bytes beside its image; at most 1 MiB",
    )
    max_name_characters: int = Field(
        256, ge=64, description="characters of a name in a request: of a model, layer or class, or a method's text"
    )
    max_text_characters: int = Field(
        1000,
        ge=64,
        description="characters of a free text in a request: a question, a caption, words that are explained",
    )
    max_map_pixels: int = Field(128 * 10**6, ge=1, description="pixels of all maps of one reply together")
    max_methods: int = Field(16, ge=1, description="methods in one request")
    max_layers: int = Field(8, ge=1, description="layers in one request; each has a forward pass of its own")
    max_targets: int = Field(100, ge=1, description="classes explained in one request")
    max_calls: int = Field(512, ge=1, description="explain calls at once, of all clients; beyond: RESOURCE_EXHAUSTED")
    max_bytes_in_flight: int = Field(
        2**30,
        ge=2**20,
        description="bytes of all calls at once: half for messages that are being read, half for those being answered, "
        "with their replies until they are delivered; at least 16 max_message_bytes",
    )
    max_requests: int = Field(128, ge=1, description="requests taken on at once per model; beyond: RESOURCE_EXHAUSTED")
    max_waiting_s: float = Field(
        1200.0,
        gt=0,
        description="seconds of predicted work that may wait for each worker of a model; beyond: RESOURCE_EXHAUSTED",
    )

    step_target_s: float | None = Field(
        None,
        gt=0,
        description="seconds that a step shall take, by the measured cost; unset: 0.12 on a CPU, 0.03 on a GPU",
    )
    step_queries: int = Field(
        STEP_QUERIES, ge=2, description="masked queries in one step at most, whatever the cost says"
    )
    step_share: float = Field(
        0.5, gt=0, le=1, description="part of a step's queries that one request has at most while others wait"
    )
    age_s: float = Field(10.0, gt=0, description="seconds after which a waiting request counts as one class better")
    step_items: int = Field(8, ge=2, description="requests that share one step")
    step_bytes: int = Field(
        40 * 2**20,
        ge=2**20,
        le=120 * 2**20,  # `camserve serve` gives TorchServe room for messages of 128 MiB
        description="bytes of images and sums in one step; at least 2 max_image_bytes, at most 120 MiB",
    )
    steps_per_worker: int | None = Field(
        None,
        ge=1,
        description="steps sent at once per worker; unset: 2 where a step takes less than 0.1 s, so that the next is "
        "at hand, else 1, so that nobody waits for two",
    )
    step_timeout_s: float = Field(60.0, gt=0, description="seconds after which a step counts as lost and is sent again")

    default_deadline_s: float = Field(
        180.0, gt=0, description="deadline in seconds of a request that comes without one; a Score-CAM on a CPU fits"
    )
    partial_margin_s: float = Field(
        0.02, ge=0, description="seconds before its deadline, besides rendering, at which a partial answer is begun"
    )
    auto_ladder: str = Field(
        "grad_cam group_cam:groups=8 group_cam:groups=16 group_cam:groups=32 group_cam:groups=64 "
        "score_cam:tolerance=0.2 score_cam:tolerance=0.05 score_cam",
        description="methods that `auto` chooses from, the most faithful last: NAME[:KEY=VALUE,...], by spaces",
    )
    auto_budget_s: float = Field(
        2.0, gt=0, description="seconds that `auto` may take for a request that comes without a deadline"
    )
    result_cache_bytes: int = Field(
        0, ge=0, description="bytes of replies that are kept for those who ask the same again; 0: none"
    )
    result_cache_shared: bool = Field(
        False, description="give callers with other tokens the kept replies too; else none learns what another asked"
    )
    evidence_log: Path | None = Field(
        None,
        description="file of JSON lines with an evidence record of every answer; no reply leaves before its record is "
        "on the disk; each gateway has a file of its own; unset: none",
    )
    evidence_log_bytes: int = Field(
        64 * 2**20, ge=2**16, description="size at which the evidence log goes on in a new file; full ones are kept"
    )
    worker_wait_s: float = Field(
        30.0, ge=0, description="seconds that running requests wait for a lost worker to come back before UNAVAILABLE"
    )
    backend_losses: int = Field(
        3,
        ge=1,
        description="steps lost in a row for which a TorchServe gets no work until it has answered a canary; also "
        "unanswered looks at its workers in a row for which they count as gone",
    )
    quarantine_s: float = Field(
        1.0,
        gt=0,
        le=60.0,
        description="seconds that a TorchServe gets no work at first when it loses its steps; twice as long each time "
        "that it goes on so, up to 60 s",
    )
    poll_s: float = Field(1.0, gt=0, description="seconds between two looks at the state of TorchServe's workers")
    drain_s: float = Field(25.0, ge=0, description="seconds that running requests have to finish after a stop signal")

    @field_validator("upstreams", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("auto_ladder")
    @classmethod
    def _checked_ladder(cls, value: str) -> str:
        try:
            methods = [parse_method_text(text) for text in value.split()]
        except InvalidOption as error:
            raise ValueError(str(error)) from None
        if not methods or any(isinstance(method, Auto) for method in methods):
            raise ValueError("a ladder has at least one method, and not auto itself")
        return value

    def ladder(self) -> tuple[MethodSpec, ...]:
        """Returns the methods that `auto` chooses from, the most faithful last."""
        return tuple(parse_method_text(text) for text in self.auto_ladder.split())

    def request_limits(self) -> RequestLimits:
        """Returns the bounds of a request."""
        return RequestLimits(
            image_bytes=self.max_image_bytes,
            image_pixels=self.max_image_pixels,
            methods=self.max_methods,
            layers=self.max_layers,
            targets=self.max_targets,
            map_pixels=self.max_map_pixels,
            message_bytes=self.max_message_bytes,
            name_characters=self.max_name_characters,
            text_characters=self.max_text_characters,
            option_bytes=self.max_option_bytes,
            auto=True,
        )

    @property
    def reads_at_once(self) -> int:
        """Number of messages that are read at once, each of which may be as large as a message can be."""
        return max(1, self.max_bytes_in_flight // 2 // self.max_request_bytes)

    @property
    def max_request_bytes(self) -> int:
        """Largest message that is read: larger than any image, so that one that is too large gets its own error.

        Reading stalls the event loop for about 1.5 ms for each MiB, since grpc.aio copies it there twice.
        """
        return min(self.max_message_bytes, 2 * self.max_image_bytes + 2**20)

    def limits(self, device: str = "cpu") -> Limits:
        """Returns the limits that the planner keeps to at workers on a device: "cpu" or "cuda"."""
        target_s = self.step_target_s or (CPU_STEP_S if device == "cpu" else GPU_STEP_S)
        return Limits(
            target_s=target_s,
            queries=self.step_queries,
            items=self.step_items,
            size_bytes=self.step_bytes,
            share=self.step_share,
            steps_per_worker=self.steps_per_worker or (2 if target_s < SHORT_STEP_S else 1),
            age_s=self.age_s,
            requests=self.max_requests,
            waiting_s=self.max_waiting_s,
            losses=self.backend_losses,
            pause_s=self.quarantine_s,
        )

    @model_validator(mode="after")
    def _fit(self) -> Settings:
        if self.max_message_bytes < self.max_image_bytes + 2**16:
            raise ValueError(
                f"{PREFIX}MAX_MESSAGE_BYTES must be at least max_image_bytes + 65536 = {self.max_image_bytes + 2**16}, "
                f"got {self.max_message_bytes}"
            )
        if self.max_bytes_in_flight < 16 * self.max_message_bytes:
            raise ValueError(
                f"{PREFIX}MAX_BYTES_IN_FLIGHT must be at least 16 max_message_bytes = {16 * self.max_message_bytes}, "
                f"got {self.max_bytes_in_flight}"
            )
        if self.step_bytes < 2 * self.max_image_bytes:
            raise ValueError(
                f"{PREFIX}STEP_BYTES must be at least twice max_image_bytes = {2 * self.max_image_bytes}, "
                f"got {self.step_bytes}"
            )
        return self

    @model_validator(mode="after")
    def _safe(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(f"{PREFIX}TLS_CERT and {PREFIX}TLS_KEY belong together: set both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(f"{PREFIX}TLS_CLIENT_CA needs {PREFIX}TLS_CERT and {PREFIX}TLS_KEY")
        for name, address in (("LISTEN", self.listen), ("WEB_LISTEN", self.web_listen)):
            local = address == "off" or is_loopback(address)
            if self.tls_cert is None and not self.allow_plaintext and not local:
                raise ValueError(
                    f"{PREFIX}{name}={address} would take plain text from other machines: set {PREFIX}TLS_CERT and "
                    f"{PREFIX}TLS_KEY, or say {PREFIX}ALLOW_PLAINTEXT=true"
                )
        return self
