"""Costs and their regularizer: MorphNet's numbers, its gradient from first principles, and whole numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.models.resnet import resnet20
from galago.prune.cost import Costs, Operations, Parameters, Resource, costs_of
from galago.prune.groups import Groups, strengths
from galago.prune.survey import survey

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "distillation" / "compact_cnn_kd.npz")
KINDS = {"flops": Operations(), "params": Parameters()}
THETA = float(GOLDEN["theta"])


class Golden(nn.Module):
    """The golden network: an inverted residual behind a stem, and a convolution with a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.expand, self.norm2 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm3 = nn.Conv2d(8, 8, 3, 2, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.project, self.norm4 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.conv5, self.norm5 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        for number, norm in enumerate((self.norm1, self.norm2, self.norm3, self.norm4, self.norm5), 1):
            norm.weight.data = torch.from_numpy(GOLDEN[f"gamma{number}"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.expand(self.norm1(self.conv1(x)).relu())).relu()
        x = self.norm4(self.project(self.norm3(self.depthwise(x)).relu()))
        return self.fc((x + self.norm5(self.conv5(x))).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    return Golden().double().eval()


@pytest.fixture
def groups(model: nn.Module) -> Groups:
    return survey(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))


def of(groups: Groups, kind: str) -> Costs:
    costs = costs_of(groups, KINDS[kind])
    assert [layer.path for layer in groups.layers] == list(GOLDEN["layer_names"])
    return costs


@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_the_official_ones(model: nn.Module, groups: Groups, kind: str) -> None:
    costs, gates = of(groups, kind), strengths(model, groups).detach()
    alive = costs.alive(gates, THETA)
    assert costs.cost(alive).tolist() == GOLDEN[f"{kind}_cost_per_layer"].tolist()
    assert costs.cost(torch.ones_like(gates)).sum() == GOLDEN[f"{kind}_seed_cost"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_regularizer_and_its_gradients_are_the_official_ones(model: nn.Module, groups: Groups, kind: str) -> None:
    costs, gates = of(groups, kind), strengths(model, groups)
    layers = costs.regularizer(costs.alive(gates.detach(), THETA), gates)
    torch.testing.assert_close(layers.detach(), torch.from_numpy(GOLDEN[f"{kind}_reg_per_layer"]))
    torch.testing.assert_close(layers.sum().item(), float(GOLDEN[f"{kind}_reg_total"]))
    layers.sum().backward()
    for number in range(1, 6):
        found = model.get_submodule(f"norm{number}").weight.grad
        torch.testing.assert_close(found, torch.from_numpy(GOLDEN[f"{kind}_grad_gamma{number}"]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_group_is_what_it_costs_with_its_layers_as_they_are(groups: Groups, kind: str) -> None:
    """Counted by hand: κ times the living channels on the other side, over all that make and all that read it."""
    costs, resource = of(groups, kind), KINDS[kind]
    gates = torch.rand(groups.count, dtype=torch.float64, requires_grad=True)
    alive = costs.alive(gates.detach(), 0.4)
    costs.regularizer(alive, gates).sum().backward()
    for group in range(groups.count):
        total = 0.0
        for layer in groups.layers:
            kappa = resource.coefficient(layer)
            inputs, outputs = layer.inputs.tolist(), layer.outputs.tolist()
            living = {g: 1.0 if g < 0 else float(alive[g]) for g in (*inputs, *outputs)}
            total += kappa * sum(living[g] for g in inputs) * outputs.count(group)
            total += kappa * sum(living[g] for g in outputs) * inputs.count(group)
        assert gates.grad is not None
        assert gates.grad[group].item() == pytest.approx(total)


def test_with_all_gates_one_the_regularizer_is_twice_the_cost_where_both_sides_may_go(groups: Groups) -> None:
    costs, ones = of(groups, "flops"), torch.ones(groups.count, dtype=torch.float64)
    ratio = costs.regularizer(ones, ones) / costs.cost(ones)
    assert ratio.tolist() == [1.0, 2.0, 1.0, 2.0, 2.0, 1.0]  # the image, a depth-wise layer and the answer: once


def test_masks_have_no_gradient(groups: Groups) -> None:
    gates = torch.rand(groups.count, dtype=torch.float64, requires_grad=True)
    assert not of(groups, "flops").alive(gates, THETA).requires_grad


def test_a_strength_of_exactly_the_threshold_is_dead(groups: Groups) -> None:
    costs, gates = of(groups, "flops"), torch.ones(groups.count, dtype=torch.float64)
    gates[0] = 0.5
    assert costs.alive(gates, 0.5)[0] == 0
    assert costs.alive(gates, 0.49)[0] == 1


def test_every_layer_keeps_its_strongest_group(groups: Groups) -> None:
    costs = of(groups, "params")
    gates = torch.rand(groups.count, dtype=torch.float64)
    alive = costs.alive(gates, 2.0)
    layers = [layer.outputs for layer in groups.layers if (layer.outputs >= 0).all()]
    assert all(alive[outputs[gates[outputs].argmax()]] == 1 for outputs in layers)
    assert alive.sum() == 3  # one for the stem, the inner and the outer channels each
    assert (costs.cost(alive) > 0).all()


@pytest.mark.parametrize("resource", KINDS.values())
def test_single_precision_on_relative_costs_is_good_enough(resource: Resource) -> None:
    groups = survey(resnet20().eval(), torch.randn(1, 3, 32, 32))
    costs = costs_of(groups, resource)
    gates = torch.rand(groups.count, dtype=torch.float64)
    alive = costs.alive(gates, 0.5)
    rough = costs._replace(kappa=costs.kappa / costs.kappa.sum()).to(torch.zeros(()))
    wanted = costs.regularizer(alive, gates) / costs.kappa.sum()
    torch.testing.assert_close(rough.regularizer(alive.float(), gates.float()).double(), wanted, rtol=1e-5, atol=0.0)
