"""Faults of files: a full disk, and files that are damaged, cut or gone."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.jobs import EVERY, HALF
from tests.faults.scene import Fault, Scene, anything, is_fault, is_fine, is_refused

DISK = "24m"
"""Size of the small disk; a run needs about 6 MB of it."""

FULL_SECONDS = 3.0


def _mount(scene: Scene, path: Path) -> None:
    """Put a small file system at `path`; this process has a mount namespace of its own."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path)], check=True, timeout=60)
    scene.undo.append(lambda: subprocess.run(["umount", "--lazy", str(path)], check=False, timeout=60))


def _fill(path: Path) -> None:
    with (path / "filler").open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def _free(path: Path) -> None:
    (path / "filler").unlink(missing_ok=True)


def _disk_of_run(scene: Scene) -> None:
    """Put the run's folder on the small disk, as a subfolder: a mount point cannot be renamed or removed."""
    disk = scene.setting.folder / "disk"
    half = scene.setting.run
    _mount(scene, disk)
    scene.setting.run = disk / "run"
    if half.exists():
        shutil.copytree(half, scene.setting.run)


def _disk_of_data(scene: Scene) -> None:
    _mount(scene, scene.setting.folder / "disk")
    scene.setting.keys["data.dir"] = scene.setting.folder / "disk" / "data"


def _disk_of_temporary_files(scene: Scene) -> None:
    _mount(scene, scene.setting.folder / "disk")
    scene.setting.environment["TMPDIR"] = str(scene.setting.folder / "disk")


def _disk_of_log(scene: Scene) -> None:
    _mount(scene, scene.setting.folder / "disk")
    scene.setting.log_folder = scene.setting.folder / "disk"


def _fill_it(scene: Scene) -> None:
    _fill(scene.setting.folder / "disk")


def _fill_it_now(prepare: Callable[[Scene], None]) -> Callable[[Scene], None]:
    def prepare_and_fill(scene: Scene) -> None:
        prepare(scene)
        _fill_it(scene)

    return prepare_and_fill


def _free_it(scene: Scene) -> None:
    _free(scene.setting.folder / "disk")


def _fill_for_a_while(scene: Scene) -> None:
    _fill_it(scene)
    timer = threading.Timer(FULL_SECONDS, _free_it, (scene,))
    timer.start()
    scene.undo.append(timer.cancel)


# --- damage ---


def _cut(path: Path, scene: Scene) -> None:
    size = path.stat().st_size
    os.truncate(path, scene.random.randrange(size) if size else 0)


def _flip(path: Path, scene: Scene) -> None:
    content = bytearray(path.read_bytes())
    content[scene.random.randrange(len(content))] ^= 1 << scene.random.randrange(8)
    path.write_bytes(content)


def _empty(path: Path, scene: Scene) -> None:
    os.truncate(path, 0)


def _remove(path: Path, scene: Scene) -> None:
    path.unlink()


def _scramble(path: Path, scene: Scene) -> None:
    path.write_bytes(scene.random.randbytes(max(1, path.stat().st_size)))


def _be_a_folder(path: Path, scene: Scene) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, Scene], None]] = {
    "is cut": _cut,
    "has a flipped bit": _flip,
    "is empty": _empty,
    "is gone": _remove,
    "is random bytes": _scramble,
    "is a folder": _be_a_folder,
}


def _checkpoint_files(scene: Scene, steps: int) -> list[Path]:
    folder = scene.setting.run / "checkpoints" / f"step_{steps:08d}"
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _damage_newest(damage: str) -> Callable[[Scene], None]:
    return lambda scene: DAMAGES[damage](scene.random.choice(_checkpoint_files(scene, HALF)), scene)


def _damage_all(damage: str) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        shutil.copytree(scene.setting.run / "checkpoints", scene.setting.folder / "intact")
        for steps in range(EVERY, HALF + 1, EVERY):
            path = next(p for p in _checkpoint_files(scene, steps) if "trunk" in str(p) or p.name.endswith(".pt"))
            DAMAGES[damage](path, scene)

    return act


def _restore_checkpoints(scene: Scene) -> None:
    """As a message says: restore one from a copy."""
    shutil.rmtree(scene.setting.run / "checkpoints")
    shutil.copytree(scene.setting.folder / "intact", scene.setting.run / "checkpoints")


def _damage_file(name: str, damage: str) -> Callable[[Scene], None]:
    return lambda scene: DAMAGES[damage](scene.setting.run / name, scene)


def _append_garbage(scene: Scene) -> None:
    """What a crash of the machine may leave: a line without its end, then zeros."""
    with (scene.setting.run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "loss": 5.' + bytes(4096))


def _data_files(scene: Scene) -> list[Path]:
    (folder,) = [path for path in Path(scene.setting.keys["data.dir"]).iterdir() if (path / "facts.json").exists()]
    return sorted(folder.iterdir())


def _damage_data(name: str, damage: str) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        copy = scene.setting.folder / "data"
        shutil.copytree(scene.setting.recipe.parent / "data", copy)  # times stay, which are part of the fingerprint
        scene.setting.keys["data.dir"] = copy
        DAMAGES[damage](next(path for path in _data_files(scene) if path.name == name), scene)

    return act


def _delete_data(scene: Scene) -> None:
    """As the message says: delete the folder, and it will be made again."""
    shutil.rmtree(scene.setting.keys["data.dir"])


def _remove_checkpoints_while_running(scene: Scene) -> None:
    shutil.rmtree(scene.setting.run / "checkpoints")


def _remove_run_while_running(scene: Scene) -> None:
    shutil.rmtree(scene.setting.run)


def _cut_what_is_written(scene: Scene) -> None:
    """Cut the files of a checkpoint that has not been committed yet."""
    time.sleep(0.3)  # for the other ranks to write theirs
    for path in scene.setting.run.glob("checkpoints/.step_*/**/*.pt"):
        os.truncate(path, path.stat().st_size // 2)


def _remove_metrics(scene: Scene) -> None:
    (scene.setting.run / "metrics.jsonl").unlink()


SAVE_FAILS = "warning: the checkpoint after step"
DATA_DAMAGED = "this prepared data is damaged"
_RECORDS = {("metrics.jsonl", damage): "record" if "flipped" in damage else "fewer" for damage in DAMAGES}
"""What becomes of the records if they are damaged themselves: a flipped bit may make another digit."""

UNNOTICED = ("train.arrow", "has a flipped bit")
"""No run reads a checksum of all its data: of changed tokens it finds only those that are in no vocabulary."""

LOST = {"losses": "fewer"}

FAULTS: dict[str, Fault] = {
    "disk of run.dir full for a while": Fault(
        is_fine, prepare=_disk_of_run, act=_fill_for_a_while, seconds=FULL_SECONDS + 130, losses="fewer"
    ),
    "disk of run.dir full to the end": Fault(
        is_fault, prepare=_disk_of_run, act=_fill_it, heal=_free_it, seconds=270, says="could not|cannot be", **LOST
    ),
    "disk of run.dir full before the start": Fault(
        anything, prepare=_fill_it_now(_disk_of_run), heal=_free_it, says="[Nn]o space left on device"
    ),
    "disk of data.dir full": Fault(anything, prepare=_disk_of_data, act=_fill_it, heal=_free_it, says="error:"),
    "disk of temporary files full": Fault(anything, prepare=_disk_of_temporary_files, act=_fill_it, heal=_free_it),
    "disk of temporary files full before the start": Fault(
        anything, prepare=_fill_it_now(_disk_of_temporary_files), heal=_free_it
    ),
    "disk of the log full": Fault(is_fine, prepare=_disk_of_log, act=_fill_it, heal=_free_it),
    **{
        f"a file of the newest checkpoint {damage}": Fault(is_fine, prepare=_damage_newest(damage), says="is damaged")
        for damage in DAMAGES
    },
    **{
        f"a file of every checkpoint {damage}": Fault(
            is_refused, prepare=_damage_all(damage), heal=_restore_checkpoints, says="all its checkpoints are damaged"
        )
        for damage in ("is cut", "has a flipped bit", "is gone")
    },
    **{
        f"{name} {damage}": Fault(
            is_fine, prepare=_damage_file(name, damage), losses=_RECORDS.get((name, damage), "same")
        )
        for name in ("plan.json", "recipe.yaml", "tokenizer.json", "metrics.jsonl")
        for damage in DAMAGES
        if damage != "is a folder"
    },
    "metrics.jsonl has zeros at its end": Fault(is_fine, prepare=_append_garbage),
    **{
        f"{name} of the data {damage}": Fault(
            is_refused, prepare=_damage_data(name, damage), heal=_delete_data, says=DATA_DAMAGED
        )
        if (name, damage) != UNNOTICED
        else Fault(anything, prepare=_damage_data(name, damage), heal=_delete_data, losses="other")
        for name, damages in {
            "facts.json": ("is cut", "is gone", "is random bytes", "is empty"),
            "train.arrow": ("is cut", "is gone", "is empty", "is random bytes", "has a flipped bit"),
            "tokenizer.json": ("is cut", "is gone", "has a flipped bit"),
        }.items()
        for damage in damages
    },
    "checkpoints/ removed": Fault(is_fine, act=_remove_checkpoints_while_running),
    "run.dir removed": Fault(anything, act=_remove_run_while_running, losses="fewer"),
    "files of a save cut": Fault(is_fine, act=_cut_what_is_written, says=SAVE_FAILS),
    "metrics.jsonl removed": Fault(is_fine, act=_remove_metrics, losses="fewer"),
}
