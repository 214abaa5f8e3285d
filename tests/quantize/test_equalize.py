"""Equalization against brute force, and that the float network answers as before."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from rich.table import Table
from torch import Tensor, nn

from galago.deploy.integer import lower
from galago.errors import UserError
from galago.laws.trial import TinyImages
from galago.models.mobilenet import MobileNetV2
from galago.models.resnet import ResNet
from galago.quantize.calibrated import Calibrated, CalibratedWeight
from galago.quantize.equalize import Equalize, columns_span, divide_columns, equalizing, rows_span
from galago.quantize.fold import FoldedNorm
from galago.quantize.quantize import Quantize
from galago.spec import architecture, rebuild
from galago.testing import check_method


def settled(model: nn.Module, spread: float = 1.0) -> nn.Module:
    """A network with BatchNorms as after training: gains of both signs, some channels much wider than others."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.bias.normal_()
                module.weight.uniform_(0.5, 1.5)
                module.weight.mul_(torch.randint_like(module.weight, 2) * 2 - 1)
            if isinstance(module, nn.Conv2d):
                module.weight.mul_((spread * torch.randn(len(module.weight), 1, 1, 1)).exp())
    return model.eval()


class Chain(nn.Module):
    """Convolution, depth-wise, convolution, all three without a BatchNorm somewhere, and activations of every kind."""

    def __init__(self, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.filter, self.prelu = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.PReLU(8)
        self.narrow, self.leaky = nn.Conv2d(8, 12, 1), nn.LeakyReLU(0.1)
        self.grouped, self.pool = nn.Conv2d(12, 6, 3, groups=3), nn.MaxPool2d(2)
        self.last = nn.Conv2d(6, 3, 1)
        self.between = second or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.filter(self.between(self.norm(self.first(x))))
        x = self.grouped(self.leaky(self.narrow(self.prelu(x))))
        return self.last(self.pool(x).relu()).mean((2, 3))


def difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).detach().abs().max() / second.detach().abs().max())


def test_one_pair_is_the_brute_force(golden):
    want = {key.removeprefix("cle_"): value for key, value in golden("ptq").items() if key.startswith("cle_")}
    c = equalizing(rows_span(want["w1"]), columns_span(want["w2"]))
    torch.testing.assert_close(c, want["expected_c"], rtol=1e-10, atol=0)
    torch.testing.assert_close(want["w1"] * c.view(-1, 1, 1, 1), want["expected_w1"], rtol=1e-10, atol=0)
    torch.testing.assert_close(want["b1"] * c, want["expected_b1"], rtol=1e-10, atol=0)
    torch.testing.assert_close(divide_columns(want["w2"], c), want["expected_w2"], rtol=1e-10, atol=0)


@pytest.mark.parametrize(("groups", "inputs"), [(1, 6), (3, 6), (6, 6)])
def test_columns_of_grouped_weights_are_those_that_read_a_channel(groups, inputs):
    layer = nn.Conv2d(inputs, 12, 3, groups=groups, bias=False).double()
    spans = columns_span(layer.weight.detach(), groups)
    for channel in range(inputs):
        gradient = torch.zeros(1, inputs, 3, 3, dtype=torch.float64)
        largest = 0.0
        for place in range(9):  # what an image with a single lit pixel brings out
            image = gradient.clone()
            image[0, channel].view(-1)[place] = 1
            largest = max(largest, float(layer(image).detach().abs().max()))
        assert spans[channel].item() == pytest.approx(largest)
    c = torch.rand(inputs, dtype=torch.float64) + 0.5
    x = torch.randn(2, inputs, 5, 5, dtype=torch.float64)
    expected = layer(x)
    layer.weight.data.copy_(divide_columns(layer.weight.data, c, groups))
    torch.testing.assert_close(layer(x * c.view(1, -1, 1, 1)), expected)


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    mobile = MobileNetV2(3, width=0.1)
    for path, module in list(mobile.named_modules()):
        if isinstance(module, nn.ReLU6):
            mobile.set_submodule(path, nn.ReLU())
    return [
        Chain(),
        ResNet([1, 1], [5, 8], 3),
        ResNet([1, 1], [5, 8], 3, project=True),
        mobile,
        timm.create_model("test_resnet", num_classes=3),
    ]


@pytest.mark.parametrize("number", range(5))
def test_the_float_network_answers_as_before_and_both_ranges_are_equal(number):
    model, x = settled(networks()[number]), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        method = Equalize(sweeps=100)
        model = method.prepare(model, TinyImages())
        assert difference(model(x), before) < 1e-5
    assert method.rows()
    for row in method.rows():
        first, second = (model.get_submodule(path) for path in (row.first, row.second))
        r1, r2 = rows_span(first.weight), columns_span(second.weight, second.groups)
        torch.testing.assert_close(r1, r2, rtol=1e-5, atol=0)
        assert not row.note


def test_a_folded_batch_norm_is_a_bias_in_training_too():
    model, x = settled(Chain()), torch.randn(4, 3, 8, 8)
    before = model(x)
    model = Equalize().prepare(model, TinyImages())
    assert isinstance(model.norm, FoldedNorm)
    assert difference(model.train()(x), before) < 1e-5
    assert not model.norm.layer.training
    means = model.norm(model.first(torch.randn(2, 3, 8, 8)))
    assert means.requires_grad


def test_the_distribution_behind_a_folded_norm_is_kept_with_its_scale():
    model = settled(Chain())
    beta, gamma = model.norm.bias.detach().clone(), model.norm.weight.detach().clone()
    plain = model.first.weight.detach() * (gamma / (model.norm.running_var + model.norm.eps).sqrt()).view(-1, 1, 1, 1)
    model = Equalize().prepare(model, TinyImages())
    c = rows_span(model.first.weight) / rows_span(plain)
    torch.testing.assert_close(model.norm.mean, beta * c)
    torch.testing.assert_close(model.norm.deviation, gamma.abs() * c)


def test_pairs_never_reach_across_sums_and_forks():
    method = Equalize()
    method.prepare(settled(ResNet([2], [5], 3)), TinyImages())
    assert [(row.first, row.second) for row in method.rows()] == [
        ("layer1.0.conv1", "layer1.0.conv2"),
        ("layer1.1.conv1", "layer1.1.conv2"),
    ]


def test_relu6_gives_way_or_its_pair_stays():
    x = torch.randn(4, 3, 32, 32)
    model = settled(MobileNetV2(3, width=0.1))
    clipped, relu = model(x), copy.deepcopy(model)
    untouched, method = copy.deepcopy(model), Equalize(replace_relu6=False)
    narrow_pairs = [row for row in _rows(method, untouched) if not row.note]
    assert difference(untouched(x), clipped) < 1e-5
    assert all(".narrow." in row.first for row in narrow_pairs)
    assert any("replace_relu6" in row.note for row in method.rows())
    replaced = Equalize().prepare(model, TinyImages())
    kinds = {path: type(module) for path, module in replaced.named_modules()}
    swapped = [path for path, module in relu.named_modules() if isinstance(module, nn.ReLU6) and kinds[path] is nn.ReLU]
    assert len(swapped) > 20
    for path in swapped:
        relu.set_submodule(path, nn.ReLU())
    assert difference(replaced(x), relu.eval()(x)) < 1e-5
    functional = Chain(nn.Hardtanh(0.0, 6.0))
    rows = _rows(Equalize(), functional)
    assert "no ReLU6 module" in rows[0].note
    assert not isinstance(functional.norm, FoldedNorm)


def _rows(method: Equalize, model: nn.Module):
    method.prepare(model, TinyImages())
    return method.rows()


def test_timms_mobile_network_is_equalized_inside_its_norms():
    model = settled(timm.create_model("mobilenetv2_035", num_classes=3))
    method = Equalize()
    model = method.prepare(model, TinyImages())
    assert sum(not row.note or "ReLU" in row.note for row in method.rows()) > 30
    assert all(row.after <= row.before for row in method.rows() if ".bn1" in row.first)


def test_dead_channels_stay_as_they_are():
    model = settled(Chain())
    with torch.no_grad():
        model.first.weight[2] = 0
        model.filter.weight[5] = 0
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    model = Equalize().prepare(model, TinyImages())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert difference(model(x), before) < 1e-5


def test_absorbed_biases_change_nothing_where_they_always_pass():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)
    )
    model = settled(nn.Sequential(model, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), 0.3)
    with torch.no_grad():
        model[0][0].weight.mul_(0.01)  # so that no value is far from the mean
        model[0][1].running_mean.zero_()
        model[0][1].bias.copy_(torch.tensor([5.0, 8.0, -1.0, 4.0]))
    x = torch.randn(4, 3, 8, 8)
    before = model(x)
    method = Equalize(absorb=True)
    model = method.prepare(model, TinyImages())
    assert "bias absorbed" in method.rows()[0].note
    assert difference(model(x), before) < 1e-5
    left = model[0][1]
    assert (left.mean[:2] <= 3 * left.deviation[:2] * 1.001).all()
    padded = Equalize(absorb=True)
    padded.prepare(settled(ResNet([1], [5], 3)), TinyImages())
    assert not padded.rows()[0].note


def test_per_tensor_weights_lose_far_less():
    errors = []
    x = torch.randn(8, 3, 16, 16)
    for methods in ([], [Equalize()]):
        torch.manual_seed(3)
        model = settled(ResNet([1, 1], [8, 8], 3), spread=2.0)
        with torch.no_grad():
            expected = model(x)
            for method in [*methods, Quantize(CalibratedWeight(8, per_channel=False))]:
                model = method.prepare(model, TinyImages())
            errors.append(difference(model.eval()(x), expected))
    assert errors[1] < 0.7 * errors[0]


def test_a_finished_network_is_written_down_rebuilt_and_lowered():
    model = MobileNetV2(3, width=0.1)
    model.__dict__["built_from"] = {
        "class_path": "galago.models.mobilenet.mobilenet_v2",
        "init_args": {"classes": 3, "width": 0.1},
    }
    model = settled(model)
    data = TinyImages()
    quantize = Quantize(CalibratedWeight(8, per_channel=False), Calibrated(8), stream=Calibrated(8))
    for method in (equalize := Equalize(), quantize):
        model = method.prepare(model, data)
    model = quantize.finish(model)
    again = rebuild(architecture(model))
    again.load_state_dict(model.state_dict())
    x = data.normalize(data.example())
    assert torch.equal(again.eval()(x), model(x))
    assert difference(lower(model, x)(x), model(x)) < 0.05
    assert isinstance(equalize.summary(), Table)


def test_it_obeys_the_laws():
    check_method(Equalize)
    check_method(lambda: Equalize(absorb=True, sweeps=1))


def test_nothing_to_equalize_is_said():
    method = Equalize()
    method.prepare(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), TinyImages())
    assert "nothing changed" in str(method.summary())


def test_behind_quantize_it_is_refused():
    model = Quantize(CalibratedWeight(8)).prepare(ResNet([1], [5], 3), TinyImages())
    with pytest.raises(UserError, match="before Quantize"):
        Equalize().prepare(model, TinyImages())
    with pytest.raises(UserError, match="sweeps is 0"):
        Equalize(sweeps=0)
