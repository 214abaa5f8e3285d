"""Block-wise computing gives what computing at once gives, in every layout."""

from __future__ import annotations

import pytest
import torch

from galago.quantize import blocks
from galago.quantize.blocks import extremes, in_blocks, inner_product


def product_and_sums(a, b):
    return a * b + 1, a.sum(), inner_product(a, b)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
}


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_blocks_give_what_the_whole_gives(monkeypatch, first, second):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    a, b = LAYOUTS[first](torch.randn(3, 4, 5, 7)), LAYOUTS[second](torch.randn(3, 4, 5, 7))
    seen = []

    def compute(one, other):
        seen.append(one.numel())
        return product_and_sums(one, other)

    with torch.no_grad():
        found = in_blocks(compute, a, b)
    assert len(seen) > 1
    assert sum(seen) == a.numel()
    assert torch.equal(found[0], a * b + 1)
    if first in ("contiguous", "channels_last", "transposed"):
        assert found[0].stride() == a.stride()
    torch.testing.assert_close(found[1:], product_and_sums(a, b)[1:])


def test_small_tensors_and_second_derivatives_are_computed_at_once(monkeypatch):
    for block, grad in ((16, True), (2**17, False)):
        monkeypatch.setattr(blocks, "BLOCK", block)
        seen = []
        with torch.set_grad_enabled(grad):
            in_blocks(lambda x: (x, seen.append(x.shape) or x.sum()), torch.randn(3, 4, 5, 7))  # noqa: B023
        assert seen == [(3, 4, 5, 7)]


def test_the_results_type_is_the_first_tensors():
    with torch.no_grad():
        assert in_blocks(lambda x: (x.float(),), torch.randn(2, 2).bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_extremes_are_those_of_all_elements(layout):
    x = LAYOUTS[layout](torch.randn(3, 4, 5, 7))
    assert extremes(x) == (x.min(), x.max())
