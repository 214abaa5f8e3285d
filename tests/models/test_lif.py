"""Leaky integrate-and-fire neurons against loops in NumPy and reference values, and what must be true of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.models.lif import LIF, SpikeCount, at_each_step, fire, leaky_integrate_and_fire, membranes, surrogate
from lessons import FOLDER

BETA, THRESHOLD, KAPPA = 0.9, 1.0, 10.0


class Spikes:
    """The reference values, in float64."""

    def __init__(self) -> None:
        self.file = np.load(FOLDER / "distilling_spikes.npz")

    def __call__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.file[name]))


golden = Spikes()


def fired(current: Tensor) -> Tensor:
    return leaky_integrate_and_fire(current, BETA, THRESHOLD, KAPPA)


def recursion(current: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spikes and membranes, neuron by neuron and step by step."""
    rows = current.reshape(-1, current.shape[-1])
    spikes, found = np.zeros_like(rows), np.zeros_like(rows)
    for row in range(len(rows)):
        membrane = spike = rows.dtype.type(0)
        for t in range(rows.shape[1]):
            membrane = rows.dtype.type(BETA) * membrane * (1 - spike) + rows[row, t]
            spike = rows.dtype.type(membrane >= THRESHOLD)
            spikes[row, t], found[row, t] = spike, membrane
    return spikes.reshape(current.shape), found.reshape(current.shape)


@pytest.mark.parametrize("shape", [(3, 4, 16), (2, 3, 5, 4, 7), (2, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_spikes_and_membranes_are_those_of_the_recursion_exactly(shape: tuple[int, ...], dtype: type) -> None:
    current = np.random.default_rng(0).normal(0.3, 0.8, shape).astype(dtype)
    spikes, found = recursion(current)
    own = fired(torch.from_numpy(current))
    assert torch.equal(own, torch.from_numpy(spikes))
    assert set(own.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(membranes(torch.from_numpy(current), own, BETA), torch.from_numpy(found))


def test_spikes_membranes_and_gradients_are_the_reference() -> None:
    current = golden("current_student").clone().requires_grad_()
    spikes = fired(current)
    assert torch.equal(spikes.detach(), golden("spikes_student"))
    assert torch.equal(fired(golden("current_teacher")), golden("spikes_teacher"))
    torch.testing.assert_close(membranes(current.detach(), spikes.detach(), BETA), golden("membrane_student"))
    spikes.backward(golden("grad_spikes"))
    torch.testing.assert_close(current.grad, golden("grad_current"), rtol=1e-12, atol=1e-12)


def test_the_gradient_is_that_of_the_backward_recursion_through_which_no_reset_flows() -> None:
    generator = torch.Generator().manual_seed(1)
    current = torch.randn(5, 4, 12, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(5, 4, 12, generator=generator, dtype=torch.float64)
    spikes = fired(current)
    spikes.backward(upstream)
    spikes, membrane = spikes.detach(), membranes(current.detach(), spikes.detach(), BETA)
    later, expected = torch.zeros(5, 4, dtype=torch.float64), []
    for t in reversed(range(12)):
        slope = 1 / (1 + KAPPA * (membrane[..., t] - THRESHOLD).abs()) ** 2
        later = upstream[..., t] * slope + BETA * (1 - spikes[..., t]) * later
        expected.append(later)
    torch.testing.assert_close(current.grad, torch.stack(expected[::-1], -1), rtol=1e-12, atol=1e-12)


class FastSigmoid(torch.autograd.Function):
    """What the surrogate is the slope of: its values are those of a smooth function, its gradient the surrogate's."""

    @staticmethod
    def forward(ctx, membrane: Tensor) -> Tensor:
        ctx.save_for_backward(membrane)
        return (membrane - THRESHOLD) / (1 + KAPPA * (membrane - THRESHOLD).abs())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * surrogate(ctx.saved_tensors[0], THRESHOLD, KAPPA)


def test_the_surrogate_is_the_slope_of_a_fast_sigmoid() -> None:
    membrane = torch.linspace(-2, 4, 41, dtype=torch.float64, requires_grad=True)  # the threshold is none of these
    assert torch.autograd.gradcheck(FastSigmoid.apply, (membrane,), eps=1e-7)


def test_a_spike_has_the_surrogates_gradient() -> None:
    membrane = torch.randn(50, dtype=torch.float64).add(1).requires_grad_()
    upstream = torch.randn(50, dtype=torch.float64)
    fire(membrane, THRESHOLD, KAPPA).backward(upstream)
    expected = upstream / (1 + KAPPA * (membrane.detach() - THRESHOLD).abs()) ** 2
    torch.testing.assert_close(membrane.grad, expected, rtol=1e-12, atol=0)


def test_a_membrane_at_the_threshold_fires() -> None:
    assert LIF()(torch.tensor([[1.0]])).item() == 1
    assert LIF()(torch.tensor([[1.0]]).nextafter(torch.tensor(0.0))).item() == 0


def test_memory_for_training_grows_linearly_with_the_time_steps() -> None:
    def kept(steps: int) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        current = (torch.rand(steps, 100).requires_grad_() * 1.0).movedim(0, -1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            spikes = fired(current)
        assert spikes.requires_grad
        return sum(sizes.values())

    few, some, many = kept(8), kept(16), kept(32)
    assert many - some == 2 * (some - few) > 0


def test_half_precision_is_added_up_in_float32() -> None:
    current = torch.rand(4, 64).mul(0.3).bfloat16()
    assert torch.equal(fired(current), fired(current.float()))
    assert fired(current).dtype == torch.float32


@pytest.mark.parametrize("wrong", [{"leak": 1.1}, {"leak": -0.1}, {"threshold": 0.0}, {"slope": -1.0}])
def test_neurons_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"LIF: leak .* give a leak from 0 to 1"):
        LIF(**wrong)


def test_every_step_goes_through_the_layer_and_a_norm_is_shared_over_time() -> None:
    x, norm = torch.randn(5, 3, 4, 4, 6), nn.BatchNorm2d(3)
    alone = torch.stack([torch.nn.functional.avg_pool2d(x[..., t], 2) for t in range(6)], -1)
    assert torch.equal(at_each_step(nn.AvgPool2d(2), x), alone)
    at_each_step(norm, x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3, 4)))


def test_predictions_are_the_largest_counts_and_of_these_the_largest_membranes() -> None:
    spikes, membrane = golden("spikes_student"), golden("membrane_student")
    torch.testing.assert_close(membrane.sum(-1), golden("membrane_sum"))
    assert torch.equal(spikes.sum(-1), golden("counts"))
    assert torch.equal(SpikeCount()(spikes, membrane).argmax(1), golden("prediction"))
    assert torch.equal(SpikeCount()(spikes.float(), membrane.float()).argmax(1), golden("prediction"))


def test_scores_are_scaled_counts_and_learn_as_these_do() -> None:
    current = golden("current_student").clone().requires_grad_()
    spikes = fired(current)
    scores = SpikeCount(float(golden("logit_scale")))(spikes, torch.zeros_like(spikes))
    loss = nn.functional.cross_entropy(scores, golden("y"))
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden("loss_cls"), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(current.grad, golden("grad_current_cls"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_membranes_never_outweigh_a_spike_and_have_no_gradient(size: float) -> None:
    spikes = torch.zeros(1, 2, 16).requires_grad_()
    with torch.no_grad():
        spikes[0, 0, 3] = 1
    membrane = (size * torch.tensor([[-1.0, 1.0]])).unsqueeze(-1).expand(1, 2, 16).clone().requires_grad_()
    scores = SpikeCount()(spikes, membrane)
    assert scores[0, 0] > scores[0, 1] > 0
    assert (scores - 10 / 16 * spikes.sum(-1)).abs().max() <= 0.01 * 10 / 16 + 1e-6
    scores[0, 0].backward()
    assert membrane.grad is None
    assert torch.equal(spikes.grad[0], torch.tensor([[10 / 16], [0.0]]).expand(2, 16))
