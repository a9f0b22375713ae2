"""What serving from one pool costs against private experts: memory, tokens/s by batch size, experts touched, KV cache.

    python -m tests.benchmarks.serving --runs FOLDER --out docs/results/serving

The recipe quickstart and its vanilla counterpart are trained and exported, unless FOLDER has them already, and both are
quantised to 8 bits as well; another model with half the experts is not trained. Each is loaded by a process of its own,
as `unipool serve` does. The processes take turns: in every round each answers as many requests as the batch has,
together, by continuous batching.
"""

from __future__ import annotations

import csv
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import click
from matplotlib.axes import Axes
from tqdm import tqdm

from tests.benchmarks.exported import exported
from tests.benchmarks.report import commit, machine
from trainer.common.figure_style import (
    SERIES,
    figure_title,
    label_ends,
    new_figure,
    panel_title,
    style_axes,
    write_png_and_svg,
)

BATCHES = (1, 2, 4, 8, 16)
PROMPT, NEW = 32, 24
"""Tokens of a prompt, and of an answer."""

NAMES = ("vanilla", "one pool", "half the pool", "vanilla, int8", "one pool, int8")
"""8 private experts in each of 8 layers; 64 experts that all layers share; 32 of them. A token takes one in a layer."""


def worker(export: Path) -> None:
    """Load an export; then answer each line of stdin, a batch size, with a line of what was measured."""
    import psutil
    import torch

    process = psutil.Process()
    from trainer.export.loaded_model import load_model

    before = process.memory_info().rss
    model = load_model(export, "cpu").model
    resident = process.memory_info().rss - before
    from tests.benchmarks.quantisation import bytes_in_memory

    config = model.config
    experts = model.model.experts
    facts = {
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "weight_bytes": bytes_in_memory(model),
        "expert_bytes": bytes_in_memory(experts) // len(next(experts.parameters())),
        "kv_bytes_per_token": 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4,
        "resident_bytes": resident,
    }
    print(json.dumps(facts), flush=True)
    touched: dict[int, dict[str, float]] = {}
    for line in sys.stdin:
        batch = int(line)
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(1, config.vocab_size, (batch, PROMPT), generator=generator).tolist()
        if batch not in touched:
            touched[batch] = experts_touched(model, prompts)
        print(json.dumps({"tokens_per_second": speed(model, prompts), **touched[batch]}), flush=True)


def speed(model: Any, prompts: list[list[int]]) -> float:
    """Return the new tokens per second of requests that are computed together."""
    from transformers import ContinuousBatchingConfig

    batch = len(prompts)
    paging = ContinuousBatchingConfig(
        page_size=32, num_blocks=2 * batch + 2, max_batch_tokens=512, max_requests_per_batch=batch, safety_margin=0.0
    )
    outputs = model.generate_batch(prompts, generation_config=_settings(), continuous_batching_config=paging)
    spans = [output.lifespan for output in outputs.values()]
    assert len(spans) == batch and all(len(output.generated_tokens) == NEW for output in outputs.values())
    return batch * NEW / (max(end for _, end in spans) - min(start for start, _ in spans))


def experts_touched(model: Any, prompts: list[list[int]]) -> dict[str, float]:
    """Return how many different experts a decoding step takes, in all layers together and in one."""
    import torch

    layers, batch = model.config.num_hidden_layers, len(prompts)
    steps: list[set[int]] = []
    counts: list[int] = []

    def note(_module: Any, inputs: Any) -> None:
        if len(inputs[0]) == batch:  # a decoding step, one token of each request
            if len(counts) % layers == 0:
                steps.append(set())
            chosen = set(inputs[1].flatten().tolist())
            counts.append(len(chosen))
            steps[-1] |= chosen

    hook = model.model.experts.register_forward_pre_hook(note)
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=_settings())
    hook.remove()
    return {"experts_per_step": statistics.mean(map(len, steps)), "experts_per_layer": statistics.mean(counts)}


def _settings() -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)


def exports(runs: Path, folder: Path) -> dict[str, Path]:
    """Return the models' exports: two of trained runs, and those that are made here."""
    import torch

    from tests.benchmarks.quantisation import in_8_bits
    from trainer.config.recipe import load_recipe
    from trainer.export.model_files.modeling_unipool import UniPoolConfig, UniPoolForCausalLM
    from trainer.export.names import config_fields

    vanilla, pool, half = exported(runs, "vanilla"), exported(runs, "unipool"), folder / "half"
    torch.manual_seed(0)
    config = UniPoolConfig(**config_fields(load_recipe("quickstart", ["pool.experts=32"])))
    UniPoolForCausalLM(config).save_pretrained(half)
    in_int8 = []
    for trained in (vanilla, pool):
        in_int8.append(folder / trained.parent.name)
        in_8_bits(trained).save_pretrained(in_int8[-1])
    for made, source in ((half, pool), *zip(in_int8, (vanilla, pool), strict=True)):
        for file in source.glob("token*.json"):
            shutil.copyfile(file, made / file.name)
    return dict(zip(NAMES, (vanilla, pool, half, *in_int8), strict=True))


class Server:
    """A process that has loaded an export."""

    def __init__(self, export: Path):
        command = [sys.executable, "-m", "tests.benchmarks.serving", "--worker", str(export)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._read()

    def answer(self, batch: int) -> dict[str, float]:
        """Measure a batch."""
        stream: IO[str] = self._process.stdin  # type: ignore[assignment]
        stream.write(f"{batch}\n")
        stream.flush()
        return self._read()

    def _read(self) -> Any:
        stream: IO[str] = self._process.stdout  # type: ignore[assignment]
        return json.loads(stream.readline())

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)


def measure(servers: dict[str, Server], rounds: int) -> Iterator[list[dict[str, Any]]]:
    """After every round, yield the rows so far: one for each model and batch size."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in tqdm(range(rounds), desc="rounds"):
        for batch in BATCHES:
            for name, server in servers.items():
                found.setdefault((name, batch), []).append(server.answer(batch))
        yield [_row(found, name, batch, servers[name].facts) for name, batch in found]


def _row(
    found: dict[tuple[str, int], list[dict[str, float]]], name: str, batch: int, facts: dict[str, float]
) -> dict[str, Any]:
    samples = found[name, batch]
    speeds = [sample["tokens_per_second"] for sample in samples]
    vanilla = [sample["tokens_per_second"] for sample in found["vanilla", batch]]
    ratios = [speed / other for speed, other in zip(speeds, vanilla, strict=True)]
    return {
        "model": name,
        "batch": batch,
        "tokens_per_second": round(statistics.median(speeds), 1),
        "speed_over_vanilla": round(statistics.median(ratios), 3),
        "lowest_ratio": round(min(ratios), 3),
        "highest_ratio": round(max(ratios), 3),
        "experts_per_step": round(samples[0]["experts_per_step"], 1),
        "experts_per_layer": round(samples[0]["experts_per_layer"], 2),
        **facts,
    }


def page(rows: Sequence[dict[str, Any]], rounds: int) -> str:
    """Return the page of the results."""
    import torch
    import transformers

    first = {row["model"]: row for row in rows if row["batch"] == 1}
    lines = [
        "# Serving from one pool",
        "Written by `python -m tests.benchmarks.serving`: quickstart (8 layers, 64 experts in one pool), its "
        "vanilla counterpart (8 private experts in each layer: nearly as many parameters, as many of them active), "
        "both in fp32 and with attention and experts in torchao's int8, and the same with half the pool, which is not "
        f"trained. Commit {commit()}, {machine()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; {rounds} rounds in which "
        f"the models take turns. A request has {PROMPT} tokens and gets {NEW}. Speeds are medians; ratios are of the "
        "same round, median (lowest to highest).",
        "![Speed and experts touched by batch size](serving.svg)",
        "| model | parameters | weights | resident after loading | KV cache per token |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| {name} | {row['parameters'] / 1e6:.1f} M | {row['weight_bytes'] / 2**20:.0f} MB | "
            f"{row['resident_bytes'] / 2**20:.0f} MB | {row['kv_bytes_per_token'] / 1024:.0f} KB |"
            for name, row in first.items()
        ),
        "| model | batch | tokens/s | over vanilla | experts a layer | experts a step | of their weights |\n"
        "|---|---|---|---|---|---|---|\n"
        + "\n".join(
            f"| {row['model']} | {row['batch']} | {row['tokens_per_second']:,.0f} | {row['speed_over_vanilla']:.2f} "
            f"({row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f}) | {row['experts_per_layer']:.1f} | "
            f"{row['experts_per_step']:.1f} | {row['experts_per_step'] * row['expert_bytes'] / 2**20:.0f} MB |"
            for row in rows
        ),
        "`experts a layer`: different experts that the tokens of a decoding step take in a layer, on average. "
        "`experts a step`: in all layers together. `of their weights`: what these weigh, which a step must read at "
        "least once.",
    ]
    return "\n\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw speed and experts touched by batch size."""
    figure = new_figure(9, 3.6)
    figure_title(figure, "Serving from one pool, and from private experts")
    left, right = figure.subplots(1, 2)
    _panel(left, rows, "tokens_per_second", "Tokens/s, all requests of the batch")
    _panel(right, rows, "experts_per_step", "Different experts of a decoding step, all layers")
    write_png_and_svg(figure, path)


def _panel(axes: Axes, rows: Sequence[dict[str, Any]], key: str, title: str) -> None:
    ends = []
    for name in NAMES:
        model, _, quantised = name.partition(", ")
        colour = SERIES[NAMES.index(model)]
        heights = [row[key] for row in rows if row["model"] == name]
        axes.plot(range(len(BATCHES)), heights, ":" if quantised else "-", color=colour, marker="o", markersize=3)
        ends.append((len(BATCHES) - 1.0, heights[-1], name, colour))
    axes.set_xticks(range(len(BATCHES)), [str(batch) for batch in BATCHES])
    axes.set_xlabel("requests computed together", fontsize=9)
    axes.set_ylim(0)
    style_axes(axes)
    label_ends(axes, ends)
    panel_title(axes, title, 10)


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="The folder to write.")
@click.option("--runs", type=click.Path(file_okay=False, path_type=Path), help="The folder of the trained models.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--worker", "export", type=click.Path(path_type=Path), hidden=True)
def main(runs: Path | None, out: Path | None, rounds: int, export: Path | None) -> None:
    """Measure, and write a page, a table and a picture."""
    if export:
        return worker(export)
    if runs is None:
        raise click.UsageError("--runs is missing")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {name: stack.enter_context(Server(path)) for name, path in exports(runs, Path(folder)).items()}
        for done, rows in enumerate(measure(servers, rounds), start=1):
            text = page(rows, done)
            if out:
                write(out, text, rows)
    print(text)
    return None


def write(out: Path, text: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write the page, the table and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(text)
    with (out / "measurements.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, out / "serving.svg")


if __name__ == "__main__":
    main()
