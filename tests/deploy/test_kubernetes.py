"""deploy/kubernetes: every overlay renders, fits its schemas, and trains when its pods' commands are run."""

from __future__ import annotations

import copy
import json
import subprocess
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from pool.topology import Topology
from tests.deploy.pods import Cluster
from tests.deploy.schemas import check
from tests.tools import need
from tests.trainer.job import ROOT
from trainer.config.recipe import Recipe, load_recipe
from trainer.telemetry.prometheus import parse

KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = sorted(path.parent for path in KUBERNETES.glob("*/*/kustomization.yaml") if "components" not in path.parts)


@cache
def _render(folder: Path) -> str:
    command = [need("kubectl", "kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would apply."""
    return list(yaml.safe_load_all(_render(folder)))


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_it_renders_and_every_object_fits_its_schema(overlay: Path) -> None:
    for manifest in render(overlay):
        check(manifest)


def test_there_are_all_overlays() -> None:
    names = {path.name for path in OVERLAYS}
    assert names == {"one-gpu-node", "many-nodes", "kueue", "cpu-smoke", "mpijob", "trainjob"}


MISSPELT = {
    "PersistentVolumeClaim": ("many-nodes", ["spec", "accessmodes"], ["ReadWriteMany"]),
    "JobSet": ("many-nodes", ["spec", "failurePolicy", "maxRestart"], 3),
    "Job in a JobSet": ("many-nodes", ["spec", "replicatedJobs", 0, "template", "spec", "backofflimit"], 3),
    "a type": ("many-nodes", ["spec", "replicatedJobs", 0, "template", "spec", "parallelism"], "2"),
    "LocalQueue": ("kueue", ["spec", "clusterqueue"], "gpus"),
    "MPIJob": ("mpijob", ["spec", "slotsPerWorkers"], 8),
    "Pod in an MPIJob": ("mpijob", ["spec", "mpiReplicaSpecs", "Worker", "template", "spec", "volume"], []),
    "TrainJob": ("trainjob", ["spec", "trainer", "numNode"], 2),
    "ClusterTrainingRuntime": ("trainjob", ["spec", "mlPolicy", "mpi", "numProcPerNodes"], 8),
}


@pytest.mark.parametrize("what", MISSPELT)
def test_a_misspelt_field_is_found(what: str) -> None:
    folder, path, value = MISSPELT[what]
    (overlay,) = [overlay for overlay in OVERLAYS if overlay.name == folder]
    kind = "JobSet" if what == "a type" else what.split()[-1]
    node = manifest = copy.deepcopy(of_kind(render(overlay), kind))
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(Exception, match=f"{path[-1]}|'2' is not of type"):
        check(manifest)


def split_overlay(tmp_path: Path, overlay: str, **numbers: int | str) -> list[dict[str, Any]]:
    """An overlay with other numbers in its split.env, edited as the documents say."""
    for part in (f"overlays/{overlay}", "base", "components"):
        for source in (KUBERNETES / part).rglob("*"):
            if source.is_file():
                copied = tmp_path / source.relative_to(KUBERNETES)
                copied.parent.mkdir(parents=True, exist_ok=True)
                copied.write_bytes(source.read_bytes())
    (tmp_path / f"overlays/{overlay}/split.env").write_text("".join(f"{k}={v}\n" for k, v in numbers.items()))
    return render(tmp_path / f"overlays/{overlay}")


def test_one_edit_changes_the_split_everywhere(tmp_path: Path) -> None:
    manifests = split_overlay(tmp_path, "many-nodes", TRUNK_PODS=1, TRUNK_SLOTS=4, POOL_PODS=3, POOL_SLOTS=2)
    found = {}
    for group in of_kind(manifests, "JobSet")["spec"]["replicatedJobs"]:
        job = group["template"]["spec"]
        limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
        slots = job["template"]["metadata"]["labels"]["unipool/slots"]
        found[group["name"]] = (job["parallelism"], job["completions"], limits["nvidia.com/gpu"], slots)
    assert found == {"trunk": (1, 1, 4, "4"), "pool": (3, 3, 2, "2")}
    budgets = {
        m["metadata"]["name"]: m["spec"]["minAvailable"] for m in manifests if m["kind"] == "PodDisruptionBudget"
    }
    assert budgets == {"unipool-trunk": 1, "unipool-pool": 3}


STAND_IN = """#!/bin/sh
# For python: shows the hostfile, then the arguments after it.
while [ "$1" != --hostfile ]; do shift; done
cat "$2"
shift 2
echo "$@"
"""


def started(manifests: list[dict[str, Any]], tmp_path: Path, *edits: str) -> list[Recipe]:
    """The recipe that each pod trains, edited by hand; its line of the hostfile is its own name, and all ranks fit."""
    recipes = []
    maps = {m["metadata"]["name"].split("-")[1]: m["data"] for m in manifests if m["kind"] == "ConfigMap"}
    script, recipe, stand_in = tmp_path / "start.sh", tmp_path / "recipe.yaml", tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    script.write_text(maps["job"]["start.sh"])
    recipe.write_text(maps["job"]["recipe.yaml"])
    for group in of_kind(manifests, "JobSet")["spec"]["replicatedJobs"]:
        for index in range(group["template"]["spec"]["completions"]):
            place = {"RUN": "unipool", "GROUP": group["name"], "JOB_COMPLETION_INDEX": str(index)}
            environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TMPDIR": str(tmp_path)} | maps["split"] | place
            done = subprocess.run(["sh", str(script)], env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            *hosts, arguments = done.stdout.splitlines()
            words = arguments.split()
            node = int(words[words.index("--node-rank") + 1])
            assert hosts[node].startswith(f"unipool-{group['name']}-0-{index}.unipool slots=")
            assert words[words.index("--master-addr") + 1] == hosts[0].split()[0]
            sets = [value for flag, value in pairwise(words) if flag == "--set"]
            recipes.append(load_recipe(str(recipe), [*edits, *sets]))
            assert recipes[-1].grid.world_size == sum(int(line.partition("=")[2]) for line in hosts)
    return recipes


@pytest.mark.parametrize(
    ("overlay", "pods", "ranks"), [("one-gpu-node", 1, (4, 4)), ("many-nodes", 4, (16, 16)), ("cpu-smoke", 4, (2, 2))]
)
def test_what_start_sh_makes_of_the_numbers_is_a_job(
    overlay: str, pods: int, ranks: tuple[int, int], tmp_path: Path
) -> None:
    recipes = started(render(KUBERNETES / "overlays" / overlay), tmp_path)
    assert [(made.parallel.trunk_ranks, made.parallel.pool_ranks) for made in recipes] == pods * [ranks]


@pytest.mark.parametrize(
    "folder", ["overlays/one-gpu-node", "overlays/many-nodes", "variants/trainjob", "variants/mpijob"]
)
def test_the_recipe_is_the_papers(folder: str) -> None:
    named, own = load_recipe("unipool-182m"), load_recipe(str(KUBERNETES / folder / "recipe.yaml"))
    for section in ("model", "router", "pool", "balance", "train", "data", "eval"):
        assert getattr(own, section) == getattr(named, section), section


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
            page = parse(last.read(f"http://{last.address}:9400/metrics"))
            assert page["unipool_restarts_total"] == [({"role": "pool", "rank": "3"}, 0.0)]
            assert sum(tokens for _, tokens in page["unipool_expert_tokens_total"]) > 0
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
