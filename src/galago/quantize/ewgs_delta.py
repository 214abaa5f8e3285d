"""EWGSDelta: how strongly EWGS scales gradients, from the curvature of the loss.

Lee, Kim and Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv:2104.00903, section 3.3.

The gradient at the value before rounding is, to first order, that at the rounded one plus the Hessian times the
distance. With the Hessian's mean diagonal for the Hessian and a typical large gradient G for the gradient's size, that
is EWGS's rule with

    delta = max(0, mean over batches of (Tr(H) / n) / G),   G = 3 std(g)

g and H are gradient and Hessian of the training loss in a quantizer's rounded values q in [0, 1], n of them. The trace
is Hutchinson's: the mean of v'Hv over vectors v of random signs, each from differentiating g'v once more.

When to use it: with `EWGS` and `EWGSWeight` at 1 to 3 bits, where it is worth about a point over the straight-through
estimator. Cost: up to `draws` backward passes a quantizer and batch, so some 3,000 for ResNet-20, once in `every`
epochs. List it behind `Quantize`; losses of methods listed behind this one count, of those before it do not.

Recipe: recipes/quantize/paper/ewgs_w2a2_resnet20_cifar10.yaml.

Chosen where the paper is silent: draws stop once the running mean changes by less than a thousandth of its absolute
value (the public code divides by the signed mean and so stops at once where it is negative). Delta is at most 2 N, so
that no gradient changes its sign. A quantizer that runs several times in one pass gets the mean over its runs. Random
state and BatchNorm statistics are as before afterwards, and the pass is in float32 whatever the run's precision.
With several processes the first one's estimate counts, since it is the one whose buffers are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method
from galago.quantize.calibration import undisturbed
from galago.quantize.ewgs import EWGS


class Curvature(NamedTuple):
    """What a loss does around one tensor."""

    trace: float  # of the Hessian
    gradient: Tensor  # shape of the tensor


def hutchinson(product: Callable[[Tensor], Tensor], like: Tensor, draws: int = 50, tolerance: float = 1e-3) -> float:
    """The trace of a symmetric matrix, given as a function from v to Hv: the mean of v'Hv over random signs v.

    Args:
        product: multiplies a tensor of the shape of `like` with the matrix.
        like: gives shape, type and device.
        draws: at most this many.
        tolerance: stops once the mean changes, from one draw to the next, by less than this share of itself.

    >>> hutchinson(lambda v: torch.tensor([1.0, 2.0, 3.0]) * v, torch.zeros(3))  # exact for a diagonal matrix
    6.0
    """
    mean = 0.0
    for drawn in range(1, draws + 1):
        signs = torch.randint_like(like, 2).mul_(2).sub_(1)
        before, mean = mean, mean + (float((signs * product(signs)).sum()) - mean) / drawn
        if drawn > 1 and abs(mean - before) < tolerance * abs(mean):
            break
    return mean


def curvatures(loss: Tensor, tensors: Sequence[Tensor], draws: int, tolerance: float) -> list[Curvature]:
    """Gradient and Hessian trace of a loss in each of several tensors of its graph."""
    gradients = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
    return [
        Curvature(hutchinson(hessian_of(gradient, tensor), gradient.detach(), draws, tolerance), gradient.detach())
        for gradient, tensor in zip(gradients, tensors, strict=True)
    ]


def hessian_of(gradient: Tensor, tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """The Hessian as a function from v to Hv: the gradient, differentiated once more along v."""

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:  # the loss is linear in the tensor
            return torch.zeros_like(v)
        return torch.autograd.grad(gradient, tensor, v, retain_graph=True, materialize_grads=True)[0]

    return product


def ratio(curvature: Curvature, span: float) -> float:
    """`(Tr(H) / n) / (3 std(g))` in the values q in [0, 1], where the tensor is `span` times q."""
    gradient = curvature.gradient
    large = (3 * span * gradient.std()).clamp_min(torch.finfo(gradient.dtype).tiny)
    return float(span**2 * curvature.trace / gradient.numel() / large)


class EWGSDelta(Method):
    """Sets the gradient scaling of EWGS quantizers from the Hessian's trace; list it behind `Quantize`.

    Args:
        every: epochs between estimates; the first comes after as many (paper: 10 for CIFAR, 1 for ImageNet).
        batches: training batches that an estimate averages over (paper: 3 and 10).
        images: how many images of a batch are used; none: all (paper: 16 for ImageNet).
        draws: random vectors a trace, at most.
        tolerance: relative change of a trace at which drawing stops.
    """

    def __init__(
        self,
        every: int = 10,
        batches: int = 3,
        images: int | None = None,
        draws: int = 50,
        tolerance: float = 1e-3,
    ) -> None:
        super().__init__()
        for name, value in (("every", every), ("batches", batches), ("draws", draws), ("images", images)):
            if value is not None and value < 1:
                raise UserError(f"EWGSDelta: {name} is {value}, but must be at least 1")
        self.every, self.batches, self.images = every, batches, images
        self.draws, self.tolerance = draws, tolerance
        self.seen = batches  # batches of the running estimate that are done; `batches`: none is running
        self.ratios: dict[str, float] = {}  # their sums, by the quantizer's path

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        if not scaled_quantizers(model):
            raise UserError("EWGSDelta finds no EWGS quantizer: list it behind Quantize, and use EWGS there")
        return model

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        if epoch > 0 and epoch % self.every == 0:
            self.seen, self.ratios = 0, {}
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        """The step itself, after a second-order pass on the first few batches of an epoch that has an estimate."""
        if self.seen < self.batches:
            self.look(batch, inner)
            self.seen += 1
            if self.seen == self.batches:
                self.settle(inner.model)
        return inner(batch)

    def look(self, batch: Batch, inner: Forward) -> None:
        """Adds one batch's ratios to the sums."""
        if (count := self.images) is not None:
            batch = tree_map_only(Tensor, lambda tensor: tensor[:count], batch)
        modules = [inner.model, *inner.methods]
        with undisturbed(modules), captured(inner.model) as outputs:
            loss = inner(batch).loss
            places = [(path, output) for path, given in outputs.items() for output in given]
            if not places:  # the layers rest
                return
            found = curvatures(loss, [output for _, output in places], self.draws, self.tolerance)
        spans = {path: quantizer.span for path, quantizer in scaled_quantizers(inner.model).items()}
        for (path, _), curvature in zip(places, found, strict=True):
            share = ratio(curvature, spans[path]) / len(outputs[path])
            self.ratios[path] = self.ratios.get(path, 0.0) + share

    def settle(self, model: nn.Module) -> None:
        """Gives each quantizer its delta: the mean over the batches first, then the clip."""
        for path, quantizer in scaled_quantizers(model).items():
            if path in self.ratios:
                quantizer.delta.fill_(min(max(self.ratios[path] / self.batches, 0.0), 2.0 * quantizer.steps))
        self.ratios = {}

    def get_extra_state(self) -> dict[str, Any]:
        """An estimate may be under way when a checkpoint is written."""
        return {"seen": self.seen, "ratios": dict(self.ratios)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen, self.ratios = int(state["seen"]), dict(state["ratios"])


def scaled_quantizers(model: nn.Module) -> dict[str, EWGS]:
    """The quantizers that have a delta, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, EWGS)}


@contextmanager
def captured(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collects what each quantizer with a delta gives out, with its graph, as long as the `with` lasts."""
    outputs: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks:
        for path, quantizer in scaled_quantizers(model).items():

            def keep(module: nn.Module, inputs: Any, output: Tensor, path: str = path) -> None:
                if output.requires_grad:
                    outputs.setdefault(path, []).append(output)

            hooks.callback(quantizer.register_forward_hook(keep).remove)
        yield outputs
