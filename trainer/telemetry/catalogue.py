"""Every Prometheus metric that a rank may serve, in the order of its page."""

from __future__ import annotations

from trainer.telemetry.step_scalars import STEP_METRICS, counter, gauge, histogram

STEP_SECONDS = tuple(round(10.0**power * bound, 3) for power in range(-2, 3) for bound in (1, 1.5, 2, 3, 5, 7))
"""Upper bounds of the buckets of a step's duration, 10 ms to 700 s."""

DEVICE_MEMORY = ("allocated", "reserved", "total")
"""Values of the label `kind`: by tensors, by torch's allocator, of the GPU."""

CATALOGUE = (
    # every rank, from its first second on
    gauge("phase", "1 for what the rank is doing, 0 for everything else.", "phase"),
    counter("time_seconds", "Time of this process by what it went into; lost: steps done again.", "cause"),
    counter("restarts", "Restarts of the job; on Kubernetes and Slurm also those after a graceful stop."),
    gauge("max_restarts", "Restarts after which the job fails for good, where that is known."),
    # every rank, once it has joined the job
    gauge("rank_info", "Where the rank runs; always 1.", "local_rank", "node", "device", "gpu_uuid"),
    gauge("build_info", "Versions and device; always 1.", "version", "torch", "deepspeed", "python", "device"),
    gauge("unused_gpus", "GPUs of the machine that the rank, which trains on the CPU, cannot use."),
    gauge(
        "device_memory_bytes", "Memory of the rank's GPU: held by tensors, reserved by torch, and all of it.", "kind"
    ),
    counter("device_allocation_retries", "Times that torch emptied its cache because the GPU's memory was full."),
    gauge("peak_memory_bytes", "Most memory so far: resident on the host, allocated on the GPU.", "where"),
    # every rank, once it trains
    counter("steps", "Optimizer steps of this process."),
    counter("activity_seconds", "Time of training steps by what the rank did.", "activity"),
    gauge("straggler_score", "The rank's own computing time over the median of its role, recent steps."),
    counter("wire_sent_bytes", "Headers and payloads sent to other ranks."),
    counter("wire_received_bytes", "Headers and payloads received from other ranks."),
    # every trunk rank
    counter("tokens", "Tokens that this rank has trained on."),
    gauge("pool_wait_ratio", "Share of the last step spent waiting for the pool."),
    # rank 0
    gauge(
        "run_info",
        "What is trained; always 1.",
        *("run", "model", "layers", "experts", "top_k", "router"),
        *("layout", "trunk_ranks", "pool_ranks", "expert_parallel", "lanes", "precision", "devices"),
    ),
    gauge("step", "Optimizer steps done, over all starts of the run."),
    gauge("target_steps", "Optimizer steps of the whole run."),
    *STEP_METRICS,
    histogram("step_duration_seconds", "Wall time of steps."),
    counter("model_flops", "FLOPs of the model that the whole job has done, without those computed again."),
    gauge("peak_flops_per_second", "Peak FLOP/s of all ranks together in train.precision, if it is known."),
    counter("loss_spikes", "Steps whose loss was far above the losses of the 100 steps before."),
    counter("gradient_norm_spikes", "Steps whose gradient norm was far above those of the 100 steps before."),
    counter("skipped_steps", "Steps skipped because gradients were not finite, or by train.skip_spikes."),
    gauge("validation_loss_nats", "Mean cross-entropy of the last evaluation."),
    gauge("random_routing_loss_nats", "Held-out loss that random experts in a layer add.", "layer", by_rank=False),
    gauge(
        "ownership_shortfall_ratio",
        "What a layer's own experts lacked of lock.coverage of its tokens at the assignment.",
        "layer",
        by_rank=False,
    ),
    gauge("checkpoint_step", "Optimizer steps in the newest checkpoint."),
    gauge("checkpoint_timestamp_seconds", "Unix time of the newest checkpoint, or of the start."),
    gauge("checkpoint_duration_seconds", "Time from the start of the last save until it was complete."),
    gauge("checkpoint_stall_seconds", "Time for which the last save stopped training."),
    gauge("checkpoint_bytes", "Size of the last checkpoint that this process saved."),
    gauge("checkpoint_interval_steps", "Steps between checkpoints; 0: only at the end."),
    counter("checkpoint_failures", "Checkpoints that could not be saved."),
    gauge("disk_free_bytes", "Free space of the file system that holds the run's folder."),
    # every pool rank; colocated: rank 0
    counter("expert_tokens", "Token assignments served forward.", "expert", by_rank=False),
    counter("expert_gradients", "Token assignments served backward.", "expert", by_rank=False),
    counter("layer_expert_tokens", "Token assignments served forward.", "layer", "expert", by_rank=False),
    counter("service_tokens", "Token assignments that this rank has served forward."),
    gauge("service_queue_depth", "Slots received but not begun when one was done, mean over the last step."),
    gauge("stash_bytes", "Largest deferred weight-gradient work in the last step."),
)
