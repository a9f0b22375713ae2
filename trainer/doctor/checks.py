"""All checks of `doctor`, in the order of its lines."""

from __future__ import annotations

from trainer.doctor import gpus, host, network, software, storage
from trainer.doctor.findings import Check

CHECKS = (
    Check("Python", software.python),
    Check("packages", software.packages),
    Check("torch", gpus.torch_and_gpus, seconds=120.0),  # torch may lie on a slow disk
    Check("driver", gpus.state),
    Check("CPU", host.cores),
    Check("memory", host.memory),
    Check("limits", host.limits),
    Check("/dev/shm", host.shared_memory),
    Check("run.dir", storage.folder_of_run),
    Check("data.dir", storage.folder_of_data),
    Check("folders", storage.temporary),
    Check("text", storage.text, seconds=60.0),
    Check("network", network.interfaces),
    Check("metrics.port", network.ports),
    Check("clock", host.clock),
    Check("launchers", host.launchers),
)
