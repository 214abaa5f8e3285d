"""How much a layer can enlarge its input: exact l1, l∞ and spectral norms of convolutions and linear layers.

Youwei Liang, Dong Huang, "Large Norms of CNN Layers Do Not Hurt Adversarial Robustness", AAAI 2021 (recalled),
arXiv:2009.08435.

A layer without its bias is a matrix M. ‖M‖_1, the largest absolute column sum, bounds how much the sum of absolute
changes grows from input to output; ‖M‖_∞, the largest absolute row sum, how much the largest change does; ‖M‖_2 the
Euclidean length. M itself is never made: a column of it is what one input pixel meets of the kernel, a row is what of
the kernel lies inside the image at one place of the output, and both depend on each axis by itself.

    ‖K‖_1 = max_(c, R, Q) Σ_o Σ_(i in R, j in Q) |K[o, c, i, j]|     R, Q: taps that a pixel's row and column meet
    ‖K‖_∞ = max_(o, R, Q) Σ_c Σ_(i in R, j in Q) |K[o, c, i, j]|     R, Q: taps inside the image at a place
    a pixel at y meets tap i from the output at u where y = s u - p + d i,   0 ≤ u < outputs

For images that are large against the kernel R and Q are the residue classes modulo the stride in the first formula, and
all taps in the second. Checked against dense matrices, also where images are as small as kernels. Groups, dilation and
transposed convolutions, whose matrix is a convolution's the other way round, are not the paper's but exact as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.layers import removing
from galago.probe import evaluating
from galago.taps import unnoticed

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LAYERS = (*CONVOLUTIONS, nn.Linear)  # exactly these: others compute with another weight than they store


class Axis(NamedTuple):
    """A convolution along one axis of the image."""

    kernel: int
    size: int  # of the image
    stride: int = 1
    before: int = 0  # zeros in front of the image
    after: int = 0  # and behind it
    dilation: int = 1

    @property
    def outputs(self) -> int:
        """How many places the kernel has."""
        return (self.size + self.before + self.after - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def met(self) -> Tensor:
        """Which taps one pixel of the image meets, for all pixels, without those that meet fewer; sets×taps of 0 and 1.

        >>> Axis(kernel=3, size=8, stride=2, before=1, after=1).met().tolist()
        [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
        """
        return indicators(largest((pixel, tap) for pixel, _, tap in self._meetings()), self.kernel)

    def inside(self) -> Tensor:
        """Which taps lie inside the image at one place, for all places, without those with fewer; sets×taps of 0 and 1.

        >>> Axis(kernel=3, size=2, before=1, after=1).inside().tolist()
        [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
        """
        return indicators(largest((place, tap) for _, place, tap in self._meetings()), self.kernel)

    def _meetings(self) -> Iterator[tuple[int, int, int]]:
        """Pixel, place and tap, wherever a tap lies on a pixel."""
        for place in range(self.outputs):
            for tap in range(self.kernel):
                pixel = self.stride * place - self.before + self.dilation * tap
                if 0 <= pixel < self.size:
                    yield pixel, place, tap


def largest(members: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Of sets that are given as pairs of a set's number and a member: those that lie in no other, each once.

    >>> largest([(0, 5), (1, 5), (1, 6), (2, 7)])
    [[5, 6], [7]]
    """
    sets: dict[int, set[int]] = {}
    for number, member in members:
        sets.setdefault(number, set()).add(member)
    distinct = {frozenset(one) for one in sets.values()}
    return sorted(sorted(one) for one in distinct if not any(one < other for other in distinct))


def indicators(sets: Sequence[Sequence[int]], size: int) -> Tensor:
    """Sets of numbers below `size` as rows of ones and zeros."""
    rows = torch.zeros(len(sets), size)
    for row, one in zip(rows, sets, strict=True):
        row[list(one)] = 1.0
    return rows


class Operator(NamedTuple):
    """A layer as a matrix, as far as its norms ask for it; a linear layer has no axes.

    `met` and `inside` are those of `Axis`, one tensor an axis of the image.
    """

    met: tuple[Tensor, ...] = ()
    inside: tuple[Tensor, ...] = ()
    groups: int = 1
    transposed: bool = False
    size: tuple[int, ...] = ()  # of the image, whose pixels are those of the convolution's input

    def to(self, like: Tensor) -> Operator:
        """The same on another tensor's device and of its type; itself where it is so already."""
        met, inside = (tuple(sets.to(like) for sets in each) for each in (self.met, self.inside))
        return self._replace(met=met, inside=inside)


def operator_of(layer: nn.Module, size: Sequence[int]) -> Operator:
    """What a layer is as a matrix.

    Args:
        layer: a convolution that pads with zeros, or a linear layer.
        size: of the image that goes in (H×W), of the one that comes out for a transposed convolution.

    >>> operator_of(nn.Conv2d(3, 4, 3, padding=1), (32, 32)).met[0]
    tensor([[1., 1., 1.]])
    """
    if isinstance(layer, nn.Linear):
        return Operator()
    assert isinstance(layer, CONVOLUTIONS)
    zeros = list(layer._reversed_padding_repeated_twice)[::-1]  # after, before of each axis
    axes = [
        Axis(kernel, pixels, stride, before, after, dilation)
        for kernel, pixels, stride, after, before, dilation in zip(
            layer.kernel_size, size, layer.stride, zeros[::2], zeros[1::2], layer.dilation, strict=True
        )
    ]
    met, inside = tuple(axis.met() for axis in axes), tuple(axis.inside() for axis in axes)
    return Operator(met, inside, layer.groups, isinstance(layer, TRANSPOSED), tuple(size))


def column_sums(weight: Tensor, operator: Operator) -> Tensor:
    """The largest absolute column sums of a layer's matrix, C×sets×…: of each channel that comes in.

    >>> column_sums(torch.tensor([[1.0, -2.0], [3.0, 0.5]]), Operator())
    tensor([4.0000, 2.5000])
    """
    return _sums(weight, operator, _Side.of_columns(operator))


def row_sums(weight: Tensor, operator: Operator) -> Tensor:
    """The largest absolute row sums of a layer's matrix, O×sets×…: of each channel that goes out.

    >>> row_sums(torch.tensor([[1.0, -2.0], [3.0, 0.5]]), Operator())
    tensor([3.0000, 3.5000])
    """
    return _sums(weight, operator, _Side.of_rows(operator))


class _Side(NamedTuple):
    """Columns or rows of a convolution's matrix: which axis of G×O×C×taps is summed, and over which taps."""

    axis: int
    sets: tuple[Tensor, ...]

    @classmethod
    def of_columns(cls, operator: Operator) -> _Side:
        return cls(2, operator.inside) if operator.transposed else cls(1, operator.met)

    @classmethod
    def of_rows(cls, operator: Operator) -> _Side:
        return cls(1, operator.met) if operator.transposed else cls(2, operator.inside)


def _sums(weight: Tensor, operator: Operator, side: _Side) -> Tensor:
    sums = _split(weight.abs(), operator).sum(side.axis).flatten(0, 1)
    for sets in side.sets:  # each takes the first axis of taps and leaves one of sets at the end
        sums = torch.tensordot(sums, sets.to(weight), ([1], [1]))
    return sums


def _maximal(weight: Tensor, operator: Operator, side: _Side) -> Tensor:
    sums = _sums(weight, operator, side)
    place = sums.flatten().argmax(0, keepdim=True)
    marked = torch.zeros_like(sums).flatten().scatter(0, place, 1.0).view_as(sums)
    for sets in side.sets:
        marked = torch.tensordot(marked, sets.to(weight), ([1], [0]))
    marked = _split(marked, operator).unsqueeze(side.axis)
    return (marked.expand_as(_split(weight, operator)) > 0).flatten(0, 1)


def _split(tensor: Tensor, operator: Operator) -> Tensor:
    """The first axis by groups."""
    return tensor.reshape(operator.groups, -1, *tensor.shape[1:])


class OperatorNorm(ABC):
    """A norm of layers as matrices that is reached by one column or row."""

    @abstractmethod
    def __call__(self, weight: Tensor, operator: Operator) -> Tensor:
        """The norm, a scalar."""

    @abstractmethod
    def maximal(self, weight: Tensor, operator: Operator) -> Tensor:
        """Which weights make up the column or row that reaches it, the first one where several do; like the weight."""


class L1(OperatorNorm):
    """The largest absolute column sum.

    >>> L1()(torch.tensor([[1.0, -2.0], [3.0, 0.5]]), Operator())
    tensor(4.)
    """

    def __call__(self, weight: Tensor, operator: Operator) -> Tensor:
        return column_sums(weight, operator).max()

    def maximal(self, weight: Tensor, operator: Operator) -> Tensor:
        return _maximal(weight, operator, _Side.of_columns(operator))


class Linf(OperatorNorm):
    """The largest absolute row sum.

    >>> Linf()(torch.tensor([[1.0, -2.0], [3.0, 0.5]]), Operator())
    tensor(3.5000)
    """

    def __call__(self, weight: Tensor, operator: Operator) -> Tensor:
        return row_sums(weight, operator).max()

    def maximal(self, weight: Tensor, operator: Operator) -> Tensor:
        return _maximal(weight, operator, _Side.of_rows(operator))


@torch.no_grad()
def spectral_norm(apply: Callable[[Tensor], Tensor], start: Tensor, steps: int = 100) -> Tensor:
    """‖M‖_2 of a linear function by the power method, from below: `x ← MᵀM x / ‖·‖`, a scalar.

    Args:
        apply: x to M x.
        start: any x of length 1 that is not orthogonal to what M enlarges most, such as random numbers.
        steps: how many products with MᵀM.
    """
    x = start
    for _ in range(steps):
        found = torch.func.vjp(apply, x)
        (x,) = found[1](found[0])
        x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    length: Tensor = apply(x).norm()
    return length


def channel_factors(norm: nn.Module) -> Tensor:
    """By what a BatchNorm at rest multiplies each channel, |γ| / √(σ² + ε); the largest of them is its norm.

    >>> channel_factors(nn.BatchNorm2d(2, eps=0.0))
    tensor([1., 1.])
    """
    assert isinstance(norm.eps, float)
    factor = (norm.get_buffer("running_var") + norm.eps).rsqrt()
    return factor if norm.weight is None else norm.get_parameter("weight").detach().abs() * factor


def has_operator(layer: nn.Module) -> bool:
    """Whether a layer is one of `LAYERS`, and pads with zeros if it is a convolution."""
    return type(layer) in LAYERS and getattr(layer, "padding_mode", "zeros") == "zeros"


def operators(model: nn.Module, image: Tensor) -> dict[str, Operator]:
    """Every convolution and linear layer that runs when a network predicts, by path, in the order of execution.

    Args:
        model: left as it was; one that is compiled runs as it is written.
        image: normalized, N×C×H×W; one is enough. Of a layer that runs more than once the largest image counts.
    """
    sizes: dict[str, list[int]] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            image = output if isinstance(layer, TRANSPOSED) else inputs[0]
            axes = 0 if isinstance(layer, nn.Linear) else len(getattr(layer, "kernel_size", ()))
            size = image.shape[image.ndim - axes :]
            sizes[path] = [max(pair) for pair in zip(size, sizes.get(path, size), strict=True)]

        return hook

    layers = {path: layer for path, layer in model.named_modules() if has_operator(layer)}
    handles = [layer.register_forward_hook(note(path)) for path, layer in layers.items()]
    device = [image.device] if image.device.type == "cuda" else []
    with removing(handles), evaluating(model), unnoticed(), torch.no_grad(), torch.random.fork_rng(device):
        model.forward(image)
    return {path: operator_of(layers[path], size) for path, size in sizes.items()}
