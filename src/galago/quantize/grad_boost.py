"""GradBoost: noise that enlarges gradients and never turns them around, for quantized training from random weights.

Kim, Yoo and Yang, "A Study on Optimal INT8 Quantization-aware Training from Scratch", 2020, arXiv:2006.09679 (versions
1 and 2; later ones became "FrostNet").

Rounding leaves a network that starts from scratch in places where gradients are small. An optimizer with GradBoost
remembers how small and how large each element's gradient has been, and pushes some elements further the way they go,
by a random amount of that spread. The push fades out as training goes on:

    m <- beta m + (1 - beta) min(m, |g|),     M <- beta M + (1 - beta) max(M, |g|),     m = M = |g| at first
    e = clip(|Laplace(0, 1)| (M - m) (1 - nu)^k, kappa) coin sign(g),     g <- g + e

for each element by itself, with a fair coin of 0 or 1 and k the quantized steps so far. SGD gets the new g before
weight decay and momentum, AdamW before its moments. In the float phase of `StatAssist` extremes are gathered and
nothing is added.

When to use it: together with `StatAssist`, at 8 bits from scratch. Name it as the recipe's optimizer. It costs two more
tensors the size of the weights, and a few element-wise operations on each: 2 % of a step of ResNet-20 on a CPU.

Recipe: recipes/quantize/statassist_gradboost_w8a8_resnet20_cifar10.yaml.

Chosen where the paper is not to be had or the public code differs: the formula above is a design choice. The public
code starts m at 0, where it stays, and divides M by 1 - beta^t at every step; the divisions compound, so that M ends up
thousands of times larger than any gradient and e is simply kappa, on half of the elements, for the first thousand or so
steps. `released: true` does the same. There kappa = 0 removes the bound; here it turns the noise off, and null removes
the bound. |Laplace(0, 1)| is drawn as what it is, an exponential variable. The noise follows from `seed` and the number
of steps, which is kept with the optimizer's state: a resumed training draws what an uninterrupted one does, and several
processes draw the same. All parameters are boosted, learned ranges among them. `AdamW` without weight decay is `Adam`.
Gradients are boosted after `clip`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from galago.errors import UserError
from galago.quantize.rest import is_float_step


class Extremes(NamedTuple):
    """How small and how large each element's gradient has been; shaped like the gradient."""

    smallest: Tensor  # m
    largest: Tensor  # M


def track(size: Tensor, before: Extremes | None, beta: float) -> Extremes:
    """`m` and `M` after one more gradient of the given size.

    >>> track(torch.tensor(3.0), Extremes(torch.tensor(1.0), torch.tensor(1.0)), beta=0.5)
    Extremes(smallest=tensor(1.), largest=tensor(2.))
    """
    if before is None:
        return Extremes(size.clone(), size.clone())
    smallest, largest = before
    return Extremes(
        smallest.lerp(torch.minimum(smallest, size), 1 - beta), largest.lerp(torch.maximum(largest, size), 1 - beta)
    )


def track_as_released(size: Tensor, before: Extremes | None, beta: float, count: int) -> Extremes:
    """The same as the public code has it: from zero, each result divided by `1 - beta^t` and used again.

    Args:
        size: `|g|`.
        before: none at first.
        beta: how much is kept.
        count: t, the gradients seen, this one included.
    """
    smallest, largest = before or Extremes(torch.zeros_like(size), torch.zeros_like(size))
    found = track(size, Extremes(smallest, largest), beta)
    return Extremes(*(extreme / (1 - beta**count) for extreme in found))


def boost(gradient: Tensor, spread: Tensor, draw: Tensor, kappa: float | None) -> Tensor:
    """The noise e for a gradient: along its sign, `draw` times `spread`, at most `kappa`.

    >>> boost(torch.tensor([-2.0, 0.0, 5.0]), torch.tensor(0.5), torch.tensor([1.0, 1.0, 9.0]), kappa=2.0)
    tensor([-0.5000,  0.0000,  2.0000])
    """
    amount = draw * spread
    return (amount if kappa is None else amount.clamp(max=kappa)) * gradient.sign()


def draw(like: Tensor, coin: bool, generator: torch.Generator) -> Tensor:
    """`|Laplace(0, 1)|` for each element, and 0 for those whose coin shows it.

    One uniform number u in (0, 1] decides both: `-log(2 u)` is negative for one half of all u, and for the other it is
    what is wanted.
    """
    uniform = 1 - torch.empty_like(like).uniform_(generator=generator)
    return (2 * uniform if coin else uniform).log_().neg_().clamp_(min=0)


class GradBoostSGD(SGD):
    """SGD with GradBoost.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: mu.
        weight_decay: added to the boosted gradient.
        nesterov: look ahead, as the paper does.
        kappa: the most that is added to an element of a gradient; 0 adds nothing, null does not bound it.
        fade: nu, by what share the noise shrinks at each step.
        coin: boost half of the elements, at random, rather than all.
        beta: how much of the extremes is kept at each step.
        released: track extremes as the public code does, not as the formulas say.
        seed: of the noise.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        kappa: float | None = 0.001,
        fade: float = 0.01,
        coin: bool = True,
        beta: float = 0.9,
        released: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov)
        remember(self, kappa, fade, coin, beta, released, seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = evaluated(closure)
        with boosted(self):
            super().step()
        return loss


class GradBoostAdamW(AdamW):
    """AdamW with GradBoost; its first beta also keeps the extremes.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: how much of the two moments is kept.
        eps: added to the denominator.
        weight_decay: decoupled: applied to the weights themselves.
        kappa: the most that is added to an element of a gradient; 0 adds nothing, null does not bound it.
        fade: nu, by what share the noise shrinks at each step.
        coin: boost half of the elements, at random, rather than all.
        released: track extremes as the public code does, not as the formulas say.
        seed: of the noise.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        kappa: float | None = 0.001,
        fade: float = 0.01,
        coin: bool = True,
        released: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
        remember(self, kappa, fade, coin, betas[0], released, seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = evaluated(closure)
        with boosted(self):
            super().step()
        return loss


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """The loss, where the optimizer is asked to compute it."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def remember(
    optimizer: Optimizer, kappa: float | None, fade: float, coin: bool, beta: float, released: bool, seed: int
) -> None:
    """Keeps GradBoost's settings where an optimizer's settings are: in its groups.

    Raises:
        UserError: a setting out of range.
    """
    if kappa is not None and kappa < 0:
        raise UserError(f"GradBoost: kappa is {kappa}, but must be 0 or more; null for no bound")
    if not 0 <= fade <= 1:
        raise UserError(f"GradBoost: fade is {fade}; give a number from 0 (never) to 1 (no noise)")
    if not 0 <= beta < 1:
        raise UserError(f"GradBoost: beta is {beta}; give a number from 0 to below 1, usually 0.9")
    settings = {"kappa": kappa, "fade": fade, "coin": coin, "boost_beta": beta, "released": released, "seed": seed}
    optimizer.defaults.update(settings)
    for group in optimizer.param_groups:
        group.update({name: group.get(name, value) for name, value in settings.items()})


@contextmanager
def boosted(optimizer: Optimizer) -> Iterator[None]:
    """Adds the noise to the gradients of an optimizer, whose own step is then taken inside the `with`.

    What is remembered is written down after that step: optimizers take an empty state for a first step.
    """
    given = [(p, group, optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]]
    adding = not is_float_step()
    steps = max((state.get("boosts", 0) for _, _, state in given), default=0) + adding
    generators: dict[torch.device, torch.Generator] = {}
    fresh: dict[nn.Parameter, dict[str, Any]] = {}
    for parameter, group, state in given:
        if (gradient := parameter.grad) is None:
            continue
        count = state.get("gradients", 0) + 1
        before = Extremes(state["smallest"], state["largest"]) if count > 1 else None
        if group["released"]:
            smallest, largest = track_as_released(gradient.abs(), before, group["boost_beta"], count)
        else:
            smallest, largest = track(gradient.abs(), before, group["boost_beta"])
        if adding:
            if (device := gradient.device) not in generators:
                generators[device] = seeded(group["seed"], steps, device)
            spread = (largest - smallest) * (1 - group["fade"]) ** steps
            gradient.add_(boost(gradient, spread, draw(gradient, group["coin"], generators[device]), group["kappa"]))
        fresh[parameter] = {"smallest": smallest, "largest": largest, "gradients": count, "boosts": steps}
    yield
    for parameter, state in fresh.items():
        optimizer.state[parameter].update(state)


def seeded(seed: int, steps: int, device: torch.device) -> torch.Generator:
    """A generator whose numbers belong to one step, so that the step's number is all the state that it has."""
    mixed = np.random.SeedSequence([seed, steps]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> 1))
