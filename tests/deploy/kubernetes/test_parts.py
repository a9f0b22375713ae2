"""deploy/kubernetes: requests, storage, preparation, Kueue, RDMA and the test of the network."""

from __future__ import annotations

import json
import os
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.kubernetes.overlays import (
    KUBERNETES,
    OVERLAYS,
    WITH_GPUS,
    copied_overlay,
    of_kind,
    pods_of,
    render,
    started,
)
from tests.deploy.schemas import check
from tests.tools import ended
from trainer.cluster.launch import free_port
from trainer.config.recipe import load_recipe
from trainer.planning.model_costs import count_parameters


@pytest.mark.parametrize("overlay", WITH_GPUS)
def test_requests_scale_with_gpus(overlay: str) -> None:
    for pod in pods_of(render(OVERLAYS[overlay])).values():
        resources = pod["containers"][0]["resources"]
        asked, gpus = resources["requests"], resources["limits"]["nvidia.com/gpu"]
        assert (int(asked["cpu"]) / gpus, int(asked["memory"].removesuffix("Gi")) / gpus) == (8, 32)


@pytest.mark.parametrize("overlay", WITH_GPUS)
def test_deleting_a_job_leaves_its_volume(overlay: str, tmp_path: Path) -> None:
    """The volume is in storage/, holds what the recipe needs, and may be of another class."""
    assert not [m for m in render(OVERLAYS[overlay]) if m["kind"] == "PersistentVolumeClaim"]
    storage = "storage/one-node" if overlay.endswith("one-gpu-node") else "storage/shared"
    claim = of_kind(render(OVERLAYS[storage]), "PersistentVolumeClaim")
    for pod in pods_of(render(OVERLAYS[overlay])).values():
        assert {"claimName": claim["metadata"]["name"]} in [v.get("persistentVolumeClaim") for v in pod["volumes"]]
    recipe = load_recipe(str(OVERLAYS[overlay] / "recipe.yaml"))
    train, validation, test = recipe.data.split
    data = 2 * (recipe.data.max_tokens or 0) * (1 + (validation + test) / train)
    saved = (recipe.checkpoint.keep + 1) * 12 * count_parameters(recipe).total
    assert 2 * (data + saved) < 200 * 2**30
    assert claim["spec"]["resources"]["requests"]["storage"] == "200Gi"
    name = "kustomization.yaml" if storage == "storage/shared" else "volume.yaml"
    for folder in ("shared", "one-node"):
        shutil.copytree(KUBERNETES / "storage" / folder, tmp_path / "storage" / folder)
    edited = tmp_path / storage / name
    edited.write_text(edited.read_text().replace("# storageClassName", "storageClassName"))
    assert of_kind(render(tmp_path / storage), "PersistentVolumeClaim")["spec"]["storageClassName"]


@pytest.mark.parametrize("name", ["cpu-smoke", "one-gpu-node", "many-nodes", "kueue"])
def test_preparation_is_a_job_without_gpus_for_the_ranks_data(name: str, tmp_path: Path) -> None:
    manifests, ranks = render(OVERLAYS[f"prepare/{name}"]), render(OVERLAYS[f"overlays/{name}"])
    assert not [m for m in manifests if m["kind"] in ("JobSet", "LocalQueue")]
    job = of_kind(manifests, "Job")
    (pod,) = pods_of(manifests).values()
    assert "nvidia.com/gpu" not in json.dumps(pod)
    assert job["metadata"]["name"] == "unipool-prepare" and job["spec"]["ttlSecondsAfterFinished"] >= 3600
    for other in pods_of(ranks).values():  # the same recipe and volume, at the same paths
        common = [v for v in other["volumes"] if v["name"] in ("job", "unipool")]
        assert [v for v in pod["volumes"] if v["name"] in ("job", "unipool")] == common
        for mount in pod["containers"][0]["volumeMounts"]:
            assert mount in other["containers"][0]["volumeMounts"]
    words = pod["containers"][0]["command"]
    recipe = load_recipe(str(OVERLAYS[f"overlays/{name}"] / "recipe.yaml"), [words[words.index("--set") + 1]])
    assert {recipe.data.dir} == {made.data.dir for made in started(ranks, tmp_path)}


def test_the_preparation_jobs_command_prepares_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod's command on the volume and the recipe that it sees; a second pod finds the data complete."""
    manifests = render(OVERLAYS["prepare/cpu-smoke"])
    (pod,) = pods_of(manifests).values()
    maps = {m["metadata"]["name"]: m["data"] for m in manifests if m["kind"] == "ConfigMap"}
    (job,) = [data for name, data in maps.items() if name.startswith("unipool-job-")]
    (tmp_path / "recipe.yaml").write_text(job["recipe.yaml"])
    command = pod["containers"][0]["command"]
    program, words = command[:5], command[5:]
    assert program == ["tini", "--", "python", "-m", "trainer"]
    words = [w.replace("/mnt/job", str(tmp_path)).replace("/mnt/unipool", str(tmp_path / "volume")) for w in words]
    assert ended(monkeypatch, *words) == 0
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "volume").rglob("*.arrow")}
    assert len(made) == 3
    assert ended(monkeypatch, *words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "volume").rglob("*.arrow")} == made


def test_kueue_gets_a_job_that_its_queue_can_hold() -> None:
    job_set = of_kind(render(OVERLAYS["overlays/kueue"]), "JobSet")
    local = of_kind(render(OVERLAYS["overlays/kueue"]), "LocalQueue")
    cluster = {m["kind"]: m for m in render(OVERLAYS["cluster/kueue"])}
    assert "suspend" not in job_set["spec"]  # `kubectl apply` would stop a running job
    labels = job_set["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert labels["kueue.x-k8s.io/priority-class"] == cluster["WorkloadPriorityClass"]["metadata"]["name"]
    assert local["spec"]["clusterQueue"] == cluster["ClusterQueue"]["metadata"]["name"]
    (resources,) = cluster["ClusterQueue"]["spec"]["resourceGroups"]
    (flavor,) = resources["flavors"]
    assert flavor["name"] == cluster["ResourceFlavor"]["metadata"]["name"]
    assert cluster["ResourceFlavor"]["spec"]["topologyName"] == cluster["Topology"]["metadata"]["name"]
    levels = [level["nodeLabel"] for level in cluster["Topology"]["spec"]["levels"]]
    needed = dict.fromkeys(resources["coveredResources"], 0)
    for group in job_set["spec"]["replicatedJobs"]:
        job = group["template"]["spec"]
        assert job["template"]["metadata"]["annotations"]["kueue.x-k8s.io/podset-preferred-topology"] in levels
        asked = job["template"]["spec"]["containers"][0]["resources"]
        for name, amount in (asked["requests"] | asked["limits"]).items():
            needed[name] += job["parallelism"] * int(str(amount).removesuffix("Gi"))
    quotas = {r["name"]: int(str(r["nominalQuota"]).replace("1Ti", "1024")) for r in flavor["resources"]}
    assert needed == quotas  # KeyError: Kueue admits no pod that asks for anything else


@pytest.mark.parametrize("overlay", ["many-nodes", "kueue"])
def test_rdma_for_both_groups(overlay: str, tmp_path: Path) -> None:
    """Uncommented as the overlay says. NCCL must not fall back to TCP, and ranks meet over the pod's own interface."""
    edited = copied_overlay(tmp_path, overlay) / "kustomization.yaml"
    edited.write_text(edited.read_text().replace("# - ../../components/rdma", "- ../../components/rdma"))
    manifests = render(edited.parent)
    for manifest in manifests:
        check(manifest)
    pods = pods_of(manifests)
    assert list(pods) == ["trunk", "pool"]
    for pod in pods.values():
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["rdma/rdma_shared_device_a"] == 1
        values = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert (values["NCCL_NET"], values["NCCL_SOCKET_IFNAME"], values["GLOO_SOCKET_IFNAME"]) == (
            "IB",
            "eth0",
            "eth0",
        )
        assert {"medium": "Memory", "sizeLimit": "16Gi"} in [volume.get("emptyDir") for volume in pod["volumes"]]


def test_an_image_may_be_named_by_its_digest(tmp_path: Path) -> None:
    digest = "sha256:" + 64 * "a"
    edited = copied_overlay(tmp_path, "many-nodes") / "kustomization.yaml"
    edited.write_text(edited.read_text().replace("newTag: 0.1.0}", f'digest: "{digest}"}}'))
    images = [container["image"] for pod in pods_of(render(edited.parent)).values() for container in pod["containers"]]
    assert images == 2 * [f"unipool@{digest}"]


def test_all_reduce_starts_one_job_over_all_pods(tmp_path: Path) -> None:
    manifests = render(OVERLAYS["all-reduce/many-nodes"])
    job_set = of_kind(manifests, "JobSet")
    assert job_set["metadata"]["name"] == "unipool-all-reduce"
    for group in job_set["spec"]["replicatedJobs"]:  # with this label, Prometheus would call its pods silent ranks
        assert "unipool/slots" not in group["template"]["spec"]["template"]["metadata"]["labels"]
    maps = {m["metadata"]["name"].split("-")[1]: m["data"] for m in manifests if m["kind"] == "ConfigMap"}
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    said = []
    for group in ("trunk", "pool"):
        for index in range(2):
            place = {"RUN": "unipool-all-reduce", "GROUP": group, "JOB_COMPLETION_INDEX": str(index)}
            environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | maps["split"] | place
            command = ["sh", "-c", maps["job"]["start.sh"]]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
            words = done.stdout.split()
            options = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
            said.append(int(options.pop("--node-rank")))
            assert words[:2] == ["-m", "torch.distributed.run"] and words[-1] == "/mnt/job/all_reduce.py"
            assert options == {
                "--nnodes": "4",
                "--nproc-per-node": "8",
                "--master-addr": "unipool-all-reduce-trunk-0-0.unipool-all-reduce",
                "--master-port": "29500",
            }
    assert said == [0, 1, 2, 3]
    assert "all_reduce.py" in maps["job"]


ALL_REDUCE = KUBERNETES / "components/all-reduce/all_reduce.py"


def test_all_reduce_adds_up_and_says_so() -> None:
    """Here with gloo."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, ALL_REDUCE, "cpu"]
    with subprocess.Popen(command, env=environment | {"RANK": "1"}) as other:
        try:
            done = subprocess.run(
                command, env=environment | {"RANK": "0"}, capture_output=True, text=True, check=False, timeout=120
            )
            assert (done.returncode, other.wait(60)) == (0, 0), done.stderr
        finally:
            other.kill()
    assert done.stdout.startswith("2 ranks: all-reduce of 4 MB in ")


def test_all_reduce_says_what_a_node_needs_for_rdma(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCCL_NET", "IB")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    assert runpy.run_path(str(ALL_REDUCE))["main"]("cpu") == 2
    assert "may lock only 8,388,608 bytes of memory" in capsys.readouterr().err
