"""Singular value clipping against dense circular matrices, and what must be true of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported, identical, tiny_network
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.regularize.clip_singular_values import ClipSingularValues, clipped, spectrum
from galago.testing import check_method
from galago.trainer import finish


def circular(kernel: Tensor, height: int, width: int, dilation: int = 1) -> Tensor:
    """The matrix of a convolution with circular padding, outputs×inputs."""
    basis = torch.eye(kernel.shape[1] * height * width, dtype=kernel.dtype)
    image = basis.view(-1, kernel.shape[1], height, width)
    tall, wide = (dilation * (k - 1) for k in kernel.shape[2:])
    padded = nn.functional.pad(image, (0, wide, 0, tall), mode="circular")
    return nn.functional.conv2d(padded, kernel, dilation=dilation).flatten(1).T


@pytest.mark.parametrize(("size", "dilation"), [((5, 6), 1), ((6, 5), 1), ((7, 8), 2)])
def test_singular_values_are_those_of_the_dense_circular_matrix(size: tuple[int, int], dilation: int) -> None:
    kernel = torch.randn(3, 2, 3, 2, dtype=torch.float64)
    wanted = torch.linalg.svdvals(circular(kernel, *size, dilation))
    found = torch.linalg.svdvals(spectrum(kernel, size, (dilation, dilation)))
    half = size[1] // 2 + 1
    twice = torch.cat([found, found[:, 1 : size[1] - half + 1]], 1)  # the mirror images of the other half
    torch.testing.assert_close(twice.flatten().sort(descending=True).values, wanted[: twice.numel()])


def test_a_kernel_as_large_as_the_image_is_clipped_exactly() -> None:
    kernel = torch.randn(3, 4, 4, 5, dtype=torch.float64)
    found = clipped(kernel, (4, 5), (1, 1), 1.0)
    values = torch.linalg.svdvals(circular(found, 4, 5))
    assert float(values.max()) == pytest.approx(1.0)
    before = torch.linalg.svdvals(circular(kernel, 4, 5))
    torch.testing.assert_close(values, before.clamp_max(1.0))


@pytest.mark.parametrize("size", [(8, 8), ()])
def test_clipping_again_and_again_comes_to_the_limit_and_changes_nothing_below_it(size: tuple[int, ...]) -> None:
    kernel = torch.randn(4, 4, *[3] * len(size), dtype=torch.float64)
    ones = [1] * len(size)
    small = kernel * 0.9 / torch.linalg.svdvals(spectrum(kernel, size, ones)).max()
    torch.testing.assert_close(clipped(small, size, ones, 1.0), small)
    largest = []
    for _ in range(30):
        kernel = clipped(kernel, size, ones, 1.0)
        largest.append(float(torch.linalg.svdvals(spectrum(kernel, size, ones)).max()))
    assert largest == sorted(largest, reverse=True) or size == ()
    assert largest[-1] < 1.01


def started(every: int, quantized: bool = False, saved=None) -> Trial:
    def methods() -> list:
        others = [Quantize(LSQWeight(4), LSQ(4))] if quantized else []
        return [*others, ClipSingularValues(0.1, every)]

    return Trial(tiny_network, classify(), TinyImages(), methods, saved)


def norms(model: nn.Module) -> list[float]:
    return [float(p.detach().flatten(1).norm()) for p in model.parameters() if p.ndim > 1]


def test_it_clips_every_second_step_and_a_resumed_training_counts_on() -> None:
    straight = started(every=2)
    start = norms(straight.learner.model)
    straight.step(0)
    first = norms(straight.learner.model)
    saved = straight.save()
    straight.step(1)
    second = norms(straight.learner.model)
    assert all(new > 0.5 * old for new, old in zip(first, start, strict=True))
    assert all(new < 0.9 * old for new, old in zip(second, first, strict=True))
    resumed = started(every=2, saved=saved)
    resumed.step(1)
    assert identical(straight.learner.state_dict(), resumed.learner.state_dict())


def test_quantized_layers_are_clipped_and_the_network_still_exports() -> None:
    trial = started(every=1, quantized=True)
    start = norms(trial.learner.model)
    for number in range(2):
        trial.step(number)
    assert all(new < old for new, old in zip(norms(trial.learner.model), start, strict=True))
    assert exported(finish(trial.learner), trial.image()).isfinite().all()


def test_pruned_weights_stay_zero_and_groups_are_clipped_one_by_one() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
    with torch.no_grad():
        layer.weight[1] = 0.0
        layer.weight[:, 0, 0, 0] = 0.0
        layer.weight[3:] *= 1e-3  # the second group is below the limit
    before = layer.weight.detach().clone()
    data = TinyImages()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer)
    method = ClipSingularValues(0.1, every=1)
    method.prepare(model, data)
    method.update(model, lambda: None)
    after = layer.weight.detach()
    assert torch.equal(after == 0, before == 0)
    torch.testing.assert_close(after[3:], before[3:])
    assert not torch.allclose(after[0], before[0])


def test_senseless_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="limit 0"):
        ClipSingularValues(limit=0.0)
    with pytest.raises(UserError, match="every 0"):
        ClipSingularValues(every=0)


def test_the_laws_of_methods_hold() -> None:
    check_method(lambda: ClipSingularValues(every=1))
    check_method(lambda: ClipSingularValues(every=2))
