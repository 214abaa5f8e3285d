"""Training several branches or networks at once: what the methods that do so have in common.

Before training: numbers that make sense, one method alone, batches that do not mix. In a step: the task's losses of
everyone. Afterwards: what ships. `galago.distill.branches` makes the branches, `galago.distill.ensemble` runs them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from galago.batch import Step
from galago.data import Data
from galago.distill.branches import Parallel
from galago.distill.ensemble import Ensemble, Heads, ensemble_in
from galago.distill.teacher import scores
from galago.errors import UserError
from galago.layers import find, flow, swap
from galago.method import Forward
from galago.probe import device_of, evaluating, normalized
from galago.quantize.layer import QuantLayer, QuantOutput


def require_sensible(method: str, branches: int, temperature: float) -> None:
    """Refuses numbers that mean nothing.

    Raises:
        UserError: naming the argument.
    """
    if branches < 2:
        raise UserError(f"{method}: branches is {branches}; give 2 or more")
    if temperature <= 0:
        raise UserError(f"{method}: temperature is {temperature}; give a positive number, usually 3")


def require_single(model: nn.Module, method: str) -> None:
    """Refuses a network that is an ensemble already.

    Raises:
        UserError: naming the method that comes second.
    """
    if ensemble_in(model) is not None:
        raise UserError(f"{method}: the network is branched already; list one method that trains branches or peers")


def require_answers(ensemble: Ensemble, images: Tensor, method: str, path: str) -> None:
    """Runs all branches once.

    Args:
        ensemble: as it will train.
        images: `examples`.
        method: whose ensemble it is.
        path: where its branches begin, for the message.

    Raises:
        UserError: something from before the fork is used behind it, or the networks tell other classes apart.
    """
    try:
        with evaluating(ensemble), torch.no_grad():
            heads = ensemble.heads(images)
    except (RuntimeError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"{method}: the network cannot be branched at {path!r} ({str(error).partition(chr(10))[0]});"
            " name a layer, such as a whole stage, that everything behind it reads alone"
        ) from error
    if len(heads.joint) != len(images):
        raise UserError(f"{method}: what is fused comes from before {path!r}; name a layer of every branch in features")
    shapes = {tuple(answer.shape) for answer in (*heads.branches, heads.joint)}
    if len(shapes) > 1 or any(len(shape) != 2 or shape[0] != len(images) for shape in shapes):
        found = ", ".join("×".join(map(str, shape)) for shape in sorted(shapes))
        raise UserError(f"{method}: every branch or peer must give scores for the same classes, but they give {found}")


def require_recorded(model: nn.Module, method: str) -> None:
    """Refuses what could be trained, but not loaded again.

    Raises:
        UserError: something that ships beside the network was quantized.
    """
    ensemble = ensemble_in(model)
    beside = [] if ensemble is None or not ensemble.together else [ensemble.joint, *ensemble.peers]
    if any(isinstance(part, QuantLayer | QuantOutput) for network in beside for part in network.modules()):
        raise UserError(f"{method}: what ships beside the network stays float; list Quantize in front of {method}")


def examples(data: Data, device: torch.device, count: int) -> Tensor:
    """The example so many times, normalized. As many as there are branches show any mixing-up of their batches."""
    image = normalized(data, data.example()[:1], device)
    return image.repeat(count, *[1] * (image.ndim - 1))


def in_every_branch(model: nn.Module, path: str) -> list[str]:
    """Where a layer is found in a branched network: once, or in every copy of the layer that contains it.

    Args:
        model: whose layers have been replaced by `Parallel`s.
        path: of the layer in the network as it was.
    """
    parts = path.split(".")
    for number in range(1, len(parts)):
        around, inside = ".".join(parts[:number]), ".".join(parts[number:])
        layer = find(model, around)
        if isinstance(layer, Parallel):
            copies = ["layer", *(f"others.{other}" for other in range(layer.count - 1))]
            return [f"{around}.{one}.{inside}" for one in copies]
    return [path]


def judged(step: Step, inner: Forward) -> tuple[Step, Heads]:
    """A step with the task's losses of everyone whose answer is not its output already; and what everyone said.

    Args:
        step: of a training pass.
        inner: what made it.
    """
    ensemble = ensemble_in(inner.model)
    assert ensemble is not None, "a method that trains branches puts an ensemble in the model's place"
    said = ensemble.said()
    heads = Heads([scores(one) for one in said.branches], scores(said.joint))
    named = {f"branch_{number}": one for number, one in enumerate(heads.branches, 1)}
    named |= {ensemble.joint.title: heads.joint}
    named.pop(ensemble.joint.title if ensemble.together else "branch_1")
    for name, answer in named.items():
        step = step.add(**{f"{loss}_{name}": value for loss, value in inner.task.losses(answer, step.batch).items()})
    return step, heads


def shipped(model: nn.Module, images: Tensor) -> nn.Module:
    """What is left when training is over: the ensemble where it ships together, else the first branch as it was.

    Args:
        model: as it was trained.
        images: `examples`.
    """
    ensemble = ensemble_in(model)
    if ensemble is None:
        return model
    if ensemble.together:
        return without_idle_quantizers(model, images.to(device_of(model)))
    for path, part in reversed(list(model.named_modules(remove_duplicate=False))):
        if isinstance(part, Parallel | Ensemble):
            model = swap(model, path, part.layer)
    ensemble.unwatch(model)
    return model


def without_idle_quantizers(model: nn.Module, images: Tensor) -> nn.Module:
    """Layers whose result does not reach the answer (branches' own classifiers) in float: no file will hold them."""
    with evaluating(model):
        seen = flow(model, images)
    reached = {number for given in seen.gave[""] for number in given}
    for call in reversed(seen.calls):
        if not reached.isdisjoint(call.outputs):
            reached.update(call.inputs)
    for path, part in reversed(list(model.named_modules(remove_duplicate=False))):
        gave = {number for given in seen.gave.get(path, []) for number in given}
        if isinstance(part, QuantLayer | QuantOutput) and gave and reached.isdisjoint(gave):
            model = swap(model, path, part.layer)
    return model
