"""Recipes: what a run is, checked once at the door.

A recipe is a YAML file with the sections below. `load_recipe` reads it, applies `--set` overrides, checks every key
and every relation between keys, and returns a frozen `Recipe`. Anything wrong is a `UserError` of one line that names
the key, its value and what is allowed. Nothing here imports torch.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pool.topology import Topology
from trainer.common.credentials import redacted
from trainer.common.errors import UserError, breaks_lines
from trainer.common.safe_read import NotYaml, Unreadable, parse_yaml, read_text, texts_of
from trainer.config.constraints import check_relations, sources_or_list
from trainer.config.key_errors import first_line

LARGEST = 2**62
"""Of a whole number: beyond it, numbers that are made from several keys leave what floats and tensors can hold."""

Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)


class Run(Section):
    dir: str = Field(
        min_length=1,
        description="folder of the run: recipe.yaml, plan.json, tokenizer.json, metrics.jsonl, checkpoints/, "
        "tensorboard/, load.png",
    )
    seed: NonNegative = 0


class Model(Section):
    layers: Positive
    hidden: Positive
    heads: Positive
    kv_heads: Positive = 4
    ffn_hidden: Positive = Field(description="width F of one expert, or of the dense FFN")
    vocab: Positive = Field(description="rows of the embedding: the tokenizer's vocabulary must fit in")
    seq_len: Positive = 1024
    ffn: Literal["pool", "dense"] = "pool"
    groups: Positive = Field(1, description="sub-pools across depth: 1 is UniPool, `layers` is a vanilla MoE")
    init_std: PositiveFloat = 0.01
    rope_base: PositiveFloat = 1e6
    norm_eps: PositiveFloat = 1e-5


class Router(Section):
    kind: Literal["norm", "softmax", "sigmoid_bias"] = "norm"
    top_k: Positive = 1
    z_loss: NonNegativeFloat = 0.0
    bias_rate: NonNegativeFloat = Field(1e-3, description="step of the expert bias (sigmoid_bias only)")
    constant_factor: PositiveFloat = Field(
        1.0, description="what c is multiplied by (norm only): a token's gate values begin with this 2-norm, about"
    )


class Pool(Section):
    experts: NonNegative = Field(0, description="experts of the whole pool, over all groups")
    recompute: bool = Field(False, description="recompute the experts' hidden activations in backward")
    stash_bytes: Positive = Field(2**30, description="weight-gradient work kept before it is flushed, bytes a rank")
    placement: Literal["contiguous", "auto"] = Field(
        "contiguous", description="auto: at a resume, spread each layer's recorded load evenly over the shards"
    )


class Balance(Section):
    layer: NonNegativeFloat = 0.0
    pool: NonNegativeFloat = 0.0
    scope: Literal["micro_batch", "global_batch"] = "global_batch"
    delay: NonNegative = 1
    scores: Literal["raw", "normalized"] = "raw"


class Train(Section):
    steps: Positive
    global_batch: Positive = Field(description="sequences an optimizer step")
    micro_batch: Positive = Field(description="sequences a micro-batch of one trunk rank")
    lr: PositiveFloat
    min_lr: NonNegativeFloat
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    weight_decay: NonNegativeFloat = 0.1
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)
    eps: PositiveFloat = Field(1e-8, description="AdamW's term against division by zero")
    clip: NonNegativeFloat = Field(1.0, description="largest global gradient norm; 0 does not clip")
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: bool = Field(False, description="recompute the trunk's segments in backward")
    init_from: str | None = Field(None, description="an export to begin with, instead of random weights")
    freeze: Literal["none", "pool", "trunk"] = Field("none", description="the role whose weights stay as they are")
    max_skipped_steps: Positive = Field(
        20, description="steps in a row that may be skipped for gradients that are not finite; then the job stops"
    )


class Source(Section):
    """One of several sources of text; what it leaves out is as the section `data` has it."""

    source: str = Field(description="python-stdlib, a file, folder or glob, or hub:NAME")
    weight: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        1.0, description="share of the sequences, relative to the other sources' weights"
    )
    text_field: str | None = None
    max_documents: Positive | None = None
    max_tokens: Positive | None = None


_ONE, _SEVERAL = "<one>", "<several>"  # tags of a union, which pydantic puts into the locations of errors
Sources = Annotated[
    Annotated[str, Tag(_ONE)] | Annotated[tuple[Source, ...], Field(strict=False), Tag(_SEVERAL)],
    Discriminator(lambda value: _SEVERAL if isinstance(value, list | tuple) else _ONE),
]


def source_names(sources: Sources) -> str:
    """Sources in short, for people: "a", or "2 x a, 1 x b"."""
    if isinstance(sources, str):
        return sources
    return ", ".join(f"{source.weight:g} x {source.source}" for source in sources)


class Data(Section):
    source: Sources = Field(
        description="python-stdlib, a file, folder or glob, or hub:NAME; or a list of them, "
        "[{source: a, weight: 2}, {source: b}], mixed by weight"
    )
    tokenizer: str = Field(description="train, a tokenizer.json, or a name on the hub")
    split: tuple[NonNegative, NonNegative, NonNegative] = Field((969, 30, 1), strict=False)
    validation: Sources | None = Field(
        None, description="held-out text of its own, as `source`; then the validation part of `split` is trained on"
    )
    text_field: str = Field("text", description="where a record has its text; `meta.text` is a field within a field")
    max_documents: Positive | None = Field(None, description="read no more documents of a source than these")
    max_tokens: Positive | None = Field(None, description="most tokens of a source, without those held out of it")
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="records without readable text are skipped; more than this share of them is an error"
    )
    end_of_document: str | None = Field(
        None, description="token that ends a document, as <|endoftext|>; default: the tokenizer's own"
    )
    dir: str = Field("data", description="folder in which prepared data is kept")
    document_mask: bool = Field(False, description="a token attends to its own document only, not to all of its row")

    @field_validator("source", "validation", mode="before")
    @classmethod
    def _sources(cls, value: Any, info: ValidationInfo) -> Any:
        return sources_or_list(f"data.{info.field_name}", value)


class Parallel(Section):
    trunk_ranks: Positive = 1
    pool_ranks: NonNegative = Field(0, description="0: colocated, the pool lives in the trunk's processes")
    expert_parallel: Positive | None = Field(None, description="shards of the pool; default: one a pool rank")
    lanes: Positive | None = Field(
        None, description="micro-batches in flight a trunk rank; default: the fewest that the simulator finds fast"
    )
    stagger: bool = Field(True, description="trunk rank t of T starts t/T of a micro-batch later")
    trunk_zero: Literal[0, 1, 2, 3] = 1
    pool_zero: Literal[0, 1, 2] = 1
    hardware: str | None = Field(
        None, description="h100, h200, a100 or a profile that `bench` saved: costs for the service plan; default: FLOPs"
    )
    wire: Literal["auto", "gloo"] = Field(
        "auto",
        description="auto: NCCL if every rank has a GPU, else gloo and copies through the host; gloo: always that",
    )
    timeout_seconds: PositiveFloat = Field(60.0, description="longest wait for another rank inside a step")
    start_timeout_seconds: PositiveFloat = Field(
        1800.0, description="longest wait for another rank at the start, at a checkpoint and at the end"
    )
    check: bool = Field(
        False,
        description="debugging: of every request check headers, finite payloads, checksums, sent = served = returned",
    )


class Roles(Section):
    order: Literal["pool_last", "interleaved"] = Field(
        "pool_last", description="whether pool ranks are the launcher's last ranks, or spread over its nodes"
    )


class Eval(Section):
    every: NonNegative = Field(0, description="steps between validations; 0: only at the end")
    batches: Positive = Field(8, description="global batches of held-out text")


class Probe(Section):
    every: NonNegative = Field(
        0, description="steps between probes of the routing: held-out loss with random experts in one layer; 0: none"
    )
    layers: Annotated[tuple[NonNegative, ...], Field(min_length=1)] | None = Field(
        None, strict=False, description="layers that get random experts, one at a time; default: the deep half"
    )
    batches: Positive = Field(1, description="global batches of held-out text")


class Checkpoint(Section):
    every: NonNegative = Field(0, description="steps between checkpoints; 0: only at the end")
    keep: Positive = Field(
        2, description="newest checkpoints that are kept; those between which nothing was learned are one"
    )
    keep_every: NonNegative = Field(0, description="also keep checkpoints of every so many steps; 0: none")


class Metrics(Section):
    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="rank r serves port + r; 0 picks free ports")
    port_by: Literal["rank", "local_rank"] = Field(
        "rank", description="local_rank: port + the rank's number on its machine, the same ports on every machine"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0: everybody who reaches the machine")
    targets_dir: str | None = Field(
        None, description="folder that Prometheus watches: a run's targets.json is there too, as NAME.json"
    )
    tensorboard: bool = True
    csv: bool = Field(False, description="a file for every scalar, in csv/ of run.dir")
    wandb: str | None = Field(None, description="project of Weights & Biases, whose own variables have the rest")
    per_layer_experts: bool = Field(False, description="also a series for every expert of every layer: may be 20,000")


class Recipe(Section):
    run: Run
    model: Model
    router: Router = Router()
    pool: Pool = Pool()
    balance: Balance = Balance()
    train: Train
    data: Data
    parallel: Parallel = Parallel()
    topology: Roles = Roles()
    eval: Eval = Eval()
    probe: Probe = Probe()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()

    @property
    def experts_per_layer(self) -> int:
        """Experts a layer's router chooses from: M / G."""
        return self.pool.experts // self.model.groups

    @property
    def grid(self) -> Topology:
        """The grid of the job's ranks."""
        p = self.parallel
        return Topology(p.trunk_ranks, p.pool_ranks, p.expert_parallel or max(1, p.pool_ranks))

    @property
    def probed_layers(self) -> tuple[int, ...]:
        """Layers that a probe of the routing looks at: the recipe's, or the deep half."""
        layers = self.model.layers
        return self.probe.layers or tuple(range((layers + 1) // 2, layers))

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one trunk rank in an optimizer step."""
        return self.train.global_batch // (self.train.micro_batch * self.parallel.trunk_ranks)

    @model_validator(mode="after")
    def _relations(self) -> Self:
        check_relations(self)
        return self


def recipe_names() -> list[str]:
    """Names of the recipes that come with the trainer."""
    folder = resources.files("trainer.config") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or from a file, apply `key.path=value` overrides, and check it.

    Raises:
        UserError: the recipe is not there, is not YAML, holds a credential, or a key or a relation between keys is
            wrong.
    """
    tree = read_tree(name_or_path)
    return check_recipe(tree, [parse_override(text) for text in overrides], f"recipe {name_or_path}")


def check_recipe(tree: dict[str, Any], settings: Sequence[tuple[str, Any]], what: str) -> Recipe:
    """Set keys (key.path, value) in a recipe's sections, which are left as they are, and check it.

    Args:
        what: begins the messages.
    Raises:
        UserError: as `load_recipe`.
    """
    tree = copy.deepcopy(tree)
    for key, value in settings:
        _put(tree, key, value, what)
    for key, text in texts_of(tree):
        if any(map(breaks_lines, text)):
            raise UserError(f"{what}: {key}: contains a control character, or half of a surrogate pair; remove it")
        if redacted(text) != text:  # before any line shows a value
            raise UserError(
                f"{what}: {key}: contains a credential, which recipe.yaml, checkpoints and logs would repeat; remove "
                "it: HF_TOKEN in the environment, or a login on the machine, gives access to what is private on the hub"
            )
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{what}: {first_line(error, Recipe)}") from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe; `load_recipe` of the file gives an equal one."""
    path.write_text(recipe_text(recipe))


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def read_tree(name_or_path: str) -> dict[str, Any]:
    """A recipe's sections as its file has them, unchecked.

    Raises:
        UserError: the recipe is not there or is not YAML.
    """
    if name_or_path in recipe_names():
        text = (resources.files("trainer.config") / "recipes" / f"{name_or_path}.yaml").read_text()
    else:
        try:
            text = read_text(Path(name_or_path))
        except Unreadable as error:
            known = recipe_names()
            close = difflib.get_close_matches(name_or_path, known, n=3) or known
            raise UserError(
                f"recipe {name_or_path}: neither a readable file ({error}) nor a known name; "
                f"did you mean: {', '.join(close)}"
            ) from None
    return parse_mapping(text, f"recipe {name_or_path}", f"sections ({', '.join(Recipe.model_fields)})")


def parse_mapping(text: str, what: str, parts: str) -> dict[str, Any]:
    """YAML that must be a mapping of `parts`; `what` begins the messages.

    Raises:
        UserError: it is not.
    """
    try:
        tree = parse_yaml(text)
    except NotYaml as error:
        raise UserError(f"{what}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what}: must be a mapping of {parts}")
    return tree


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of `--set key.path=value`.

    Raises:
        UserError: it is not of this form.
    """
    key, separator, value = text.partition("=")
    if not separator or not all(part.strip() for part in key.split(".")):
        raise UserError(f"--set {text}: must be key=value, as in --set train.steps=100")
    try:
        return key, parse_yaml(value)
    except NotYaml as error:
        raise UserError(f"--set {text}: the value is not YAML: {error}") from None


def _put(tree: dict[str, Any], key: str, value: Any, what: str) -> None:
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"{what}: {key} cannot be set: {section} is a value, not a section")
    node[leaf] = value
