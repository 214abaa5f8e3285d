"""Distilled spikes against reference values and loops, and what must be true of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.data import Data
from galago.datasets.digits import Digits
from galago.distill.distill import Distill
from galago.distill.lesson import Lesson, Seen, View
from galago.distill.logits import SoftTargets
from galago.distill.spikes import (
    SpikeLesson,
    SpikeRates,
    SpikeTrains,
    SpikeWindows,
    rate_divergence,
    train_distance,
    window_distance,
    windowed,
)
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported
from galago.layers import tap
from galago.method import Forward, Method
from galago.models.lif import leaky_integrate_and_fire
from galago.models.spiking import SpikingNet
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network
from galago.trainer import finish
from lessons import FOLDER

REFERENCE = {
    "full": SpikeTrains(),
    "rate": SpikeRates(),
    "window_4_1": SpikeWindows(4, 1),
    "window_3_2": SpikeWindows(3, 2),
    "window_count": SpikeWindows(10, 1),
}


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(np.load(FOLDER / "distilling_spikes.npz")[name]))


def neurons(current: Tensor) -> Tensor:
    return leaky_integrate_and_fire(current, 0.9, 1.0, 10.0)


def seen(student: Tensor, teacher: Tensor) -> Seen:
    scores = student.detach().sum(-1)
    return Seen(View(scores, [student]), View(scores, [teacher]), Batch(scores, scores), 0.5)


def random_spikes(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, shape or (3, 4, 10), generator=generator).double()


@pytest.mark.parametrize("name", REFERENCE)
def test_losses_and_their_gradients_through_the_neurons_are_the_reference(name: str) -> None:
    current = golden("current_student").clone().requires_grad_()
    loss = REFERENCE[name](seen(neurons(current), golden("spikes_teacher")))
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden(f"loss_{name}"), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(current.grad, golden(f"grad_current_{name}"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 1), (3, 2), (4, 3), (10, 1), (7, 5)])
def test_only_complete_windows_are_averaged(window: int, stride: int) -> None:
    spikes = random_spikes(0)
    starts = range(0, 10 - window + 1, stride)
    expected = torch.zeros(3, 4, len(starts), dtype=torch.float64)
    for place, start in enumerate(starts):
        for t in range(start, start + window):
            expected[:, :, place] += spikes[:, :, t] / window
    torch.testing.assert_close(windowed(spikes, window, stride), expected)


def test_the_distance_of_trains_is_the_share_of_spikes_that_differ() -> None:
    own, its = random_spikes(0), random_spikes(1)
    apart = sum(own[place] != its[place] for place in np.ndindex(3, 4, 10))
    assert train_distance(own, its) == pytest.approx(float(apart) / 120)


def test_rates_are_compared_as_hinton_compares_logits() -> None:
    own, its = random_spikes(0), random_spikes(1)
    p, q = ((spikes.sum(-1) / 4).softmax(1) for spikes in (its, own))
    torch.testing.assert_close(rate_divergence(own, its, 4.0), 16 * (p * (p / q).log()).sum(1).mean())
    assert float(SpikeRates(4.0)(seen(own, its))) == pytest.approx(
        float(SoftTargets(4.0)(Seen(View(own.sum(-1), []), View(its.sum(-1), []), Batch(own, own), 0.5)))
    )


def test_windows_of_one_step_are_trains() -> None:
    own, its = random_spikes(0), random_spikes(1)
    assert window_distance(own, its, 1, 1) == train_distance(own, its)


def test_windows_of_all_steps_see_counts_only_and_shorter_ones_do_not() -> None:
    own, its = random_spikes(0), random_spikes(1)
    moved = own[..., torch.randperm(10)]
    assert not torch.equal(moved, own)
    assert abs(window_distance(moved, its, 10, 1) - window_distance(own, its, 10, 1)) < 1e-7
    torch.testing.assert_close(window_distance(own, its, 10, 1), ((own - its).sum(-1) / 10).square().mean())
    assert abs(rate_divergence(moved, its, 4.0) - rate_divergence(own, its, 4.0)) < 1e-7
    assert abs(window_distance(moved, its, 4, 1) - window_distance(own, its, 4, 1)) > 1e-3


def test_a_little_jitter_costs_windows_less_than_trains() -> None:
    its = torch.zeros(1, 1, 16)
    its[..., 4::6] = 1
    late = its.roll(1, -1)
    assert window_distance(late, its, 4, 1) < train_distance(late, its) / 4


@pytest.mark.parametrize("lesson", REFERENCE.values(), ids=list(REFERENCE))
def test_a_student_that_fires_as_its_teacher_has_nothing_to_learn(lesson: SpikeLesson) -> None:
    spikes = random_spikes(2).requires_grad_()
    loss = lesson(seen(spikes, spikes.detach()))
    loss.backward()
    assert loss == 0
    assert spikes.grad.abs().max() < 1e-12


# --- in a training ---


def spiking(widths: Sequence[int] = (4,), steps: int = 6, rate_coded: bool = False, classes: int = 3) -> SpikingNet:
    """A network whose output neurons fire before anything is learned."""
    network = SpikingNet(classes, 3, 8, widths, steps, rate_coded)
    with torch.no_grad():
        network.bn.weight.mul_(8)
    return network


def fitted(lesson: Lesson, model: nn.Module, teacher: nn.Module) -> Distill:
    method = Distill(teacher, [lesson], 0.5)
    method.prepare(model, TinyImages())
    return method


def test_hidden_neurons_can_be_compared_and_every_layer_counts() -> None:
    model, teacher = spiking(), spiking((4, 5))
    teacher.blocks[0].load_state_dict(spiking().blocks[0].state_dict())
    layers = ["blocks.0.neurons", "output"]
    method = Distill(teacher, [SpikeTrains(layers=layers), SpikeTrains(layers=layers[:1]), SpikeTrains()])
    method.prepare(model, TinyImages())
    losses = method.step(Batch(torch.randn(5, 3, 8, 8), torch.eye(3)[:1].expand(5, 3)), Forward(model, classify()))
    both, hidden, output = (losses.losses[name] for name in ("spike_trains", "spike_trains_2", "spike_trains_3"))
    torch.testing.assert_close(both, hidden + output)
    assert hidden > 0


def test_no_gradient_reaches_the_teacher() -> None:
    model, teacher = spiking(), spiking((6,))
    method = fitted(SpikeWindows(), model, teacher)
    step = method.step(Batch(torch.randn(6, 3, 8, 8), torch.eye(3).repeat(2, 1)), Forward(model, classify()))
    step.losses["spike_windows"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert model.head.weight.grad.abs().sum() > 0
    assert model.blocks[0].conv.weight.grad.abs().sum() > 0


class Bright(TinyImages):
    """The same images in [0, 1], as rate coding wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize.mean.zero_()
        self.normalize.std.fill_(1)


def test_rate_coded_networks_see_the_same_spikes_so_that_equal_ones_fire_alike() -> None:
    data, teacher = Bright(), spiking((4, 5), rate_coded=True).eval()
    model = spiking((4, 5), rate_coded=True).eval()
    weights = {name: tensor for name, tensor in teacher.state_dict().items() if "levels" not in name}
    model.load_state_dict(weights, strict=False)
    method = Distill(teacher, [SpikeTrains(), SpikeWindows(), SpikeRates()])
    method.prepare(model, data)
    batch = data.train()[0]._replace(input=data.normalize(data.train()[0].input))
    with tap(model, "encoding") as own, tap(teacher, "encoding") as its:
        losses = method.step(batch, Forward(model, classify())).losses
    assert torch.equal(own.value, its.value)
    assert 0.3 < own.value.mean() < 0.7
    assert all(losses[name] == 0 for name in ("spike_trains", "spike_windows", "spike_rates"))


def test_a_mixed_image_is_encoded_once_for_both() -> None:
    data, model, teacher = Bright(), spiking(rate_coded=True), spiking((5,), rate_coded=True)
    method = fitted(SpikeTrains(), model, teacher)
    batch = data.train()[0]._replace(input=data.normalize(data.train()[0].input))
    with tap(model, "encoding") as own, tap(teacher, "encoding") as its:
        step = CutMix(probability=1.0).step(batch, Forward(model, classify(), [method]))
    assert not torch.equal(step.batch.input, batch.input)
    assert torch.equal(own.value, its.value)


def test_a_teacher_that_does_not_spike_teaches_by_its_scores() -> None:
    model, data = spiking(), TinyImages()
    method = Distill(tiny_network(), [SoftTargets()], 0.1)
    method.prepare(model, data)
    batch = data.train()[0]._replace(input=data.normalize(data.train()[0].input))
    method.step(batch, Forward(model, classify())).losses["soft_targets"].backward()
    assert model.blocks[0].conv.weight.grad.abs().sum() > 0


def test_it_obeys_the_laws() -> None:
    def make_method() -> Distill:
        torch.manual_seed(1)
        return Distill(spiking((5,)), [SpikeTrains(), SpikeWindows(), SpikeRates()], 0.5)

    check_method(make_method, make_model=spiking)


@pytest.mark.parametrize("other", ["Quantize", "CutMix"])
def test_with_another_method_it_trains_finishes_and_is_exported(other: str) -> None:
    def methods() -> list[Method]:
        distill = Distill(spiking((5,)), [SpikeTrains(), SpikeRates()], 0.5)
        return {
            "Quantize": [Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8)), distill],
            "CutMix": [CutMix(), distill],
        }[other]

    trial = Trial(spiking, classify(), TinyImages(), methods)
    before = trial.learner.model.head.weight.detach().clone()
    for number in range(2):
        step = trial.step(number)
        assert {"cross_entropy", "spike_trains", "spike_rates"} == step.losses.keys()
        assert step.loss.isfinite()
    network = finish(trial.learner)
    assert not torch.equal(before, network.head.weight)
    assert exported(network, trial.image()).isfinite().all()


def disagreement(student: nn.Module, teacher: nn.Module, data: Data) -> float:
    """Mean |O_student - O_teacher| on test images."""
    found = []
    with torch.no_grad(), tap(student.eval(), "output") as own, tap(teacher.eval(), "output") as its:
        for batch in data.test():
            image = data.normalize(batch.input)
            student(image)
            teacher(image)
            found.append((own.value - its.value).abs().mean((1, 2)))
    return float(torch.cat(found).mean())


def learned(model: nn.Module, data: Data, methods: Sequence[Method], epochs: int) -> nn.Module:
    for method in methods:
        method.prepare(model, data)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for epoch in range(epochs):
        model.train()
        for batch in data.train(epoch):
            optimizer.zero_grad()
            given = batch._replace(input=data.normalize(batch.input))
            Forward(model, Classify(10), methods)(given).loss.backward()
            optimizer.step()
    for method in methods:
        method.finish(model)
    return model.eval()


def test_a_distilled_student_fires_more_like_its_teacher_than_one_that_learns_labels_alone() -> None:
    data = Digits(batch_size=64)
    teacher = learned(SpikingNet(size=8, widths=(8, 16), steps=8), data, [], 12)
    start = SpikingNet(size=8, widths=(4, 8), steps=8)
    alone = disagreement(learned(copy.deepcopy(start), data, [], 10), teacher, data)
    taught = learned(start, data, [Distill(teacher, [SpikeTrains(weight=10.0)], 0.5)], 10)
    assert disagreement(taught, teacher, data) < alone


# --- what is refused ---


def test_other_numbers_of_time_steps_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"SpikeTrains: layer 'output' of the model has 6 time steps, .* teacher 8; give"
    ):
        fitted(SpikeTrains(), spiking(), spiking(steps=8))


def test_other_numbers_of_neurons_are_refused() -> None:
    with pytest.raises(UserError, match=r"'blocks.0.neurons' of the model has 4×8×8 neurons, .* teacher 6×8×8; name"):
        fitted(SpikeRates(layers=["blocks.0.neurons"]), spiking(), spiking((6,)))


def test_other_numbers_of_classes_are_refused() -> None:
    with pytest.raises(UserError, match="the teacher tells 4 classes apart, the model 3"):
        fitted(SpikeTrains(), spiking(), spiking(classes=4))


@pytest.mark.parametrize("layer", ["head", "blocks.0.pool"])
def test_layers_that_do_not_spike_are_refused(layer: str) -> None:
    with pytest.raises(UserError, match=rf"SpikeWindows: layer '{layer}' of the model gives no spikes over time"):
        fitted(SpikeWindows(layers=[layer]), spiking(), spiking())


def test_a_teacher_that_does_not_spike_has_no_trains() -> None:
    with pytest.raises(UserError, match=r"layer 'head' of the teacher gives no spikes .* teaches by SoftTargets"):
        fitted(SpikeTrains(teacher_layers=["head"]), spiking(), tiny_network())
    with pytest.raises(UserError, match="Tiny has no layer 'output'"):
        fitted(SpikeTrains(), spiking(), tiny_network())


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="window is 7, layer 'output' has 6 time steps"):
        fitted(SpikeWindows(7), spiking(), spiking())
    with pytest.raises(UserError, match="window 0, stride 1"):
        SpikeWindows(0)
    with pytest.raises(UserError, match="window 4, stride 0"):
        SpikeWindows(stride=0)


def test_a_temperature_that_softens_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="SpikeRates: temperature is 0"):
        SpikeRates(temperature=0.0)
