"""The gateway's settings: read, refused, and turned into bounds."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from camserve.errors import InvalidOption
from camserve.gateway.ops.settings import Settings
from camserve.planning import Limits
from camserve.settings import KUBERNETES
from camserve.supervisor import WorkerSettings
from camserve.types.request import RequestLimits


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("CAMSERVE_"):
            monkeypatch.delenv(variable)


def test_variables_are_read_and_arguments_win(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CAMSERVE_STEP_QUERIES", "32")
    monkeypatch.setenv("CAMSERVE_STEP_ITEMS", "4")
    monkeypatch.setenv("CAMSERVE_LISTEN", "127.0.0.2:9000")
    settings = Settings.load(step_items=6, listen=None)
    assert (settings.step_queries, settings.step_items, settings.listen) == (32, 6, "127.0.0.2:9000")


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("CAMSERVE_STEP_QUERIES", "many", "CAMSERVE_STEP_QUERIES='many': Input should be a valid integer"),
        ("CAMSERVE_STEP_QUERIES", "1", "greater than or equal to 2"),
        ("CAMSERVE_DRAIN_S", "-1", "CAMSERVE_DRAIN_S='-1'"),
        ("CAMSERVE_LISTEN", "8500", "host:port"),
        ("CAMSERVE_UPSTREAMS", "a:7070:8081,localhost:8081", "host:grpc_port:management_port"),
        (
            "CAMSERVE_STEP_BYTES",
            "2000000",
            "CAMSERVE_STEP_BYTES must be at least twice max_image_bytes = 33554432, got 2000000",
        ),
        ("CAMSERVE_MAX_MESSAGE_BYTES", "2000000", "CAMSERVE_MAX_MESSAGE_BYTES must be at least max_image_bytes"),
        ("CAMSERVE_STEPQUERIES", "8", "unknown setting CAMSERVE_STEPQUERIES='8'; did you mean CAMSERVE_STEP_QUERIES?"),
        ("CAMSERVE_XYZ", "8", "unknown setting CAMSERVE_XYZ='8'; `camserve config` lists"),
    ],
)
def test_a_bad_variable_stops_the_start(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, text: str):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidOption) as caught:
        Settings.load()
    assert text in str(caught.value)


def test_every_bad_value_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CAMSERVE_STEP_ITEMS", "x")
    monkeypatch.setenv("CAMSERVE_POLL_S", "0")
    with pytest.raises(InvalidOption, match=r"CAMSERVE_STEP_ITEMS.*CAMSERVE_POLL_S"):
        Settings.load()


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    for variable in (
        "CAMSERVE_MODEL_STORE",
        "CAMSERVE_SERVICE_HOST",
        "CAMSERVE_SERVICE_PORT",
        "CAMSERVE_SERVICE_PORT_GRPC",
        "CAMSERVE_PORT",
        "CAMSERVE_PORT_8500_TCP",
        "CAMSERVE_PORT_8500_TCP_ADDR",
        "CAMSERVE_METRICS_PORT",
        "CAMSERVE_METRICS_SERVICE_HOST",
    ):
        monkeypatch.setenv(variable, "tcp://10.0.0.1:8500")
    assert Settings.load() == Settings()


def test_no_setting_has_a_name_that_kubernetes_may_set():
    assert not [name for name in Settings.model_fields if KUBERNETES.search(f"CAMSERVE_{name.upper()}")]


def test_every_setting_says_what_it_is():
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_the_limits_are_those_that_are_promised():
    settings = Settings()
    assert (settings.max_image_bytes, settings.max_image_pixels) == (16 * 2**20, 64_000_000)
    assert (settings.step_queries, settings.step_items) == (512, 8)
    ways = {0.3: None, 0.03: None, 0.2: 2}
    limits = [Settings(step_target_s=target_s, steps_per_worker=steps).limits() for target_s, steps in ways.items()]
    assert [limit.steps_per_worker for limit in limits] == [1, 2, 2]


def test_every_bound_of_a_request_can_be_set():
    values = {
        "max_image_bytes": 2**24 + 1,
        "max_image_pixels": 10**8,
        "max_methods": 3,
        "max_layers": 4,
        "max_targets": 5,
        "max_map_pixels": 6,
        "max_message_bytes": 2**25 + 7,
        "max_name_characters": 65,
        "max_text_characters": 66,
        "max_option_bytes": 2**13,
    }
    assert Settings(**values, step_bytes=2**26).request_limits() == RequestLimits(*values.values(), auto=True)


def test_a_plain_client_of_a_worker_has_the_bounds_that_a_gateway_has_by_default():
    from camserve.worker.service import PLAIN_LIMITS  # torch

    assert Settings().request_limits() == replace(PLAIN_LIMITS, auto=True)


def test_every_bound_of_the_planner_can_be_set():
    own = Settings(
        step_target_s=0.5,
        step_queries=3,
        step_items=4,
        step_bytes=2**26,
        step_share=0.25,
        steps_per_worker=5,
        age_s=6,
        max_requests=7,
        max_waiting_s=8.5,
    )
    assert own.limits() == Limits(0.5, 3, 4, 2**26, 0.25, 5, 6, 7, 8.5)


def test_a_gpu_has_shorter_steps_than_a_cpu_and_a_second_one_at_hand():
    settings = Settings()
    assert [
        (settings.limits(device).target_s, settings.limits(device).steps_per_worker) for device in ("cpu", "cuda")
    ] == [
        (0.12, 1),
        (0.03, 2),
    ]
    assert Settings(step_target_s=0.2).limits("cuda").target_s == 0.2


CLASSES = (Settings, WorkerSettings)
VARIABLES = [(one, one.variable(name)) for one in CLASSES for name in one.model_fields]


@pytest.mark.parametrize(("owner", "variable"), VARIABLES, ids=[variable for _, variable in VARIABLES])
def test_a_setting_of_one_part_is_no_unknown_setting_of_another(owner, variable, monkeypatch):
    """Parts share one environment, and the beginning of one's names may be that of the other's."""
    monkeypatch.setenv(variable, "")  # as good as not set, but the name is looked at
    for one in CLASSES:
        one.load()
    assert [one for one, other in VARIABLES if other == variable] == [owner]


def test_a_request_may_be_twice_an_image_and_as_many_are_read_at_once_as_fit():
    assert (Settings().max_request_bytes, Settings().reads_at_once) == (33 * 2**20, 15)
    small = Settings(max_message_bytes=2**21, max_image_bytes=2**20 + 2**19)
    assert (small.max_request_bytes, small.reads_at_once) == (2**21, 256)


def test_what_is_in_flight_must_have_room_for_a_reply():
    with pytest.raises(InvalidOption, match="MAX_BYTES_IN_FLIGHT must be at least 16 max_message_bytes = 1073741824"):
        Settings.load(max_bytes_in_flight=2**29)
