"""Write losses.json again, after a change that is meant to change numbers: `python -m tests.golden.make_losses`."""

from __future__ import annotations

import json

from tests.trainer.train.test_layouts import LOSSES, METHODS, ZERO_0, losses_of
from tests.training import run_training, tiny


def main() -> None:
    """Trains every method for a few steps, colocated."""
    found = {}
    for method, sections in {"unipool": {}, **METHODS}.items():
        values = losses_of(run_training(tiny(parallel=ZERO_0, **sections)))
        found[method] = {name: [float(f"{value:.8g}") for value in values[name]] for name in values}
    LOSSES.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
