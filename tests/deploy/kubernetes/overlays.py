"""What the tests of deploy/kubernetes share: rendered overlays, their pods, and what start.sh makes of them."""

from __future__ import annotations

import subprocess
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from tests.tools import need
from tests.trainer.job import ROOT
from trainer.config.recipe import Recipe, load_recipe

KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = {
    str(path.parent.relative_to(KUBERNETES)): path.parent
    for path in sorted(KUBERNETES.glob("*/*/kustomization.yaml"))
    if "components" not in path.parts
}
WITH_GPUS = ["overlays/one-gpu-node", "overlays/many-nodes", "overlays/kueue"]


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


def pods_of(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The specifications of the pods of a JobSet or Job, by the name of their group."""
    found = {m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in manifests if m["kind"] == "Job"}
    for job_set in (m for m in manifests if m["kind"] == "JobSet"):
        for group in job_set["spec"]["replicatedJobs"]:
            found[group["name"]] = group["template"]["spec"]["template"]["spec"]
    return found


def copied_overlay(tmp_path: Path, overlay: str) -> Path:
    """A copy of an overlay, to edit."""
    for part in (f"overlays/{overlay}", "base", "components", "storage"):
        for source in (KUBERNETES / part).rglob("*"):
            if source.is_file():
                copied = tmp_path / source.relative_to(KUBERNETES)
                copied.parent.mkdir(parents=True, exist_ok=True)
                copied.write_bytes(source.read_bytes())
    return tmp_path / f"overlays/{overlay}"


def split_overlay(tmp_path: Path, overlay: str, **numbers: int | str) -> list[dict[str, Any]]:
    """An overlay with other numbers in its split.env, edited as the documents say."""
    edited = copied_overlay(tmp_path, overlay)
    (edited / "split.env").write_text("".join(f"{k}={v}\n" for k, v in numbers.items()))
    return render(edited)


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
