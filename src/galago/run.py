"""A run's folder: recipe, log, checkpoints, weights, numbers; and `load(run)`, the deployable model back.

runs/student/
├── recipe.yaml         everything that was asked for, defaults included
├── run.json            command, versions, seed, when
├── log.jsonl           a line every few steps and every epoch
├── last.ckpt best.ckpt what exact continuation needs (tensors and plain data; never unpickled)
├── model.safetensors   the finished network's weights
├── architecture.json   how to rebuild it (see `galago.spec`)
└── metrics.json …      what was measured; model.onnx, model.xml, verify.json, report.html as commands add them
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from galago.data import Normalize
from galago.errors import UserError
from galago.spec import architecture, rebuild

_RECORDED = ("galago", "torch", "torchvision", "timm", "lightning", "numpy", "onnx", "onnxruntime", "openvino")


class Run:
    """The files of one training, by name.

    Args:
        folder: where they are; made when something is first written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.recipe, self.info, self.log = (self.folder / name for name in ("recipe.yaml", "run.json", "log.jsonl"))
        self.last, self.best = self.folder / "last.ckpt", self.folder / "best.ckpt"
        self.weights, self.architecture = self.folder / "model.safetensors", self.folder / "architecture.json"
        self.metrics, self.verification = self.folder / "metrics.json", self.folder / "verify.json"
        self.onnx, self.openvino = self.folder / "model.onnx", self.folder / "model.xml"
        self.report = self.folder / "report.html"

    @property
    def finished(self) -> bool:
        """Whether training came to its end and the deployable model was written."""
        return self.weights.exists() and self.architecture.exists()

    def begin(self, recipe: dict[str, Any], seed: int) -> None:
        """Writes down what is about to happen.

        Raises:
            UserError: the folder holds a run of another recipe, or cannot be written.
        """
        if self.recipe.exists() and (changed := _differences(self.read_recipe(), recipe)):
            raise UserError(
                f"{self.folder} holds a run of another recipe ({'; '.join(changed[:3])})."
                " Choose another folder with --run, or start this one over with --restart true"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic(self.recipe) as temporary:
                temporary.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
            if not self.info.exists():
                write_json(self.info, _provenance(seed))
        except OSError as error:
            raise UserError(f"cannot write to the run's folder {self.folder}: {error.strerror or error}") from error

    def clear(self) -> None:
        """Removes what a run wrote, so that it starts over. Other files in the folder stay."""
        own = (self.recipe, self.info, self.log, self.last, self.best, self.weights, self.architecture, self.metrics)
        files = (self.verification, self.onnx, self.openvino, self.openvino.with_suffix(".bin"), self.report)
        names = ("latency.json", "layers.json", "sensitivity.json", "trust.json", "attention.npz")
        others = (self.folder / name for name in names)
        stored = (*(self.folder / "predictions").glob("*.npz"), *(self.folder / "trust").glob("*/*"))
        for path in (*own, *files, *others, *stored):
            path.unlink(missing_ok=True)

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain data."""
        if not self.recipe.exists():
            raise UserError(f"{self.folder} is no run's folder: it has no recipe.yaml")
        try:
            recipe = yaml.safe_load(self.recipe.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{self.recipe} is not readable YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(recipe, dict):
            raise UserError(f"{self.recipe} holds no recipe")
        return recipe

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line to the log."""
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The lines of the log; a last line that a crash cut off is left out."""
        lines = []
        for text in self.log.read_text().splitlines() if self.log.exists() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def rewind(self, step: int) -> None:
        """Forgets what was logged after optimizer step `step`, which is about to be done again."""
        kept = [line for line in self.history() if line.get("step", 0) <= step]
        if self.log.exists():
            with atomic(self.log) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def save_checkpoint(self, state: dict[str, Any], path: Path) -> None:
        """Writes tensors and plain data so that a crash leaves either the old file or the new one."""
        with atomic(path) as temporary:
            torch.save(state, temporary)

    def load_checkpoint(self, path: Path) -> dict[str, Any] | None:
        """What `save_checkpoint` wrote; None where there is nothing yet. Never unpickles."""
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch reports a bad archive in many ways
            raise UserError(f"{path} is damaged or not a checkpoint of Galago; delete it to start over") from error
        return state

    def save_model(self, model: nn.Module, normalize: Normalize) -> None:
        """Writes the deployable model: weights, and how to rebuild it."""
        record = architecture(model) | {
            "mean": normalize.mean.flatten().tolist(),
            "std": normalize.std.flatten().tolist(),
        }
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
        with atomic(self.weights) as temporary:
            save_file(tensors, temporary)
        write_json(self.architecture, record)


def load(run: Path | str, allow: Sequence[str] = ()) -> nn.Module:
    """The deployable model of a finished run, in evaluation mode, from normalized input to raw output.

    Its `normalization` says what its input must have gone through. Safe on a stranger's folder: nothing is unpickled
    and nothing is imported but galago, torch, torchvision and timm.

    Args:
        run: the run's folder.
        allow: further packages that its architecture may be imported from.

    Raises:
        UserError: the run is unfinished, damaged, or asks for an import that is not allowed.
    """
    files = Run(run)
    if not files.finished:
        raise UserError(
            f"{run} holds no finished run; train it first (`galago train`, or `galago ship` for all it needs)"
        )
    record = read_json(files.architecture)
    model = rebuild(record, allow)
    state = model.state_dict()  # which knows the versions of its parts; torchvision's MNASNet asks for its own
    state.clear()
    try:
        state.update(load_file(files.weights))
        model.load_state_dict(state, assign=False)
    except (RuntimeError, SafetensorError, OSError) as error:
        raise UserError(
            f"{files.weights} does not fit its architecture: {' '.join(str(error).split())[:300]}"
        ) from error
    try:
        normalization = Normalize(record["mean"], record["std"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{files.architecture} says nothing usable of the normalization") from error
    # notes, not submodules: no part of the network. What it was built from is not this run, should it train further
    model.__dict__.update(normalization=normalization, built_from=record["model"])
    return model.eval()


def normalization_of(model: nn.Module) -> Normalize:
    """What the input of a model that `load` gave must have gone through."""
    found: Normalize = model.__dict__["normalization"]
    return found


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` once it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.chmod(0o644)  # some writers keep theirs private; a run's folder is to be shared
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes plain data, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads plain data.

    Raises:
        UserError: the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _provenance(seed: int) -> dict[str, Any]:
    return {
        "command": " ".join(["galago", *sys.argv[1:]]),
        "seed": seed,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "versions": {name: found for name in _RECORDED if (found := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Where two recipes differ, as `key: old → new`. Where a run lies and how it is shown does not count."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if f"{key}{name}" not in ("run", "restart", "needs", "log_every")]
        return [d for name in names for d in _differences(old.get(name), new.get(name), f"{key}{name}.")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in _differences(a, b, f"{key}{i}.")]
    return [] if old == new else [f"{key.rstrip('.')}: {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 40 else text[:37] + "…"
