"""Which checkpoint a run goes on from: the newest one that is whole, made by a recipe of the same mathematics."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint import format as checkpoint
from trainer.common.errors import SharedUserError, UserError
from trainer.common.strict_json import dumps, loads
from trainer.config.recipe import Recipe, load_recipe
from trainer.config.sections import source_names

if TYPE_CHECKING:
    from trainer.cluster.process_groups import Job

# Keys that decide what the weights are: a checkpoint of other ones cannot be loaded.
_WEIGHTS = {f"model.{key}" for key in ("layers", "hidden", "heads", "kv_heads", "ffn_hidden", "vocab", "ffn", "groups")}
_WEIGHTS |= {"pool.experts", "router.kind"}
# Keys on which the numbers do not depend, but for rounding.
_FREE_SECTIONS = {"run", "parallel", "topology", "eval", "probe", "checkpoint", "metrics"}
_FREE = {"pool.recompute", "pool.stash_bytes", "pool.placement", "train.recompute", "train.max_skipped_steps"}
_FREE |= {"train.micro_batch", "data.dir", "data.max_bad_share"}


def differences(saved: Recipe, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both."""
    before, now = _flat(saved.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    return {key: (before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)}


def _flat(tree: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def changes_mathematics(key: str, recipe: Recipe) -> bool:
    """Whether a run with another value of `key` comes to other numbers."""
    if key == "run.seed":
        return True
    b = recipe.balance
    # Balance losses see the load of a micro-batch, and with a delay that of an earlier one of the same rank.
    if b.scope == "micro_batch" and (key == "train.micro_batch" or (key == "parallel.trunk_ranks" and b.delay)):
        return True
    return key.partition(".")[0] not in _FREE_SECTIONS and key not in _FREE


def check(recipe: Recipe, folder: Path, force: bool) -> list[str]:
    """Compare the recipe with that of checkpoint `folder`; returns what differs, as "key old -> new".

    Raises:
        SharedUserError: it cannot be loaded, or the mathematics would change and `force` is not set.
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
    if other := [line for key, line in lines.items() if key in _WEIGHTS]:
        raise SharedUserError(f"{where} is of another model: {', '.join(other)}; use the same or another run.dir")
    changed = [line for key, line in lines.items() if changes_mathematics(key, recipe)]
    if changed and not force:
        raise SharedUserError(
            f"{where} was made with other mathematics: {', '.join(changed)}; use the same, another run.dir, or --force "
            f"to go on with the new"
        )
    return list(lines.values())


def check_data(recipe: Recipe, folder: Path, identity: str, force: bool) -> None:
    """Whether the data is still that of checkpoint `folder`: files change while the recipe's keys stay.

    Raises:
        SharedUserError: it is not, and `force` is not set.
    """
    if checkpoint.read_about(folder).data != identity and not force:
        raise SharedUserError(
            f"data.source = {source_names(recipe.data.source)}: its text or its tokenizer has changed since checkpoint "
            f"{folder.name} of {recipe.run.dir}; restore the old data, use another run.dir, or pass --force to "
            "continue with the new data"
        )


def _show(value: Any) -> str:
    if isinstance(value, list):  # of sources, each without what it leaves to the section
        value = [{k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part for part in value]
    return dumps(value)


def early_check(recipe: Recipe, checkpoints: Path, force: bool) -> bool:
    """Before ranks start: whether there is a checkpoint to go on from. A recipe that does not fit is found here.

    Raises:
        SharedUserError: see `check`.
    """
    found = checkpoint.newest(checkpoints)
    if found and checkpoint.damage(found[1], lambda _: [checkpoint.RECIPE_FILE]) is None:
        check(recipe, found[1], force)
    return found is not None


def choose(job: Job, recipe: Recipe, checkpoints: Path, force: bool) -> tuple[int, Path] | None:
    """The newest checkpoint whose files are all as they were written, read by all ranks together; None to start anew.

    Damaged ones that are newer are named in a warning and set aside as damaged_step_*. A collective of all ranks.

    Raises:
        SharedUserError: there are checkpoints, but all are damaged; or see `check`.
    """
    names = loads(job.shared.broadcast("checkpoints", lambda: dumps(_candidates(checkpoints))))
    damaged: dict[str, str] = {}
    for name in reversed(names):
        folder = checkpoints / name
        problem = _damage(job, folder)
        if problem is None:
            differing = check(recipe, folder, force)
            if job.rank == 0:
                _set_aside(checkpoints, damaged, name)
                if differing:
                    print(f"the recipe differs from that of {name}: {', '.join(differing)}", file=sys.stderr)
            job.barrier()
            return checkpoint.steps_of(folder), folder
        damaged[name] = problem
    if damaged:
        problems = "; ".join(f"{name}: {problem}" for name, problem in damaged.items())
        raise SharedUserError(
            f"run.dir = {recipe.run.dir}: none of its checkpoints is whole ({problems}); restore one, or use another "
            f"run.dir"
        )
    return None


def _candidates(checkpoints: Path) -> list[str]:
    return [folder.name for folder in checkpoint.folders(checkpoints)]


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
        print(
            f"WARNING: checkpoint {name} is damaged: {problem}. GOING BACK to {chosen}; the damaged one is now {aside}",
            file=sys.stderr,
        )
