"""What 8 and 4 bits a weight cost an export with shared and with private experts: loss, size and speed.

python -m tests.benchmarks.quantisation [--runs runs/exports] [--out docs/results/quantisation]

Both models are quickstarts with nearly as many parameters (tests/benchmarks/exported.py trains them if needed). The
loss is that on held-out text; differences are paired by window. Tokens are generated one sequence at a time, greedily.
Speeds are ratios to fp32, measured in turns. What was measured is kept, model by model, in the folder --out.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from tests.benchmarks.exported import exported, run_of
from tests.benchmarks.report import commit, machine
from trainer.common.atomic import atomic_write
from trainer.evaluate.loss import summed_loss
from trainer.export.loaded_model import prepare_libraries
from trainer.export.saved_run import data_of, find_run

ROWS = 32
"""Held-out windows."""

PROMPT, NEW_TOKENS, ROUNDS = 16, 24, 3
MATRICES = r"re:.*\.(experts\.(gate_up|down)_proj|self_attn\.\w_proj)"
GROUP = 32
"""Weights that share a scale in 4 bits."""


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


def in_8_bits(folder: Path) -> Any:
    """Quantise attention and the pool while loading: one scale for each row of a matrix."""
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = FqnToConfig({MATRICES: Int8WeightOnlyConfig()})
    return load(folder, quantization_config=TorchAoConfig(config))


def in_4_bits(folder: Path) -> Any:
    """Quantise attention and the pool to torchao's 4 bits for CPUs, which only linear layers can have."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = load(folder)
    model.model.experts.unstack()
    config = PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    return model


FORMATS: dict[str, Callable[[Path], Any]] = {
    "fp32": load,
    "bf16": lambda folder: load(folder, dtype=torch.bfloat16),
    "int8": in_8_bits,
    "int4": in_4_bits,
}


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return what a matrix would be after quantisation: int8 by rows, int4 by groups."""
    from torchao.quantization import PerGroup, PerRow
    from torchao.quantization.quantize_.workflows import Int8Tensor, IntxUnpackedToInt8Tensor

    if bits == 8:
        return Int8Tensor.from_hp(weight, PerRow()).dequantize()
    size = PerGroup(GROUP).group_size
    return IntxUnpackedToInt8Tensor.from_hp(weight, (1, size), torch.int4).dequantize()


def also(model: Any, part: str, bits: int) -> Any:
    """Return a copy whose routers, or embedding and output projection, are rounded too."""
    made = copy.deepcopy(model)
    for name, parameter in made.named_parameters():
        if part in name and parameter.ndim == 2:
            parameter.data = rounded(parameter.data, bits)
    return made


PARTS = {"routers": "router.weight", "embedding": "embed_tokens", "output projection": "lm_head"}


@torch.no_grad()
def losses(model: Any, rows: Tensor) -> Tensor:
    """Return the loss of each window, in nats per token."""
    with torch.autocast("cpu", enabled=False):
        sums = [summed_loss(model, row[None], None) for row in tqdm(rows, desc="loss", leave=False, disable=None)]
    return torch.tensor(sums, dtype=torch.float64) / (rows.shape[1] - 1)


def difference(found: Tensor, base: Tensor) -> str:
    """Return the mean difference and the half width of its 95 % interval over windows."""
    delta = found - base
    return f"{delta.mean():+.4f} ± {1.96 * delta.std() / math.sqrt(len(delta)):.4f}"


def bytes_in_memory(model: Any) -> int:
    """Return the bytes of all weights, scales included."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        parts = [*tensor.tensor_data_names, *tensor.optional_tensor_data_names] if _is_quantised(tensor) else []
        held = [getattr(tensor, part) for part in parts] or [tensor]
        total += sum(part.nbytes for part in held if part is not None)
    return total


def _is_quantised(tensor: Tensor) -> bool:
    return hasattr(tensor, "tensor_data_names")


def bytes_on_disk(model: Any, kind: str) -> int:
    """Return the size of the saved weights; torchao's 4-bit format has no other file than torch's own."""
    if kind == "int4":
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        return len(file.getvalue())
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


@torch.no_grad()
def seconds(model: Any, rows: Tensor) -> tuple[float, float]:
    """Return seconds to generate, and to read a batch of prompts as long as the window."""
    prompt = rows[:1, :PROMPT]
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    started = time.perf_counter()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    generated = time.perf_counter()
    model(rows[:4, :-1], use_cache=False, logits_to_keep=1)
    return generated - started, time.perf_counter() - generated


def measured(folder: Path, name: str) -> dict[str, Any]:
    """Return what was measured of a model, if it is kept in FOLDER/NAME/quantisation.json, or measure it."""
    file = folder / name / "quantisation.json"
    if not file.exists():
        result = measure(folder, name)
        atomic_write(file, lambda partial: partial.write_text(json.dumps(result)))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def measure(folder: Path, name: str) -> dict[str, Any]:
    """Measure all formats of one model."""
    export = exported(folder, name)
    stream = data_of(find_run(run_of(folder, "unipool"))).stream("validation", None)
    rows = torch.cat(list(stream.micro_batches(0, ROWS, 0, 1, 1)))
    models = {kind: make(export) for kind, make in FORMATS.items()}
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in models}
    for turn in tqdm(range(ROUNDS + 1), desc=f"{name}: speed", disable=None):
        for kind, model in models.items():
            measured = seconds(model, rows)
            if turn:  # the first one warms up
                times[kind].append(measured)
    found = {kind: losses(model, rows) for kind, model in models.items()}
    result: dict[str, Any] = {"loss": float(found["fp32"].mean()), "formats": {}, "also": {}}
    for kind, model in models.items():
        ratios = [
            statistics.median(base[i] / own[i] for base, own in zip(times["fp32"], times[kind], strict=True))
            for i in (0, 1)
        ]
        result["formats"][kind] = {
            "difference": difference(found[kind], found["fp32"]) if kind != "fp32" else "",
            "disk": bytes_on_disk(model, kind),
            "memory": bytes_in_memory(model),
            "tokens_per_second": NEW_TOKENS / statistics.median(own[0] for own in times[kind]),
            "generate": ratios[0],
            "read": ratios[1],
        }
    for part, key in PARTS.items():
        for bits in (8, 4):
            base = f"int{bits}"
            extra = losses(also(models["fp32"], key, bits), rows)
            result["also"][f"{part}, {base}"] = difference(extra, found["fp32"])
    return result


def page(results: dict[str, dict[str, Any]]) -> str:
    """Write the page of the documents."""
    lines = [
        "# Quantisation",
        "",
        f"`python -m tests.benchmarks.quantisation`, commit {commit()}, {machine()}, torch {torch.__version__}, "
        "one thread. Other work ran at a low share of the machine; speeds are medians of ratios measured in turns.",
        "",
        "| model | format | loss minus fp32 | MB on disk | MB in memory | generating, x fp32 | reading, x fp32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for kind, found in result["formats"].items():
            loss = found["difference"] or f"(loss {result['loss']:.4f})"
            sizes = f"{found['disk'] / 1e6:.1f} | {found['memory'] / 1e6:.1f}"
            lines.append(f"| {name} | {kind} | {loss} | {sizes} | {found['generate']:.2f} | {found['read']:.2f} |")
    lines += [
        "",
        "- **unipool** shares 64 experts among 8 layers; **vanilla** has 8 experts of its own in each layer. Both are "
        "quickstarts with nearly as many parameters, one seed each.",
        f"- The loss is the mean in nats over {ROWS} held-out windows; intervals (95 %) are over windows, paired.",
        f"- int8 has a scale for each row, int4 for each {GROUP} weights of a row. Attention and experts are "
        "quantised; routers, norms, embedding and output projection are not.",
        "- **Generating** is one sequence with a cache, one token at a time; **reading** is a batch of four windows. "
        "The size of int4 on disk is that of `torch.save`, because torchao has no safetensors for its 4 bits of CPUs.",
        "",
        "What rounding one more part alone adds to the loss of fp32:",
        "",
        "| part | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
    ]
    for part in next(iter(results.values()))["also"]:
        lines.append(f"| {part} | " + " | ".join(result["also"][part] for result in results.values()) + " |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--runs", "folder", type=click.Path(path_type=Path), default="runs/exports", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="docs/results/quantisation", show_default=True)
def main(folder: Path, out: Path) -> None:
    logging.disable(logging.WARNING)
    prepare_libraries()
    results = {name: measured(folder.resolve(), name) for name in ("unipool", "vanilla")}
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "README.md", lambda file: file.write_text(page(results)))
    atomic_write(out / "measurements.json", lambda file: file.write_text(json.dumps(results, indent=1) + "\n"))


if __name__ == "__main__":
    main()
