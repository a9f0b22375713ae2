"""Records which experts each layer of a trained model chooses, micro-batch by micro-batch.

python -m tests.benchmarks.record runs/quickstart --out routing.npy
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pool.placement import contiguous
from tests.saved_weights import load_weights
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.reshard import SavedCheckpoint, convert
from trainer.config.recipe import load_recipe
from trainer.data.prepare import prepare_for
from trainer.engine.experts import build_shard
from trainer.model.micro_batch import PoolMap, hidden_states
from trainer.model.pool_client import LocalPool
from trainer.model.trunk import Trunk


def record(run: Path, micro_batches: int) -> NDArray[np.int64]:
    """Count assignments by micro-batch, layer and global expert (N, L, M) of a run's newest checkpoint.

    Raises:
        ValueError: The run has no checkpoint of a model with experts.
    """
    recipe = load_recipe(str(run / "recipe.yaml"))
    found = checkpoint.newest(run / "checkpoints")
    if found is None or recipe.model.ffn == "dense":
        raise ValueError(f"{run}: has no checkpoint of a model with experts")
    groups, device = recipe.model.groups, torch.device("cpu")
    placement = contiguous(recipe.pool.experts, groups, 1)
    trunk, shard = Trunk(recipe, device), build_shard(recipe, placement, 0, device)
    with tempfile.TemporaryDirectory() as work:
        convert(found[1], Path(work))
        load_weights(SavedCheckpoint(found[1], Path(work)), trunk, shard)
    pool_map = PoolMap(placement.position_M, recipe.experts_per_layer, recipe.model.layers // groups)
    pool = LocalPool(shard)
    stream = prepare_for(recipe).stream("train", recipe.run.seed + 1)
    size = recipe.train.micro_batch
    load_NLM = np.zeros((micro_batches, recipe.model.layers, recipe.pool.experts), dtype=np.int64)
    for number in tqdm(range(micro_batches), desc="recording"):
        (sequences_BS1,) = stream.micro_batches(number, size, 0, 1, size)
        coroutine = hidden_states(trunk, pool_map, sequences_BS1[:, :-1], number)
        ((_, load_LM),) = pool.run([coroutine], (0,), 0)
        assert load_LM is not None
        for layer, row in enumerate(load_LM.numpy()):
            first = pool_map.first_expert(layer)
            load_NLM[number, layer, first : first + len(row)] = row
    return load_NLM


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The .npy file to write.")
@click.option(
    "--micro-batches", default=256, show_default=True, help="Number of micro-batches of training text, in a new order."
)
def main(run: Path, out: Path, micro_batches: int) -> None:
    """Record the routing of RUN's newest checkpoint: counts by micro-batch, layer and global expert."""
    load_NLM = record(run, micro_batches)
    np.save(out, load_NLM)
    print(f"{out}: {load_NLM.shape}")


if __name__ == "__main__":
    main()
