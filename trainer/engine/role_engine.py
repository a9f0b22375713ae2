"""What DeepSpeed does for a role: engine, ZeRO, optimizer, schedule, clipping, monitors, checkpoint files.

Only this file imports deepspeed. Each role is a DeepSpeed job of its own in its role's process group, with one
reduction of gradients per step; a rank with both roles has two engines with different groups. The engine is fp32 at
every ZeRO stage: parameters are the fp32 master weights, and `.grad` is the fp32 accumulator. The trunk (by autocast)
and the experts may compute in bf16 nevertheless.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.common.machine import first_import_of
from trainer.common.safe_read import read_tensors
from trainer.config.recipe import Recipe
from trainer.engine.ds_config import deepspeed_config, scheduled_rate
from trainer.engine.frozen_role import FrozenRole
from trainer.engine.monitors import Monitors, quiet_writers
from trainer.engine.muon import MuonWithAdamW, muon_optimizer
from trainer.engine.parameter_state import CHECKPOINT_TAG, ParameterState, refuse_paths
from trainer.engine.replica_group import ReplicaGroup
from trainer.model.trunk import parameter_groups


def _import_deepspeed() -> Any:
    """Import deepspeed quietly, without letting it compile anything.

    Its first start on a CPU would build an extension for a minute, and a process killed meanwhile would leave a lock on
    which every later start hangs. The extension only speeds up collectives that are not used here.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    with first_import_of("deepspeed"):
        import deepspeed
        import deepspeed.ops
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

    # No extension may be used; finding out which could be would start a compiler.
    deepspeed.ops.__compatible_ops__ = {}
    _ask_torch_for_memory()
    _import_muon()
    # DeepSpeed would execute what checkpoint files contain. torch refuses that, except for these types.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("UNIPOOL_DEEPSPEED_LOG", "ERROR").upper())
    return deepspeed


def _ask_torch_for_memory() -> None:
    """Let DeepSpeed ask torch how much memory a GPU has, not NVML, where pynvml is installed.

    For NVML it takes the GPUs in CUDA_VISIBLE_DEVICES to be numbers, which fails with UUIDs.
    """
    if accelerator := sys.modules.get("deepspeed.accelerator.cuda_accelerator"):
        accelerator.pynvml = None  # type: ignore[attr-defined]


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which every engine imports and ours never use, without loading torch's compiler.

    Muon compiles a function on import. `torch.compile` loads the compiler, which takes a second, even if that is turned
    off (TORCHDYNAMO_DISABLE). As yet nothing is gained, because torch's optimizers load it too.
    """
    original = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = original


class RoleEngine:
    """The module of a role in its DeepSpeed engine.

    A step consists of `with engine.accumulating(): ...`, with any number of backward passes inside, at whose end the
    gradients are averaged over the role's ranks; `grad_norm()`; and `step(total_norm)`.

    Args:
        module: The role's module, with fp32 parameters on their device.
        role: "trunk" or "pool".
        role_size: Number of ranks of the role's group.
        group: The role's group, a torch process group, if it is not the default one. Not at ZeRO stage 3.
    """

    def __init__(self, module: nn.Module, recipe: Recipe, role: str, role_size: int, group: Any = None):
        deepspeed = _import_deepspeed()
        self.module = module
        self.stage = recipe.parallel.trunk_zero if role == "trunk" else recipe.parallel.pool_zero
        self._clip, self._ranks = recipe.train.clip, role_size
        self._group = ReplicaGroup(group) if group is not None else None
        assert self._group is None or self.stage < 3, "ZeRO-3 broadcasts from rank 0 of the default group"
        config = deepspeed_config(recipe, role, role_size, sum(p.numel() for p in module.parameters()))
        groups = parameter_groups(module, recipe.train.weight_decay)
        by_muon = recipe.train.optimizer == "muon"
        with self._in_group():
            self._engine, self._optimizer, _, self._schedule = deepspeed.initialize(
                model=module,
                model_parameters=groups,
                optimizer=muon_optimizer(module, groups, recipe, config["optimizer"]["params"]) if by_muon else None,
                config=config,
                mpu=self._group,
                dist_init_required=False,
            )
        self.monitors = Monitors(self._engine.monitor)
        self._total_norm = math.nan
        self._replace_internals(role)
        if recipe.train.schedule != "cosine":
            t, schedule = recipe.train, self._schedule
            ratio = lambda: scheduled_rate(recipe, schedule.last_batch_iteration) / t.lr  # noqa: E731
            self._replace(schedule, "get_lr_ratio", ratio)
        # DeepSpeed leaves the schedule before its first step, where the learning rate is 0.
        self._schedule.step()

    @contextmanager
    def _in_group(self) -> Iterator[None]:
        """Let DeepSpeed find this engine's group, which it looks up in a global variable.

        It does so while it builds an engine, and whenever it reduces gradients without ZeRO.
        """
        from deepspeed.utils import groups

        before, groups.mpu = groups.mpu, self._group
        try:
            yield
        finally:
            groups.mpu = before

    def _replace_internals(self, role: str) -> None:
        """Replace what DeepSpeed offers no interface for. `tests/trainer/engine/test_role_engine.py` checks all of it.

        Gradients are clipped by the norm over both roles instead of the role's own, which also says whether they are
        finite, so that a step reads nothing from the device. Checkpoint files are read safely, and written by the
        caller of `save`.
        """
        if self.stage == 0:
            self._replace(self._engine, "clip_fp32_gradients", self._clip_gradients)
            if role == "pool":
                self._replace(self._engine, "allreduce_and_copy", self._reduce_in_place)
        elif self.stage == 3:
            self._own_norms = self._replace(self._optimizer, "_get_norm_groups", lambda: [self._deepspeed_norm()])
        else:
            name = "scaled_global_norm"
            self._own_norm = self._replace(self._optimizer, name, lambda norm_type=2: self._deepspeed_norm())
            self._optimizer.check_grad_overflow = False
        files = self._engine.checkpoint_engine
        self._replace(files, "load", lambda path, map_location=None: read_tensors(path, map_location))
        self._replace(files, "makedirs", lambda path, exist_ok=False: None)  # the writer creates folders
        self._replace(files, "save", self._save_file)
        # It would copy DeepSpeed's scripts at once, and fail on a full disk; `export` does what they are for.
        self._replace(self._engine, "_copy_recovery_script", lambda path: None)

    @staticmethod
    def _replace(owner: Any, name: str, function: Callable[..., Any]) -> Any:
        """Replace a method of one object, and return the original."""
        original = getattr(owner, name)
        setattr(owner, name, function)
        return original

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Let backward passes inside add to `.grad`, and average the gradients over the role's ranks at the end."""
        if self.stage == 0:
            yield
            self._fill_missing_gradients()
            if self._ranks > 1:
                with self._in_group():
                    self._engine.allreduce_gradients()
            return
        with self._engine.coalesce_grad_reduction():
            yield
            if self.stage != 3:
                self._fill_missing_gradients()

    @staticmethod
    def _reduce_in_place(gradients: list[Tensor], group: Any, size: int) -> None:
        """Average gradients over the ranks, each where it is. DeepSpeed would copy them into one tensor, and back.

        The experts have two gradients, both large; the trunk has many small ones, for which one message is better.
        """
        for gradient in gradients:
            torch.distributed.all_reduce(gradient, group=group)
            gradient.mul_(1 / size)

    def _fill_missing_gradients(self) -> None:
        """Add zeros where there is no gradient: replicas must reduce the same set of gradients."""
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def grad_norm(self) -> Tensor:
        """Return the norm of the role's averaged gradients, the same on all its ranks: fp32, on the device.

        It is negative or not finite if the gradients are not finite; see `squared_norm`.
        """
        if self.stage == 0:
            return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            return combine_grad_norm_groups(self._own_norms())  # type: ignore[no-any-return]
        return self._own_norm()  # type: ignore[no-any-return]

    def step(self, total_norm: float) -> bool:
        """Clip by `total_norm`, the norm over all roles, and step; skip the step if that is not finite.

        Returns:
            Whether the step was applied; if so, the schedule has advanced. The gradients are gone in either case.
        """
        self._total_norm = total_norm
        if self.stage == 0 and not math.isfinite(total_norm):
            self._engine.zero_grad()
            return False
        self._engine.step()
        return self.stage == 0 or bool(self._engine.was_step_applied())

    def _deepspeed_norm(self) -> Tensor:
        """Return the norm over all roles as DeepSpeed's ZeRO optimizers expect it, but on the host.

        They ask whether it is finite, and multiply by numbers that they make of it. Neither waits for the device then.
        """
        return torch.tensor(self._total_norm if math.isfinite(self._total_norm) else -1.0)

    def _clip_gradients(self) -> None:
        factor = self._clip / (self._total_norm + 1e-6)
        if factor < 1:
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def updates(self) -> int:
        """Optimizer steps applied since the beginning of the run, which is the position in the schedule."""
        return int(self._schedule.last_batch_iteration)

    def save(self, folder: Path, write: Callable[[Path, Any], None]) -> None:
        """Pass this rank's files of the role's checkpoint, copied to the host, to `write(path, state)`.

        A collective of all ranks of the default group: DeepSpeed waits for all of them even if the role's group is
        another one.
        """
        if self.stage == 3 and not self.updates:  # the conversion into another layout asks for moments
            self._make_moments(0)
        self._write = write
        self._engine.save_checkpoint(str(folder), tag=CHECKPOINT_TAG, save_latest=False)

    def _save_file(self, state_dict: Any, path: str) -> None:
        from deepspeed.checkpoint.utils import clone_tensors_for_torch_save

        self._write(Path(path), clone_tensors_for_torch_save(state_dict))

    def load(self, folder: Path) -> None:
        """Load what `save` wrote in the same layout. Learning rate, weight decay and so on stay the recipe's."""
        groups = self._optimizer.param_groups
        own = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        path, _ = self._engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)
        assert path is not None, f"no checkpoint in {folder}"
        for group, values in zip(self._optimizer.param_groups, own, strict=True):
            group.update(values)
        if self.stage in (1, 2):
            self._optimizer.clip_grad = self._clip
        # Set the learning rate of the next step, from the recipe's schedule.
        self._schedule.step(self._schedule.last_batch_iteration)

    @torch.no_grad()
    def load_resharded(
        self, read: Callable[[str], ParameterState], buffers: dict[str, Tensor], updates: int, fresh: bool = False
    ) -> None:
        """Load a state that was saved in another layout. A collective of the role's ranks.

        Args:
            read: Returns the whole state of a parameter, by its name in the module.
            buffers: The module's buffers, by name.
            updates: Optimizer steps applied.
            fresh: Whether the moments are zeros that have never been updated.
        """
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])
        self._make_moments(0 if fresh else updates)
        for name, parameter in self.module.named_parameters():
            self._set(parameter, read(name))
        self._schedule.step(updates)

    def _make_moments(self, updates: int) -> None:
        """Create moments of zeros, which optimizers create in their first step only; those that exist are kept.

        At ZeRO 1 and 2 DeepSpeed links each parameter with its part of them once.
        """
        optimizer = self._optimizer
        if self.stage == 0:
            base, flats = optimizer, list(self.module.parameters())
        else:
            base = optimizer.optimizer
            flats = (
                optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
            )
        for flat in flats:
            if flat in base.state:
                base.state[flat]["step"].fill_(updates)
                continue
            step = torch.tensor(float(updates), device=flat.device)
            base.state[flat] = {"step": step, "exp_avg": torch.zeros_like(flat)}
            if not isinstance(base, MuonWithAdamW) or not base.updates_by_muon(flat):
                base.state[flat]["exp_avg_sq"] = torch.zeros_like(flat)
        if self.stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, state: ParameterState) -> None:
        optimizer = self._optimizer
        for key, value in ((None, state.weight), ("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            if self.stage == 0 and key and key not in optimizer.state[parameter]:
                continue  # Muon has one moment
            assert value is not None
            if self.stage == 3:
                optimizer.set_local_hp_param(_partition_of(value, parameter), parameter, key)
            elif self.stage == 0:
                (optimizer.state[parameter][key] if key else parameter).copy_(value)
            elif parameter._hp_mapping is not None:  # this rank holds a part of it
                parameter.set_full_hp_param(value, key)
        if self.stage == 3:
            parameter.ds_tensor.copy_(_partition_of(state.weight, parameter))
        else:
            parameter.copy_(state.weight)


Engine = RoleEngine | FrozenRole


def squared_norm(norm: float) -> float:
    """Return the square of a norm that `grad_norm` returned, or infinity if the gradients were not finite."""
    # DeepSpeed's optimizers return -1 for a norm that is not finite.
    return norm * norm if norm >= 0 and math.isfinite(norm) else math.inf


def build_engine(module: nn.Module, recipe: Recipe, role: str, role_size: int, group: Any = None) -> Engine:
    """Return the engine of a role; see `RoleEngine` for the arguments."""
    quiet_writers()
    if recipe.train.freeze != role:
        return RoleEngine(module, recipe, role, role_size, group)
    deepspeed = _import_deepspeed()
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    deepspeed.init_distributed(dist_init_required=False)
    monitors = Monitors(MonitorMaster(get_monitor_config(deepspeed_config(recipe, role, role_size, 1))))
    return FrozenRole(module, recipe, monitors, writes=torch.distributed.get_rank(group) == 0)


def _partition_of(value: Tensor, parameter: Any) -> Tensor:
    """Return this rank's part of a whole tensor, partitioned as ZeRO-3 partitions `parameter`, padded with zeros."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    flat = F.pad(value.flatten(), (0, max(0, size * (rank + 1) - value.numel())))
    return flat[size * rank : size * (rank + 1)]


def to_universal(folder: Path, target: Path) -> None:
    """Convert what `RoleEngine.save` wrote at ZeRO 1, 2 or 3 into DeepSpeed's universal format.

    Afterwards `target/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt` hold every parameter whole.
    """
    _import_deepspeed()
    from deepspeed.checkpoint.ds_to_universal import main

    for file in sorted((folder / CHECKPOINT_TAG).rglob("[!.]*")):  # it reads files of any ending, also in folders
        if not file.is_dir():
            refuse_paths(file, read_tensors(file, mmap=True))  # names what is refused, which the conversion does not

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
