"""LIF: leaky integrate-and-fire neurons, which answer in spikes over time instead of in numbers.

Emre O. Neftci, Hesham Mostafa, Friedemann Zenke, "Surrogate Gradient Learning in Spiking Neural Networks", IEEE Signal
Processing Magazine 2019, arXiv:1901.09948.

A neuron's membrane adds up what comes in and leaks; where it reaches the threshold it fires a spike, 0 or 1, and
starts again from zero. The step has no slope, so training takes that of a fast sigmoid in its place.

    U[t] = β U[t-1] (1 - S[t-1]) + I[t],   S[t] = 1[U[t] ≥ ϑ],   U[0] = S[0] = 0
    dS/dU = 1 / (1 + κ |U - ϑ|)²,   S[t-1] in the reset is a constant
    dL/dI[t] = dL/dU[t] = dL/dS[t] dS/dU[t] + β (1 - S[t]) dL/dU[t+1]

When: in networks for neuromorphic hardware, where a spike costs energy and silence none. On ordinary processors time
steps cost as much as so many images; memory for training grows linearly with them.

Usual setting (the defaults): β 0.9, ϑ 1, κ 10.

Time is the last axis everywhere. Design choices: spikes that are equally many are told apart by the membranes
(`SpikeCount`), which count for a hundredth of a spike and have no gradient, so that the loss is that of the counts.
Membranes add up in float32 even where layers compute in half precision. In a file the steps are written out and a
spike is a comparison: a membrane that meets the threshold to the last digit may fire in one engine and not in another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from galago.errors import UserError

TIE = 0.01  # of a spike: what membranes may add to a count


def surrogate(membrane: Tensor, threshold: float, slope: float) -> Tensor:
    """`1 / (1 + κ |U - ϑ|)²`, the slope of a fast sigmoid; any shape.

    >>> surrogate(torch.tensor([1.0, 1.1]), threshold=1.0, slope=10.0)
    tensor([1.0000, 0.2500])
    """
    return (1 + slope * (membrane - threshold).abs()) ** -2


def fire(membrane: Tensor, threshold: float, slope: float) -> Tensor:
    """`1[U ≥ ϑ]`, with the surrogate as its gradient.

    >>> fire(torch.tensor([0.9, 1.0, 1.1]), threshold=1.0, slope=10.0)
    tensor([0., 1., 1.])
    """
    spike: Tensor = _Fire.apply(membrane, threshold, slope)
    return spike


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, membrane: Tensor, threshold: float, slope: float) -> Tensor:
        ctx.save_for_backward(membrane)
        ctx.threshold, ctx.slope = threshold, slope
        return (membrane >= threshold).to(membrane.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (membrane,) = ctx.saved_tensors
        return grads[0] * surrogate(membrane, ctx.threshold, ctx.slope), None, None


def integrate(membrane: Tensor, spike: Tensor, current: Tensor, leak: float) -> Tensor:
    """The next membrane, `β U (1 - S) + I`; the reset is a constant."""
    return leak * membrane * (1 - spike.detach()) + current


def leaky_integrate_and_fire(current: Tensor, leak: float, threshold: float, slope: float) -> Tensor:
    """Spikes S of one recursion over the last axis, which begins at rest.

    Args:
        current: I, N×…×T.
        leak: β.
        threshold: ϑ.
        slope: κ.

    >>> leaky_integrate_and_fire(torch.tensor([[0.6, 0.6, 0.6, 0.6]]), leak=0.9, threshold=1.0, slope=10.0)
    tensor([[0., 1., 0., 1.]])
    """
    membrane = spike = at_rest(current)
    spikes = []
    for now in current.unbind(-1):
        membrane = integrate(membrane, spike, now, leak)
        spike = fire(membrane, threshold, slope)
        spikes.append(spike)
    return over_time(spikes)


def membranes(current: Tensor, spikes: Tensor, leak: float) -> Tensor:
    """U of the neurons that answered `current` with `spikes`; all N×…×T.

    >>> membranes(torch.tensor([[0.6, 0.6, 0.6]]), torch.tensor([[0.0, 1.0, 0.0]]), leak=0.5)
    tensor([[0.6000, 0.9000, 0.6000]])
    """
    membrane = spike = at_rest(current)
    found = []
    for now, next_spike in zip(current.unbind(-1), spikes.unbind(-1), strict=True):
        membrane, spike = integrate(membrane, spike, now, leak), next_spike
        found.append(membrane)
    return over_time(found)


def at_rest(current: Tensor) -> Tensor:
    """Membranes N×… of zero, in float32 at least: what is added up loses too much in half precision."""
    return torch.zeros_like(current[..., 0], dtype=torch.promote_types(current.dtype, torch.float32))


def over_time(moments: Sequence[Tensor]) -> Tensor:
    """Tensors of all steps as one with time last; each step's values stay together in memory."""
    return torch.stack(list(moments)).movedim(0, -1)


def at_each_step(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer applied at every step of N×…×T, all steps as one batch: BatchNorm in it is shared over time.

    >>> at_each_step(nn.Conv2d(1, 2, 3), torch.zeros(5, 1, 4, 4, 7)).shape
    torch.Size([5, 2, 2, 2, 7])
    """
    every = layer(x.movedim(-1, 0).flatten(0, 1))
    return every.view(x.shape[-1], -1, *every.shape[1:]).movedim(0, -1)


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons, one for each place: currents N×…×T to spikes of the same shape.

    Args:
        leak: what is left of a membrane after one step, 0 to 1.
        threshold: where a neuron fires.
        slope: how steep the surrogate gradient falls away from the threshold.
    """

    def __init__(self, leak: float = 0.9, threshold: float = 1.0, slope: float = 10.0) -> None:
        super().__init__()
        if not 0 <= leak <= 1 or threshold <= 0 or slope < 0:
            raise UserError(
                f"LIF: leak {leak}, threshold {threshold}, slope {slope}; give a leak from 0 to 1, usually 0.9, a"
                " threshold above 0, usually 1, and a slope of at least 0, usually 10"
            )
        self.leak, self.threshold, self.slope = leak, threshold, slope

    def forward(self, current: Tensor) -> Tensor:
        return leaky_integrate_and_fire(current, self.leak, self.threshold, self.slope)


class SpikeCount(nn.Module):
    """Class scores of output neurons: how often each fired; of equal counts the larger sum of membranes wins.

        z = c/N_t (n + 0.01 u / (1 + |u|)),   n = Σ_t S,   u = (1/N_t) Σ_t U, a constant

    Args:
        scale: c, the score of a neuron that always fires.
    """

    def __init__(self, scale: float = 10.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, spikes: Tensor, membrane: Tensor) -> Tensor:
        """Spikes and membranes N×K×T to scores N×K."""
        mean = membrane.detach().mean(-1)
        return self.scale / spikes.shape[-1] * (spikes.sum(-1) + TIE * mean / (1 + mean.abs()))
