"""Element-wise work over large tensors, a block at a time, so that what it needs in between stays in the cache.

Without a compiler each operation of a backward pass fills a fresh tensor as large as the feature map. On a CPU most of
that time goes into fetching the memory, not into arithmetic. A block at a time, temporaries are small and are used
again; only the result is as large as what came in. `torch.compile` fuses the operations itself and sees none of this.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 2**17  # elements a thread: half a megabyte of float32


def in_blocks(compute: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """`compute(*tensors)`, in blocks where that is faster.

    Args:
        compute: from tensors of one shape to an element-wise result, then any number of sums over elements (scalars).
        tensors: of one shape, in any layouts; the result gets the first one's layout and type.

    >>> in_blocks(lambda a, b: (a + b, (a * b).sum()), torch.ones(2), torch.tensor([1.0, 2.0]))
    (tensor([2., 3.]), tensor(3.))
    """
    first = tensors[0]
    fused = torch.compiler.is_compiling() or torch.is_grad_enabled() or not first.is_cpu
    if fused or first.numel() <= (block := BLOCK * torch.get_num_threads()):
        result, *sums = compute(*tensors)
        return result.to(first.dtype), *sums
    order = memory_order(first)
    rows = [flat(tensor, order) for tensor in tensors]
    whole = torch.empty(first.numel(), dtype=first.dtype)
    parts = []
    for place, *pieces in zip(*(torch.split(row, block) for row in (whole, *rows)), strict=True):
        result, *sums = compute(*pieces)
        place.copy_(result)
        parts.append(sums)
    placed = whole.view([first.shape[dimension] for dimension in order])
    back = sorted(range(first.ndim), key=order.__getitem__)
    return placed.permute(back), *(torch.stack(sums).sum() for sums in zip(*parts, strict=True))


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """The sum of all products of two tensors of one shape, a scalar, without a temporary.

    >>> inner_product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor(11.)
    """
    if torch.compiler.is_compiling():
        return (a * b).sum()  # which the compiler fuses with what made them
    order = memory_order(a)
    return torch.dot(flat(a, order), flat(b, order))


def kept_inside(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """`grad` where `low < x < high`, 0 elsewhere.

    >>> kept_inside(torch.tensor([2.0, 2.0, 2.0]), torch.tensor([0.0, 0.5, 1.0]), 0, 1)
    tensor([0., 2., 0.])
    """
    if torch.compiler.is_compiling():  # no comparison, whose result the compiler would store, slowly, as booleans
        return grad * ((x - low) * (high - x)).sign().clamp(min=0)
    kept: Tensor = torch.ops.aten.hardtanh_backward(grad, x, low, high)  # one pass
    return kept


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest element, scalars."""
    if torch.compiler.is_compiling():
        return x.amin(), x.amax()
    smallest, largest = flat(x, memory_order(x)).aminmax()  # which copies what is not in order
    return smallest, largest


def memory_order(x: Tensor) -> list[int]:
    """A tensor's axes from the slowest to the fastest in memory: N, H, W, C for channels last."""
    return sorted(range(x.ndim), key=x.stride, reverse=True)


def flat(x: Tensor, order: list[int]) -> Tensor:
    """All elements in a row; a view if the axes lie in memory in this order."""
    return x.permute(order).reshape(-1)
