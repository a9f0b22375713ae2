"""The tables that `bench` prints. No torch here."""

from __future__ import annotations

from trainer.common.format import percent, quantity
from trainer.common.tables import new_table, print_tables
from trainer.planning.hardware import Figure, Profile

PROCESSOR = "processor time available"
BUSY = 0.9
"""With a smaller share of the processor, other programs were running and the figures mean less."""


def print_profile(profile: Profile) -> None:
    """Print the figures as tables, each with its share of the machine's own limit."""
    products = new_table(profile.hardware.name, "forward + backward", "fp32", "share", "bf16", "share")
    machine = new_table("Machine", "", "", "share")
    notes = [
        "Shares are of the dense product; the router's time is compared with that of the experts at 128 rows each.",
        "Figures are the best of several runs; those of the wire are medians, between two processes on this machine.",
    ]
    by_name: dict[str, list[Figure]] = {}
    for figure in profile.figures:
        by_name.setdefault(figure.name, []).append(figure)
    for name, figures in by_name.items():
        first = figures[0]
        if first.precision:
            products.add_row(name, *(cell for figure in figures for cell in (_quantity(figure), _share(figure))))
        else:
            machine.add_row(name, _quantity(first), _share(first) + (f" of {first.limit}" if first.limit else ""))
        if name == PROCESSOR and first.share is not None and first.share < BUSY:
            notes.append("The machine was busy with other programs; measure again when it is idle.")
    print_tables(products, machine, notes=notes)


def _share(figure: Figure) -> str:
    return "" if figure.share is None else percent(figure.share, 1)


def _quantity(figure: Figure) -> str:
    return "" if figure.unit == "of its time" else quantity(figure.value, figure.unit.replace("bytes", "B"))
