"""Which checkpoint a run resumes from: the newest intact one, trained with the same settings; and loading it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint import format as checkpoint
from trainer.common.errors import SharedUserError, UserError
from trainer.common.safe_read import read_tensors
from trainer.common.strict_json import dumps, loads
from trainer.config.lock import OWNERSHIP_FILE, assigned_after
from trainer.config.recipe import Recipe, load_recipe
from trainer.config.sections import source_names
from trainer.telemetry.console import say

if TYPE_CHECKING:
    from trainer.cluster.process_groups import Job

_MODEL_KEYS = {f"model.{key}" for key in ("layers", "hidden", "heads", "kv_heads", "ffn_hidden", "vocab", "ffn")}
_MODEL_KEYS |= {"model.groups", "model.private_ffn", "pool.experts", "router.kind", "router.logit_bias"}
_MODEL_KEYS |= {"model.head_dim", "model.qk_norm", "model.qkv_bias", "model.private_gate"}
"""Keys that determine what the weights are: a checkpoint with other values cannot be loaded."""

_STATE_KEY = "train.optimizer"
"""Determines which moments there are: a checkpoint with another value cannot be continued."""

_FREE_SECTIONS = {"run", "parallel", "topology", "eval", "tasks", "probe", "profile", "checkpoint", "metrics"}
_FREE_KEYS = {"pool.recompute", "pool.stash_bytes", "pool.placement", "train.recompute", "train.max_skipped_steps"}
_FREE_KEYS |= {"train.micro_batch", "train.compile", "train.loss_chunk", "data.dir", "data.max_bad_share"}
_FREE_KEYS |= {"lock.stop_above"}
"""Keys that do not affect the numbers, apart from rounding."""


def differences(saved: Recipe, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, with both values."""
    before, now = _flat(saved.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    return {key: (before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)}


def _flat(tree: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in (keys or {}).items()}


def affects_results(key: str, recipe: Recipe, assigned: bool = False) -> bool:
    """Whether a run with another value of `key` produces other numbers.

    Args:
        assigned: Whether experts have been assigned to layers, in a run with a lock.
    """
    if key == "run.seed":
        return True
    # Evaluations decide the assignment.
    if recipe.lock and recipe.lock.allocation == "learned" and not assigned and key in ("eval.every", "eval.batches"):
        return True
    # The entropy loss is not linear in the mean scores of a micro-batch.
    if recipe.lock and recipe.lock.entropy and key == "train.micro_batch":
        return True
    b = recipe.balance
    # Balance losses see the load of a micro-batch, and with a delay that of an earlier one of the same rank.
    if b.scope == "micro_batch" and (key == "train.micro_batch" or (key == "parallel.trunk_ranks" and b.delay)):
        return True
    return key.partition(".")[0] not in _FREE_SECTIONS and key not in _FREE_KEYS


def check(recipe: Recipe, folder: Path, force: bool) -> list[str]:
    """Compare the recipe with that of a checkpoint; return the differences as "key old -> new".

    Args:
        force: Whether differences that affect results are accepted.

    Raises:
        SharedUserError: The checkpoint cannot be loaded, or results would be affected and `force` is not set.
    """
    where = f"run.dir = {recipe.run.dir}: its checkpoint {folder.name}"
    try:
        saved = load_recipe(str(folder / checkpoint.RECIPE_FILE))
    except UserError as error:
        raise SharedUserError(
            f"{where} has a recipe that this version cannot read ({error}); use another run.dir"
        ) from None
    found = differences(saved, recipe)
    found.pop("run.dir", None)
    lines = {key: f"{key} {_show(before)} -> {_show(now)}" for key, (before, now) in found.items()}
    if other := [line for key, line in lines.items() if key in _MODEL_KEYS]:
        raise SharedUserError(
            f"{where} belongs to another model: {', '.join(other)}; restore these settings, or use another run.dir"
        )
    if _STATE_KEY in lines:
        raise SharedUserError(
            f"{where} has the moments of another optimizer: {lines[_STATE_KEY]}; restore the key, or begin another "
            "run.dir from its export (train.init_from)"
        )
    record = checkpoint.read_ownership(folder)
    if recipe.lock:
        _check_assignment(recipe, record, checkpoint.steps_of(folder), where)
    changed = [line for key, line in lines.items() if affects_results(key, recipe, record is not None)]
    if changed and not force:
        raise SharedUserError(
            f"{where} was trained with different settings: {', '.join(changed)}; restore them, use another run.dir, or "
            "pass --force to continue with the new ones"
        )
    return list(lines.values())


def _check_assignment(recipe: Recipe, record: checkpoint.OwnershipRecord | None, done: int, where: str) -> None:
    """Check that the recipe's lock assigns experts where the run has done so: neither too late nor a second time."""
    after = assigned_after(recipe)
    if record is None and done > after:
        raise SharedUserError(
            f"{where} has no experts assigned to layers, and the recipe's lock would have assigned them after step "
            f"{after}: restore the keys of lock, or use another run.dir"
        )
    if record is not None and record.step != after:
        raise SharedUserError(
            f"{where} has experts assigned to layers after step {record.step}, but the recipe's lock assigns them "
            f"after step {after}: restore train.steps and the keys of lock, or choose lock.full_fraction for step "
            f"{record.step}, or use another run.dir"
        )


def check_data(recipe: Recipe, folder: Path, identity: str, force: bool) -> None:
    """Check that the data is still that of a checkpoint: files may change while the recipe's keys stay the same.

    Args:
        force: Whether other data is accepted.

    Raises:
        SharedUserError: The data is different, and `force` is not set.
    """
    if checkpoint.read_info(folder).data != identity and not force:
        raise SharedUserError(
            f"data.source = {source_names(recipe.data.source)}: its text or its tokenizer has changed since checkpoint "
            f"{folder.name} of {recipe.run.dir}; restore the old data, use another run.dir, or pass --force to "
            "continue with the new data"
        )


def _show(value: Any) -> str:
    if isinstance(value, list):  # of sources, each without the keys that it leaves to the section
        value = [{k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part for part in value]
    return dumps(value)


def early_check(recipe: Recipe, checkpoints: Path, force: bool) -> bool:
    """Return whether there is a checkpoint to resume from; called before ranks start, to find a wrong recipe early.

    Raises:
        SharedUserError: See `check`.
    """
    found = checkpoint.newest(checkpoints)
    if found and checkpoint.damage(found[1], _of_check) is None:
        check(recipe, found[1], force)
    return found is not None


def _of_check(names: list[str]) -> list[str]:
    return [name for name in names if name in (checkpoint.RECIPE_FILE, OWNERSHIP_FILE)]


def choose(job: Job, recipe: Recipe, checkpoints: Path, force: bool) -> tuple[int, Path] | None:
    """Return (steps done, folder) of the newest intact checkpoint, or None to start from the beginning.

    All ranks call this together and share the reading of all files. Newer, damaged checkpoints are named in a warning
    and renamed to damaged_step_*.

    Raises:
        SharedUserError: All checkpoints are damaged; or see `check`.
    """
    candidates = job.shared.broadcast("checkpoints", lambda: dumps([f.name for f in checkpoint.folders(checkpoints)]))
    damaged: dict[str, str] = {}
    for name in reversed(loads(candidates)):
        folder = checkpoints / name
        problem = _damage(job, folder)
        if problem is None:
            differing = check(recipe, folder, force)
            if job.rank == 0:
                _set_aside(checkpoints, damaged, name)
                if differing:
                    say(f"the recipe differs from that of {name}: {', '.join(differing)}")
            job.barrier()
            return checkpoint.steps_of(folder), folder
        damaged[name] = problem
    if damaged:
        problems = "; ".join(f"{name}: {problem}" for name, problem in damaged.items())
        raise SharedUserError(
            f"run.dir = {recipe.run.dir}: all its checkpoints are damaged ({problems}); restore one, or use another "
            "run.dir"
        )
    return None


def _damage(job: Job, folder: Path) -> str | None:
    """What some rank found wrong, the same on all ranks; each reads a part of the files."""
    problem = checkpoint.damage(folder, lambda names: names[job.rank :: job.topology.world_size])
    job.barrier()  # reading may take long
    (found,) = job.sum_over_ranks([float(problem is not None)])
    if not found:
        return None
    job.shared.put(f"damage/{folder.name}", problem or "")
    return next(text for text in job.shared.gather(f"damage/{folder.name}") if text)


def _set_aside(checkpoints: Path, damaged: dict[str, str], chosen: str) -> None:
    for name, problem in damaged.items():
        aside = checkpoints / f"damaged_{name}"
        number = 1
        while aside.exists():
            number += 1
            aside = checkpoints / f"damaged_{name}.{number}"
        (checkpoints / name).rename(aside)
        say(
            f"WARNING: checkpoint {name} is damaged: {problem}. RESUMING FROM {chosen} INSTEAD; the damaged one is now "
            f"{aside}"
        )


def load_checkpoint(job: Job, recipe: Recipe, folder: Path, role: checkpoint.Role) -> None:
    """Load this rank's part of a checkpoint, resharded if its layout is another one. A collective of all ranks."""
    info = checkpoint.read_info(folder)
    if info.layout == checkpoint.layout_of(recipe, role.placement):
        for name, engine in role.engines.items():
            engine.load(folder / name)
    else:
        from trainer.checkpoint.reshard import reshard

        if job.rank == 0:
            say(f"checkpoint {folder.name} has another layout: resharding it")
        reshard(job, folder, role.engines)
    state: dict[str, Any] = {}
    if job.is_trunk or recipe.train.skip_spikes is not None:  # pool ranks skip the same steps
        saved_ranks = info.layout.ranks[0]
        state = read_tensors(checkpoint.state_file(folder, job.rank % saved_ranks), job.device)
    role.restore(state, info.steps, info.steps * (recipe.micro_batches - info.micro_batches))
