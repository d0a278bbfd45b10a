"""Reads what processor time and memory the container, or the unit of systemd, of this process may have: cgroup v2, v1.

The limits of all groups that the process is in hold at once. Inside of a container its own group may be the root of
what is mounted, whatever the process is told of its place; so every group from there up to the root is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def cpu_limit(root: Path = ROOT, own: Path = OWN) -> float | None:
    """Returns the processor cores that this process may keep busy; None without a limit."""
    quotas = [_numbers(folder / "cpu.max") for folder in _folders(root, own, "")]
    v1 = _folders(root, own, "cpu")
    quotas += [_numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us") for folder in v1]
    # "max" has no number, and -1 is v1's word for no limit.
    return min((one[0] / one[1] for one in quotas if len(one) == 2 and min(one) > 0), default=None)


def memory_limit(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Returns the bytes of memory that the processes of the group may have together; None without a limit."""
    limits = [_numbers(folder / "memory.max") for folder in _folders(root, own, "")]
    limits += [_numbers(folder / "memory.limit_in_bytes") for folder in _folders(root, own, "memory")]
    return min((one[0] for one in limits if one), default=None)


def _folders(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """Yields the folders of the groups of this process, from its own to the root; the controller "" stands for v2."""
    mounted = root / controller
    yield mounted
    try:
        lines = own.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            place = PurePosixPath(path.lstrip("/"))
            yield from (mounted / group for group in (place, *place.parents))


def _numbers(path: Path) -> list[int]:
    """Returns the numbers in a file; none where there is no such file, or something else in it."""
    try:
        return [int(word) for word in path.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []
