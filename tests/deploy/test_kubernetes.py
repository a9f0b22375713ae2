"""deploy/kubernetes: every overlay renders, fits its schemas, and trains when its pods' commands are run."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import pytest

from pool.topology import Topology
from tests.deploy.kubernetes.overlays import (
    KUBERNETES,
    OVERLAYS,
    WITH_GPUS,
    of_kind,
    render,
    split_overlay,
    started,
)
from tests.deploy.pods import Cluster
from tests.deploy.schemas import check
from tests.distributed import TIME_LIMIT
from trainer.config.recipe import load_recipe
from trainer.telemetry.prometheus import parse


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_it_renders_and_every_object_fits_its_schema(overlay: str) -> None:
    for manifest in render(OVERLAYS[overlay]):
        check(manifest)


def test_there_are_all_overlays() -> None:
    names = {"one-gpu-node", "many-nodes", "kueue", "cpu-smoke"}
    assert {name for name in OVERLAYS if name.startswith("overlays/")} == {f"overlays/{name}" for name in names}
    assert {name for name in OVERLAYS if name.startswith("prepare/")} == {f"prepare/{name}" for name in names}


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.startswith("overlays/")])
def test_every_overlay_has_the_files_that_one_edits(overlay: str) -> None:
    assert {path.name for path in OVERLAYS[overlay].iterdir()} >= {"kustomization.yaml", "split.env", "recipe.yaml"}
    assert "images:\n- {name: unipool, newName:" in (OVERLAYS[overlay] / "kustomization.yaml").read_text()


JOB = ["spec", "replicatedJobs", 0, "template", "spec"]
MISSPELT = {
    "PersistentVolumeClaim": ("storage/shared", ["spec", "accessmodes"], ["ReadWriteMany"], "accessmodes"),
    "JobSet": ("overlays/many-nodes", ["spec", "failurePolicy", "maxRestart"], 3, "maxRestart"),
    "Job in a JobSet": ("overlays/many-nodes", [*JOB, "backofflimit"], 3, "backofflimit"),
    "a type in a JobSet": ("overlays/many-nodes", [*JOB, "parallelism"], "2", "'2' is not of type"),
    "an action in a JobSet": (
        *("overlays/many-nodes", ["spec", "failurePolicy", "rules", 0, "action"]),
        *("RestartJobs", "'RestartJobs' is not one of"),
    ),
    "a label of a JobSet": ("overlays/many-nodes", ["metadata", "labels", "team"], 3, "3 is not of type"),
    "two groups in a JobSet": ("overlays/many-nodes", ["spec", "replicatedJobs", 1, "name"], "trunk", "the same name"),
    "LocalQueue": ("overlays/kueue", ["spec", "clusterqueue"], "gpus", "clusterqueue"),
    "a rule of a ResourceFlavor": ("cluster/kueue", ["spec", "nodeLabels"], {}, "nodeLabels"),
    "a rule of a ClusterQueue": (
        *("cluster/kueue", ["spec", "resourceGroups", 0, "flavors", 0, "resources", 0, "borrowingLimit"]),
        *(1, "borrowingLimit must be nil when cohort is empty"),
    ),
    "a rule of a Topology": ("cluster/kueue", ["spec", "levels", 0, "nodeLabel"], "kubernetes.io/hostname", "unique"),
}


@pytest.mark.parametrize("what", MISSPELT)
def test_a_misspelt_field_is_found(what: str) -> None:
    folder, path, value, message = MISSPELT[what]
    node = manifest = copy.deepcopy(of_kind(render(OVERLAYS[folder]), what.split()[-1]))
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(Exception, match=message):
        check(manifest)


def test_one_edit_changes_the_split_everywhere(tmp_path: Path) -> None:
    requests: dict[str, int | str] = {"TRUNK_CPU": 32, "TRUNK_MEMORY": "128Gi", "POOL_CPU": 16, "POOL_MEMORY": "64Gi"}
    numbers = {"TRUNK_PODS": 1, "TRUNK_SLOTS": 4, "POOL_PODS": 3, "POOL_SLOTS": 2} | requests
    found = {}
    for group in of_kind(split_overlay(tmp_path, "many-nodes", **numbers), "JobSet")["spec"]["replicatedJobs"]:
        job = group["template"]["spec"]
        resources = job["template"]["spec"]["containers"][0]["resources"]
        slots = job["template"]["metadata"]["labels"]["unipool/slots"]
        gpus, asked = resources["limits"]["nvidia.com/gpu"], resources["requests"]
        found[group["name"]] = (job["parallelism"], job["completions"], gpus, slots, str(asked["cpu"]), asked["memory"])
    assert found == {"trunk": (1, 1, 4, "4", "32", "128Gi"), "pool": (3, 3, 2, "2", "16", "64Gi")}


@pytest.mark.parametrize(
    ("overlay", "pods", "ranks"), [("one-gpu-node", 1, (4, 4)), ("many-nodes", 4, (16, 16)), ("cpu-smoke", 4, (2, 2))]
)
def test_what_start_sh_makes_of_the_numbers_is_a_job(
    overlay: str, pods: int, ranks: tuple[int, int], tmp_path: Path
) -> None:
    recipes = started(render(KUBERNETES / "overlays" / overlay), tmp_path)
    assert [(made.parallel.trunk_ranks, made.parallel.pool_ranks) for made in recipes] == pods * [ranks]


@pytest.mark.parametrize(("overlay"), WITH_GPUS)
def test_the_recipe_is_the_papers(overlay: str) -> None:
    """But for data that no step would read."""
    named, own = load_recipe("unipool-182m"), load_recipe(str(OVERLAYS[overlay] / "recipe.yaml"))
    for section in ("model", "router", "pool", "balance", "train", "eval"):
        assert getattr(own, section) == getattr(named, section), section
    assert own.data.model_copy(update={"max_tokens": None}) == named.data.model_copy(update={"max_tokens": None})
    read = own.train.steps * own.train.global_batch * own.model.seq_len
    assert read < (own.data.max_tokens or 0) < 1.01 * read
    assert own.parallel.device == "cuda"


@pytest.mark.parametrize("pods", [1, 2])
def test_ranks_of_both_roles(pods: int, tmp_path: Path) -> None:
    """What docs/operations/kubernetes.md says of them."""
    numbers = {"TRUNK_PODS": pods, "TRUNK_SLOTS": 8, "TRUNK_RANKS": "", "POOL_PODS": 0, "POOL_SLOTS": 0}
    manifests = split_overlay(tmp_path, "one-gpu-node", **numbers)
    for made in (recipes := started(manifests, tmp_path, "parallel.layout=every_rank")):
        assert made.grid == Topology(8 * pods, 8 * pods, 8 * pods, every_rank=True)
    assert len(recipes) == pods


@pytest.mark.slow
def test_the_pods_train_stop_and_go_on(tmp_path: Path) -> None:
    """The CPU overlay's four pods: names resolve late; one pod gets SIGTERM, and all save and end with status 75.

    Then the job continues to its end with one pod less in each group, as after an edit of split.env.
    """
    with Cluster(tmp_path) as cluster:
        manifests = render(KUBERNETES / "overlays/cpu-smoke")
        pods = cluster.start(manifests, ["--set", "train.steps=100000"], names_known=not cluster.isolated)
        assert list(pods) == ["unipool-trunk-0-0", "unipool-trunk-0-1", "unipool-pool-0-0", "unipool-pool-0-1"]
        first, last = pods["unipool-trunk-0-0"], pods["unipool-pool-0-1"]
        if cluster.isolated:
            last.wait_for("cannot be retrieved")
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert last.probe(probe) == 0
            cluster.publish()
        first.wait_for("step 1/")
        if cluster.isolated:
            deadline = time.monotonic() + TIME_LIMIT
            while True:
                page = parse(last.read(f"http://{last.address}:9400/metrics"))
                assert page["unipool_restarts_total"] == [({"role": "pool", "rank": "3"}, 0.0)]
                if sum(tokens for _, tokens in page.get("unipool_expert_tokens_total", ())) > 0:
                    break  # this rank comes to the end of its step after the first one
                assert time.monotonic() < deadline, last.log
        last.terminate()
        assert {host: pod.wait() for host, pod in pods.items()} == dict.fromkeys(pods, 75), first.log
        saved = int(first.log.rpartition("checkpoint after step ")[2].split()[0])

        cluster.restarts = 1
        smaller = split_overlay(tmp_path, "cpu-smoke", TRUNK_PODS=1, TRUNK_SLOTS=1, POOL_PODS=1, POOL_SLOTS=1)
        pods = cluster.start(smaller, ["--set", f"train.steps={saved + 3}", "--force"])
        first = pods["unipool-trunk-0-0"]
        assert [pod.wait() for pod in pods.values()] == [0, 0], first.log
        assert f"resuming after step {saved}" in first.log
    lines = [json.loads(line) for line in (tmp_path / "volume/runs/unipool/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, saved + 4))
