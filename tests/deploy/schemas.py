"""Strict checks of Kubernetes objects: unknown fields, values of a wrong type and broken rules are errors.

Core kinds are checked by kubernetes-validate. The schemas of custom resources are those of their projects, in crds/,
and the rules in them (Common Expression Language) are evaluated as an API server does when an object is created.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cel
import jsonschema
import kubernetes_validate

VERSION = "1.31"
"""Oldest release of Kubernetes whose Jobs are stable in all that the manifests use."""

CRDS = {
    facts["kind"]: facts
    for facts in (json.loads(path.read_text()) for path in (Path(__file__).parent / "crds").glob("*.json"))
}


def check(manifest: dict[str, Any]) -> None:
    """Check one object, and as core kinds the Jobs in it.

    Raises:
        jsonschema.ValidationError, kubernetes_validate.ValidationError: it is wrong; the message says what and where.
    """
    kind = manifest["kind"]
    if kind not in CRDS:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
        return
    assert manifest["apiVersion"] == CRDS[kind]["apiVersion"], (kind, manifest["apiVersion"])
    _check_core("v1", "ConfigMap", {"metadata": manifest["metadata"]})
    jsonschema.Draft202012Validator(_schema(kind)).validate(manifest)
    for broken in _broken_rules(_schema(kind), _with_defaults(_schema(kind), manifest), kind):
        raise jsonschema.ValidationError(broken)
    for job in manifest["spec"].get("replicatedJobs", []) if kind == "JobSet" else []:
        metadata = {"name": "unnamed", **job["template"].get("metadata", {})}
        _check_core("batch/v1", "Job", {"metadata": metadata, "spec": job["template"]["spec"]})


def _check_core(version: str, kind: str, rest: dict[str, Any]) -> None:
    kubernetes_validate.validate({"apiVersion": version, "kind": kind, **rest}, VERSION, strict=True)


@cache
def _schema(kind: str) -> dict[str, Any]:
    """The kind's schema, in which no object has unknown fields."""
    schema: dict[str, Any] = json.loads(json.dumps(CRDS[kind]["schema"]))  # a copy
    _forbid_unknown_fields(schema)
    return schema


def _forbid_unknown_fields(schema: Any) -> None:
    if isinstance(schema, list):
        for item in schema:
            _forbid_unknown_fields(item)
    elif isinstance(schema, dict):
        for item in schema.values():
            _forbid_unknown_fields(item)
        if isinstance(schema.get("properties"), dict) and "type" in schema:
            schema["additionalProperties"] = False
        if schema.get("x-kubernetes-int-or-string"):  # has a pattern for texts and no type
            schema["type"] = ["integer", "string"]


def _with_defaults(schema: dict[str, Any], value: Any) -> Any:
    """The value with the defaults that an API server sets before it evaluates rules."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        value = {key: below["default"] for key, below in properties.items() if "default" in below} | value
        return {key: _with_defaults(properties.get(key, {}), item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_defaults(schema.get("items", {}), item) for item in value]
    return value


def _broken_rules(schema: dict[str, Any], value: Any, where: str) -> Iterator[str]:
    """Rules of the schema and of all below it that the value breaks, and lists with the same key twice.

    Rules about changes (`oldSelf`) hold for every new object.
    """
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{where}: {rule.get('message', '')} ({rule['rule']})"
    if isinstance(value, dict):
        for key, item in value.items():
            below = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            if isinstance(below, dict):
                yield from _broken_rules(below, item, f"{where}.{key}")
    elif isinstance(value, list):
        keys = [[item.get(key) for key in schema.get("x-kubernetes-list-map-keys", [])] for item in value]
        if any(key in keys[:number] for number, key in enumerate(keys) if key):
            yield f"{where}: two items have the same {', '.join(schema['x-kubernetes-list-map-keys'])}"
        for number, item in enumerate(value):
            yield from _broken_rules(schema.get("items", {}), item, f"{where}[{number}]")
