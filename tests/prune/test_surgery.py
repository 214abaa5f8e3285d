"""Cutting channels out: the golden networks', the masked network's answers, and nothing else about a module changes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from galago.deploy.onnx import export
from galago.deploy.runtime import OnnxRuntime
from galago.laws.trial import TinyImages, classify, exported, tiny_network
from galago.models.mobilenet import mobilenet_v2
from galago.models.resnet import resnet20
from galago.probe import Deployed
from galago.prune.cost import Operations, Parameters, costs_of
from galago.prune.groups import Groups
from galago.prune.surgery import left_of, narrow, silence
from galago.prune.survey import survey

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "structure" / "pruning_baselines.npz")


class Residual(nn.Module):
    """The golden network `res`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c1, self.c2 = (nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in ((3, 8), (8, 6), (6, 8)))
        self.c3 = nn.Conv2d(8, 10, 3, 2, padding=1, bias=False)
        self.c4, self.sc = nn.Conv2d(10, 12, 3, padding=1, bias=False), nn.Conv2d(8, 12, 1, 2, bias=False)
        self.bn0, self.b1, self.b2, self.b3, self.b4, self.bs = (nn.BatchNorm2d(n) for n in (8, 6, 8, 10, 12, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.bn0(self.stem(x)).relu()
        a = (a + self.b2(self.c2(self.b1(self.c1(a)).relu()))).relu()
        a = (self.bs(self.sc(a)) + self.b4(self.c4(self.b3(self.c3(a)).relu()))).relu()
        return self.fc(a.mean((2, 3)))


class Branches(nn.Module):
    """The golden network `cat`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1), nn.BatchNorm2d(10)
        self.c, self.dw = nn.Conv2d(10, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.fc = nn.Linear(80, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.bn(torch.cat([self.a(x), self.b(x)], 1)).relu()).relu()
        return self.fc(nn.functional.max_pool2d(self.dw(x), 2).flatten(1))


def golden(model: nn.Module, name: str) -> tuple[nn.Module, Tensor]:
    """A golden network with its weights, in float64, and its images."""
    model = model.double().eval()
    given = {key.removeprefix(f"{name}_w_"): GOLDEN[key] for key in GOLDEN if key.startswith(f"{name}_w_")}
    state = {key: torch.from_numpy(given[key.replace(".", "_")]) for key in model.state_dict() if "tracked" not in key}
    model.load_state_dict(state, strict=False)
    return model, torch.from_numpy(GOLDEN[f"{name}_x"]).double()


REMOVED = {
    "res": {"s1": "stem", "c1": "c1", "c3": "c3", "s2": "sc"},
    "cat": {"a": "a", "b": "b", "c": "c"},
}


@pytest.mark.parametrize(("name", "make"), [("res", Residual), ("cat", Branches)])
def test_golden_networks_answer_as_the_reference_with_the_same_channels_removed(name: str, make: type) -> None:
    model, image = golden(make(), name)
    torch.testing.assert_close(model(image), torch.from_numpy(GOLDEN[f"{name}_logits"]), rtol=1e-6, atol=1e-9)
    groups = survey(model, image)
    made = {layer.path: layer.outputs for layer in groups.layers}
    kept, whole = (torch.ones(groups.count, dtype=torch.bool) for _ in range(2))
    for group, path in REMOVED[name].items():
        kept[made[path][torch.from_numpy(GOLDEN[f"{name}_removed_{group}"])]] = False
    operations = costs_of(groups, Operations())
    for at, alive in enumerate((whole, kept)):
        assert operations.cost(alive.double()).sum() == 2 * GOLDEN[f"{name}_core_macs"][at]
    narrow(model, groups, kept)
    assert sum(parameter.numel() for parameter in model.parameters()) == GOLDEN[f"{name}_params"][1]
    wanted = torch.from_numpy(GOLDEN[f"{name}_logits_removed"])
    torch.testing.assert_close(model(image), wanted, rtol=1e-6, atol=1e-9)


def trained(model: nn.Module, size: int = 32) -> nn.Module:
    """With statistics of BatchNorm and shifts that are not zero."""
    torch.manual_seed(0)
    for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.2)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size))
    return model.eval()


def some(groups: Groups, share: float = 0.5) -> Tensor:
    drawn = torch.rand(groups.count, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return costs_of(groups, Parameters()).alive(drawn, share).bool()


@pytest.mark.parametrize("make", [resnet20, lambda: mobilenet_v2(width=0.25)])
def test_the_cut_network_answers_as_one_whose_dead_factors_and_shifts_are_zero(make) -> None:
    model, image = trained(make()), torch.randn(3, 3, 32, 32)
    groups = survey(model, image)
    kept = some(groups)
    masked = copy.deepcopy(model)
    for gate in groups.gates:
        norm, dead = masked.get_submodule(gate.module), ~left_of(gate.groups, kept)
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.data[dead], norm.bias.data[dead] = 0.0, 0.0
    narrow(model, groups, kept)
    with torch.no_grad():
        torch.testing.assert_close(model(image), masked(image), rtol=1e-5, atol=1e-5)


def test_a_channel_that_is_only_left_out_of_the_factors_still_gives_its_shift() -> None:
    model, image = trained(resnet20()), torch.randn(3, 3, 32, 32)
    groups = survey(model, image)
    kept = some(groups)
    shifting = copy.deepcopy(model)
    for gate in groups.gates:
        shifting.get_submodule(gate.module).weight.data[~left_of(gate.groups, kept)] = 0.0
    narrow(model, groups, kept)
    assert not torch.allclose(model(image), shifting(image), atol=1e-2)


def test_keeping_everything_changes_nothing_and_keeps_every_tensor() -> None:
    model = trained(resnet20())
    groups = survey(model, torch.randn(1, 3, 32, 32))
    before = dict(model.named_parameters())
    narrow(model, groups, torch.ones(groups.count, dtype=torch.bool))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_modules_with_their_hooks_layout_and_frozen_parameters_outlive_the_cut() -> None:
    model = trained(resnet20()).to(memory_format=torch.channels_last)
    model.layer2.requires_grad_(False)
    seen = []
    model.layer1[0].conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    modules, groups = list(model.modules()), survey(model, torch.randn(1, 3, 32, 32))
    narrow(model, groups, some(groups))
    seen.clear()
    model(torch.randn(1, 3, 32, 32))
    conv = model.layer1[0].conv1
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))
    assert seen == [conv.out_channels] == [conv.weight.shape[0]]
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(conv.weight, nn.Parameter)
    assert not any(parameter.requires_grad for parameter in model.layer2.parameters())
    assert all(parameter.requires_grad for parameter in model.layer1.parameters())


@pytest.mark.parametrize("make", [resnet20, lambda: mobilenet_v2(width=0.25)])
def test_modules_say_the_sizes_that_they_have(make) -> None:
    model = make().eval()
    groups = survey(model, torch.randn(1, 3, 32, 32))
    narrow(model, groups, some(groups))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert [module.out_channels, module.in_channels // module.groups] == list(module.weight.shape[:2])
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_var)
        if isinstance(module, nn.Linear):
            assert [module.out_features, module.in_features] == list(module.weight.shape)


def test_silenced_channels_stay_silent_in_a_network_of_the_old_size() -> None:
    model = tiny_network().eval()
    groups = survey(model, torch.randn(1, 3, 8, 8))
    shapes = [parameter.shape for parameter in model.parameters()]
    kept = some(groups)
    silence(model, groups, kept)
    assert [parameter.shape for parameter in model.parameters()] == shapes
    with torch.no_grad():
        stem = model.stem(torch.randn(2, 3, 8, 8))
    assert torch.equal(stem.abs().amax((0, 2, 3)) > 0, left_of(groups.maps["stem"], kept))


def test_a_cut_network_trains_and_exports(tmp_path: Path) -> None:
    data, model = TinyImages(), trained(resnet20(classes=3), 8)
    image = data.normalize(data.example())
    groups = survey(model, image)
    narrow(model, groups, some(groups))
    model.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    deployed = Deployed(model.eval(), data.normalize, classify()).eval()
    path = export(deployed, data.example(), tmp_path / "model.onnx")
    with torch.no_grad():
        wanted = model(image)
    torch.testing.assert_close(exported(model, image), wanted)
    torch.testing.assert_close(OnnxRuntime(path)(data.example()), wanted, rtol=1e-4, atol=1e-4)
