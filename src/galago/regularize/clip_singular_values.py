"""Singular value clipping: every hundred steps, no direction of a layer's input may be enlarged beyond a limit.

Hanie Sedghi, Vineet Gupta, Philip M. Long, "The Singular Values of Convolutional Layers", ICLR 2019, arXiv:1805.10408
(recalled); here as the baseline of "Large Norms of CNN Layers Do Not Hurt Adversarial Robustness" (2020).

A convolution over an image without borders is one small matrix for each frequency. Their singular values are clipped,
and the kernel is what is left of the result at the places of its taps.

    K̂_ω = Σ_t K_t e^(-2πi ω·t / n) = U S Vᴴ,   O×C for each frequency ω of an image of n = H×W
    K ← crop( inverse FFT( U min(S, limit) Vᴴ ) )

When: to compare with `galago.regularize.norm_decay`, or to bound how much a layer can enlarge. It costs a
decomposition of H·W matrices a layer, a second or so for a ResNet-20 on a processor, in one step of `every`.

Usual setting (official scripts of 2020): every 100 steps; a limit of 2, 1.5, 1, 0.5 or 0.1. No recipe yet.

Exact for the circular convolution of stride 1 before the crop, so that afterwards a norm may be a little above the
limit; the crop leaves less each time. Chosen here: kernels of a stride are clipped as if theirs were 1, which bounds
them all the same; taps of a dilation stand where they are in the image; groups are clipped one by one. Weights that are
exactly zero (pruned) stay zero. As in norm decay, layers that do not run when the network predicts are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.method import Method
from galago.regularize.operators import Layers, Placed, weight_of


def spectrum(kernel: Tensor, size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """K̂, ω×…×O×C: one matrix a frequency of an image of that size; half of them where the rest is their mirror image.

    Args:
        kernel: O×C×taps, along any number of axes.
        size: n of each axis; where the kernel reaches further, it counts as large as that.
        dilation: of each axis.

    >>> spectrum(torch.ones(1, 1, 2), [2], [1]).flatten().real
    tensor([2., 0.])
    """
    if not size:
        return kernel
    found: Tensor = torch.fft.rfftn(_spread(kernel, size, dilation), dim=_axes(size))
    return found.movedim((0, 1), (-2, -1))


def clipped(kernel: Tensor, size: Sequence[int], dilation: Sequence[int], limit: float) -> Tensor:
    """The kernel O×C×taps with no singular value above the limit, but for what the crop leaves.

    >>> clipped(torch.tensor([[3.0, 0.0], [0.0, 0.5]]), [], [], 1.0)
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    u, s, v = torch.linalg.svd(spectrum(kernel, size, dilation), full_matrices=False)
    lowered: Tensor = (u * s.clamp_max(limit).unsqueeze(-2).to(u.dtype)) @ v
    if not size:
        return lowered
    wide = _extent(kernel, size, dilation)
    whole: Tensor = torch.fft.irfftn(lowered.movedim((-2, -1), (0, 1)), s=wide, dim=_axes(size))
    return whole[_taps(kernel, dilation)]


def _axes(size: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(2, 2 + len(size)))


def _extent(kernel: Tensor, size: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [max(n, d * (k - 1) + 1) for n, d, k in zip(size, dilation, kernel.shape[2:], strict=True)]


def _taps(kernel: Tensor, dilation: Sequence[int]) -> tuple[slice, ...]:
    steps = (slice(0, d * (k - 1) + 1, d) for d, k in zip(dilation, kernel.shape[2:], strict=True))
    return (slice(None), slice(None), *steps)


def _spread(kernel: Tensor, size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The kernel with its taps where they are in an image of zeros."""
    image = kernel.new_zeros(*kernel.shape[:2], *_extent(kernel, size, dilation))
    image[_taps(kernel, dilation)] = kernel
    return image


class ClipSingularValues(Method):
    """Clips the singular values of every convolution and linear layer, every so many steps.

    Args:
        limit: the largest singular value that stays.
        every: how many steps from one clipping to the next.
    """

    def __init__(self, limit: float = 1.0, every: int = 100) -> None:
        super().__init__()
        if limit <= 0 or every < 1:
            raise UserError(f"ClipSingularValues: limit {limit:g} must be above 0, every {every} at least 1")
        self.limit, self.every = limit, every
        self.steps = 0
        self._layers: Layers | None = None

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def set_extra_state(self, state: Any) -> None:
        self.steps = int(state["steps"])

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing in the model; finds out at which sizes its layers run."""
        self._layers = Layers(model, data, "ClipSingularValues")
        return model

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        """Clips behind the optimizer's step, where it is one of those."""
        assert self._layers is not None, "prepare comes first"
        apply()
        self.steps += 1
        if self.steps % self.every == 0:
            for placed in self._layers.of(model):
                self.clip(placed)

    def clip(self, placed: Placed) -> None:
        """Clips one layer, group by group; what is exactly zero stays zero."""
        weight, groups = weight_of(placed), placed.operator.groups
        dilation = getattr(placed.layer, "dilation", ())
        for part in weight.chunk(groups):
            new = clipped(part.float(), placed.operator.size, dilation, self.limit)
            part.copy_(torch.where(part == 0, part, new.to(part.dtype)))
