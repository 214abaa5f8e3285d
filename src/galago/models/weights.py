"""Loading published weights: a state dict from a file into a network, without running anything the file holds.

`.safetensors` files, and PyTorch files (`.pth`, `.pt`, `.th`, `.bin`) read with `weights_only=True`, which refuses
whatever is not a tensor or plain data. A state dict may lie inside `{"state_dict": …}` or `{"model": …}`, and its names
may carry the `module.` of `nn.DataParallel` or the `_orig_mod.` of `torch.compile`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from galago.errors import UserError

Network = TypeVar("Network", bound=nn.Module)
_INSIDE = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 3


def load_weights(model: Network, path: Path | None, strict: bool = True) -> Network:
    """The same model with the weights of a file; unchanged where `path` is None.

    Args:
        model: receives the weights in place.
        path: a .safetensors, .pth, .pt, .th or .bin file.
        strict: every name and shape must fit. False leaves layers that the file lacks or shapes otherwise (a head
            for other classes) as they are; at least one must still fit.

    Raises:
        UserError: the file is missing or unreadable, holds no state dict, or does not fit the model.
    """
    if path is None:
        return model
    given, own = read_weights(Path(path)), model.state_dict()
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    problems = _problems(own, given)
    if problems and (strict or not fitting):
        raise UserError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}; {_remedy(fitting)}")
    model.load_state_dict(fitting, strict=False)
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """Name to tensor, on the CPU, without wrapper prefixes.

    Raises:
        UserError: the file is missing or unreadable, or holds no state dict.
    """
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    found = _inside(_read(path))
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(found):
        raise UserError(f"{path} holds no state dict (names and tensors); save one with torch.save(model.state_dict())")
    return _unwrapped(tensors)


def _read(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # about unusual files; whether one can be read is said below
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file fails anywhere in the reader, with any error
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"cannot read weights from {path}: {reason}; only tensors and plain data are loaded, never pickled objects"
        ) from error


def _inside(content: Any) -> Mapping[str, Any]:
    for name in _INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    return content if isinstance(content, Mapping) else {}


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _problems(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    # Files from before PyTorch 0.4 have no batch counters; only a BatchNorm with momentum=None reads them.
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in own]
    shapes = [
        f"{name} is {_shape(value)}, not {_shape(own[name])}"
        for name, value in given.items()
        if name in own and own[name].shape != value.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "other shapes": shapes}
    return [f"{kind} {_first(names)}" for kind, names in kinds.items() if names]


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def _remedy(fitting: Mapping[str, Tensor]) -> str:
    if not fitting:
        return "no layer fits, so this is another network's file: name that network or another file"
    return "choose the model and number of classes the file was made for, or load with strict=False to keep what fits"
