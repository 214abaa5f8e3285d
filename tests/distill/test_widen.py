"""Widened layers against the golden vectors: what is added, what it learns, and that nothing else moves."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from galago.distill.junctions import added_macs, added_parameters, junctions
from galago.distill.logits import softened_divergence
from galago.distill.widen import Junction, Plant, first_filters, widen
from galago.layers import find
from galago.probes.cost import cost_table
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQWeight
from galago.quantize.min_max import MinMaxWeight
from lessons import FOLDER, equal

OLD = {"w1": "a.weight", "g1": "n.weight", "b1": "n.bias", "m1": "n.running_mean", "v1": "n.running_var"} | {
    "w2": "b.weight",
    "g2": "m.weight",
    "b2": "m.bias",
    "m2": "m.running_mean",
    "v2": "m.running_var",
    "fw": "head.weight",
    "fb": "head.bias",
}
PLACE = Junction("a", "n", "b", 1, 25, 25)


def plain(*widths: int, classes: int = 3, bias: bool = False) -> nn.Module:
    """Two 3×3 convolutions with BatchNorm and ReLU, global average pooling and a linear layer."""
    first, second, third = widths
    layers = {
        "a": nn.Conv2d(first, second, 3, padding=1, bias=bias),
        "n": nn.BatchNorm2d(second),
        "r": nn.ReLU(),
        "b": nn.Conv2d(second, third, 3, padding=1, bias=False),
        "m": nn.BatchNorm2d(third),
        "s": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "head": nn.Linear(third, classes),
    }
    return nn.Sequential(OrderedDict(layers))


class Official:
    """The golden vectors' network with channels planted in its first convolution."""

    def __init__(self) -> None:
        import numpy as np

        file = np.load(FOLDER / "channel_planting.npz")
        self.golden = {name: torch.from_numpy(np.asarray(file[name])) for name in file}
        self.net = plain(2, 3, 4).double()
        for name, path in OLD.items():
            self.net.state_dict()[path].copy_(self["old_" + name])
        self.plant = widen(self.net, PLACE, self["init_w1n"])

    def __getitem__(self, name: str) -> Tensor:
        return self.golden[name]

    def added(self) -> dict[str, Tensor]:
        """What is new of each grown tensor, by the golden vectors' names."""
        names = ("w1n", "g1n", "b1n", "running_mean", "running_var", "w2n")
        return {
            name: part.new.detach().narrow(part.axis, part.kept, part.new.shape[part.axis] - part.kept)
            for name, part in zip(names, self.plant.parts, strict=True)
        }

    def step(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """One training step of what was planted; gives the loss."""
        optimizer.zero_grad()
        self.net.train()
        with self.plant.normalizing(self.net):
            said = self.net(self["x"])
        labels = nn.functional.cross_entropy(said, self["y"])
        taught = softened_divergence(said, self["teacher_logits"], float(self["T"]))
        loss = (1 - self["alpha"]) * labels + self["alpha"] * taught
        loss.backward()
        with self.plant.held():
            optimizer.step()
        return loss.detach()


def test_the_network_answers_as_before_when_channels_were_planted() -> None:
    official = Official()
    with torch.no_grad():
        equal(official.net.eval()(official["x"]), official["logits_before"])
        official.net.train()
        with official.plant.normalizing(official.net):
            equal(official.net(official["x"]), official["logits_before"])


def test_three_steps_are_the_reference_ones() -> None:
    official = Official()
    official.plant.learn_alone(official.net)
    grown = dict(zip(("w1n", "g1n", "b1n"), official.plant.parts[:3], strict=True))
    grown["w2n"] = official.plant.parts[-1]
    begin = official.added()
    for name in ("w1n", "g1n", "b1n", "w2n"):
        equal(begin[name], official["init_" + name])
    optimizer = SGD([part.new for part in official.plant.learned], float(official["lr"]))
    losses = [official.step(optimizer)]
    equal(grown["w2n"].new.grad[:, 3:], official["step1_grad_w2n"])
    assert not grown["w1n"].new.grad.any(), "in the first step only the next layer learns"
    losses.append(official.step(optimizer))
    equal(grown["w1n"].new.grad[3:], official["step2_grad_w1n"])
    losses.append(official.step(optimizer))
    equal(torch.stack(losses), official["losses"])
    for name, tensor in official.added().items():
        equal(tensor, official["after3_" + name])
    with torch.no_grad():
        equal(official.net.eval()(official["x"]), official["logits_after_eval"])


def test_parameters_are_counted_as_the_reference_counts_them() -> None:
    official = Official()
    official.plant.take_out()
    assert added_parameters(official.net, PLACE, int(official["n_new"])) == official["added_params"]


@pytest.mark.parametrize(
    "make", [lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True), lambda p: AdamW(p, 0.01)]
)
def test_no_bit_of_what_was_there_moves_with_momentum_and_decay(make) -> None:
    official = Official()
    official.plant.learn_alone(official.net)
    optimizer = make([p for p in official.net.parameters() if p.requires_grad])
    for _ in range(3):
        official.step(optimizer)
    now = official.net.state_dict()
    for name, path in OLD.items():
        old = official["old_" + name]
        assert torch.equal(now[path][tuple(slice(size) for size in old.shape)], old), path
    assert now["n.num_batches_tracked"] == now["m.num_batches_tracked"] == 0


def test_a_step_is_that_of_two_networks_side_by_side() -> None:
    """The frozen one in evaluation mode, and the new channels alone as small layers of their own."""
    torch.manual_seed(1)
    net, image = plain(2, 3, 4), torch.randn(5, 2, 6, 6)
    filters, columns = torch.randn(2, 2, 3, 3), torch.randn(4, 2, 3, 3)
    with torch.no_grad():
        frozen = net.eval().n(net.a(image))
        new = nn.functional.conv2d(image, filters, padding=1)
        mean, variance = new.mean((0, 2, 3), keepdim=True), new.var((0, 2, 3), unbiased=False, keepdim=True)
        new = (new - mean) / (variance + net.n.eps).sqrt()
        inner = net.b(frozen.relu()) + nn.functional.conv2d(new.relu(), columns, padding=1)
        expected = net.head(net.m(inner).relu().mean((2, 3)))
        plant = widen(net, PLACE, filters)
        net.b.weight[:, 3:] = columns
        net.train()
        with plant.normalizing(net):
            torch.testing.assert_close(net(image), expected)
        assert net.m.training
    torch.testing.assert_close(net.n.running_mean[3:], 0.1 * mean.flatten())
    assert not net.n.running_mean[:3].any()


def test_taking_out_brings_back_the_same_objects() -> None:
    net = plain(2, 3, 4, bias=True)
    before, description = dict(net.named_parameters()) | dict(net.named_buffers()), str(net)
    plant = widen(net, PLACE, torch.randn(2, 2, 3, 3))
    assert (net.a.out_channels, net.n.num_features, net.b.in_channels) == (5, 5, 5)
    assert net.a.bias[3:].tolist() == [0, 0]
    wide = net.a.weight
    plant.take_out()
    after = dict(net.named_parameters()) | dict(net.named_buffers())
    assert all(after[name] is tensor for name, tensor in before.items())
    assert str(net) == description
    plant.put()
    assert net.a.weight is wide


def flattened() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.MaxPool2d(2, 2), nn.Flatten(), nn.Linear(4 * 9, 5))


@pytest.mark.parametrize(("net", "side"), [(plain(3, 4, 5, bias=True), 7), (flattened(), 14)])
def test_costs_are_those_of_the_grown_network(net: nn.Module, side: int) -> None:
    image = torch.randn(2, 3, side, side)
    places, _ = junctions(net, image[:1], 2)
    for place in places:
        costs = [(sum(p.numel() for p in net.parameters()), sum(row.macs for row in cost_table(net, image)))]
        expected = added_parameters(net, place, 2), added_macs(net, place, 2)
        before = net.eval()(image)
        layer = find(net, place.layer)
        plant = widen(net, place, first_filters(layer.weight, 2, torch.Generator()))
        costs.append((sum(p.numel() for p in net.parameters()), sum(row.macs for row in cost_table(net, image))))
        assert tuple(b - a for a, b in zip(*costs, strict=True)) == expected
        torch.testing.assert_close(net(image), before)
        plant.take_out()


def test_a_channel_that_is_flattened_takes_a_column_for_each_pixel() -> None:
    net = flattened()
    ((place,), _) = junctions(net, torch.randn(1, 3, 14, 14), 1)
    assert place == Junction("0", None, "4", 9, 36, 1)
    widen(net, place, torch.ones(1, 3, 3, 3))
    image = torch.randn(2, 3, 14, 14)
    with torch.no_grad():
        before = net(image)
        net[4].weight[:, 36:] = 1.0
        pooled = nn.functional.max_pool2d(nn.functional.conv2d(image, torch.ones(1, 3, 3, 3), stride=2).add(0), 2, 2)
        expected = before + (pooled.relu() + net[0].bias[4]).sum((1, 2, 3))[:, None]
        torch.testing.assert_close(net(image), expected)


def test_new_filters_have_the_deviation_of_the_formula() -> None:
    drawn = first_filters(torch.zeros(1, 16, 3, 3), 4000, torch.Generator().manual_seed(0))
    assert drawn.std().item() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.01)
    assert drawn.mean().abs() < 1e-3


@pytest.mark.parametrize("kind", [LSQWeight, MinMaxWeight])
def test_a_quantizer_keeps_its_old_entries_and_sets_those_of_new_channels(kind) -> None:
    torch.manual_seed(0)
    net = plain(2, 3, 4)
    net.a = QuantLayer(net.a, kind(4))
    image = torch.randn(2, 2, 6, 6)
    (own,) = (*net.a.weight_quantizer.parameters(), *net.a.weight_quantizer.buffers())
    own.data.mul_(0.7 if kind is LSQWeight else 1.0)  # as if it had learned since
    before, old = net.eval()(image), own.detach().clone()
    filters = torch.randn(2, 2, 3, 3)
    plant = widen(net, PLACE, filters)
    torch.testing.assert_close(net(image), before)
    grid = net.a.weight_quantizer.grid()
    fresh = kind(4)
    fresh.initialize(filters)
    assert torch.equal(grid.scale[:3], old)
    torch.testing.assert_close(grid.scale[3:], fresh.grid().scale)
    plant.take_out()
    assert torch.equal(net.a.weight_quantizer.grid().scale, old)


def test_the_memory_layout_stays() -> None:
    net = plain(2, 3, 4).to(memory_format=torch.channels_last)
    widen(net, PLACE, torch.randn(2, 2, 3, 3))
    for weight in (net.a.weight, net.b.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_norm_that_averages_over_all_batches_has_the_usual_momentum_for_new_entries() -> None:
    net = plain(2, 3, 4)
    net.n.momentum = None
    plant = widen(net, PLACE, torch.randn(2, 2, 3, 3))
    net.train()
    with plant.normalizing(net):
        net(torch.randn(4, 2, 6, 6) + 5)
    one: Plant = plant
    assert one.norm is net.n
    assert (net.n.running_var[3:] != 1).all()
    assert torch.equal(net.n.running_var[:3], torch.ones(3))
