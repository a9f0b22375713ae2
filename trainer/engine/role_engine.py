"""DeepSpeed's part of a role: engine, ZeRO, optimizer, schedule, clipping, monitors, checkpoint files.

The only file that imports deepspeed. Each role is a DeepSpeed job of its own on its role-local torch world, and sees
one flush of gradients a step. The engine is fp32 at every ZeRO stage: parameters are the fp32 master weights and
`.grad` is the fp32 accumulator, while bf16 is how the trunk (autocast) and the experts compute.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.common.safe_read import read_tensors
from trainer.config.recipe import Recipe
from trainer.engine.ds_config import deepspeed_config
from trainer.engine.monitors import Monitors
from trainer.model.trunk import parameter_groups

CHECKPOINT_TAG = "state"
"""DeepSpeed's name for the folder inside a role's."""


def _import_deepspeed() -> Any:
    """Import deepspeed quietly, such that it compiles nothing.

    Its first start on CPU would build an extension for a minute, and a process killed meanwhile leaves a lock on which
    every later start hangs; the extension only speeds up collectives that are not used here.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    # DeepSpeed would run whatever a checkpoint's files say; torch overrules that, and lets these types in them through.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("UNIPOOL_DEEPSPEED_LOG", "ERROR").upper())
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which every engine does and none of ours uses, without torch's compiler.

    It asks for a compiled function as it is imported, and to load the compiler for that takes a second and more.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


@dataclass(frozen=True)
class ParameterState:
    """A whole parameter and its AdamW moments: fp32, of the parameter's shape."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class RoleEngine:
    """A role's module in its DeepSpeed engine.

    A step is: `with engine.accumulating(): ...` (any number of backward passes, or gradients put into `.grad`), at
    whose end the gradients are averaged over the role's world, once; `grad_norm_squared()`; `step(total_norm)`.

    Args:
        module: its parameters are fp32 and on their device.
        role: "trunk" or "pool".
        role_size: ranks of the role's world.
    """

    def __init__(self, module: nn.Module, recipe: Recipe, role: str, role_size: int):
        deepspeed = _import_deepspeed()
        self.module = module
        self.stage = recipe.parallel.trunk_zero if role == "trunk" else recipe.parallel.pool_zero
        self._clip = recipe.train.clip
        self._engine, self._optimizer, _, self._schedule = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module, recipe.train.weight_decay),
            config=deepspeed_config(recipe, role, role_size, sum(p.numel() for p in module.parameters())),
            dist_init_required=False,
        )
        self.monitors = Monitors(self._engine.monitor)
        # DeepSpeed leaves the schedule before its first step, where the learning rate is 0.
        self._schedule.step()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Backward passes inside add to `.grad`; at the end comes the step's one reduction (a mean over the world)."""
        if self.stage == 0:
            yield
            self._fill_missing_gradients()
            self._engine.allreduce_gradients()
            return
        with self._engine.coalesce_grad_reduction():
            yield
            if self.stage != 3:
                self._fill_missing_gradients()

    def _fill_missing_gradients(self) -> None:
        """Zeros where no gradient came: replicas with different sets of gradients would be reduced wrongly."""
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def grad_norm_squared(self) -> float:
        """Square of the norm of the role's averaged gradients, the same on all its ranks; inf if it is not finite."""
        if self.stage == 0:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
        elif self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups  # beside the optimizer that this serves

            norm = float(combine_grad_norm_groups(type(self._optimizer)._get_norm_groups(self._optimizer)))
        else:
            norm = float(type(self._optimizer).scaled_global_norm(self._optimizer))
        # DeepSpeed's optimizers report a norm that is not finite as -1.
        return norm * norm if norm >= 0 and math.isfinite(norm) else math.inf

    def step(self, total_norm: float) -> bool:
        """Clip by `total_norm`, the norm over all roles, and step; or skip the step if that is not finite.

        Returns whether the step was applied. Gradients are gone afterwards, and the schedule moved on if it was.
        """
        if self.stage == 0:
            return self._plain_step(total_norm)
        norm = torch.tensor(total_norm if math.isfinite(total_norm) else -1.0, device=self._device)
        # At ZeRO the optimizer asks itself for the norm that it clips by; it is told the one over both roles.
        if self.stage == 3:
            self._optimizer._get_norm_groups = lambda: [norm]
        else:
            self._optimizer.scaled_global_norm = lambda norm_type=2: norm
        self._engine.step()
        return bool(self._engine.was_step_applied())

    def _plain_step(self, total_norm: float) -> bool:
        if not math.isfinite(total_norm):
            self._engine.zero_grad()
            return False
        self._engine.clip_fp32_gradients = lambda: self._scale_gradients(self._clip / (total_norm + 1e-6))
        self._engine.step()
        return True

    def _scale_gradients(self, factor: float) -> None:
        if factor < 1:
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def updates(self) -> int:
        """Steps that were applied since the beginning of the run: where the schedule is."""
        return int(self._schedule.last_batch_iteration)

    def save(self, folder: Path, write: Callable[[Path, Any], None]) -> None:
        """Give this rank's files of the role's checkpoint, copied to the host, to `write(path, state)`.

        Called by all ranks of the role.
        """
        from deepspeed.checkpoint.utils import clone_tensors_for_torch_save

        files = self._engine.checkpoint_engine
        files.makedirs = lambda path, exist_ok=False: None  # whoever writes makes them
        files.save = lambda state_dict, path: write(Path(path), clone_tensors_for_torch_save(state_dict))
        # Its scripts would be copied at once, and fail on a full disk; `export` does what they are for.
        self._engine._copy_recovery_script = lambda path: None
        self._engine.save_checkpoint(str(folder), tag=CHECKPOINT_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, in the same layout. Learning rate, decay and so on stay the recipe's."""
        groups = self._optimizer.param_groups
        own = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self._engine.checkpoint_engine.load = lambda path, map_location=None: read_tensors(path, map_location)
        path, _ = self._engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)
        assert path is not None, f"no checkpoint in {folder}"
        for group, values in zip(self._optimizer.param_groups, own, strict=True):
            group.update(values)
        if self.stage in (1, 2):
            self._optimizer.clip_grad = self._clip
        # The rate of the next step, from the recipe's schedule.
        self._schedule.step(self._schedule.last_batch_iteration)

    @torch.no_grad()
    def load_resharded(
        self, read: Callable[[str], ParameterState], buffers: dict[str, Tensor], updates: int, fresh: bool = False
    ) -> None:
        """Load a state that another layout saved. Called by all ranks of the role.

        Args:
            read: the whole state of a parameter, by its name in the module.
            buffers: the module's buffers, by name.
            updates: how far the schedule is.
            fresh: the moments are zeros, and their first update is still to come.
        """
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])
        self._make_moments(0 if fresh else updates)
        for name, parameter in self.module.named_parameters():
            self._set(parameter, read(name))
        self._schedule.step(updates)

    def _make_moments(self, updates: int) -> None:
        """Moments of zeros, which AdamW itself makes in its first step only."""
        optimizer = self._optimizer
        if self.stage == 0:
            base, flats = optimizer, list(self.module.parameters())
        else:
            base = optimizer.optimizer
            flats = (
                optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
            )
        for flat in flats:
            step = torch.tensor(float(updates), device=flat.device)
            base.state[flat] = {"step": step, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        if self.stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, state: ParameterState) -> None:
        optimizer = self._optimizer
        for key, value in ((None, state.weight), ("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            if self.stage == 3:
                optimizer.set_local_hp_param(_partition_of(value, parameter), parameter, key)
            elif self.stage == 0:
                (optimizer.state[parameter][key] if key else parameter).copy_(value)
            elif parameter._hp_mapping is not None:  # a part of it is this rank's
                parameter.set_full_hp_param(value, key)
        if self.stage == 3:
            parameter.ds_tensor.copy_(_partition_of(state.weight, parameter))
        else:
            parameter.copy_(state.weight)


class FrozenRole:
    """A role whose weights stay as they are: what a `RoleEngine` offers, without gradients and optimizer."""

    def __init__(self, module: nn.Module, recipe: Recipe, role: str, role_size: int):
        deepspeed = _import_deepspeed()
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster
        from deepspeed.runtime import lr_schedules

        self.module = module.requires_grad_(False)
        self.stage = 0
        config = deepspeed_config(recipe, role, role_size, 1)
        deepspeed.init_distributed(dist_init_required=False)
        self.monitors = Monitors(MonitorMaster(get_monitor_config(config)))
        # The other role's rate, for those who ask this one.
        self._optimizer = torch.optim.SGD([torch.zeros(1)], recipe.train.lr)
        schedule = getattr(lr_schedules, config["scheduler"]["type"])
        self._schedule = schedule(self._optimizer, **config["scheduler"]["params"])
        self._schedule.step()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Nothing is added."""
        yield

    def grad_norm_squared(self) -> float:
        """There are no gradients."""
        return 0.0

    def step(self, total_norm: float) -> bool:
        """Only the schedule moves on, if the step counts."""
        if math.isfinite(total_norm):
            self._schedule.step()
        return math.isfinite(total_norm)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def updates(self) -> int:
        """Steps that were applied since the beginning of the run: where the schedule is."""
        return int(self._schedule.last_batch_iteration)

    def save(self, folder: Path, write: Callable[[Path, Any], None]) -> None:
        """One file for the role, of the form that DeepSpeed's has without ZeRO."""
        if torch.distributed.get_rank() == 0:
            state = {
                "module": {name: value.cpu().clone() for name, value in self.module.state_dict().items()},
                "buffer_names": [name for name, _ in self.module.named_buffers()],
                "optimizer": None,
                "lr_scheduler": self._schedule.state_dict(),
            }
            write(folder / CHECKPOINT_TAG / "mp_rank_00_model_states.pt", state)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote."""
        state = read_tensors(folder / CHECKPOINT_TAG / "mp_rank_00_model_states.pt")
        self.module.load_state_dict(state["module"])
        self._schedule.step(state["lr_scheduler"]["last_batch_iteration"])

    @torch.no_grad()
    def load_resharded(
        self, read: Callable[[str], ParameterState], buffers: dict[str, Tensor], updates: int, fresh: bool = False
    ) -> None:
        """See `RoleEngine.load_resharded`; moments are not kept."""
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])
        for name, parameter in self.module.named_parameters():
            parameter.copy_(read(name).weight)
        self._schedule.step(updates)


Engine = RoleEngine | FrozenRole


def build_engine(module: nn.Module, recipe: Recipe, role: str, role_size: int) -> Engine:
    """The engine of a role; see `RoleEngine`."""
    frozen = recipe.train.freeze == role
    return FrozenRole(module, recipe, role, role_size) if frozen else RoleEngine(module, recipe, role, role_size)


def _partition_of(value: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a whole tensor, cut as ZeRO-3 cut `parameter`, with zeros behind the end."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    flat = F.pad(value.flatten(), (0, max(0, size * (rank + 1) - value.numel())))
    return flat[size * rank : size * (rank + 1)]


def to_universal(folder: Path, target: Path) -> None:
    """Convert what `RoleEngine.save` wrote at ZeRO 1, 2 or 3 into DeepSpeed's universal format.

    Afterwards `target/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt` holds every parameter whole.
    """
    _import_deepspeed()
    from deepspeed.checkpoint.ds_to_universal import main

    for file in sorted((folder / CHECKPOINT_TAG).glob("*.pt")):
        read_tensors(file, mmap=True)  # says which one is to be refused; the conversion would not

    options = argparse.Namespace(
        input_folder=str(folder / CHECKPOINT_TAG),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        main(options)
