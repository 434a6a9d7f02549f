"""What the pixel metrics of so many maps take in memory, fed one after another.

    python benchmarks/metrics_memory.py --images 1000 --size 1024

prints the scores' own size as float32 and the peak beyond what was in use before. A few maps are drawn and
fed over and over, slightly shifted, so that drawing takes no memory and little time.
"""

from __future__ import annotations

import argparse
import time

import anomaly_maps
import numpy as np
from peak_memory import peak_mib

from pydefect.metrics import PixelScores

DRAWN = 20


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=1024, help="side of a map in pixels")
    arguments = parser.parse_args()
    maps, masks = anomaly_maps.draw(DRAWN, arguments.size)
    seconds = {}

    def measure() -> None:
        began = time.perf_counter()
        scores = PixelScores()
        for index in range(arguments.images):
            scores.add(maps[index % DRAWN] + np.float32(index * 1e-5), masks[index % DRAWN])
        seconds["adding"] = time.perf_counter() - began
        print(f"{scores.metrics()}, AUPRO {scores.aupro():.6f}")
        seconds["metrics"] = time.perf_counter() - began - seconds["adding"]
        curve = scores.pro_curve()
        seconds["curve"] = time.perf_counter() - began - seconds["adding"] - seconds["metrics"]
        print(f"{len(curve.x)} corners of the PRO curve")

    peak = peak_mib(measure)
    own = arguments.images * arguments.size**2 * 4 / 2**20
    print(", ".join(f"{what} {taken:.2f} s" for what, taken in seconds.items()))
    print(f"scores {own:.0f} MiB, peak {peak:.0f} MiB: {100 * (peak / own - 1):+.1f} %")


if __name__ == "__main__":
    main()
