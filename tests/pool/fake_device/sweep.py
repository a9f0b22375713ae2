"""Whole plans of shipped recipes on the model of devices: `python -m tests.pool.fake_device.sweep [recipe ...]`.

The tests run smaller ones (`tests.pool.wire.test_device_wire`). This takes a minute or so for each of the large plans.
With --every-rank it looks for cycles in the orders of two to eight ranks that have both roles, with one to four lanes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import product

from tests.pool.fake_device.job import equal, step
from tests.pool.fake_device.order import order_of_exchanges
from tests.pool.fake_device.plans import DEDICATED, HARDWARE, every_rank, plan, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=DEDICATED)
    parser.add_argument("--micro-batches", type=int, default=0, help="fewer micro-batches than the recipe has")
    parser.add_argument("--seed", type=int, default=0, help="of who goes first")
    parser.add_argument("--every-rank", action="store_true", help="the orders of ranks that have both roles")
    arguments = parser.parse_args()
    if arguments.every_rank:
        look_for_cycles(arguments.recipes)
        return
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


def look_for_cycles(recipes: Sequence[str]) -> None:
    """Print how many orders have none; raise AssertionError for one that has."""
    for name in recipes:
        orders = 0
        for hardware, ranks, lanes, stagger in product(HARDWARE, range(2, 9), range(1, 5), (False, True)):
            spec = plan(name, hardware)
            case = every_rank(ranks, ranks, lanes, stagger, spec.costs, spec.recipe.model.layers)
            found = order_of_exchanges(case.topology, case.schedule).cycle()
            assert not found, (hardware, ranks, lanes, stagger, found)
            orders += 1
        print(f"{name}: {orders} orders without a cycle", flush=True)


if __name__ == "__main__":
    main()
