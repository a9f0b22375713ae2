"""The curves of a run up to a checkpoint, and their picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes

from trainer.common.figure_style import SERIES, add_legend, new_figure, panel_title, style_axes, write_png
from trainer.common.safe_read import lines, open_file
from trainer.telemetry.step_scalars import parse_record

METRICS_FILE = "metrics.jsonl"


@dataclass
class Curve:
    """A scalar by step."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def last(self) -> tuple[int, float] | None:
        """The last step and its value, or None."""
        return (self.steps[-1], self.values[-1]) if self.steps else None


def read_curves(run: Path, steps: int) -> dict[str, Curve]:
    """Return the finite values of `loss`, `val_loss` and `load_imbalance` in a run's records, of its first steps.

    Args:
        run: The run's folder.
        steps: The last step to read.
    """
    curves = {name: Curve() for name in ("loss", "val_loss", "load_imbalance")}
    try:
        with open_file(run / METRICS_FILE) as file:
            records = list(filter(None, map(parse_record, lines(file))))
    except OSError:
        return curves
    for step, record in records:
        for name, curve in curves.items():
            value = record.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and step <= steps:
                curve.steps.append(step)
                curve.values.append(value)
    return curves


def write_picture(curves: dict[str, Curve], path: Path, pooled: bool) -> bool:
    """Draw the curves as PNG; return whether there is anything to draw. Equal curves make equal files.

    Args:
        pooled: Whether the model has experts, whose load is then shown too.
    """
    if not curves["loss"].steps:
        return False
    pooled = pooled and bool(curves["load_imbalance"].steps)
    figure = new_figure(9 if pooled else 5, 3.2)
    panels: list[Axes] = figure.subplots(1, 1 + pooled, squeeze=False)[0].tolist()
    lines = (("loss", "training", SERIES[0], 1.0), ("val_loss", "validation", SERIES[1], 1.8))
    for name, label, colour, width in lines:
        curve = curves[name]
        marker = "o" if name == "val_loss" else ""
        panels[0].plot(
            curve.steps, curve.values, color=colour, linewidth=width, label=label, marker=marker, markersize=4
        )
    panel_title(panels[0], "Loss, nats per token", 10)
    add_legend(panels[0])
    if pooled:
        curve = curves["load_imbalance"]
        panels[1].plot(curve.steps, curve.values, color=SERIES[2], linewidth=1.0)
        panel_title(panels[1], "Load of the busiest expert, times the mean", 10)
    for panel in panels:
        panel.set_xlabel("step")
        style_axes(panel)
    write_png(figure, path)
    return True
