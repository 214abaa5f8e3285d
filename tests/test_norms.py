"""Operator norms against dense matrices: the golden ones, and matrices made here of any layer."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.models.resnet import resnet20
from galago.norms import (
    L1,
    Axis,
    Linf,
    Operator,
    channel_factors,
    column_sums,
    has_operator,
    operator_of,
    operators,
    row_sums,
    spectral_norm,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "regularization" / "norm_decay.npz")
CASES = [key.removesuffix("_input_size") for key in GOLDEN if key.endswith("_input_size")]


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def dense(layer: nn.Module, size: tuple[int, ...], channels: int) -> Tensor:
    """The layer's matrix, outputs×inputs: what it makes of every basis vector."""
    basis = torch.eye(channels * int(np.prod(size)), dtype=torch.float64).view(-1, channels, *size)
    with torch.no_grad():
        return layer.double()(basis).flatten(1).T


def dense_norms(matrix: Tensor) -> tuple[float, float]:
    return float(matrix.abs().sum(0).max()), float(matrix.abs().sum(1).max())


def norms(layer: nn.Module, size: tuple[int, ...]) -> tuple[float, float]:
    operator = operator_of(layer, size)
    return float(L1()(layer.weight.detach(), operator)), float(Linf()(layer.weight.detach(), operator))


def golden_layer(case: str) -> nn.Conv2d:
    weight, (stride, padding) = golden(f"{case}_weight"), (golden(f"{case}_{n}") for n in ("stride", "padding"))
    groups = int(golden(f"{case}_groups")) if f"{case}_groups" in GOLDEN else 1
    dilation = golden(f"{case}_dilation").tolist() if f"{case}_dilation" in GOLDEN else [1, 1]
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(stride.tolist()),
        tuple(padding.tolist()),
        tuple(dilation),
        groups,
        bias=False,
    )
    layer.weight = nn.Parameter(weight.clone())
    return layer


@pytest.mark.parametrize("case", CASES)
def test_norms_are_those_of_the_golden_dense_matrices(case: str) -> None:
    layer, size = golden_layer(case), tuple(golden(f"{case}_input_size").tolist())
    assert norms(layer, size) == pytest.approx(tuple(float(golden(f"{case}_{n}")) for n in ("l1", "linf")), rel=1e-9)
    if f"{case}_spectral" in GOLDEN:
        start = nn.functional.normalize(torch.randn(1, layer.in_channels, *size, dtype=torch.float64), dim=(1, 2, 3))
        found = spectral_norm(layer, start, steps=1000)
        assert float(found) == pytest.approx(float(golden(f"{case}_spectral")), rel=1e-3)
        assert found**2 <= np.prod(norms(layer, size)) * (1 + 1e-9)


def test_norms_of_a_linear_layer_are_those_of_its_weight() -> None:
    weight = golden("linear_weight")
    assert float(L1()(weight, Operator())) == pytest.approx(float(golden("linear_l1")))
    assert float(Linf()(weight, Operator())) == pytest.approx(float(golden("linear_linf")))


def test_the_example_of_the_card() -> None:
    weight = torch.tensor([[[[1.0, -2], [0, 3]], [[0.5, 0], [-1, 1]]], [[[0, 1], [2, -1]], [[4, 0], [0, -0.5]]]])
    layer = nn.Conv2d(2, 2, 2, bias=False)
    layer.weight = nn.Parameter(weight)
    once, twice = operator_of(layer, (8, 8)), operator_of(nn.Conv2d(2, 2, 2, stride=2), (8, 8))
    assert row_sums(weight, once).flatten().tolist() == [8.5, 8.5]
    assert (float(L1()(weight, once)), float(L1()(weight, twice))) == (10.0, 4.5)
    assert torch.equal(L1().maximal(weight, once), torch.tensor([True, False]).view(1, 2, 1, 1).expand(2, 2, 2, 2))
    assert L1().maximal(weight, twice).nonzero().tolist() == [[0, 1, 0, 0], [1, 1, 0, 0]]
    assert Linf().maximal(weight, once).flatten(1).all(1).tolist() == [True, False], "the first where both tie"


def test_norms_are_exact_for_every_small_convolution_along_one_axis() -> None:
    checked = 0
    for kernel, stride, padding, size, dilation in itertools.product(
        range(1, 5), range(1, 5), range(5), range(1, 9), (1, 2)
    ):
        if padding > dilation * (kernel - 1) or Axis(kernel, size, stride, padding, padding, dilation).outputs < 1:
            continue
        layer = nn.Conv1d(1, 1, kernel, stride, padding, dilation, bias=False).double()
        matrix = dense(layer, (size,), 1)
        if not matrix.any():
            continue  # no place of the kernel lies on the image
        assert norms(layer, (size,)) == pytest.approx(dense_norms(matrix), rel=1e-9)
        checked += 1
    assert checked > 500


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # a copy is made, no more
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(4, 6, (5, 3), (2, 1), (2, 1), groups=2, bias=False), (7, 5)),
        (nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False), (3, 6)),
        (nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2), bias=False), (3, 4)),
        (nn.Conv2d(2, 3, 2, padding="valid", bias=False), (3, 4)),
        (nn.Conv3d(2, 2, 2, (1, 2, 1), (1, 0, 0), bias=False), (2, 3, 2)),
    ],
)
def test_norms_are_exact_with_groups_dilation_and_uneven_padding(layer: nn.Module, size: tuple[int, ...]) -> None:
    matrix = dense(layer, size, layer.in_channels)
    assert norms(layer, size) == pytest.approx(dense_norms(matrix), rel=1e-9)


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(4, 6, (3, 2), 2, 1, (1, 0), groups=2, bias=False)])
def test_norms_of_transposed_convolutions_are_exact(layer: nn.ConvTranspose2d) -> None:
    matrix = dense(layer, (3, 4), layer.in_channels)
    given = layer(torch.zeros(1, 4, 3, 4, dtype=torch.float64)).shape[2:]
    assert norms(layer, given) == pytest.approx(dense_norms(matrix), rel=1e-9)


@pytest.mark.parametrize("norm", [L1(), Linf()])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_step_against_the_maximal_weights_signs_lowers_the_norm_by_their_number(norm, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(4, 6, 3, 2, 1, groups=2, bias=False).double()
    operator, weight = operator_of(layer, (7, 8)), layer.weight.detach()
    chosen = norm.maximal(weight, operator)
    moved = weight - 1e-6 * weight.sign() * chosen
    torch.testing.assert_close(norm(weight, operator) - norm(moved, operator), 1e-6 * chosen.sum().double())
    torch.testing.assert_close(weight.abs()[chosen].sum(), norm(weight, operator))


def test_a_chain_enlarges_no_difference_by_more_than_the_product_of_its_norms() -> None:
    chain = nn.Sequential(
        nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).double()
    image = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    other = image + torch.randn_like(image)
    found = operators(chain, image[:1])
    assert list(found) == ["0", "2", "4"]
    for norm, size in ((L1(), lambda x: x.flatten(1).abs().sum(1)), (Linf(), lambda x: x.flatten(1).abs().amax(1))):
        bound = torch.stack([norm(chain.get_submodule(p).weight, operator) for p, operator in found.items()]).prod()
        assert (size(chain(image) - chain(other)) <= bound * size(image - other)).all()


def test_norms_of_a_convolution_with_its_batch_norm_folded_in() -> None:
    conv, norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4).eval()
    nn.init.normal_(norm.weight)
    norm.running_var.uniform_(0.5, 2)
    folded = conv.weight.detach() * channel_factors(norm).view(-1, 1, 1, 1)
    wanted = (channel_factors(norm) * conv.weight.abs().sum((1, 2, 3))).max()
    torch.testing.assert_close(Linf()(folded, operator_of(conv, (8, 8))), wanted)


def test_the_norm_of_a_batch_norm_is_the_golden_one() -> None:
    norm = nn.BatchNorm2d(6, eps=float(golden("bn_eps"))).double()
    norm.weight.data, norm.running_var = golden("bn_weight"), golden("bn_running_var")
    assert float(channel_factors(norm).max()) == pytest.approx(float(golden("bn_norm")), rel=1e-12)
    assert torch.equal(channel_factors(nn.BatchNorm1d(3, eps=0.0, affine=False)), torch.ones(3))


def test_a_networks_layers_are_found_with_the_sizes_they_run_at_and_it_stays_as_it_was() -> None:
    model, image = resnet20().train(), torch.randn(1, 3, 5, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    found = operators(model, image)
    assert len(found) == 20
    assert len(found["layer1.0.conv1"].met[0]) == 1, "pixels inside an image of 5×5 meet all taps of 3×3"
    assert len(found["layer3.1.conv1"].met[0]) == 2, "those of 2×2 meet the first two or the last two"
    assert found["linear"] == Operator()
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_of_a_layer_that_runs_twice_the_larger_image_counts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.idle = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x[:, :, :2]).sum() + self.conv(x).sum()

    model = Twice()
    assert len(operators(model, torch.zeros(1, 1, 6, 6))["conv"].met[0]) == 1
    assert list(operators(model, torch.zeros(1, 1, 6, 6))) == ["conv"], "what does not run has no size"


def test_layers_that_compute_with_another_weight_or_padding_have_no_such_norm() -> None:
    class Standardized(nn.Conv2d):
        pass

    assert not has_operator(Standardized(1, 1, 1))
    assert not has_operator(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"))
    assert has_operator(nn.ConvTranspose1d(1, 1, 3))


def test_sums_of_all_columns_are_not_needed_where_some_pixels_meet_fewer_taps() -> None:
    assert column_sums(torch.ones(1, 1, 3, 3), operator_of(nn.Conv2d(1, 1, 3, padding=1), (9, 9))).shape == (1, 1, 1)
