"""What a worker says of its device's memory, and how it travels to the gateway."""

from types import SimpleNamespace

import pytest
import torch
from reference.models import PREPROCESSING, build, picture

from camserve.cgroup import memory_limit
from camserve.codecs import step
from camserve.types import DeviceMemory, Item, StepResult
from camserve.worker import device
from camserve.worker.device import device_memory, limit_bytes, resident_bytes
from camserve.worker.executor import Executor
from camserve.worker.network import Network


def test_on_a_cpu_it_is_the_memory_of_this_process():
    ballast = b"x" * 2**26
    found = device_memory(torch.device("cpu"))
    assert found is not None
    assert found.device == "cpu"
    assert len(ballast) < found.used_bytes < found.limit_bytes


def test_a_container_with_less_memory_than_the_machine_is_the_limit():
    assert limit_bytes(123456) == 123456
    assert 2**28 < limit_bytes(2**62) == limit_bytes(None)


@pytest.mark.parametrize("text", [None, "", "12", "what ever"])
def test_where_the_system_does_not_say_there_is_no_figure(tmp_path, monkeypatch, text):
    statm = tmp_path / "statm"
    if text is not None:
        statm.write_text(text)
    assert resident_bytes(statm) is None
    monkeypatch.setattr(device, "resident_bytes", lambda: None)
    assert device_memory(torch.device("cpu")) is None


def test_on_a_gpu_it_is_the_memory_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 10))
    assert device_memory(torch.device("cuda:1")) == DeviceMemory("cuda:1", 7, 10)


def test_other_devices_do_not_tell():
    assert device_memory(SimpleNamespace(type="meta", index=None)) is None


def test_a_worker_says_it_after_every_step():
    network = Network(build("pooled", 2), preprocessing=PREPROCESSING)
    found = Executor(network).execute([Item(picture(0), (), ())]).device_memory
    assert found is not None
    assert (found.device, found.limit_bytes) == ("cpu", limit_bytes(memory_limit()))


@pytest.mark.parametrize("memory", [None, DeviceMemory("cuda:0", 2**34, 2**36)])
def test_it_travels_with_the_step(memory):
    result = StepResult((), {}, "host/1/cuda:0", device_memory=memory)
    assert step.result_from_bytes(step.result_to_bytes(result)).device_memory == memory
