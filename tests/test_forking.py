"""A process that is forked after the package was used computes, and does not wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

FORKED = """
import os
import sys
import warnings

import numpy as np
import torch

import pydefect

warnings.simplefilter("ignore")
torch.set_num_threads(2)
if sys.argv[1] == "used":
    images = list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
    detector = pydefect.fit(images, weights="random", resize=64, calibration_folds=0, progress=False)
child = os.fork()
if child == 0:
    if sys.argv[1] == "used":
        print(detector.score(images[:1]).image_scores[0] >= 0, end=" ")
    print(torch.get_num_threads(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.parametrize(("use", "printed"), [("used", "True 1"), ("imported", "2")])
def test_a_forked_process_does_not_wait_for_threads_that_stayed_behind(use, printed, tmp_path):
    """A service that loads its model before it forks its workers: each of them hung at its first image."""
    # A process of its own, and a group that can be ended as a whole: this one has threads already.
    running = subprocess.Popen(
        [sys.executable, "-c", FORKED, use],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while running.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    if running.returncode is None:
        os.killpg(running.pid, signal.SIGKILL)
    assert running.communicate()[0].strip() == printed
