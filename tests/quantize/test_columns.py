"""A layer of any kind as a matrix times columns gives what the layer gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.quantize.columns import as_weight, groups_in, rows_and_columns, unfolding

LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear on tokens": (lambda: nn.Linear(5, 7), (3, 4, 5)),
    "plain": (lambda: nn.Conv2d(5, 7, 3), (2, 5, 7, 6)),
    "stride, padding, dilation": (lambda: nn.Conv2d(6, 9, (3, 2), 2, (1, 2), (2, 1), groups=3), (2, 6, 9, 8)),
    "reflected": (lambda: nn.Conv2d(5, 7, 3, padding=1, padding_mode="reflect"), (2, 5, 7, 6)),
    "same": (lambda: nn.Conv2d(5, 7, 3, padding="same"), (2, 5, 7, 6)),
    "depth-wise": (lambda: nn.Conv2d(5, 10, 3, padding=1, groups=5), (2, 5, 7, 6)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3, 2, groups=2), (2, 4, 9)),
    "three dimensions": (lambda: nn.Conv3d(3, 4, 2, 2, 1), (2, 3, 4, 5, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(5, 7, 3, 2, 1, output_padding=1), (2, 5, 4, 3)),
    "transposed, groups": (lambda: nn.ConvTranspose2d(6, 9, 3, 2, groups=3, dilation=2), (2, 6, 4, 3)),
    "transposed, depth-wise": (lambda: nn.ConvTranspose1d(4, 4, 3, 2, groups=4), (2, 4, 5)),
}


def by_columns(layer: nn.Module, x: Tensor) -> Tensor:
    """Groups, rows, samples."""
    return rows_and_columns(layer, layer.weight) @ unfolding(layer)(x)


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_times_columns_are_the_layers_output(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    nn.init.zeros_(layer.bias)
    y, found = layer(x), by_columns(layer, x)
    channels = y.flatten(0, -2).t() if isinstance(layer, nn.Linear) else y.transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.flatten(0, 1), channels, rtol=1e-5, atol=1e-5)
    assert len(found) == groups_in(layer)


@pytest.mark.parametrize("kind", LAYERS)
def test_there_and_back_is_the_weight(kind: str) -> None:
    layer = LAYERS[kind][0]()
    weight = layer.weight.detach()
    assert torch.equal(as_weight(layer, rows_and_columns(layer, weight), weight.shape), weight)
