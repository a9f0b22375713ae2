"""Whole jobs, started as a user would: every launcher, resume, the run's folder."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from nbclient import NotebookClient

from tests.trainer.forked import Fault, ForkedJob, Place, stop, train_as_forked
from tests.trainer.job import (
    EXTENSIONS,
    ROOT,
    TIME_LIMIT,
    TOKEN,
    run,
    started,
    steps,
    unipool,
    wait_for,
    write_recipe,
)
from trainer.cli import cli
from trainer.cluster.launch import free_port
from trainer.config.recipe import load_recipe
from trainer.planning.model_costs import count_flops
from trainer.telemetry.catalogue import CATALOGUE
from trainer.telemetry.prometheus import parse
from trainer.telemetry.time_breakdown import ACTIVITIES

NOT_IN_A_FIRST_STEP = {
    *("unipool_validation_loss_nats", "unipool_checkpoint_duration_seconds", "unipool_checkpoint_stall_seconds"),
    *("unipool_random_routing_loss_nats", "unipool_layer_expert_tokens", "unipool_model_flops_utilisation_ratio"),
    *("unipool_entropy_loss", "unipool_foreign_assignments", "unipool_lock_stage"),
    *("unipool_ownership_shortfall_ratio", "unipool_layer_own_share_ratio", "unipool_checkpoint_bytes"),
    *("unipool_device_memory_bytes", "unipool_device_allocation_retries", "unipool_peak_flops_per_second"),
    "unipool_max_restarts",
}
"""Metrics of evaluations, checkpoints, the lock and GPUs, some that are opt-in, and those that need known hardware."""

LONG = ("train.steps=100000", "eval.every=0", "probe.every=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> str:
    return str(write_recipe(folder))


@pytest.fixture(scope="module")
def reference(recipe: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The job that the others are compared with: no launcher given. It has checkpoints of steps 2 and 4."""
    done = unipool("train", recipe, "--set", "checkpoint.every=2")
    assert done.returncode == 0, done.stderr
    return done


def test_train_shows_and_leaves_what_it_promises(
    reference: subprocess.CompletedProcess[str], recipe: str, folder: Path
) -> None:
    run_dir = folder / "run"
    assert re.search(r"step 1/4: loss \d\.\d+, [\d,]+ tokens/s, load imbalance \d\.\d\d, .*ETA", reference.stderr)
    assert re.search(r"step 1/4: .* [kMG]FLOP/s per rank, .*\bgoodput \d+%, ETA", reference.stderr)
    assert "step 2: validation loss" in reference.stderr
    for line in (
        r"validation loss   \d\.\d{4} nats per token, perplexity",
        r"unigram entropy   \d\.\d{4}",
        r"devices           CPU\n",
        rf"checkpoint        {run_dir}/checkpoints/step_00000004",
        rf"TensorBoard       {run_dir}/tensorboard",
        rf"load picture      {run_dir}/load.png",
        r"sample \(after the bar\)\n    def f",
    ):
        assert re.search(line, reference.stdout), line
    assert (run_dir / "load.png").read_bytes().startswith(b"\x89PNG")
    assert not (run_dir / "targets.json").exists(), "the run has ended: nobody serves metrics"
    load_LM = np.load(run_dir / "load.npy")
    assert load_LM.shape == (2, 8) and load_LM.sum(1).tolist() == pytest.approx([8 * 32] * 2, abs=4)
    saved = {path.name for path in (run_dir / "checkpoints" / "step_00000004").iterdir()}
    assert saved == {"trunk", "pool", "recipe.yaml", "layout.json", "load.npy", "manifest.json", "COMPLETE"}
    assert json.loads((run_dir / "plan.json").read_text())["lanes"] >= 1
    assert load_recipe(str(run_dir / "recipe.yaml")) == load_recipe(recipe, ["checkpoint.every=2"])
    assert [line["step"] for line in steps(run_dir)] == [1, 2, 2, 2, 3, 4, 4, 4]
    assert steps(run_dir)[4]["loss"] < steps(run_dir)[0]["loss"]
    evaluation, probe = steps(run_dir)[-2:]
    assert probe["probe_loss"] == evaluation["val_loss"], "of the same batch"
    added = probe["random_routing_by_layer"]
    assert list(added) == ["0", "1"] and added["0"] != 0
    assert probe["random_routing"] == pytest.approx((added["0"] + added["1"]) / 2)
    assert (
        f"step 4: random experts in one of the layers 0, 1 add {probe['random_routing']:+.4f} nats to the loss"
        in reference.stderr
    )


@pytest.mark.usefixtures("reference")
def test_the_same_scalars_go_everywhere(folder: Path) -> None:
    """metrics.jsonl, TensorBoard with the load's picture, and CSV files where the recipe asks for them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    for line in trained:
        for side in ("trunk", "pool"):
            parts = [line[f"{side}_{activity}"] for activity in ACTIVITIES]
            assert min(parts) >= 0 and sum(parts) == pytest.approx(1)
        assert 1 <= line["distinct_experts"] <= 2 and line["shard_imbalance"] == 1
        assert line["layer_imbalance"] == pytest.approx(sum(line["layer_imbalances"]) / 2)
        assert 0 <= line["smallest_gate"] == min(line["layer_gates"])
        assert line["layer_gate"] == pytest.approx(sum(line["layer_gates"]) / 2)
    assert all(gate > 0.5 for gate in trained[0]["layer_gates"]), "near 1 at the start"
    board = EventAccumulator(str(folder / "run" / "tensorboard"))
    board.Reload()
    for name, values in {
        "train/loss": [(line["step"], line["loss"]) for line in trained],
        "train/pool_waiting": [(line["step"], line["pool_waiting"]) for line in trained],
        "layer_imbalance/1": [(line["step"], line["layer_imbalances"][1]) for line in trained],
        "layer_gate/1": [(line["step"], line["layer_gates"][1]) for line in trained],
        "eval/val_loss": [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line],
        "random_routing/mean": [(line["step"], line["random_routing"]) for line in lines if "random_routing" in line],
    }.items():
        got = [(event.step, event.value) for event in board.Scalars(name)]
        assert got == [(step, pytest.approx(value, rel=1e-6)) for step, value in values], name
    assert [image.step for image in board.Images("load")] == [2, 4]
    assert board.Images("load")[0].encoded_image_string.startswith(b"\x89PNG")
    rows = (folder / "run" / "csv" / "train_loss.csv").read_text().splitlines()
    assert [float(row.split(",")[1]) for row in rows[1:]] == pytest.approx([line["loss"] for line in trained])


@pytest.mark.usefixtures("reference")
def test_eval_says_the_validation_loss_that_training_said(folder: Path) -> None:
    """Of the export's model in one process, on the same rows; and of more of them."""
    said = steps(folder / "run")[-2]
    for more, rows in (((), 8), (("--batches", "2"), 16)):
        done = CliRunner().invoke(cli, ["eval", str(folder / "run"), "--json", *more])
        assert done.exit_code == 0, (done.output, done.exception)
        found = json.loads(done.stdout)["validation"]
        assert found["tokens"] == rows * 32
        if not more:
            assert found["loss"] == pytest.approx(said["val_loss"], rel=1e-5) and found["tokens"] == said["val_tokens"]
    facts = next((folder / "data").glob("*/facts.json")).read_text()
    split = json.loads(facts)["splits"]["validation"]
    bits = found["loss"] / math.log(2) * split["tokens"] / split["bytes"]
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-3)
    kept = json.loads((folder / "run" / "eval.json").read_text())
    assert kept == {"step_00000004": {"validation": found}}


@pytest.mark.usefixtures("reference")
def test_the_notebook_reads_the_run(folder: Path) -> None:
    """All of its cells, which draw as many pictures as are stored in it, and the code of docs/python.md."""
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "a-run.ipynb", as_version=4)
    stored = pictures(notebook)
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    notebook.cells.append(nbformat.v4.new_code_cell(block))
    for cell in notebook.cells:
        cell.source = re.sub(r'load_run\("[./]*runs/quickstart"\)', f"load_run({str(folder / 'run')!r})", cell.source)
    assert sum(str(folder) in cell.source for cell in notebook.cells) == 2
    limits = {"timeout": int(TIME_LIMIT), "startup_timeout": int(TIME_LIMIT)}
    NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}, **limits).execute()
    assert pictures(notebook) == stored >= 4


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.usefixtures("reference")
def test_nothing_is_compiled_at_start() -> None:
    assert not EXTENSIONS.exists()


def test_no_credential_of_the_environment_is_kept(reference: subprocess.CompletedProcess[str], folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "plan.json", "metrics.jsonl", "facts.json", "COMPLETE"} <= {path.name for path in files}
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in reference.stdout + reference.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
@pytest.mark.usefixtures("reference")
def test_every_launcher_runs_the_same_job(launcher: str, recipe: str, folder: Path) -> None:
    """Beside DeepSpeed's launcher of a node, which `reference` starts, and its runner, below."""
    prefix = {
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m"],
        "mpirun": ["mpirun", "-np", "2", "--oversubscribe", sys.executable, "-m"],
    }[launcher]
    done = run(*prefix, "trainer", "train", recipe, "--set", f"run.dir={folder / launcher}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(folder / launcher) == steps(folder / "run")


@pytest.mark.slow
@pytest.mark.usefixtures("reference")
def test_two_nodes_with_a_hostfile(recipe: str, folder: Path) -> None:
    """`deepspeed --hostfile --no_ssh`, started once on each of two "nodes", of which one holds ranks of both roles."""
    (folder / "hostfile").write_text("first slots=2\nsecond slots=1\n")
    common = ["deepspeed", "--hostfile", str(folder / "hostfile"), "--no_ssh", "--master_addr", "127.0.0.1"]
    common += ["--master_port", str(free_port())]
    arguments = ["--module", "trainer", "train", recipe]
    arguments += ["--set", "parallel.pool_ranks=2", "--set", f"run.dir={folder / 'nodes'}"]
    with started(*common, "--node_rank", "1", *arguments) as (second, log):
        first = run(*common, "--node_rank", "0", *arguments)
        assert first.returncode == 0, first.stderr + log.read_text()
        assert second.wait(TIME_LIMIT) == 0
    for record, other in zip(steps(folder / "nodes"), steps(folder / "run"), strict=True):
        name = next(name for name in ("loss", "val_loss", "probe_loss") if name in record)
        assert record[name] == pytest.approx(other[name], rel=1e-5)


def copy_at_step_2(folder: Path, name: str) -> Path:
    """The reference job's folder under another name, without its last checkpoint."""
    shutil.copytree(folder / "run", folder / name)
    shutil.rmtree(folder / name / "checkpoints" / "step_00000004")
    return folder / name


@pytest.mark.usefixtures("reference")
def test_resume_goes_on_where_the_checkpoint_was(recipe: str, folder: Path) -> None:
    """Steps 3 and 4 after a resume are those of an undisturbed run, bit for bit."""
    run_dir = copy_at_step_2(folder, "resumed")
    sets = ("checkpoint.every=2", f"run.dir={run_dir}")
    status, told = train_as_forked(folder, recipe, *sets)
    assert status == 0 and "resuming after step 2" in told, told
    assert steps(run_dir) == steps(folder / "run")
    status, told = train_as_forked(folder, recipe, *sets, "balance.scope=micro_batch")
    assert status == 2, told
    assert 'balance.scope "global_batch" -> "micro_batch"; restore them, use another run.dir, or pass --force' in told


@pytest.mark.usefixtures("reference")
def test_resume_in_another_layout_and_placement(recipe: str, folder: Path) -> None:
    """Steps 3 and 4 in another layout come to the same losses, and nothing of the reshaping is left behind."""
    run_dir = copy_at_step_2(folder, "reshaped")
    before = steps(run_dir)
    layout = ("parallel.layout=every_rank", "parallel.trunk_ranks=2", "parallel.pool_ranks=0")
    sets = ("checkpoint.every=2", f"run.dir={run_dir}", *layout, "pool.placement=auto")
    status, told = train_as_forked(folder, recipe, *sets)
    assert status == 0, told
    assert "checkpoint step_00000002 has another layout: resharding it" in told
    for record, undisturbed in zip(steps(run_dir), before, strict=True):
        name = next(name for name in ("loss", "val_loss", "probe_loss") if name in record)
        assert record[name] == pytest.approx(undisturbed[name], rel=1e-5)
    timed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    spent = next(record for record in reversed(timed) if "loss" in record)
    assert math.fsum(spent[f"trunk_{activity}"] for activity in ACTIVITIES) == pytest.approx(1)
    assert 0 < spent["serving_computing"] < spent["trunk_computing"], "part of the same time"
    assert "the recipe differs from that of step_00000002: pool.placement" in told
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step_00000002", "step_00000004"}


Page = dict[str, list[tuple[dict[str, str], float]]]


def scraped(url: str, whole: Callable[[Page], bool] = lambda _: True) -> Page:
    """A rank's page, after its second step at the earliest, so that all of its first step is there.

    Args:
        whole: whether a page has all or nothing of its last step; the numbers of a step appear one after the other.
    """
    deadline = time.monotonic() + TIME_LIMIT
    while True:
        samples = parse(urllib.request.urlopen(url, timeout=60).read().decode())
        if "unipool_steps_total" in samples and samples["unipool_steps_total"][0][1] >= 2 and whole(samples):
            return samples
        assert time.monotonic() < deadline, samples
        time.sleep(0.05)


def test_metrics_of_every_rank(recipe: str, folder: Path) -> None:
    flops = count_flops(load_recipe(recipe)).training * 8 * 32

    def counts_agree(page: Page) -> bool:
        done = page["unipool_step_duration_seconds_count"][0][1]
        return (
            done == page["unipool_steps_total"][0][1] == page["unipool_step"][0][1]
            and page["unipool_step_duration_seconds_bucket"][-1][1] == done
            and page["unipool_model_flops_total"][0][1] == pytest.approx(done * flops)
            and "unipool_disk_free_bytes" in page  # for which a page does not wait
        )

    job = ForkedJob(load_recipe(recipe, [*LONG, f"run.dir={folder / 'scraped'}"]), folder)
    try:
        wait_for(job.logs[0], "step 1/")
        urls = re.findall(r"metrics: rank . \((\w+).*?\): (http\S+)", job.log(0) + job.log(1))
        assert [role for role, _ in urls] == ["trunk", "pool"]
        trunk, pool = scraped(urls[0][1], counts_agree), scraped(urls[1][1])
        targets = json.loads((folder / "scraped" / "targets.json").read_text())
    finally:
        job.end(0.0)
    assert targets == [{"targets": [url.split("/")[2] for _, url in urls], "labels": {"run": "scraped"}}]
    assert [page["unipool_build_info"][0][0]["device"] for page in (trunk, pool)] == ["CPU", "CPU"]
    assert trunk["unipool_run_info"][0][0]["devices"] == "CPU"
    for rank, page in enumerate((trunk, pool)):
        ((place, _),) = page["unipool_rank_info"]
        assert (place["rank"], place["local_rank"], place["device"], place["gpu_uuid"]) == (str(rank),) * 2 + (
            "CPU",
            "",
        )
        assert place["node"] == socket.gethostname() and page["unipool_unused_gpus"][0][1] == 0
        assert {labels["phase"] for labels, on in page["unipool_phase"] if on} == {"training"}
        spent = {labels["cause"]: seconds for labels, seconds in page["unipool_time_seconds_total"]}
        assert spent["startup"] > 0 < spent["training"] and spent["lost"] == spent["evaluation"] == 0
        assert page["unipool_straggler_score"][0][1] == 1, "each is the only one of its role"
    samples = trunk | pool
    assert {name for name in samples if name.startswith("unipool_")} == {
        name for metric in CATALOGUE if metric.name not in NOT_IN_A_FIRST_STEP for name in metric.samples
    }
    served = samples["unipool_expert_tokens_total"]
    assert [labels["expert"] for labels, _ in served] == list("01234567")
    assert served == samples["unipool_expert_gradients_total"]
    for page in (trunk, pool):
        assert {labels["activity"] for labels, _ in page["unipool_activity_seconds_total"]} == set(ACTIVITIES)
        assert all(seconds >= 0 for _, seconds in page["unipool_activity_seconds_total"])
    tokens_of_a_step = 8 * 32 * 2
    assert sum(tokens for _, tokens in served) % tokens_of_a_step == 0


def test_metrics_are_there_before_all_ranks_are(recipe: str, folder: Path) -> None:
    """Rank 0 is stopped before it opens the job's store: the other one says that it waits, and since when."""
    port = free_port()
    sets = [f"metrics.port={port - 1}", f"run.dir={folder / 'early'}"]
    job = ForkedJob(load_recipe(recipe, sets), folder, Fault(0, Place("trainer.train.start:rendezvous"), stop))
    deadline = time.monotonic() + TIME_LIMIT
    doing: set[str] = set()
    try:
        while "rendezvous" not in doing:
            assert time.monotonic() < deadline, job.log(1)
            with suppress(OSError):
                page = parse(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode())
                doing = {labels["phase"] for labels, on in page["unipool_phase"] if on}
            time.sleep(0.05)
    finally:
        job.end(0.0)
    assert page["unipool_time_seconds_total"][0][0] == {"role": "pool", "rank": "1", "cause": "startup"}
    assert page["unipool_time_seconds_total"][0][1] > 0


def test_a_port_that_is_taken(recipe: str, folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sets = [f"metrics.port={port - 1}", f"run.dir={folder / 'port'}"]
        command = ["train", recipe, *(word for value in sets for word in ("--set", value))]
        job = ForkedJob(load_recipe(recipe, sets), folder, command=command)
        assert job.end(TIME_LIMIT)[1] == 2, job.log(1)
    assert re.search(rf"^error: rank 1 \(.*\): metrics.port: rank 1 cannot listen on port {port} of", job.log(1), re.M)
    assert not (folder / "port" / "targets.json").exists()


def test_bad_input_is_one_line_and_starts_nothing(recipe: str, folder: Path) -> None:
    for arguments, line in (
        (("train", recipe, "--set", "train.steps=x"), "train.steps = 'x': must be a valid integer"),
        (("train", "nowhere.yaml"), "recipe nowhere.yaml: neither a readable file"),
        (("train", recipe, "--set", "data.source=/nowhere", "--set", f"data.dir={folder}/d"), "/nowhere"),
        (("train", recipe, "--set", "run.dir=/proc/no"), "run.dir = /proc/no: cannot be written"),
        (("trian",), "No such command 'trian'"),
        (("plan", recipe, "--jsno"), "No such option"),
        (
            ("plan", recipe, "--simulate", "--set", "parallel.pool_ranks=0"),
            "a colocated pool has neither ranks nor messages",
        ),
    ):
        done = unipool(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert line in done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
