"""Writes components/monitoring/prometheusrule.yaml: the rules of deploy/prometheus in the Prometheus operator's form.

kustomize cannot put one YAML file inside another. Run this after a change of the rules.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus/rules"
MANIFEST = HERE / "components/monitoring/prometheusrule.yaml"

HEAD = """\
# Made by deploy/kubernetes/prometheusrule.py from deploy/prometheus/rules: edit these.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: unipool
  labels: {app.kubernetes.io/name: unipool}
spec:
  groups:
"""


def manifest() -> str:
    """The object's YAML, with the rules' comments."""
    text = HEAD
    for path in sorted(RULES.glob("*.yml")):
        _, _, groups = path.read_text().partition("\ngroups:\n")
        assert groups, f"{path} has no groups"
        text += "".join(f"  {line}".rstrip() + "\n" for line in groups.splitlines())
    return text


if __name__ == "__main__":
    MANIFEST.write_text(manifest())
