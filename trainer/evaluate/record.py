"""eval.json, in the folder of the run or the export: {checkpoint: {what was evaluated: its result}}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.strict_json import dumps, loads

RECORD_FILE = "eval.json"


def save_result(folder: Path, checkpoint: str, what: str, result: dict[str, Any]) -> Path:
    """Put a result into the record, which keeps the others; returns its path.

    Raises:
        UserError: the record there is none, or cannot be written.
    """
    path = folder / RECORD_FILE
    try:
        record = loads(path.read_text()) if path.exists() else {}
        record.setdefault(checkpoint, {})[what] = result
        atomic_write(path, lambda partial: partial.write_text(dumps(record, indent=2) + "\n"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); the result is above") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: is no record of `eval`; move it away. The result is above") from None
    return path
