"""eval.json, in the folder of a run or an export: the results of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.strict_json import dumps, loads

RECORD_FILE = "eval.json"


def save_result(folder: Path, checkpoint: str, what: str, result: dict[str, Any]) -> Path:
    """Store a result in eval.json under the keys `checkpoint` and `what`; return the file's path.

    Raises:
        UserError: eval.json is something else, or cannot be written.
    """
    path = folder / RECORD_FILE
    try:
        record = loads(path.read_text()) if path.exists() else {}
        record.setdefault(checkpoint, {})[what] = result
        atomic_write(path, lambda partial: partial.write_text(dumps(record, indent=2) + "\n"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); the result is printed above") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: is not a record of `eval`; move it away (the result is printed above)") from None
    return path
