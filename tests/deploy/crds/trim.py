"""Write the schemas of this folder again, from the projects' own CustomResourceDefinitions.

    python tests/deploy/crds/trim.py CHECKOUTS

CHECKOUTS holds git repositories `OWNER/NAME` with the tags below. Descriptions, the status and templates of Jobs, which
are core kinds, are dropped; the rest is a fact about what a cluster accepts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
LICENCE = "Apache-2.0"

JOBSET = ("kubernetes-sigs/jobset", "v0.10.0", "config/components/crd/bases/jobset.x-k8s.io_{}.yaml")
KUEUE = ("kubernetes-sigs/kueue", "v0.15.0", "config/components/crd/bases/kueue.x-k8s.io_{}.yaml")
OPERATOR = (
    *("prometheus-operator/prometheus-operator", "v0.80.0"),
    "example/prometheus-operator-crd/monitoring.coreos.com_{}.yaml",
)
SOURCES = {
    "jobsets": (*JOBSET, "v1alpha2"),
    "localqueues": (*KUEUE, "v1beta2"),
    "clusterqueues": (*KUEUE, "v1beta2"),
    "resourceflavors": (*KUEUE, "v1beta2"),
    "topologies": (*KUEUE, "v1beta2"),
    "workloadpriorityclasses": (*KUEUE, "v1beta2"),
    "podmonitors": (*OPERATOR, "v1"),
    "prometheusrules": (*OPERATOR, "v1"),
}
"""Plural name: repository, tag (the oldest release that the manifests support), file, version of the API."""


def trimmed(schema: Any) -> Any:
    """A schema without descriptions, and without the templates of Jobs in it."""
    if isinstance(schema, list):
        return [trimmed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: trimmed(value) for key, value in schema.items() if not isinstance(value, str) or key != "description"}
    if {"backoffLimit", "podFailurePolicy"} <= kept.get("properties", {}).get("spec", {}).get("properties", {}).keys():
        return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return kept


def main(checkouts: Path) -> None:
    """Write a file for each kind."""
    for plural, (repository, tag, path, version) in SOURCES.items():
        name = path.format(plural)
        text = subprocess.run(
            ["git", "-C", str(checkouts / repository), "show", f"{tag}:{name}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        definition = yaml.safe_load(text)["spec"]
        (found,) = [v for v in definition["versions"] if v["name"] == version and v["served"]]
        schema = trimmed(found["schema"]["openAPIV3Schema"])
        schema["properties"].pop("status", None)
        facts = {
            "source": f"https://github.com/{repository}/blob/{tag}/{name}",
            "licence": LICENCE,
            "apiVersion": f"{definition['group']}/{version}",
            "kind": definition["names"]["kind"],
            "schema": schema,
        }
        (HERE / f"{plural}.json").write_text(json.dumps(facts, separators=(",", ":"), sort_keys=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
