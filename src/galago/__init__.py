"""Train, shrink and ship compact vision networks that you can trust.

The public nouns, imported when first used so that `import galago` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from galago.batch import Batch as Batch
    from galago.batch import Step as Step
    from galago.data import Data as Data
    from galago.method import Forward as Forward
    from galago.method import Method as Method
    from galago.probe import Probe as Probe
    from galago.task import Task as Task

_HOMES = {
    "Batch": "batch",
    "Data": "data",
    "Forward": "method",
    "Method": "method",
    "Probe": "probe",
    "Step": "batch",
    "Task": "task",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'galago' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"galago.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*_HOMES, "__version__"]
