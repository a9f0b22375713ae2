"""The tables that `bench` prints. No torch here."""

from __future__ import annotations

from trainer.planning.hardware import Figure, Profile

PROCESSOR = "processor that this got"
BUSY = 0.9
"""Below this share of the processor, others were at work and the figures say less."""


def print_profile(profile: Profile) -> None:
    """The figures as tables on stdout, each beside the limit that it has on this machine."""
    from rich.console import Console
    from rich.table import Table

    products = Table(title=profile.hardware.name, title_justify="left", title_style="bold")
    for title in ("forward + backward", *(t for precision in ("fp32", "bf16") for t in (precision, "share"))):
        products.add_column(title, justify="left" if title == "forward + backward" else "right")
    by_name: dict[str, list[Figure]] = {}
    for figure in profile.figures:
        by_name.setdefault(figure.name, []).append(figure)
    machine = Table(title="Machine", title_justify="left", title_style="bold")
    machine.add_column("")
    machine.add_column("", justify="right")
    machine.add_column("share")
    for name, figures in by_name.items():
        if figures[0].precision:
            cells = [cell for f in figures for cell in (_quantity(f), _of(f))]
            products.add_row(name, *cells)
        else:
            limit = f" of {figures[0].limit}" if figures[0].limit else ""
            machine.add_row(name, _quantity(figures[0]), _of(figures[0]) + limit)
    console = Console(highlight=False)
    console.print(products, machine)
    console.print("[dim]- Shares are of the dense product; router's time, of the experts' at 128 rows each.[/dim]")
    for figure in by_name.get(PROCESSOR, []):
        if figure.share is not None and figure.share < BUSY:
            console.print("[bold]The machine was busy with other work: measure again when it is not.[/bold]")
    console.print("[dim]- The best of several runs; the wire's are medians, between two processes here.[/dim]")


def _of(figure: Figure) -> str:
    return "" if figure.share is None else f"{figure.share:.1%}"


def _quantity(figure: Figure) -> str:
    value, unit = figure.value, figure.unit
    if unit == "of its time":
        return ""
    if unit.startswith("s"):
        for scale, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")):
            if value >= scale or name == "ns":
                return f"{value / scale:.3g} {name}{unit[1:]}"
    for scale, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1, "")):
        if value >= scale:
            return f"{value / scale:.3g} {name}{unit.replace('bytes', 'B')}"
    return f"{value:.3g} {unit}"
