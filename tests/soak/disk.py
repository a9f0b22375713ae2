"""A small disk of the soak's own that can be full, or slow, for a while. Needs root; Linux only."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

_BLKIO = Path("/sys/fs/cgroup/blkio")


class SmallDisk:
    """An ext4 file system in a file, mounted at `path` for this process's mount namespace.

    `slow` slows only what is started through `prefix`.
    """

    def __init__(self, image: Path, path: Path, megabytes: int):
        self.path = path
        if not image.exists():
            image.touch()
            os.truncate(image, megabytes << 20)
            _run("mkfs.ext4", "-q", "-m", "0", str(image))
        _wait_until_free(image)
        path.mkdir(exist_ok=True)
        _run("mount", "-o", "loop", str(image), str(path))
        source = subprocess.run(
            ["findmnt", "--noheadings", "--output", "SOURCE", "--mountpoint", str(path)],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout.strip()
        self._device = Path("/sys/block", Path(source).name, "dev").read_text().strip()
        self._group = _BLKIO / f"soak-{os.getpid()}" if _BLKIO.is_dir() else None
        for old in _BLKIO.glob("soak-*"):
            with suppress(OSError):  # it is in use
                old.rmdir()
        if self._group:
            self._group.mkdir()
        self.empty()

    @property
    def can_be_slow(self) -> bool:
        """Whether the system has the block controller of control groups, version 1."""
        return self._group is not None

    @property
    def prefix(self) -> list[str]:
        """Command that puts what it starts where `slow` has an effect."""
        if not self._group:
            return []
        return ["sh", "-c", f'echo $$ > {self._group}/cgroup.procs && exec "$@"', "sh"]

    def fill(self) -> None:
        """Take all room that is left."""
        with suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
        with suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while file.write(bytes(1)):
                pass

    def empty(self) -> None:
        """Give the room back that `fill` has taken."""
        self._filler.unlink(missing_ok=True)

    def slow(self, bytes_per_second: int) -> None:
        """Limit what the processes write to the disk; 0: no limit."""
        assert self._group
        (self._group / "blkio.throttle.write_bps_device").write_text(f"{self._device} {bytes_per_second}")

    def close(self) -> None:
        """Unmount it, and remove the control group, which must have no processes any more."""
        _run("umount", "--lazy", str(self.path))
        if self._group:
            with suppress(OSError):
                self._group.rmdir()

    @property
    def _filler(self) -> Path:
        return self.path / "filler"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=120)


def _wait_until_free(image: Path) -> None:
    """Wait for what an earlier soak, which was killed, has left: mounted twice, the file system would be damaged.

    Raises:
        TimeoutError: Somebody else has mounted it.
    """
    deadline = time.monotonic() + 90
    while subprocess.run(["losetup", "-j", str(image)], capture_output=True, check=True, timeout=60).stdout:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{image} is in use")
        time.sleep(0.5)
