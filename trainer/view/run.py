"""`load_run`: a run, a checkpoint or an export as Python objects (docs/python.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint import format as checkpoint
from trainer.common.errors import UserError, os_reason
from trainer.common.safe_read import lines, open_file
from trainer.config.recipe import Recipe, load_recipe
from trainer.export.folder import is_export
from trainer.telemetry.step_scalars import parse_record
from trainer.view.records import CHECKPOINTS, METRICS_FILE, RECIPE_FILE, is_run, read_load

if TYPE_CHECKING:
    import pandas as pd

    from trainer.checkpoint.format import OwnershipRecord
    from trainer.export.exported_model import PreTrainedTokenizerFast, UniPoolForCausalLM
    from trainer.export.loaded_model import LoadedModel

Kind = Literal["run", "checkpoint", "export"]

_DEVICES, _PRECISIONS = ("cpu", "cuda"), ("fp32", "bf16")


def load_run(path: str | Path, device: str | None = None, precision: str | None = None) -> Run:
    """Open a run, one of its checkpoints, or an export of format hf. Nothing is read before it is asked for.

    Args:
        path: Its folder: `run.dir`, one of its checkpoints/step_*, or what `unipool export` wrote.
        device: Where the model goes: "cpu" or "cuda"; by default cuda if it is available.
        precision: "fp32" or "bf16"; by default that of the weights, which is fp32 for a run.

    Raises:
        UserError: The folder is none of these, or cannot be read, or the device or precision is not one of these.
    """
    for what, given, known in (("device", device, _DEVICES), ("precision", precision, _PRECISIONS)):
        if given is not None and given not in known:
            raise UserError(f"load_run: {what} = {given!r}; allowed are {', '.join(map(repr, known))} and None")
    folder = Path(path)
    try:
        kind = _kind(folder)
        problem = "not a run"
    except OSError as error:  # the path is too long, or the folder is closed to this user
        kind, problem = None, f"cannot be read ({os_reason(error)})"
    if kind is None:
        wanted = "give the folder of a run (run.dir), of one of its checkpoints or of an export"
        raise UserError(f"{folder}: {problem}; {wanted}")
    return Run(folder, kind, device, precision)


def _kind(folder: Path) -> Kind | None:
    if is_export(folder):
        return "export"
    if (folder / checkpoint.MARKER_FILE).is_file():
        return "checkpoint"
    return "run" if is_run(folder) else None


@dataclass(frozen=True)
class Load:
    """How many assignments of tokens to experts a step had, mean over about 100 steps, whenever that was saved.

    Attributes:
        steps: Steps done when it was saved, ascending, (S).
        tokens_SLM: Assignments per step by layer and expert of the whole pool, (S, L, M).
    """

    steps: NDArray[np.int64]
    tokens_SLM: NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """A run, a checkpoint or an export. Each attribute is read once, when it is first asked for.

    A run that is still training is shown as it was then; call `load_run` again for what is newer. What a folder does
    not have raises a `UserError` that says so.

    Attributes:
        path: The folder.
        kind: What it is: "run", "checkpoint" or "export".
        device, precision: Where the model goes, and its precision, as given to `load_run`.
    """

    path: Path
    kind: Kind
    device: str | None = field(default=None, repr=False)
    precision: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe with which it was trained, all defaults filled in.

        Raises:
            UserError: There is none, as in an export of format hf, or this version cannot read it.
        """
        if not (self.path / RECIPE_FILE).is_file():
            raise UserError(f"{self.path}: has no {RECIPE_FILE}; a run and its checkpoints have one")
        return load_recipe(str(self.path / RECIPE_FILE))

    @property
    def model(self) -> UniPoolForCausalLM:
        """The model for transformers, in evaluation mode; of a run that of its newest checkpoint.

        Raises:
            UserError: There is no complete checkpoint, or it is damaged.
        """
        model: UniPoolForCausalLM = self._loaded.model
        return model

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer, which is loaded together with it."""
        return self._loaded.tokenizer

    @cached_property
    def _loaded(self) -> LoadedModel:
        from trainer.export.loaded_model import load_model

        return load_model(self.path, self.device, self.precision)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """The numbers of metrics.jsonl: a row per step (the index), NaN where it has none or it was not finite.

        Columns are those of the steps, as `loss` and `tokens_per_second`, of the evaluations, as `val_loss`, and of the
        probes, as `random_routing` (docs/reference/metrics.md). A checkpoint has those up to its step.
        """
        import pandas as pd

        rows = {
            step: {name: _finite(value) for name, value in record.items() if _is_number(value) and name != "step"}
            for step, record in self._records.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("step")

    def by_layer(self, name: str) -> pd.DataFrame:
        """Return a metric that has a value per layer: a row per step, a column per layer.

        Args:
            name: As in metrics.jsonl: `layer_gates`, `layer_imbalances`, `random_routing_by_layer`, or, in a run with a
                lock, `layer_own_shares`.

        Raises:
            UserError: No step has it.
        """
        import pandas as pd

        rows = {step: _layers(record.get(name)) for step, record in self._records.items()}
        known = {step: values for step, values in rows.items() if values}
        if not known:
            names = sorted({name for record in self._records.values() for name in record if _layers(record[name])})
            raise UserError(f"{name}: {self.path} has no such metric by layer; it has {', '.join(names) or 'none'}")
        frame = pd.DataFrame.from_dict(known, orient="index").rename_axis("step")
        return frame[sorted(frame.columns)].rename_axis("layer", axis="columns")

    @cached_property
    def _records(self) -> dict[int, dict[str, Any]]:
        """All records of a step together, by step, ascending."""
        folder, last = self.path, math.inf
        if self.kind == "checkpoint":
            folder, last = self.path.resolve().parent.parent, checkpoint.read_info(self.path).steps
        try:
            with open_file(folder / METRICS_FILE) as file:
                records = list(filter(None, map(parse_record, lines(file))))
        except OSError:
            raise UserError(f"{self.path}: has no {METRICS_FILE}; a run has one from its first step on") from None
        found: dict[int, dict[str, Any]] = {}
        for step, record in records:
            if step <= last:
                found.setdefault(step, {}).update(record)
        return dict(sorted(found.items()))

    @cached_property
    def checkpoints(self) -> dict[int, Path]:
        """The folders of the complete checkpoints by the steps done in them; `load_run` opens each."""
        if self.kind == "checkpoint":
            return {checkpoint.read_info(self.path).steps: self.path}
        return {checkpoint.steps_of(folder): folder for folder in checkpoint.complete(self.path / CHECKPOINTS)}

    @cached_property
    def load(self) -> Load:
        """The load of the experts by layer, at each checkpoint and at the last evaluation.

        Raises:
            UserError: None is saved yet, or the model is dense.
        """
        found = {step: read_load(folder) for step, folder in self.checkpoints.items()}
        evaluated = (
            [step for step, record in self._records.items() if "val_loss" in record] if self.kind == "run" else []
        )
        if evaluated:  # the run's own file is of its last evaluation
            found[evaluated[-1]] = read_load(self.path)
        known = [(step, load_LM) for step, load_LM in sorted(found.items()) if load_LM is not None]
        if not known:
            raise UserError(f"{self.path}: has no load of the experts; a run saves it with evaluations and checkpoints")
        if len({load_LM.shape for _, load_LM in known}) > 1:
            raise UserError(f"{self.path}: its files load.npy are of different models; remove those of another run")
        return Load(np.array([step for step, _ in known]), np.stack([load_LM for _, load_LM in known]))

    @cached_property
    def ownership(self) -> OwnershipRecord | None:
        """Which layer owns each expert (`owners`), since when (`step`); None without a lock or before the assignment.

        Raises:
            UserError: The file is damaged.
        """
        return checkpoint.read_ownership(self.path)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _finite(value: Any) -> Any:
    return math.nan if value is None else value


def _layers(value: Any) -> dict[int, float]:
    """Return the values by layer of a list, or of an object with a key per layer; {} if it is neither."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {}
    return {int(key): _finite(number) for key, number in value.items() if str(key).isdecimal() and _is_number(number)}
