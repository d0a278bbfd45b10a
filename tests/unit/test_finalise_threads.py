"""Making maps leaves the other cores alone: no thread of a library works, nor spins afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest

MAPS = """
import os, time
from pathlib import Path
import numpy as np
from camserve.finalise.maps import into_original, upsample
from camserve.types import InputView

def of_others():
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)

def settled():
    before = -1
    for _ in range(100):
        if before == (before := of_others()):
            return before
        time.sleep(0.1)

before = settled()
{made}
print(settled() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's /proc/self/task/*/schedstat")
@pytest.mark.parametrize(
    "made",
    [
        "for side in (7, 14, 28, 56): upsample(np.ones((side, side)), (224, 224))",
        "into_original(np.ones((224, 224)), InputView((1200, 1600), (200, 0, 1400, 1200), (224, 224)))",
    ],
    ids=["upsampled", "into the original"],
)
def test_no_other_thread_works(made):
    done = subprocess.run([sys.executable, "-c", MAPS.format(made=made)], check=True, capture_output=True, timeout=60)
    assert int(done.stdout) == 0
