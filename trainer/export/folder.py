"""The files in an export's folder. None of its code is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.errors import UserError
from trainer.common.strict_json import loads

if TYPE_CHECKING:
    from torch import Tensor

MODEL_FILES = ("configuration_unipool.py", "experts_unipool.py", "modeling_unipool.py")
"""The model for transformers; every export of format hf has a copy of these files."""

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"


class StoredTensors(Mapping[str, "Tensor"]):
    """The tensors of an export, in one file or several; each is read when it is accessed.

    Attributes:
        shapes: The shapes of all tensors, by name.
        types: The types of all tensors, by name, as safetensors spells them.

    Raises:
        UserError: A file is missing or damaged, or the index contradicts the files.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        index = folder / INDEX_FILE
        if not index.is_file():
            self._add(WEIGHTS_FILE)
            return
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
            raise UserError(f"{index}: weight_map must name the file of each tensor")
        for file in sorted(set(weight_map.values())):
            self._add(file)
        for name in sorted(weight_map.keys() ^ self._files.keys()):
            where = "the index names it, but no file has it" if name in weight_map else "the index does not name it"
            raise UserError(f"{index}: contradicts the files about the tensor {name}: {where}; export the run again")

    def _add(self, name: str) -> None:
        path = self._folder / name
        if not path.is_file():
            raise UserError(f"{self._folder}: incomplete export: {name} is missing")
        with self._opened(path, "numpy") as file:
            for tensor in file.keys():  # noqa: SIM118  not a dict
                part = file.get_slice(tensor)
                self._files[tensor], self.types[tensor] = path, part.get_dtype()
                self.shapes[tensor] = tuple(part.get_shape())

    def _opened(self, path: Path, framework: str) -> Any:
        from safetensors import safe_open

        try:
            return safe_open(path, framework=framework)
        except Exception as error:  # safetensors raises its own kind
            raise UserError(f"{path}: damaged file ({first_line(error)}); export the run again") from error

    def __getitem__(self, name: str) -> Tensor:
        with self._opened(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, which may be empty."""
    return str(error).partition("\n")[0]


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    try:
        value = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def is_export(path: Path) -> bool:
    """Return whether a folder is an export of format hf, rather than a run or a checkpoint."""
    return (path / "config.json").is_file()
