"""Strict checks of Kubernetes objects: unknown fields and values of a wrong type are errors.

Core kinds are checked by kubernetes-validate. The schemas of custom resources come from packages of their projects'
Python models. No package has the version of two kinds that is used here: their schemas are below, written from the
documented API, with the fields that the manifests use.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import jsonschema
import kubernetes_validate

VERSION = "1.31"
"""Oldest release of Kubernetes whose Jobs are stable in all that the manifests use."""

MODELS = {
    "JobSet": "kubeflow_trainer_api.models.jobset_v1alpha2_job_set:JobsetV1alpha2JobSet",
    "TrainJob": "kubeflow_trainer_api.models.trainer_v1alpha1_train_job:TrainerV1alpha1TrainJob",
    "ClusterTrainingRuntime": "kubeflow_trainer_api.models.trainer_v1alpha1_cluster_training_runtime"
    ":TrainerV1alpha1ClusterTrainingRuntime",
    "PodMonitor": "cloudcoil.models.prometheus_operator.v1:PodMonitor",
    "PrometheusRule": "cloudcoil.models.prometheus_operator.v1:PrometheusRule",
}

API_VERSIONS = {
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
    "ClusterTrainingRuntime": "trainer.kubeflow.org/v1alpha1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "MPIJob": "kubeflow.org/v2beta1",
    "LocalQueue": "kueue.x-k8s.io/v1beta1",
}

_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["name"],
    "additionalProperties": False,
}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_REPLICAS = _object(
    ["replicas", "template"],
    replicas={"type": "integer"},
    restartPolicy={"enum": ["Never", "OnFailure"]},
    template={"type": "object"},  # a pod: checked as a core kind
)

OWN_SCHEMAS = {
    "MPIJob": _object(
        ["mpiReplicaSpecs"],
        slotsPerWorker={"type": "integer"},
        mpiImplementation={"enum": ["OpenMPI", "Intel", "MPICH"]},
        launcherCreationPolicy={"enum": ["AtStartup", "WaitForWorkersReady"]},
        sshAuthMountPath={"type": "string"},
        runPolicy=_object(
            [],
            cleanPodPolicy={"enum": ["None", "Running", "All"]},
            backoffLimit={"type": "integer"},
            suspend={"type": "boolean"},
        ),
        mpiReplicaSpecs=_object(["Launcher"], Launcher=_REPLICAS, Worker=_REPLICAS),
    ),
    "LocalQueue": _object(["clusterQueue"], clusterQueue={"type": "string"}),
}


def check(manifest: dict[str, Any]) -> None:
    """Check one object, and as core kinds the Jobs and pods in it.

    Raises:
        jsonschema.ValidationError, kubernetes_validate.ValidationError: it is wrong; the message says what and where.
    """
    kind = manifest["kind"]
    if kind not in API_VERSIONS:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
        return
    assert manifest["apiVersion"] == API_VERSIONS[kind], (kind, manifest["apiVersion"])
    jsonschema.Draft202012Validator(_schema(kind)).validate(manifest)
    for job in _replicated_jobs(manifest):
        _check_core("batch/v1", "Job", job["template"])
    if kind == "MPIJob":
        for replicas in manifest["spec"]["mpiReplicaSpecs"].values():
            _check_core("v1", "Pod", replicas["template"])


def _replicated_jobs(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = manifest["spec"]
    if manifest["kind"] == "ClusterTrainingRuntime":
        spec = spec["template"]["spec"]
    return list(spec.get("replicatedJobs", []))


def _check_core(version: str, kind: str, template: dict[str, Any]) -> None:
    metadata = {"name": "unnamed", **template.get("metadata", {})}
    whole = {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": template["spec"]}
    kubernetes_validate.validate(whole, VERSION, strict=True)


@cache
def _schema(kind: str) -> dict[str, Any]:
    if kind in OWN_SCHEMAS:
        text = {"type": "string"}
        return _object(["metadata", "spec"], apiVersion=text, kind=text, metadata=_METADATA, spec=OWN_SCHEMAS[kind])
    module, _, name = MODELS[kind].partition(":")
    schema: dict[str, Any] = getattr(import_module(module), name).model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        if "actual_instance" in part.get("properties", {}):  # a quantity, or a number or a text
            part.clear()
            part["type"] = ["integer", "number", "string"]
        elif "properties" in part:
            part["additionalProperties"] = False
    return schema
