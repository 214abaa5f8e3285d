"""What the methods that hide features from a network have in common: scores, masks, and the head behind a layer.

The formulas and their paper: `galago.regularize.self_challenging`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.layers import classifier, find, removing, tap
from galago.probe import evaluating
from galago.taps import unnoticed

Head = Callable[[Tensor], Tensor]  # from features to scores N×K
MARGIN = 1e-4  # what the true class must lose, at least


def class_gradient(feature: Tensor, target: Tensor, head: Head) -> Tensor:
    """`∂(Σ_b Σ_c t_c z_c) / ∂F`, of the shape of F; no parameter gets a gradient.

    >>> class_gradient(torch.ones(1, 2), torch.tensor([[0.0, 1.0]]), lambda f: f * torch.tensor([3.0, 4.0]))
    tensor([[0., 4.]])
    """
    with torch.enable_grad():
        leaf = feature.detach().requires_grad_()
        score = (head(leaf) * target).sum()
        return torch.autograd.grad(score, leaf)[0]


def place_scores(feature: Tensor, gradient: Tensor) -> Tensor:
    """`Σ_c F ḡ` of each place, N×1×H×W.

    Args:
        feature: F, N×C×H×W.
        gradient: g, likewise.
    """
    return (feature * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True)


def channel_scores(gradient: Tensor) -> Tensor:
    """`ḡ` of each channel, N×C×1×1, of g N×C×H×W."""
    return gradient.mean((2, 3), keepdim=True)


def without_highest(scores: Tensor, share: float) -> Tensor:
    """M: 0 where an image's score is above the sorted one at number ⌈share · n⌉, else 1; of the shape of the scores.

    >>> without_highest(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), 1 / 3)
    tensor([[0., 1., 0., 1.]])
    """
    flat = scores.flatten(1)
    count = min(math.ceil(round(share * flat.shape[1], 9)), flat.shape[1] - 1)
    threshold = flat.sort(1, descending=True).values[:, count : count + 1]
    return (flat <= threshold).to(scores.dtype).view_as(scores)


def only_hurt(mask: Tensor, loss: Tensor, share: float) -> Tensor:
    """M for the images whose loss is above the sorted one at number round(B q), ones for all others.

    Args:
        mask: M, B×….
        loss: Δ, B.
        share: q.

    >>> only_hurt(torch.zeros(3, 1), torch.tensor([0.1, 0.0, 0.3]), 1 / 3).flatten()
    tensor([1., 1., 0.])
    """
    number = min(round(len(loss) * share), len(loss) - 1)
    hurt = loss > loss.sort(descending=True).values[number]
    return torch.where(hurt.view(-1, *[1] * (mask.ndim - 1)), mask, 1.0)


def lost_probability(feature: Tensor, mask: Tensor, target: Tensor, head: Head) -> Tensor:
    """`p_y(h(F)) - p_y(h(F M))` of each image, B."""
    before, after = ((head(one).softmax(1) * target).sum(1) for one in (feature, feature * mask))
    return before - after


def challenge(feature: Tensor, target: Tensor, head: Head, places: bool, share: float, batch_share: float) -> Tensor:
    """The mask M that an image's features are multiplied by, N×1×H×W or N×C×1×1, constant.

    Args:
        feature: F, N×C×H×W.
        target: class probabilities N×K.
        head: from features to scores, as it predicts.
        places: whether places are muted, or channels.
        share: of places or channels that is muted.
        batch_share: q, of the images.
    """
    feature = feature.detach().to(torch.promote_types(feature.dtype, torch.float32))
    gradient = class_gradient(feature, target, head)
    with torch.no_grad():
        scores = place_scores(feature, gradient) if places else channel_scores(gradient)
        mask = without_highest(scores, share)
        lost = lost_probability(feature, mask, target, head)
        return only_hurt(mask, (lost - MARGIN).relu(), batch_share)


@contextmanager
def looking_ahead(head: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within this `with` a head answers in float32 as it predicts, and no tap notices."""
    with ExitStack() as entered:
        for part in head:
            entered.enter_context(evaluating(part))
        entered.enter_context(unnoticed())
        entered.enter_context(torch.autocast(device.type, enabled=False))
        yield


def uncompiled(hook: Any) -> Any:
    """A hook that a compiled network runs as it is written: gradients within a pass are not for the compiler."""
    return torch.compiler.disable(hook)  # type: ignore[no-untyped-call]


def unhook(model: nn.Module, own: object) -> None:
    """Takes a hook out of a network, or out of a copy of it."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number, hook in list(hooks.items()):
                if hook is own:
                    del hooks[number]


def takes_rows(part: nn.Module) -> bool:
    """Whether a module begins with a linear layer (or the dropout in front of one), which takes rows N×D."""
    first = next(one for one in part.modules() if not list(one.children()))
    return isinstance(first, nn.Linear | nn.Dropout)


def near(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are the same but for some rounding, such as a quantizer's."""
    return found.shape == wanted.shape and bool((found - wanted).norm() <= 0.1 * wanted.norm())


def watched(model: nn.Module, path: str, image: Tensor) -> tuple[Any, Any]:
    """What a layer gave out, and what the network did."""
    with tap(model, path) as held:
        output = model(image)
    return held.value, output


def averaged_layer(model: nn.Module, image: Tensor) -> str:
    """The path of the last layer whose map, averaged over places, is what the classifier takes in.

    Args:
        model: in evaluation mode.
        image: normalized, 1×C×H×W.

    Raises:
        UserError: there is none.
    """
    maps: dict[str, Tensor] = {}
    taken: list[Tensor] = []

    def keep(path: str) -> Callable[[nn.Module, object, Any], None]:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            if path and isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
                maps[path] = output

        return hook

    handles = [module.register_forward_hook(keep(path)) for path, module in model.named_modules()]
    head = find(model, classifier(model))
    handles.append(head.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0])))
    with removing(handles):
        model(image)
    for path, output in reversed(maps.items()):
        if taken and near(output.mean((2, 3)), taken[-1]):
            return path
    raise UserError(
        "SelfChallenging: the classifier takes in no layer's averaged map; name a layer and its head, or list it in"
        " front of methods that branch the network"
    )
