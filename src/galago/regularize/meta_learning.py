"""MLTP, meta-learning based training procedure: a step on one half of a batch is to help the other half too.

Xiang Deng, Zhongfei Zhang, "Is the Meta-Learning Idea Able to Improve the Generalization of Deep Neural Networks on the
Standard Supervised Learning?", ICPR 2020, arXiv:2002.12455.

Each batch is halved into a current task A and a new task B. A gradient step on A is taken on trial, and the loss of B
behind it is minimized together with the loss of A; to first order that rewards gradients of A and B that agree.

    θ' = θ - α ∇L_A(θ),   L(θ) = L_A(θ) + β L_B(θ')
    ∇L = ∇L_A(θ) + β (I - α H_A(θ)) ∇L_B(θ')           second order, H_A the Hessian of L_A
    ∇L ≈ ∇L_A(θ) + β ∇L_B(θ')                          first order

When: classifiers trained from scratch, with time to spare. First order adds a backward pass for half of each batch,
second order about as much again and the memory of a graph of the gradient: 1.4 and 2.1 times the time of a step of
ResNet-20 on a CPU. Compare at equal time too. List it first: what is listed behind it acts on each half and is part of
its loss, what stands before it sees both halves put together again.

Usual setting, the defaults: β = 1, α equal to the learning rate, second order up to a million parameters. SGD with
momentum 0.9 at 0.1, a tenth of it at 50 % and 75 %, decay 5e-4, batches of 128.
Recipe: recipes/regularize/mltp_resnet20_cifar10.yaml.

Only the abstract of the paper could be had, and no code is public. It says that a batch is a task and that a step on
one is to improve a new one; objective, setting and all that follows are chosen here:

- Halves of one batch, so that an epoch shows each image once; of an odd batch A has one image more.
- α is `rate` times `schedule`, since no method sees the optimizer: give it those of the recipe. Parameters that ask for
  a learning-rate factor of their own have it here too. Weight decay and momentum belong to the real step alone.
- BatchNorm at θ' normalizes B by itself and writes down nothing: running statistics follow A, once a batch.
- Dropout draws anew for each half.
- Quantizers round straight through, with no second derivative to speak of: a network with any learns by first order.
  In second order the network is not compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from galago.batch import Batch, Step
from galago.errors import UserError
from galago.method import Forward, Method
from galago.quantize.quantizer import Quantizer
from galago.schedule import Cosine, Schedule

SMALL = 1_000_000  # parameters up to which second order is the default


def virtual_step(
    loss: Tensor, theta: Mapping[str, Tensor], alpha: Mapping[str, float], second_order: bool
) -> dict[str, Tensor]:
    """`θ' = θ - α ∇L_A(θ)`, new tensors; what the loss does not depend on stays as it is.

    Args:
        loss: L_A, a scalar whose graph leads to θ and is kept.
        theta: θ by name.
        alpha: of each.
        second_order: whether gradients flow through ∇L_A; otherwise it counts as a constant.

    >>> theta = torch.tensor(2.0, requires_grad=True)
    >>> virtual_step(theta.square() / 2, {"theta": theta}, {"theta": 0.1}, second_order=True)["theta"].detach()
    tensor(1.8000)
    """
    found = torch.autograd.grad(
        loss, list(theta.values()), create_graph=second_order, retain_graph=True, allow_unused=True
    )
    named = zip(theta.items(), found, strict=True)
    return {name: own if its is None else own - alpha[name] * its for (name, own), its in named}


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The first and the second half of every tensor; of an odd number the first has one more.

    Raises:
        UserError: there is nothing to divide.
    """
    count = len(batch.input)
    if count < 2:
        raise UserError("MLTP halves each batch, but a batch holds a single image; make batch_size larger")
    middle = (count + 1) // 2
    return tree_map(lambda tensor: tensor[:middle], batch), tree_map(lambda tensor: tensor[middle:], batch)


class MLTP(Method):
    """Learns from each step's effect on images that it was not taken on.

    Args:
        beta: weight of the new task's loss.
        rate: learning rate of the step on trial; give it the optimizer's.
        schedule: factor on that rate over the training; give it the recipe's.
        second_order: differentiate through the step on trial; null does so up to a million parameters, where there are
            no quantizers.
    """

    def __init__(
        self,
        beta: float = 1.0,
        rate: float = 0.1,
        schedule: Schedule = Cosine(),  # noqa: B008 - has no state
        second_order: bool | None = None,
    ) -> None:
        super().__init__()
        if beta < 0 or rate < 0:
            raise UserError(f"MLTP: beta is {beta:g} and rate {rate:g}; give 0 or more, usually 1 and the optimizer's")
        self.beta, self.rate, self.schedule, self.second_order = beta, rate, schedule, second_order

    def step(self, batch: Batch, inner: Forward) -> Step:
        return self.learn(*halves(batch), inner)

    def learn(self, current: Batch, new: Batch, inner: Forward) -> Step:
        """Both tasks in one step: the losses of A, and those of B behind the step on trial as `…_after_step`."""
        exact = self.exact(inner.model)
        with torch.compiler.set_stance("force_eager") if exact else nullcontext():
            now = inner(current)
            theta = {name: own for name, own in inner.model.named_parameters() if own.requires_grad}
            factors = rate_factors(inner.model)
            alpha = {name: self.rate * self.schedule(inner.progress) * factors[name] for name in theta}
            later = elsewhere(inner, virtual_step(now.loss, theta, alpha, exact), new)
        seen = (now.batch, now.output), (later.batch, later.output)
        both, output = tree_map(lambda first, second: torch.cat([first, second]), *seen)
        after = {f"{name}_after_step": self.beta * loss for name, loss in later.losses.items()}
        return Step(both, output, now.losses).add(**after)

    def exact(self, model: nn.Module) -> bool:
        """Whether gradients flow through the step on trial.

        Raises:
            UserError: they are to, and cannot.
        """
        quantized = any(isinstance(module, Quantizer) for module in model.modules())
        if self.second_order is None:
            return not quantized and sum(own.numel() for own in model.parameters()) <= SMALL
        if self.second_order and quantized:
            raise UserError(
                "MLTP: second_order is true, but quantizers have no second derivative; leave it out, or set it to false"
            )
        return self.second_order


def rate_factors(model: nn.Module) -> dict[str, float]:
    """Every parameter's factor on the learning rate, as its module asks for it."""
    factors: dict[str, float] = {}
    for path, module in model.named_modules():
        asked: Callable[[], tuple[float, float | None]] | None = getattr(module, "own_rates", None)
        factor = 1.0 if asked is None else asked()[0]
        factors |= {f"{path}.{name}".strip("."): factor for name, _ in module.named_parameters(recurse=False)}
    return factors


def elsewhere(inner: Forward, theta: Mapping[str, Tensor], batch: Batch) -> Step:
    """The rest of the list on a batch, with the model's parameters at `theta`; its buffers stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in inner.model.named_buffers()}
    for tensor in theta.values():
        tensor.__dict__["_is_param"] = True  # by which `get_parameter`, as quantized layers use it, knows a parameter
    tensors = {f"model.{name}": tensor for name, tensor in {**theta, **buffers}.items()}
    step: Step = functional_call(_Rest(inner), tensors, (batch,))
    return step


class _Rest(nn.Module):
    """What is still to come, as a module, so that the model within can be called with other tensors."""

    def __init__(self, inner: Forward) -> None:
        super().__init__()
        self.model, self.inner = inner.model, inner

    def forward(self, batch: Batch) -> Any:
        return self.inner(batch)
