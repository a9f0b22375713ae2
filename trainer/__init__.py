"""Trains UniPool language models: the command line, the recipes, the trunk and the two roles' loops.

`load_run` is what this package offers to Python programs (docs/python.md).
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["load_run"]

if TYPE_CHECKING:
    from trainer.view.run import load_run
else:

    def __getattr__(name: str) -> object:
        """Import `load_run` when it is asked for, so that `import trainer` stays light."""
        if name == "load_run":
            from trainer.view.run import load_run

            return load_run
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
