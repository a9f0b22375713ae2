"""The sections of a recipe that say how and where it runs, and what is watched and kept; see `sections`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.sections import NonNegative, Positive, PositiveFloat, Seconds, Section


class Parallel(Section):
    """The layout of the job, and what its ranks wait for."""

    layout: Literal["dedicated", "colocated", "every_rank"] | None = Field(
        None,
        description="`dedicated`: ranks of their own hold the experts (`parallel.pool_ranks`); `colocated`: every "
        "trunk rank holds the whole pool; `every_rank`: every trunk rank also holds a shard of the pool and serves it "
        "to the others; default: dedicated with `parallel.pool_ranks` above 0, otherwise colocated.",
    )
    trunk_ranks: Positive = Field(1, description="Data-parallel ranks with attention and routers.")
    pool_ranks: NonNegative = Field(0, description="Ranks that hold only experts; 0 in the layouts without such ranks.")
    expert_parallel: Positive | None = Field(
        None, description="Shards of the pool; default: one per rank that serves experts."
    )
    lanes: Positive | None = Field(
        None, description="Micro-batches in flight per trunk rank; default: the fewest that the simulator finds fast."
    )
    stagger: bool = Field(
        True,
        description="Start trunk rank t of T later, by t/T of a micro-batch; no effect with `parallel.layout: "
        "every_rank`.",
    )
    trunk_zero: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage of the trunk.")
    pool_zero: Literal[0, 1, 2] = Field(1, description="ZeRO stage of the pool.")
    hardware: str | None = Field(
        None,
        description="`h100`, `h200`, `a100`, or a profile saved by `unipool bench`: costs for the schedule; "
        "default: FLOPs.",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto",
        description="`auto`: GPUs where torch can use them, otherwise the CPU; `cuda`: GPUs, or an error that says why "
        "not; `cpu`: the CPU.",
    )
    wire: Literal["auto", "gloo"] = Field(
        "auto",
        description="`auto`: NCCL if every rank has a GPU of its own, otherwise gloo with copies through the host; "
        "`gloo`: always gloo.",
    )
    timeout_seconds: Seconds = Field(60.0, description="Longest wait for another rank inside a step.")
    start_timeout_seconds: Seconds = Field(
        1800.0, description="Longest wait for another rank at the start, at a checkpoint and at the end."
    )
    check: bool = Field(
        False,
        description="For debugging: check the headers, payloads and checksums of every request, and that the numbers "
        "of tokens sent, served and returned are equal.",
    )


class Roles(Section):
    """Which ranks of the launcher hold which role."""

    order: Literal["pool_last", "interleaved"] = Field(
        "pool_last", description="Pool ranks are the launcher's last ranks, or spread over its nodes."
    )


class Eval(Section):
    """Validation during training."""

    every: NonNegative = Field(0, description="Steps between validations; 0: only at the end.")
    batches: Positive = Field(8, description="Global batches of held-out text per validation.")
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=16)] = Field(
        (),
        strict=False,
        description="Texts that the model continues at every validation, taking the most probable token each time: "
        "`[Once upon a time]`.",
    )
    prompt_tokens: Annotated[int, Field(ge=1, le=512)] = Field(
        32, description="Tokens by which a prompt is continued; each is a forward pass of all ranks."
    )
    patience: Positive | None = Field(
        None,
        description="Validations in a row without a new lowest loss that end the run; default: it takes all its steps.",
    )
    stop_below: PositiveFloat | None = Field(
        None, description="Validation loss below which the run ends; default: it takes all its steps."
    )


class Tasks(Section):
    """Scores of the checkpoints on tasks of lm-evaluation-harness, while training goes on."""

    names: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = Field(
        strict=False, description="Tasks, groups or tags of lm-evaluation-harness: `[piqa, arc_easy]`."
    )
    limit: Positive | None = Field(None, description="Most examples of each task; default: all.")
    include_path: str | None = Field(None, description="Folder with task files of your own.")
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="Where they are computed, on rank 0's machine; `cuda` shares a GPU with training."
    )
    minutes: PositiveFloat = Field(60.0, description="Longest time for one checkpoint, after which it has no scores.")


class Probe(Section):
    """Probes of the routing during training: held-out loss with random experts in one layer."""

    every: NonNegative = Field(0, description="Steps between probes; 0: none.")
    layers: Annotated[tuple[NonNegative, ...], Field(min_length=1)] | None = Field(
        None, strict=False, description="Layers that get random experts, one at a time; default: the deep half."
    )
    batches: Positive = Field(1, description="Global batches of held-out text per probe.")


class Profile(Section):
    """Which optimizer steps are recorded by torch's profiler."""

    steps: tuple[Positive, Positive] | None = Field(
        None,
        strict=False,
        description="First and last step to record, both included, as the progress line counts them: `[11, 12]`. Each "
        "rank writes a trace, and the first rank of each role a table of the largest costs, into profile/ of "
        "`run.dir`; default: none.",
    )


class Checkpoint(Section):
    """When checkpoints are saved and which are kept."""

    every: NonNegative = Field(0, description="Steps between checkpoints; 0: only at the end.")
    keep: Positive = Field(
        2, description="Newest checkpoints to keep; those between which nothing was learned count as one."
    )
    keep_every: NonNegative = Field(0, description="Also keep checkpoints at multiples of this many steps; 0: none.")


class Metrics(Section):
    """Where metrics are served and written."""

    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="Rank r serves port + r; 0 picks free ports.")
    port_by: Literal["rank", "local_rank"] = Field(
        "rank",
        description="`local_rank`: port + the rank's number on its machine, so that all machines use the same ports.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on; `0.0.0.0` listens on all of them.")
    targets_dir: str | None = Field(
        None, description="Folder that Prometheus watches; a copy of the run's targets.json is there as NAME.json."
    )
    tensorboard: bool = Field(True, description="Write event files for TensorBoard.")
    csv: bool = Field(False, description="Write a file per scalar, in csv/ of `run.dir`.")
    wandb: str | None = Field(
        None, description="Project of Weights & Biases, whose own environment variables configure the rest."
    )
    per_layer_experts: bool = Field(
        False, description="Serve a series for each expert of each layer; there may be 20,000."
    )
