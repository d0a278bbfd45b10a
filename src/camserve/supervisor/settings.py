"""Defines TorchServe's settings; `camserve.settings` says where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from camserve.addresses import is_loopback
from camserve.archive import model_store
from camserve.settings import PREFIX, Layered

LISTENERS = ("grpc_listen", "management_listen", "inference_listen", "metrics_listen")

# TorchServe takes no IPv6 addresses; on 0.0.0.0 it listens on those of both kinds.
_Address = Annotated[str, StringConstraints(pattern=r"^[^:\s/\[\]]+:\d{1,5}$")]


class WorkerSettings(Layered):
    """Holds everything that an operator can set of TorchServe and its workers. Frozen."""

    table: ClassVar[str] = "worker"
    others: ClassVar[frozenset[str]] = frozenset({f"{PREFIX}WORKER_WAIT_S"})
    """A setting of the gateway, `worker_wait_s`, whose variable begins as those of this class do."""
    model_config = SettingsConfigDict(
        env_prefix=f"{PREFIX}WORKER_", extra="forbid", frozen=True, env_ignore_empty=True, protected_namespaces=()
    )

    store: Path = Field(
        default_factory=model_store,
        description="directory of the model archives; unset: CAMSERVE_MODEL_STORE, else ./model_store",
    )
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        ("lite0",), min_length=1, description="names of the archives to load, separated by commas"
    )
    workers: int = Field(1, ge=1, description="processes of each model; with several GPUs they are spread over them")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of each worker; unset: the cores divided by the workers, or OMP_NUM_THREADS if that "
        "is set",
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto: GPUs if there are any")

    grpc_listen: _Address = Field(
        "127.0.0.1:7070",
        description="host:port of the gRPC that gateways call. For all four: an IPv4 address or a name; port "
        "0 is chosen by the OS, and so is a port that is not set where the gateway runs in the same process (camserve "
        "serve)",
    )
    management_listen: _Address = Field(
        "127.0.0.1:8081", description="host:port where gateways see the state of the workers"
    )
    inference_listen: _Address = Field("127.0.0.1:0", description="host:port of TorchServe's REST, for plain clients")
    metrics_listen: _Address = Field("127.0.0.1:0", description="host:port of TorchServe's own Prometheus metrics")
    allow_plaintext: bool = Field(
        False, description="listen on addresses that other machines reach; TorchServe has neither TLS nor tokens here"
    )

    batch_size: int = Field(
        1,
        ge=1,
        description="calls that TorchServe hands to a worker at once, for plain clients; the gateway's steps are "
        "batches already",
    )
    batch_delay_ms: int = Field(
        1, ge=1, description="milliseconds that a worker waits for its batch to fill, the whole time also when idle"
    )
    heap_mb: int = Field(1024, ge=1, description="largest heap of the JVM, in MiB")
    start_timeout_s: float = Field(300.0, gt=0, description="seconds until every worker has to be ready")
    stop_timeout_s: float = Field(10.0, ge=0, description="seconds to stop in peace; then the processes are killed")

    @field_validator("models", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _safe(self) -> WorkerSettings:
        reachable = [name for name in LISTENERS if not is_loopback(getattr(self, name))]
        if reachable and not self.allow_plaintext:
            name = reachable[0]
            raise ValueError(
                f"{self.variable(name)}={getattr(self, name)} would take plain text from other machines: fence it with "
                f"a network policy and say {self.variable('allow_plaintext')}=true"
            )
        return self

    @model_validator(mode="after")
    def _together(self) -> WorkerSettings:
        hosts = [address.rpartition(":")[0] for address in (self.grpc_listen, self.management_listen)]
        if hosts[0] != hosts[1]:
            raise ValueError(
                f"{self.variable('grpc_listen')} and {self.variable('management_listen')} must have the same host, "
                f"since a gateway looks for both at one; got {hosts[0]} and {hosts[1]}"
            )
        return self

    def on_free_ports(self) -> WorkerSettings:
        """Returns the settings with ports chosen by the OS for listeners that were not set."""
        unset = [name for name in LISTENERS if name not in self.model_fields_set]
        return self.model_copy(update=dict.fromkeys(unset, "127.0.0.1:0"))
