"""The files in an export's folder. None of its code is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.errors import UserError
from trainer.common.safe_read import open_file, read_bytes
from trainer.common.strict_json import loads
from trainer.export.names import Shape

if TYPE_CHECKING:
    from torch import Tensor

MODEL_FILES = ("attention_unipool.py", "configuration_unipool.py", "experts_unipool.py", "modeling_unipool.py")
"""The model for transformers; every export of format hf has a copy of these files."""


class StoredTensors:
    """The tensors of an export, in one file or several.

    Attributes:
        shapes: The shapes of all tensors, by name.
        types: The types of all tensors, by name, as safetensors spells them.

    Raises:
        UserError: The folder is not an export, a file is damaged, or two files have the same tensor.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self.types: dict[str, str] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            with self._opened(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    if name in self._files:
                        raise UserError(f"{path}: has {name}, and so has {self._files[name].name}; remove one of them")
                    part = file.get_slice(name)
                    self._files[name], self.types[name] = path, part.get_dtype()
                    self.shapes[name] = tuple(part.get_shape())
        if not self._files:
            raise UserError(
                f"{folder}: is not an export (model.safetensors is missing); make one with `unipool export`"
            )

    def _opened(self, path: Path, framework: str) -> Any:
        from safetensors import safe_open

        try:
            open_file(path).close()  # it would wait for a pipe
            return safe_open(path, framework=framework)
        except Exception as error:  # safetensors raises its own kind
            raise UserError(f"{path}: damaged file ({first_line(error)}); export the run again") from error

    def check(self, required: Mapping[str, Shape], source: str) -> None:
        """Check that the export has exactly the tensors and shapes that `source` requires.

        Raises:
            UserError: A tensor is missing, has another shape, or is not required.
        """
        for name in sorted(required.keys() | self.shapes.keys()):
            found, shape = self.shapes.get(name, "missing"), required.get(name, "missing")
            if found != shape:
                raise UserError(
                    f"{self._folder}: the shape of the tensor {name} is {found} in the files, but {shape} by {source}; "
                    "export the run again"
                )

    def read(self, name: str) -> Tensor:
        """Read a tensor."""
        with self._opened(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, which may be empty."""
    return str(error).partition("\n")[0]


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    try:
        value = loads(read_bytes(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def is_export(path: Path) -> bool:
    """Return whether a folder is an export of format hf, rather than a run or a checkpoint."""
    return (path / "config.json").is_file()
