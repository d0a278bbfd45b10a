"""What containers and units of systemd allow, as the kernel tells it in its two versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from camserve.cgroup import cpu_limit, memory_limit


def kernel(tmp_path: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """The root of the groups and what the process is told of its own, as the kernel shows them."""
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    told = tmp_path / "own"
    told.write_text(own)
    return tmp_path / "cgroup", told


V2, V2_UNIT = "0::/\n", "0::/system.slice/camserve.service\n"
V1 = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        (V2, {"cpu.max": "150000 100000"}, 1.5),
        (V2, {"cpu.max": "max 100000"}, None),
        (V2, {}, None),
        (V2_UNIT, {"system.slice/camserve.service/cpu.max": "100000 100000"}, 1),
        (V2_UNIT, {"system.slice/camserve.service/cpu.max": "max 100000", "system.slice/cpu.max": "200000 100000"}, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "50000", "cpu/docker/abc/cpu.cfs_period_us": "100000"}, 0.5),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        (V1, {"cpu/cpu.cfs_quota_us": "100000"}, None),
        (V1, {"cpu/cpu.cfs_quota_us": "rubbish", "cpu/cpu.cfs_period_us": "0"}, None),
    ],
)
def test_processor_time_is_that_of_the_narrowest_group(tmp_path: Path, own: str, files: dict, cores: float | None):
    assert cpu_limit(*kernel(tmp_path, own, files)) == cores


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        (V2, {"memory.max": "1000"}, 1000),
        (V2, {"memory.max": "max"}, None),
        (V2_UNIT, {"system.slice/camserve.service/memory.max": "700", "system.slice/memory.max": "900"}, 700),
        (V1, {"memory/memory.limit_in_bytes": "2000"}, 2000),
        (V1, {"memory/docker/abc/memory.limit_in_bytes": "1500"}, 1500),
        (V1, {}, None),
    ],
)
def test_memory_is_that_of_the_narrowest_group(tmp_path: Path, own: str, files: dict, limit: int | None):
    assert memory_limit(*kernel(tmp_path, own, files)) == limit


def test_a_system_without_groups_has_no_limits(tmp_path: Path):
    assert cpu_limit(tmp_path / "none", tmp_path / "nothing") is None
    assert memory_limit(tmp_path / "none", tmp_path / "nothing") is None
