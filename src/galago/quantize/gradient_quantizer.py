"""What every gradient quantizer promises: the network's answer stays as it is, its backward pass computes in low bits.

A gradient quantizer stands behind a layer. Forward it changes nothing. Backward it rounds the gradient G that arrives,
before the layer multiplies it with its input and its weight, so that both products have low-bit operands:

    c = gamma max|G|,   step = 2 c / (2^b - 2)          2^b - 1 levels, symmetric, zero among them
    G_hat = step round(clip(G / step + U, -c / step, c / step)),   U ~ Uniform(-1/2, 1/2) for each element

Rounding is stochastic, so that G_hat is G on average wherever nothing is clipped. What kinds of quantizers differ in is
gamma, the share of the largest gradient that the levels span, and how it moves.

Design choices: U comes from the process's own generator, which the recipe seeds and every checkpoint holds (one for
each process), so that a resumed run rounds as if it had not stopped. The generator gives two keys a tensor, and a hash
of keys and position gives each element its U: compiled for a CPU that takes a third of the time of drawing each. A
backward pass has no way to hand a number to the next step but as a gradient. So the share of clipped elements leaves as
the gradient of `report`, a parameter that nothing reads: accumulated batches and data-parallel processes are then
averaged as all gradients are, and the compiler sees a plain function. Its size is kept far below that of other
gradients, so that clipping their norm does not notice. A backward pass that is itself to be differentiated (curvatures)
is left unrounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.layers import Wrapper
from galago.quantize.blocks import extremes, in_blocks
from galago.quantize.calibration import undisturbed

OFF = 32  # bits that leave gradients as they are
SMALLEST_BOUND = 1e-30  # where all gradients are zero
REPORT_SCALE = 2.0**-20
MIXERS = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)  # odd numbers, as signed ones of 32 bits


def stochastically_rounded(gradient: Tensor, bound: Tensor, bits: int, noise: Tensor) -> Tensor:
    """The gradient on `2^bits - 1` levels from `-bound` to `bound`, a new tensor.

    Args:
        gradient: of any shape.
        bound: where values are clipped, a positive scalar.
        bits: width of the integer.
        noise: shape of the gradient, in [-1/2, 1/2).

    >>> stochastically_rounded(torch.tensor([0.3, 0.3, 9.0]), torch.tensor(1.0), 2, torch.tensor([0.1, 0.3, 0.0]))
    tensor([0., 1., 1.])
    """
    largest = largest_code(bits)
    step = bound / largest
    return (gradient / step).add_(noise).clamp_(-largest, largest).round_().mul_(step)


def largest_code(bits: int) -> int:
    """The largest of the symmetric codes."""
    return int(2 ** (bits - 1)) - 1


def noise_like(x: Tensor) -> Tensor:
    """Uniform in [-1/2, 1/2), of the shape and type of `x`: multiples of 2^-24 from a hash of the element's number.

    The process's generator gives the hash its two keys. Mixing as in MurmurHash3's last step, in integers that wrap.
    """
    keys = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=x.device)
    mixed = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) ^ keys[0]
    mixed = (mixed ^ ((mixed >> 16) & 0xFFFF)) * MIXERS[0] ^ keys[1]
    mixed = (mixed ^ ((mixed >> 13) & 0x7FFFF)) * MIXERS[1]
    mixed = mixed ^ ((mixed >> 16) & 0xFFFF)
    return (mixed >> 8).to(x.dtype).mul_(2.0**-24)


def quantized_gradient(gradient: Tensor, gamma: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient in low bits; the share of its elements that were clipped, a scalar; whether that is a number to use.

    Args:
        gradient: what arrives, of any shape and layout; is not changed.
        gamma: the share of its largest element that the levels span, a scalar.
        bits: width of the integer.
    """
    lowest, highest = extremes(gradient)
    wide = torch.promote_types(gradient.dtype, gamma.dtype)
    largest = torch.maximum(-lowest, highest).to(wide)
    bound = gamma * largest

    def compute(part: Tensor) -> tuple[Tensor, Tensor]:
        part = part.to(wide)
        clipped = (part.abs() > bound).sum()
        return stochastically_rounded(part, bound.clamp_min(SMALLEST_BOUND), bits, noise_like(part)), clipped

    quantized, clipped = in_blocks(compute, gradient)
    return quantized.to(gradient.dtype), clipped / gradient.numel(), (largest > 0) & largest.isfinite()


class _QuantizedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gamma: Tensor, report: Tensor, bits: int, target: float) -> Tensor:
        ctx.save_for_backward(gamma.clone())  # it may be started between this pass and the backward one
        ctx.bits, ctx.target, ctx.exact = bits, target, False
        return y.clone()  # not a view, which what follows could not change in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gamma,) = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            ctx.exact = True  # also when what comes of it is differentiated
        if ctx.exact:
            return grads[0], None, None, None, None
        quantized, share, usable = quantized_gradient(grads[0], gamma.detach(), ctx.bits)
        excess = (share - ctx.target) * usable * REPORT_SCALE
        return quantized, None, excess.to(gamma.dtype), None, None


class GradientQuantizer(nn.Module, ABC):
    """Passes a layer's output on as it is, and the gradient in it back in low bits.

    Every constructor argument is kept as an attribute of the same name.

    Attributes:
        bits: width of the integer, 2 to 8; 32 leaves gradients as they are.
        gamma: the share of the largest gradient that the levels span, in (0, 1].
        report: its gradient is by how much more elements were clipped than `target`, in units of `REPORT_SCALE`.
    """

    gamma: Tensor

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        if not (2 <= bits <= 8 or bits == OFF):
            raise UserError(f"{type(self).__name__}: bits is {bits}, but must be 2 to 8, or {OFF} for no rounding")
        self.bits = bits
        self.register_buffer("gamma", torch.ones(()))
        self.report = nn.Parameter(torch.zeros(()))

    @property
    def target(self) -> float:
        """The share of elements that is to be clipped."""
        return 0.0

    def forward(self, y: Tensor) -> Tensor:
        if self.bits == OFF or not self.training:
            return y
        passed: Tensor = _QuantizedGradient.apply(y, self.gamma, self.report, self.bits, self.target)
        return passed

    def start(self, gradient: Tensor) -> None:
        """Sets gamma from the first gradient, before the first step. By default it stays as it is."""

    @abstractmethod
    def follow(self, excess: Tensor) -> None:
        """Moves gamma, given the share of elements clipped in a step less `target`, times any positive number."""

    @torch.no_grad()
    def adapt(self) -> None:
        """Once after each backward pass, or after several: moves gamma, and hides the report from the optimizer."""
        if self.report.grad is not None:
            self.follow(self.report.grad)
            self.report.grad = None

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class QuantGradient(Wrapper):
    """A layer into which gradients come back quantized. Parameters stay the same objects.

    Args:
        layer: gives one tensor.
        gradient_quantizer: for the gradient in that tensor.
    """

    def __init__(self, layer: nn.Module, gradient_quantizer: GradientQuantizer) -> None:
        super().__init__(layer)
        self.gradient_quantizer = gradient_quantizer

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        output: Tensor = self.gradient_quantizer(self.layer(*args, **kwargs))
        return output


def gradient_quantizers(model: nn.Module) -> dict[str, GradientQuantizer]:
    """All of them in a network, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, GradientQuantizer)}


def arriving_gradients(model: nn.Module, others: Sequence[nn.Module], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradient that arrives at each quantizer, unrounded, from a side trip that leaves no trace.

    Args:
        model: the network.
        others: further modules that take part, and whose buffers are to be as before.
        loss: runs the network and gives what is to be differentiated, a scalar.

    Returns:
        By path, of the shape of the layer's output; in a row for a layer that ran several times.
    """
    outputs: dict[str, list[Tensor]] = {}

    def keeping(path: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            kept = output if output.requires_grad else output.detach().requires_grad_()  # of a frozen network
            outputs.setdefault(path, []).append(kept)
            return kept

        return keep

    hooks = [quantizer.register_forward_hook(keeping(path)) for path, quantizer in gradient_quantizers(model).items()]
    try:
        with undisturbed([model, *others]):
            value = loss()
            given = [output for several in outputs.values() for output in several]
            found = iter(torch.autograd.grad(value, given, materialize_grads=True) if given else ())
    finally:
        for hook in hooks:
            hook.remove()
    arrived = {path: [next(found) for _ in several] for path, several in outputs.items()}
    return {path: g[0] if len(g) == 1 else torch.cat([one.flatten() for one in g]) for path, g in arrived.items()}
