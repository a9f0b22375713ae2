"""Made-up runs: pages of metrics like those of ranks, servers for these pages, and a run's folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.recipe import load_recipe, save_recipe

ACTIVITIES = ("computing", "waiting", "wire", "optimizer")
SHARES = {"trunk": (0.9, 0.05, 0.03, 0.02), "pool": (0.5, 0.4, 0.06, 0.04)}
"""Of ACTIVITIES."""


def skewed(experts: int) -> list[int]:
    """Assignments a step: some experts have many, expert 3 none."""
    load = np.random.default_rng(0).gamma(2.0, 60.0, experts).astype(int) + 1
    load[3:4] = 0
    return [int(tokens) for tokens in load]


def page(
    role: str,
    rank: int,
    steps: int,
    load: Sequence[int] = (),
    first_expert: int = 0,
    started: float = 1e9,
    shares: Sequence[float] = (),
    gauges: str = "",
) -> str:
    """A rank's page after `steps` steps of a second each.

    Args:
        load: assignments a step of its experts, whose ids begin at first_expert.
        gauges: more lines.
    """
    own = f'role="{role}",rank="{rank}"'
    lines = [f"process_start_time_seconds {started}", "# TYPE unipool_steps counter"]
    lines.append(f"unipool_steps_total{{{own}}} {steps}")
    if role == "trunk":
        lines.append(f"unipool_tokens_total{{{own}}} {262_144 * steps}")
    for activity, share in zip(ACTIVITIES, shares or SHARES[role], strict=True):
        lines.append(f'unipool_activity_seconds_total{{{own},activity="{activity}"}} {share * steps}')
    for place, tokens in enumerate(load):
        lines.append(f'unipool_expert_tokens_total{{expert="{first_expert + place:03d}"}} {tokens * steps}')
    if load:
        lines.append(f"unipool_service_tokens_total{{{own}}} {sum(load) * steps}")
    return "\n".join(lines) + f"\n{gauges}"


def job_gauges(step: int, experts: int, loss: float = 3.25, pool_ranks: int = 1, layers: int = 8) -> str:
    """What rank 0 says of the whole job."""
    info = {"run": "made-up", "model": "unipool", "layers": layers, "experts": experts, "top_k": 1, "router": "norm"}
    info |= {
        "layout": "dedicated",
        "trunk_ranks": 2,
        "pool_ranks": pool_ranks,
        "expert_parallel": pool_ranks,
        "lanes": 4,
        "precision": "bf16",
    }
    own = 'role="trunk",rank="0"'
    labels = ",".join(f'{name}="{value}"' for name, value in info.items())
    lines = [f"unipool_run_info{{{own},{labels}}} 1"]
    for name, value in {
        "step": step,
        "target_steps": 60_000,
        "loss_nats": loss,
        "validation_loss_nats": loss + 0.1,
        "gradient_norm": 0.5,
        "learning_rate": 5e-4,
        "step_seconds": 1.0,
        "load_imbalance_ratio": 2.5,
        "shard_load_imbalance_ratio": 1.25,
        "dead_experts": 1,
        "effective_experts": 0.8 * experts,
        "distinct_experts_per_token": 6.5,
        "checkpoint_step": 1000,
        "checkpoint_timestamp_seconds": 1e9,
        "skipped_steps_total": 2,
    }.items():
        lines.append(f"unipool_{name}{{{own}}} {value}")
    for layer in range(layers):
        lines.append(f'unipool_layer_load_imbalance_ratio{{layer="{layer:02d}"}} {3 + layer / 2}')
    return "\n".join(lines) + "\n"


def job(steps: int, experts: int, pool_ranks: int = 1, loss: float = 3.25, started: float = 1e9) -> list[str]:
    """Pages of two trunk ranks and some pool ranks, in rank order."""
    trunk = [
        page("trunk", 0, steps, started=started, gauges=job_gauges(steps, experts, loss, pool_ranks)),
        page("trunk", 1, steps, started=started),
    ]
    load, shard = skewed(experts), experts // pool_ranks
    pool = [
        page("pool", 2 + place, steps, load[place * shard : (place + 1) * shard], place * shard, started)
        for place in range(pool_ranks)
    ]
    return trunk + pool


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    text = ""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/metrics" else 404)
        self.end_headers()
        self.wfile.write(self.server.text.encode())  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(pages: Sequence[str]) -> Iterator[list[Any]]:
    """A server a page; each has `text`, which may be changed, and `server_port`."""
    servers = []
    for text in pages:
        server = _Server(("127.0.0.1", 0), _Handler)
        server.text = text
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
    try:
        yield servers
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def write_run(folder: Path, steps: int = 60, recipe: str = "quickstart", overrides: Sequence[str] = ()) -> Path:
    """A folder as a run leaves it: recipe, records of its steps with an evaluation now and then, load."""
    folder.mkdir(parents=True)
    checked = load_recipe(recipe, [f"run.dir={folder}", *overrides])
    save_recipe(checked, folder / "recipe.yaml")
    experts, tokens = checked.pool.experts, checked.train.global_batch * checked.model.seq_len
    noise = np.random.default_rng(0).standard_normal((steps, 4))
    decay = np.exp(-np.arange(steps) / (steps / 5))
    with (folder / "metrics.jsonl").open("w") as file:
        for step, (a, b, c, d) in enumerate(noise.tolist(), 1):
            left = float(decay[step - 1])
            record: dict[str, Any] = {"step": step, "loss": 2.5 + 5 * left + 0.05 * a, "balance_loss": 0.01}
            record |= {
                "grad_norm": 0.5 + left + 0.1 * abs(b),
                "lr": checked.train.lr * min(step / 20, 1.0),
                "tokens": tokens,
            }
            record |= {"seconds": 0.8 + 0.05 * abs(c), "tokens_per_second": tokens / (0.8 + 0.05 * abs(c))}
            record |= {"load_imbalance": 2 + 3 * left + 0.1 * a, "layer_imbalance": 6 + 5 * left, "applied": step != 7}
            record |= {"shard_imbalance": 1.1 + 0.05 * abs(d), "dead_experts": int(8 * left)}
            record |= {"effective_experts": experts * (0.8 - 0.4 * left), "distinct_experts": 7 - 2 * left}
            record["specialisation"] = 0.6 - 0.4 * left
            record |= {"layer_gate": 0.5 + 0.5 * left, "smallest_gate": 0.3 + 0.6 * left}
            record["layer_gates"] = [0.3 + 0.6 * left + 0.01 * layer for layer in range(checked.model.layers)]
            for role, shares in SHARES.items():
                waiting = shares[1] + 0.02 * d
                for activity, share in zip(ACTIVITIES, (shares[0] - 0.02 * d, waiting, *shares[2:]), strict=True):
                    record[f"{role}_{activity}"] = share
            file.write(json.dumps(record) + "\n")
            if step % max(steps // 6, 1) == 0:
                file.write(json.dumps({"step": step, "val_loss": 2.7 + 5 * left, "val_tokens": 4096}) + "\n")
                file.write(json.dumps({"step": step, "probe_loss": 2.7, "random_routing": 0.3 - 0.31 * left}) + "\n")
    load_LM = np.random.default_rng(1).gamma(0.4, 80, (checked.model.layers, experts)).astype(np.int64)
    np.save(folder / "load.npy", load_LM)
    (folder / "plan.json").write_text(json.dumps({"lanes": 2, "devices": "4 x NVIDIA H100"}))
    return folder
