import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.laws.integers import accumulate, convolve, quantized_layer
from galago.quantize.layer import QuantLayer
from galago.quantize.quantizer import Grid, Quantizer


class HalfStep(Quantizer):
    """A grid without a zero: odd codes, as binary weights have."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.bits, self.scale = 2, scale

    def initialize(self, x: Tensor) -> None:
        pass

    def codes(self, x: Tensor) -> Tensor:
        return (2 * (x / self.scale / 2).floor() + 1).clamp(-3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.grid().values(self.codes(x))

    def grid(self) -> Grid:
        return Grid(torch.tensor(self.scale), torch.zeros(()), -3, 3, step=2)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3, bias=False),
        nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 2), bias=False),
        nn.Conv2d(6, 9, 3, dilation=2, groups=3, bias=False),
        nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=6, bias=False),
    ],
)
def test_whole_numbers_are_convolved_as_torch_convolves(layer: nn.Conv2d) -> None:
    x, weight = torch.randint(-99, 99, (2, 6, 9, 8)), torch.randint(-99, 99, layer.weight.shape)
    found = accumulate(layer, x.numpy(), weight.numpy())
    layer.weight = nn.Parameter(weight.double())
    assert np.array_equal(found, layer(x.double()).detach().numpy())


def test_whole_numbers_are_multiplied_as_a_linear_layer_does() -> None:
    found = accumulate(nn.Linear(2, 1), np.array([[3, 5]]), np.array([[2, -1]]))
    assert found.tolist() == [[1]]


def test_sums_beyond_float_are_exact() -> None:
    x, weight = np.full((1, 1, 1, 1), 2**40 + 1), np.full((1, 1, 1, 1), 2**20 + 1)
    assert convolve(x, weight, (1, 1), (0, 0), (1, 1), 1).item() == (2**40 + 1) * (2**20 + 1)


def test_layers_with_half_steps_bias_and_output_scale_are_reproduced() -> None:
    layer = QuantLayer(nn.Linear(5, 3), HalfStep(0.1), HalfStep(0.7))
    layer.output_scale = nn.Parameter(torch.tensor(-1.7))
    x = torch.randn(4, 5)
    np.testing.assert_allclose(quantized_layer(layer, x), layer(x).detach().numpy(), rtol=1e-5)
