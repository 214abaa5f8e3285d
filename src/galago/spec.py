"""Objects as plain data and back: `{class_path, init_args}`, without pickle and without running a stranger's code.

`describe` reads an object's constructor arguments from its attributes of the same names (the convention of
scikit-learn's estimators); `build` makes the object again. `architecture` writes a finished network down as the model
it began with and the layers that were wrapped, replaced or resized since; `rebuild` follows that record.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor, nn

from galago.errors import UserError
from galago.layers import Wrapper, find, swap
from galago.sizes import resize, sizes_of

TRUSTED = ("galago", "torch", "torchvision", "timm")
# Functions, unlike network classes, can do anything: only those that build a network are called.
_BUILDERS = ("galago.models.", "torchvision.models.", "timm.models.")
_NETWORKS = (
    "torch.nn.",
    "torchvision.models.",
    "torchvision.ops.",
    "torchvision.transforms.",
    "timm.models.",
    "timm.layers.",
)
_FETCHING = {"pretrained": False, "weights": None}  # arguments that read or download weights, and their harmless values
_REFUSED = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_strict"}
ORIGINAL = {"original": True}


def describe(thing: Any) -> Any:
    """Plain data (numbers, strings, lists, dicts) from which `build` makes an equal object.

    >>> describe(nn.ReLU(inplace=True))
    {'class_path': 'torch.nn.modules.activation.ReLU', 'init_args': {'inplace': True}}

    Raises:
        UserError: a constructor argument is not kept as an attribute of the same name.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Tensor):
        return True  # torch's layers keep a parameter where they were asked `bias=True`
    if isinstance(thing, Path):
        return str(thing)
    if isinstance(thing, Enum):
        return thing.name
    if isinstance(thing, dict):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple | nn.ModuleList):
        return [describe(value) for value in thing]
    made_from = getattr(thing, "built_from", None)
    return made_from if isinstance(made_from, dict) else _described(thing)


def _described(thing: Any) -> dict[str, Any]:
    kind = type(thing)
    arguments = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        where_it_lives = name in ("device", "dtype")  # not part of what a layer is
        if parameter.kind is parameter.VAR_POSITIONAL and kind.__init__ is not nn.Module.__init__:
            raise UserError(
                f"cannot write down a {kind.__qualname__}, which takes any number of arguments:"
                " name a class or function of your own that makes it in a recipe's `model`"
            )
        if where_it_lives or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not hasattr(thing, name):
            raise UserError(
                f"cannot write down a {kind.__qualname__}: its argument {name!r} is not kept as an attribute;"
                f" add `self.{name} = {name}` to its __init__, or build it from a recipe"
            )
        arguments[name] = describe(getattr(thing, name))
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def build(spec: Any, allow: Sequence[str] = ()) -> Any:
    """The object that `describe` wrote down; lists and nested descriptions are followed.

    Args:
        spec: plain data.
        allow: packages to import from besides galago, torch, torchvision and timm.

    Raises:
        UserError: the class comes from elsewhere, does not exist or refuses its arguments.
    """
    if isinstance(spec, list):
        return [build(value, allow) for value in spec]
    if not (isinstance(spec, dict) and "class_path" in spec):
        return spec
    path, given = spec["class_path"], spec.get("init_args") or {}
    target = resolve(path, allow)
    arguments = {name: build(value, allow) for name, value in given.items()} | _offline(path, given)
    try:
        made = target(**arguments)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be built from its record: {error}") from error
    if isinstance(made, nn.Module) and not inspect.isclass(target):
        made.__dict__["built_from"] = spec
    return made


def _offline(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments that would read or download weights, made harmless."""
    hub = any(isinstance(value, str) and (":" in value or "/" in value) for value in given.values())
    if _REFUSED & given.keys() or (path.startswith("timm.") and hub):
        raise UserError(f"refused to build {path}: its record asks for files or downloads ({sorted(given)})")
    return {name: harmless for name, harmless in _FETCHING.items() if name in given}


def guard(recipe: Any, allow: Sequence[str] = ()) -> None:
    """Goes through plain data and refuses every `class_path` that may not be imported.

    Raises:
        UserError: naming the first one.
    """
    if isinstance(recipe, dict):
        if "class_path" in recipe:
            resolve(recipe["class_path"], allow)
        for value in recipe.values():
            guard(value, allow)
    elif isinstance(recipe, list):
        for value in recipe:
            guard(value, allow)


def packages(recipe: Any) -> list[str]:
    """The packages that a user's own recipe imports from: trusted because it is theirs."""
    if isinstance(recipe, list):
        return sorted({name for value in recipe for name in packages(value)})
    if not isinstance(recipe, dict):
        return []
    path = recipe.get("class_path")
    own = {path.partition(".")[0]} if isinstance(path, str) else set()
    return sorted(own.union(*(packages(value) for value in recipe.values())))


def resolve(path: Any, allow: Sequence[str] = ()) -> Callable[..., Any]:
    """The class or function at a dotted path, imported only from trusted or allowed packages."""
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")) or "." not in path:
        raise UserError(f"class_path {path!r} is not a dotted import path")
    package = path.partition(".")[0]
    if package not in (*TRUSTED, *allow):
        raise UserError(
            f"refused to import {path!r}: only {', '.join(TRUSTED)} are; allow {package!r} by name if you trust it"
        )
    target = _imported(path)
    if package not in allow and not _harmless(path, target):
        raise UserError(f"refused to call {path!r}: a record may only name network classes and model functions")
    return target


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"class_path {path!r} does not exist: {error}") from error
    return found


def _harmless(path: str, target: Any) -> bool:
    home = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    if inspect.isclass(target):
        return home.startswith("galago.") or (issubclass(target, nn.Module) and home.startswith(_NETWORKS))
    return path == "timm.create_model" or (
        path.startswith(_BUILDERS) and home.startswith(_BUILDERS) and _gives_a_network(target)
    )


def _gives_a_network(target: Any) -> bool:
    """Whether a function says that it returns a network: loaders, downloaders and the like say something else."""
    if not inspect.isfunction(target):
        return False
    try:
        made = get_type_hints(target).get("return")
    except (NameError, TypeError):
        return False
    return inspect.isclass(made) and issubclass(made, nn.Module)


def architecture(model: nn.Module) -> dict[str, Any]:
    """A finished network as the model it began with and the layers that were wrapped, replaced or resized since.

    Raises:
        UserError: the model it began with cannot be written down.
    """
    start = describe(model)
    made_from = getattr(model, "built_from", None)
    base = build(made_from, allow=[made_from["class_path"].partition(".")[0]]) if made_from else None
    changes = [] if base is None else list(_changes(base, model, ""))
    return {"model": _without_fetching(start), "changes": changes}


def _without_fetching(spec: Any) -> Any:
    """The weights are in the run's own file: the record never fetches others."""
    if not isinstance(spec, dict):
        return spec
    arguments = {k: _without_fetching(v) for k, v in (spec.get("init_args") or {}).items()}
    return {**spec, "init_args": {**arguments, **{k: v for k, v in _FETCHING.items() if k in arguments}}}


def _changes(base: nn.Module, final: nn.Module, path: str) -> Iterator[dict[str, Any]]:
    """Innermost first, so that each path is still that of the model it began with."""
    inner = final
    while isinstance(inner, Wrapper):
        inner = inner.layer
    if type(inner) is not type(base):
        yield {"path": path, "module": describe(final)}
        return
    kept = dict(base.named_children())
    for name, child in inner.named_children():
        where = f"{path}.{name}" if path else name
        if name in kept:
            yield from _changes(kept[name], child, where)
        else:
            yield {"path": where, "module": describe(child)}
    if resized := sizes_of(base, inner):
        yield {"path": path, **resized}
    if isinstance(final, Wrapper):
        yield {"path": path, "module": _wrapping(final)}


def _wrapping(module: nn.Module) -> dict[str, Any]:
    if not isinstance(module, Wrapper):
        return ORIGINAL
    arguments = {
        name: _wrapping(module.layer) if name == "layer" else describe(getattr(module, name))
        for name in inspect.signature(type(module)).parameters
    }
    return {"class_path": f"{type(module).__module__}.{type(module).__qualname__}", "init_args": arguments}


def rebuild(record: dict[str, Any], allow: Sequence[str] = ()) -> nn.Module:
    """The network that `architecture` wrote down, with fresh weights.

    Raises:
        UserError: the record is not one of Galago's, or names what may not be imported.
    """
    if not isinstance(record, dict) or not isinstance(record.get("changes", []), list) or "model" not in record:
        raise UserError("this architecture record is not one that Galago writes: `model` and `changes` are missing")
    model = build(record["model"], allow)
    if not isinstance(model, nn.Module):
        raise UserError("this architecture record's `model` is no network")
    for change in record.get("changes", []):
        if "shapes" in change:
            resize(find(model, change["path"]), change)
            continue
        old = model.get_submodule(change["path"]) if _has(model, change["path"]) else None
        model = swap(model, change["path"], build(_filled(change["module"], old), allow))
    return model


def _has(model: nn.Module, path: str) -> bool:
    try:
        find(model, path)
    except UserError:
        return False
    return True


def _filled(spec: Any, original: nn.Module | None) -> Any:
    """The description with the original layer itself wherever it says so."""
    if spec == ORIGINAL:
        return original
    if not isinstance(spec, dict):
        return spec
    return {**spec, "init_args": {k: _filled(v, original) for k, v in (spec.get("init_args") or {}).items()}}
