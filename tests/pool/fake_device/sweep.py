"""Whole plans of shipped recipes on the model of devices: `python -m tests.pool.fake_device.sweep [recipe ...]`.

The tests run smaller ones (`tests.pool.wire.test_device_wire`). This takes a minute or so for each of the large plans.
"""

from __future__ import annotations

import argparse
import time

from tests.pool.fake_device.job import equal, step
from tests.pool.fake_device.plans import DEDICATED, HARDWARE, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=DEDICATED)
    parser.add_argument("--micro-batches", type=int, default=0, help="fewer micro-batches than the recipe has")
    parser.add_argument("--seed", type=int, default=0, help="of who goes first")
    arguments = parser.parse_args()
    for name in arguments.recipes:
        for hardware in HARDWARE:
            case = whole(name, hardware, arguments.micro_batches)
            started = time.perf_counter()
            run = step(case, "random", arguments.seed, queues=8)
            same = equal(run.run(), step(case, on_device=False).run())
            sms = max(device.most_sms for device in run.devices)
            seconds = time.perf_counter() - started
            verdict = "same numbers as in host memory" if same else "OTHER NUMBERS THAN IN HOST MEMORY"
            print(f"{name} on {hardware}: {verdict}, at most {sms} SMs, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
