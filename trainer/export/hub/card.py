"""The model card of an export: README.md with the run's facts, and curves.png beside it.

Nothing in it depends on the time, the machine or a folder's place: exports of one checkpoint have equal cards.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from trainer.checkpoint.format import read_info
from trainer.common.errors import UserError
from trainer.common.format import count, loss, perplexity, plural, plus_minus
from trainer.common.safe_read import read_bytes
from trainer.common.strict_json import loads
from trainer.common.versions import software
from trainer.config.recipe import Recipe
from trainer.config.sections import source_list
from trainer.data.reading.sources import HUB_PREFIX
from trainer.export.hub.curves import Curve, read_curves, write_picture
from trainer.planning.model_costs import count_parameters
from trainer.telemetry.console import describe

if TYPE_CHECKING:
    from trainer.export.saved_run import SavedRun

CARD_FILE, PICTURE_FILE = "README.md", "curves.png"

_BODY = """
# {{ name }}

A language model: {{ about }}.
{%- if pooled %} In a [UniPool](https://arxiv.org/abs/2605.06665) model, layers share a pool of experts.
{%- endif %}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
{%- if code %}
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
{%- else %}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
{%- endif %}
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```
{% if code %}
`trust_remote_code=True` runs the Python files of this folder. Read them first, unless you made the folder yourself.
{% endif %}
## Model

| | |
|---|---|
{%- for name, value in model %}
| {{ name }} | {{ value }} |
{%- endfor %}

## Training

| | |
|---|---|
{%- for name, value in training %}
| {{ name }} | {{ value }} |
{%- endfor %}
{% if picture %}
![Loss by step{% if pooled %}, and how evenly the experts are used{% endif %}]({{ picture }})
{% endif %}
{%- if scores %}
## Evaluation

| task | metric | score |
|---|---|---|
{%- for task, metric, score in scores %}
| {{ task }} | {{ metric }} | {{ score }} |
{%- endfor %}

By lm-evaluation-harness {{ harness }}.
{% endif %}
## Limits

- It was trained to continue text, and does so with the errors and biases of the training text. Nothing was done here to
  make it follow instructions or be safe.
- It was trained on sequences of {{ window }} tokens; how it does on longer ones is not known.
- {% if scores %}The losses and scores on this page are all that was measured.
{%- else %}The losses on this page are all that was measured; it was not evaluated on tasks.{% endif %}
- No licence is stated. Who publishes the model adds `license:` to the metadata at the top of this file, after a look at
  the licence of the training text.

"""

Rows = list[tuple[str, str]]


def write_card(run: SavedRun, folder: Path, dtype: str, code: bool) -> None:
    """Write the card of a checkpoint's export into `folder`, and the picture if the run has records.

    Args:
        dtype: The type of the exported weights.
        code: Whether the export needs the Python files beside it.

    Raises:
        UserError: The run's eval.json is not a record of `eval`.
    """
    recipe = run.recipe
    curves = read_curves(run.home, read_info(run.folder).steps)
    pooled = recipe.model.ffn == "pool"
    picture = write_picture(curves, folder / PICTURE_FILE, pooled)
    scores, harness = _evaluated(run)
    kind = "dense" if not pooled else "unipool" if recipe.model.groups < recipe.model.layers else "mixture-of-experts"
    name = Path(recipe.run.dir).name
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["unipool", "mixture-of-experts"] if kind == "unipool" else [kind],
        datasets=_hub_data_sets(recipe) or None,
        model_name=name,
        eval_results=_results(scores, curves["val_loss"]) or None,
    )
    card = ModelCard.from_template(
        data,
        template_str=f"---\n{{{{ card_data }}}}\n---\n{_BODY}",
        name=_text(name),
        about=describe(recipe).removeprefix(f"{recipe.run.dir}: ").partition(";")[0],
        pooled=kind == "unipool",
        code=code,
        model=_model(recipe, dtype),
        training=_training(run, curves["val_loss"]),
        picture=PICTURE_FILE if picture else None,
        scores=[(_text(task), _text(metric), plus_minus(value, error)) for task, metric, value, error in scores],
        harness=_text(harness),
        window=f"{recipe.model.seq_len:,}",
    )
    card.save(folder / CARD_FILE)


def _model(recipe: Recipe, dtype: str) -> Rows:
    m, p = recipe.model, count_parameters(recipe)
    rows = [("parameters", f"{count(p.total)}, of which a token uses {count(p.active)}")]
    if m.ffn == "pool":
        shared = f"{plural(m.groups, 'pool')} for {m.layers} layers" if m.groups < m.layers else "each layer its own"
        rows.append(("experts", f"{recipe.pool.experts} of width {m.ffn_hidden:,}: {shared}"))
        rows.append(("router", f"{recipe.router.kind}, top-{recipe.router.top_k}"))
    else:
        rows.append(("feed-forward width", f"{m.ffn_hidden:,}"))
    return [
        *rows,
        ("layers, hidden width", f"{m.layers}, {m.hidden:,}"),
        ("heads, key-value heads", f"{m.heads}, {m.kv_heads}"),
        ("vocabulary, context", f"{m.vocab:,}, {m.seq_len:,} tokens"),
        ("weights", dtype + (", routers float32" if m.ffn == "pool" and dtype != "float32" else "")),
    ]


def _training(run: SavedRun, val_loss: Curve) -> Rows:
    recipe, info = run.recipe, read_info(run.folder)
    t = recipe.train
    tokens = info.steps * t.global_batch * recipe.model.seq_len
    rows = [
        *([("started from", _public_name(t.init_from))] if t.init_from else []),
        ("data", _data(recipe)),
        ("tokens", f"{count(tokens)} in {info.steps:,} of {t.steps:,} steps of {t.global_batch:,} sequences"),
    ]
    if val_loss.last:
        step, nats = val_loss.last
        at = "" if step == info.steps else f", at step {step:,}"
        rows.append(("validation loss", f"{loss(nats)} nats per token, perplexity {perplexity(nats)}{at}"))
    rows += [
        ("learning rate", f"{t.lr:g} to {t.min_lr:g}"),
        ("precision", t.precision),
        ("layout", describe(recipe).split("; ")[-2]),
        ("seed", str(recipe.run.seed)),
    ]
    if by := _trained_by(run.home):
        rows.append(("trained by", by))
    return [*rows, ("exported by", _versions(software()))]


def _data(recipe: Recipe) -> str:
    """The sources, each with its weight if there are several."""
    listed = source_list(recipe.data.source)
    weights = [f"{source.weight:g} x " if len(listed) > 1 else "" for source in listed]
    return ", ".join(weight + _public_name(source.source) for weight, source in zip(weights, listed, strict=True))


def _public_name(path: str) -> str:
    """A name on the hub as it is, and of a path only the last part: the others are nobody's business."""
    return _text(path.removeprefix(HUB_PREFIX) if path.startswith(HUB_PREFIX) else Path(path).name)


def _hub_data_sets(recipe: Recipe) -> list[str]:
    names = [source.source for source in source_list(recipe.data.source)]
    return [name.removeprefix(HUB_PREFIX).partition(":")[0] for name in names if name.startswith(HUB_PREFIX)]


def _trained_by(home: Path) -> str | None:
    try:
        return _text(_versions(loads(read_bytes(home / "plan.json"))["software"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # of an earlier version
        return None


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _evaluated(run: SavedRun) -> tuple[list[tuple[str, str, Any, Any]], str]:
    """What `eval` found: task, metric, value and standard error of each score, and the harness's version."""
    path = run.home / "eval.json"
    try:
        record = loads(read_bytes(path)).get(run.folder.name, {}).get("tasks") if path.exists() else None
        if record is None:
            return [], ""
        scores = [
            (str(task["task"]), str(metric), score["value"], score["stderr"])
            for task in record["tasks"]
            for metric, score in task["metrics"].items()
        ]
        if not all(isinstance(value, float | int | None) for _, _, *values in scores for value in values):
            raise ValueError
        return [score for score in scores if score[2] is not None], str(record["harness"])
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        raise UserError(f"{path}: is not a record of `eval`; move it away, and evaluate again if you like") from None


def _results(scores: list[tuple[str, str, Any, Any]], val_loss: Curve) -> list[EvalResult]:
    """The scores and the validation loss as metadata."""
    kind = "text-generation"
    found = [EvalResult(kind, task, task, metric, value) for task, metric, value, _ in scores]
    if val_loss.last:
        nats = val_loss.last[1]
        found.append(EvalResult(kind, "held-out", "held-out text", "loss", nats, metric_name="nats per token"))
    return found


def _text(name: str) -> str:
    """A name as it may stand in a cell of a table."""
    return "".join(f"\\{c}" if c in "\\|*_`<[" else c for c in " ".join(name.split()))
