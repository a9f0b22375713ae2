"""What fine-tuning on new text does to a shared pool: the loss on the new text, and on the text before.

python -m tests.benchmarks.fine_tuning [--runs runs/fine-tuning] [--out docs/results/fine-tuning] [--jobs 2]

The model is a trained quickstart, on the source of Python's library, and beside it one with private experts and as many
parameters. The new text is C++: the headers of torch. Every method has the same loop and the same batches; its learning
rate, for both models, is that of `RATES` with which the shared pool has the lowest loss on new text that is neither
trained on nor reported, with seed 0. With it, the model is trained with seeds 1 to 3, which decide the order of the
text and the initial adapters.

Runs that are done are read from FOLDER/runs.jsonl, so the command continues after an interruption.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from tests.benchmarks.exported import exported, run_of
from trainer.evaluate.loss import summed_loss, token_ids, windows
from trainer.export.exported_model import load_export
from trainer.export.loaded_model import prepare_libraries
from trainer.export.saved_run import data_of, find_run

STEPS, BATCH, WINDOW = 40, 4, 256
"""Steps of a run, sequences of a step, and tokens of a sequence."""

TEST_ROWS = 64
RATES = {"weights": (3e-4, 1e-3, 3e-3), "adapters": (3e-3, 1e-2, 3e-2)}
SEEDS = (1, 2, 3)
RANK = 8
"""The rank of an adapter for all layers; eight layers with an adapter each have rank 1, and so as many parameters."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapt(model: Any, rank: int, **targets: Any) -> None:
    """Freeze a model and add adapters of low rank to it, in place."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, **targets))


def adapt_by_layer(model: Any) -> None:
    """Give each layer adapters of its own for the pool, whose weights all layers still share."""
    for layer in model.model.layers:
        layer.pool = copy.copy(model.model.experts)  # a module of its own, with the same parameters
        layer.pool._parameters = dict(model.model.experts._parameters)
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: (args, kwargs | {"experts": layer.pool}), with_kwargs=True
        )
    adapt(model, RANK // len(model.model.layers), target_parameters=["pool.gate_up_proj", "pool.down_proj"])


METHODS: dict[str, Callable[[Any], object]] = {
    "full": lambda model: model,
    "frozen pool": lambda model: model.model.experts.requires_grad_(False),
    "LoRA on attention": lambda model: adapt(model, RANK, target_modules=ATTENTION),
    "LoRA on routers": lambda model: adapt(model, RANK, target_parameters=["router.weight"]),
    "LoRA on the pool": lambda model: adapt(
        model, RANK, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    ),
    "LoRA on the pool by layer": adapt_by_layer,
}
COMPARED = [*(("unipool", method) for method in METHODS), ("vanilla", "full"), ("vanilla", "LoRA on the pool")]
"""What is trained with all seeds."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning: losses in nats per token, of text that it has not seen.

    Attributes:
        parameters: How many were trained.
        choice: The loss on the new text by which the learning rate is chosen.
        seconds: Of training; other work may have shared the machine.
    """

    model: str
    method: str
    rate: float
    seed: int
    parameters: int
    choice: float
    new: float
    old: float
    seconds: float

    @property
    def key(self) -> tuple[str, str, float, int]:
        return self.model, self.method, self.rate, self.seed


@cache
def new_text(tokenizer_folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return windows to train on, to choose the rate by, and to report: (rows, WINDOW + 1) each."""
    tokenizer = load_export(tokenizer_folder)[1]
    include = Path(torch.__file__).parent / "include"
    files = [path for part in ("c10", "torch/csrc") for path in (include / part).rglob("*.h")]
    # In an order that mixes the folders, as much as is needed.
    files.sort(key=lambda path: hashlib.sha256(str(path.relative_to(include)).encode()).digest())
    needed = STEPS * BATCH + 2 * TEST_ROWS
    ids = itertools.islice(token_ids(tokenizer, (path.read_text() for path in files)), needed * WINDOW + 1)
    rows = torch.tensor(windows(list(ids), WINDOW))
    return rows[2 * TEST_ROWS :], rows[:TEST_ROWS], rows[TEST_ROWS : 2 * TEST_ROWS]


@cache
def old_text(run: Path) -> Tensor:
    """Return held-out windows of the text that the models were trained on, (TEST_ROWS, WINDOW + 1)."""
    stream = data_of(find_run(run)).stream("validation", None)
    return torch.cat(list(stream.micro_batches(0, TEST_ROWS, 0, 1, 1)))


@torch.no_grad()
def mean_loss(model: Any, rows: Tensor) -> float:
    return sum(summed_loss(model, part, None) for part in rows.split(16)) / (len(rows) * WINDOW)


def train(model: Any, rows: Tensor, rate: float, seed: int) -> int:
    """Train what is not frozen; return the number of parameters that are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.95), weight_decay=0.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).split(BATCH)
    for step in range(STEPS):
        for group in optimizer.param_groups:  # warm up for a tenth, then fall to 0
            group["lr"] = rate * min((step + 1) / (STEPS / 10), (STEPS - step) / (STEPS * 0.9))
        tokens = rows[order[step]]
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return sum(parameter.numel() for parameter in trained)


def tune(folder: Path, model: str, method: str, rate: float, seed: int) -> Run:
    """Fine-tune one model; with the method "none", only compute its losses."""
    prepare_libraries()
    export = exported(folder, model)
    tuned = load_export(export)[0]
    training, choosing, testing = new_text(exported(folder, "unipool"))
    parameters, started = 0, time.perf_counter()
    if method != "none":
        torch.manual_seed(seed)
        METHODS[method](tuned)
        parameters = train(tuned, training, rate, seed)
    seconds = time.perf_counter() - started
    losses = [mean_loss(tuned, rows) for rows in (choosing, testing, old_text(run_of(folder, "unipool")))]
    return Run(model, method, rate, seed, parameters, *losses, seconds)


def done_runs(file: Path) -> list[Run]:
    return [Run(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def best_rate(runs: Iterable[Run], method: str) -> float:
    """Return the rate with which the shared pool has the lowest loss on the text to choose by."""
    tried = [run for run in runs if (run.model, run.method, run.seed) == ("unipool", method, 0)]
    return min(tried, key=lambda run: run.choice).rate


def rates_of(method: str) -> Sequence[float]:
    return RATES["adapters" if method.startswith("LoRA") else "weights"]


def make(folder: Path, wanted: Sequence[tuple[str, str, float, int]], jobs: int) -> list[Run]:
    """Make the runs that are missing, and return all."""
    file = folder / "runs.jsonl"
    runs = done_runs(file)
    missing = [key for key in wanted if key not in {run.key for run in runs}]
    with (
        ProcessPoolExecutor(jobs, get_context("spawn")) as pool,  # this process has threads
        tqdm(desc="fine-tuning", total=len(missing), unit=" runs", disable=None) as bar,
    ):
        for made in pool.map(tune, itertools.repeat(folder), *zip(*missing, strict=True)) if missing else ():
            runs.append(made)
            with file.open("a") as lines:
                lines.write(json.dumps(asdict(made)) + "\n")
            bar.update()
    return runs


@click.command(help=__doc__)
@click.option("--runs", "folder", type=click.Path(path_type=Path), default="runs/fine-tuning", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="docs/results/fine-tuning", show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Runs at the same time.")
def main(folder: Path, out: Path, jobs: int) -> None:
    folder = folder.resolve()
    for name in ("unipool", "vanilla"):
        exported(folder, name)
    none = [(model, "none", 0.0, 0) for model in ("unipool", "vanilla")]
    tried = [("unipool", method, rate, 0) for method in METHODS for rate in rates_of(method)]
    runs = make(folder, none + tried, jobs)
    chosen = {(model, method): best_rate(runs, method) for model, method in COMPARED}
    runs = make(folder, [(*pair, chosen[pair], seed) for pair in COMPARED for seed in SEEDS], jobs)
    from tests.benchmarks.fine_tuning_page import write_page

    write_page(runs, chosen, out)


if __name__ == "__main__":
    main()
