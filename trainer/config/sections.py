"""The sections of a recipe that say what is trained on what: every key with its type, default, limits and meaning.

`trainer.config.job_sections` has those that say how and where. `docs/reference/recipe.md` is generated from the
descriptions in both. Nothing in these modules imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator

from trainer.config.constraints import sources_or_list

LARGEST = 2**62
"""Largest integer in a recipe; products of larger ones could overflow floats and tensors."""

LARGEST_NUMBER = 1e38
"""Largest other number in a recipe, as tensors in fp32 can hold it."""

LOSS_CHUNK = 4096
"""Tokens whose logits exist at once, unless a recipe says otherwise."""

Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=LARGEST_NUMBER)]
PositiveFloat = Annotated[float, Field(gt=0, le=LARGEST_NUMBER)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A mapping of known keys: no others, no conversion of types, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)


class Run(Section):
    """Where a run is kept and what makes it repeatable."""

    dir: str = Field(
        min_length=1,
        description="Folder of the run: recipe.yaml, plan.json, tokenizer.json, metrics.jsonl, checkpoints/, "
        "tensorboard/, load.png.",
    )
    seed: NonNegative = Field(0, description="Seed of the initial weights and of the order of the data.")


class Model(Section):
    """Shape of the transformer."""

    layers: Positive = Field(description="Number of layers L.")
    hidden: Positive = Field(description="Hidden size D.")
    heads: Positive = Field(description="Attention heads.")
    kv_heads: Positive = Field(4, description="Key and value heads of grouped-query attention.")
    head_dim: Positive | None = Field(
        None, description="Width of an attention head; default, and kept as such: `hidden` / `heads`."
    )
    qk_norm: Literal["none", "head", "all"] = Field(
        "none",
        description="RMSNorm of queries and keys before their rotation. `head`: of each head, as in Qwen3; `all`: of "
        "all heads as one vector, as in OLMoE.",
    )
    qkv_bias: bool = Field(False, description="Biases of the query, key and value projections, as in Qwen2.")
    ffn_hidden: Positive = Field(description="Width F of one expert, or of the dense FFN.")
    vocab: Positive = Field(description="Rows of the embedding; at least the tokenizer's vocabulary.")
    seq_len: Positive = Field(1024, description="Tokens per sequence.")
    ffn: Literal["pool", "dense"] = Field("pool", description="`pool`: experts; `dense`: one FFN per layer.")
    groups: Positive = Field(1, description="Sub-pools across depth: 1 is UniPool, `model.layers` is a vanilla MoE.")
    private_ffn: NonNegative = Field(
        0, description="Width of a private expert in each layer, which computes every token beside the pool; 0: none."
    )
    private_gate: bool = Field(
        False, description="Multiply the private expert's output by a sigmoid gate of the token, as in Qwen2-MoE."
    )
    init_std: PositiveFloat = Field(0.01, description="Standard deviation of the initial weights.")
    rope_base: PositiveFloat = Field(1e6, description="Base of the rotary position embeddings.")
    norm_eps: PositiveFloat = Field(1e-5, description="Term of RMSNorm that prevents division by zero.")

    @field_validator("head_dim")
    @classmethod
    def _as_by_default(cls, value: int | None, info: ValidationInfo) -> int | None:
        """The default written out is the default: recipes of one model are equal."""
        heads = info.data.get("heads")
        return None if value and heads and value * heads == info.data.get("hidden") else value

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden // self.heads


class Router(Section):
    """How each layer chooses experts."""

    kind: Literal["norm", "norm_bias", "softmax", "sigmoid_bias"] = Field(
        "norm",
        description="`norm`: NormRouter; `norm_bias`: NormRouter, balanced by a bias of the selection that the layers "
        "of a group share; `softmax`: vanilla's router; `sigmoid_bias`: sigmoid scores, balanced by a bias of the "
        "selection in each layer.",
    )
    top_k: Positive = Field(1, description="Experts per token and layer.")
    z_loss: NonNegativeFloat = Field(0.0, description="Coefficient of the router z-loss.")
    bias_rate: NonNegativeFloat = Field(
        1e-3, description="Step size of the expert bias (`norm_bias` and `sigmoid_bias` only)."
    )
    constant_factor: PositiveFloat = Field(
        1.0,
        description="Factor of NormRouter's constant c (`norm` and `norm_bias` only): about the 2-norm with which a "
        "token's gate values begin.",
    )
    renormalize: bool = Field(
        False, description="Divide a token's gate values by their sum, as in Mixtral (`softmax` only)."
    )
    logit_bias: bool = Field(False, description="Learned biases of the router's logits (`softmax` only).")
    force: Literal["balanced"] | None = Field(
        None,
        description="For measuring throughput: `balanced` sends tokens to the experts in turn, whatever the router "
        "prefers, so that all get equally many; the model does not learn to route.",
    )

    @property
    def has_norm(self) -> bool:
        """Whether the scores are NormRouter's."""
        return self.kind in ("norm", "norm_bias")


class Pool(Section):
    """The pool of experts."""

    experts: NonNegative = Field(0, description="Experts M of the whole pool, over all groups.")
    recompute: bool = Field(False, description="Recompute the experts' hidden activations in the backward pass.")
    stash_bytes: Positive | None = Field(
        None,
        description="Most bytes per rank of deferred weight-gradient work; beyond that, some of it is done. `null`: "
        "1 GiB, and with `precision: bf16` at least room for 2048 rows of every expert.",
    )
    placement: Literal["contiguous", "auto"] = Field(
        "contiguous",
        description="`auto`: at a checkpoint and at a resume the experts move, if that spreads the recorded load more "
        "evenly over the shards; `contiguous`: they stay in the order of their numbers, but in a run with a lock they "
        "move too, from when layers are locked.",
    )


class Balance(Section):
    """Balance losses of the routers."""

    layer: NonNegativeFloat = Field(0.0, description="Coefficient of the balance loss of each layer.")
    pool: NonNegativeFloat = Field(0.0, description="Coefficient of the balance loss of the whole pool.")
    scope: Literal["micro_batch", "global_batch"] = Field(
        "global_batch", description="Tokens over which the load is counted: a rank's micro-batch or the global batch."
    )
    delay: NonNegative = Field(
        1, description="Age of the load that the loss uses, in micro-batches or optimizer steps (as `balance.scope`)."
    )
    scores: Literal["raw", "normalized"] = Field(
        "raw", description="Scores in the loss; `normalized` divides them by the token's sum of scores."
    )


class Lock(Section):
    """UniPool-lock: early in training every expert is assigned to one layer, which from then on uses only its own."""

    allocation: Literal["learned", "random"] = Field(
        "learned",
        description="`learned`: by the routing of held-out text at the end of the full stage; `random`: at random by "
        "`run.seed`, and locked from the first step.",
    )
    full_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        1 / 60,
        description="Share of the steps in which all layers use the whole pool, at the start; at least one step. "
        "With 1 no experts are assigned.",
    )
    anneal_fraction: Share = Field(
        1 / 60, description="Share of the steps in which the scores of a layer's foreign experts then fall to 0."
    )
    entropy: NonNegativeFloat = Field(
        5e-3,
        description="Coefficient of the entropy loss, which concentrates each layer on as many experts as it will own; "
        "it rises linearly during the full stage.",
    )
    coverage: Share = Field(
        0.95, description="Share of each layer's routed tokens that its own experts should have at the assignment."
    )
    evaluations: Positive = Field(
        5, description="Most evaluations whose load decides the assignment; each weighs half as much as the next one."
    )
    stop_above: NonNegativeFloat = Field(
        0.05,
        description="Nats by which the validation loss may exceed that at the assignment; two evaluations in a row "
        "above that end the run.",
    )


class Train(Section):
    """Steps, optimizer and precision."""

    steps: Positive = Field(description="Optimizer steps of the whole run.")
    global_batch: Positive = Field(description="Sequences per optimizer step.")
    micro_batch: Positive = Field(description="Sequences per micro-batch of one trunk rank.")
    lr: PositiveFloat = Field(description="Peak learning rate.")
    min_lr: NonNegativeFloat = Field(description="Learning rate at the end of the schedule.")
    schedule: Literal["cosine", "linear", "wsd"] = Field(
        "cosine",
        description="How the learning rate falls after the warm-up: as a cosine, linearly, or (`wsd`: warm-up, stable, "
        "decay) not at all until the last `train.decay_fraction` of the steps, and then as 1 - sqrt.",
    )
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="Share of the steps in which the learning rate falls (`train.schedule: wsd` only)."
    )
    warmup_fraction: Share = Field(0.01, description="Share of the steps in which the learning rate rises.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="`muon`: Muon for the matrices of attention and of experts or FFNs, AdamW for the rest."
    )
    weight_decay: NonNegativeFloat = Field(0.1, description="Weight decay of matrices, as in AdamW.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False, description="AdamW's decay rates of its moments.")
    eps: PositiveFloat = Field(1e-8, description="AdamW's term that prevents division by zero.")
    clip: NonNegativeFloat = Field(1.0, description="Largest global gradient norm; 0 disables clipping.")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="Precision of computation and of the wire; master weights and routers are always fp32."
    )
    recompute: bool = Field(False, description="Recompute the trunk's segments in the backward pass.")
    loss_chunk: Positive = Field(
        LOSS_CHUNK, description="Largest number of tokens whose logits exist at once; bounds the memory of the loss."
    )
    compile: bool | None = Field(
        None,
        description="Compile the trunk's segments and the experts' elementwise operations (torch.compile); default: on "
        "GPUs only, and not with `parallel.trunk_zero` 3.",
    )
    init_from: str | None = Field(None, description="An export whose weights replace the random initial ones.")
    freeze: Literal["none", "pool", "trunk"] = Field("none", description="The role whose weights are not trained.")
    skip_spikes: PositiveFloat | None = Field(
        None,
        description="Skip a step whose gradient norm is by more than this many standard deviations above the median of "
        "up to 100 steps before it, of which there must be 20, such as 6; default: none.",
    )
    max_skipped_steps: Positive = Field(
        20, description="Consecutive steps that may be skipped for non-finite gradients before the job stops."
    )


class Source(Section):
    """One of several sources of text; a key that is left out has the value it has in the section `data`."""

    source: str = Field(description="`python-stdlib`, a file, folder or glob, or `hub:NAME`.")
    weight: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        1.0, description="Share of the sequences, relative to the weights of the other sources."
    )
    text_field: str | None = Field(None, description="Field of a record that holds the text.")
    max_documents: Positive | None = Field(None, description="Most documents to read.")
    max_tokens: Positive | None = Field(None, description="Most training tokens to take.")


_ONE, _SEVERAL = "<one>", "<several>"  # tags of a union, which pydantic puts into the locations of errors
Sources = Annotated[
    Annotated[str, Tag(_ONE)] | Annotated[tuple[Source, ...], Field(strict=False), Tag(_SEVERAL)],
    Discriminator(lambda value: _SEVERAL if isinstance(value, list | tuple) else _ONE),
]


def source_list(sources: Sources) -> tuple[Source, ...]:
    """Return the sources, also if it is a single one."""
    return (Source(source=sources),) if isinstance(sources, str) else sources


def source_names(sources: Sources) -> str:
    """A short text for people: "a", or "2 x a, 1 x b"."""
    if isinstance(sources, str):
        return sources
    return ", ".join(f"{source.weight:g} x {source.source}" for source in sources)


class Data(Section):
    """Text to train on, and how it becomes sequences."""

    source: Sources = Field(
        description="`python-stdlib`, a file, folder or glob, or `hub:NAME`; or a list of sources that are mixed by "
        "weight, as in `[{source: a, weight: 2}, {source: b}]`."
    )
    tokenizer: str = Field(
        description="`train`, a tokenizer.json, a folder that contains one, or a name on the Hugging Face hub."
    )
    split: tuple[NonNegative, NonNegative, NonNegative] = Field(
        (969, 30, 1), strict=False, description="Proportion of training, validation and test documents."
    )
    validation: Sources | None = Field(
        None,
        description="Separate held-out text, in the form of `data.source`; the validation part of `data.split` is then "
        "used for training.",
    )
    text_field: str = Field("text", description="Field of a record that holds the text; `meta.text` is a nested one.")
    max_documents: Positive | None = Field(None, description="Most documents to read from a source.")
    max_tokens: Positive | None = Field(None, description="Most training tokens to take from a source.")
    max_bad_share: Share = Field(
        0.05, description="Largest share of records without readable text. They are skipped; more are an error."
    )
    end_of_document: str | None = Field(
        None, description="Token that ends a document, such as `<|endoftext|>`; default: the tokenizer's own."
    )
    dir: str = Field("data", description="Folder in which prepared data is kept.")
    stream_window: Positive | None = Field(
        None,
        description="Read, tokenise and pack the training text while the run trains, in parts of this many sequences, "
        "each shuffled on its own; default: all of it is prepared first.",
    )
    document_mask: bool = Field(
        False, description="Let a token attend to its own document only, not to its whole sequence."
    )

    @field_validator("source", "validation", mode="before")
    @classmethod
    def _sources(cls, value: Any, info: ValidationInfo) -> Any:
        return sources_or_list(f"data.{info.field_name}", value)
