"""Corrected biases: mean outputs are the float network's, measured or computed, wherever the bias lives."""

from __future__ import annotations

import copy

import pytest
import torch
from rich.table import Table
from torch import Tensor, nn

from galago.data import Data
from galago.deploy.integer import lower
from galago.errors import UserError
from galago.laws.trial import TinyImages, tiny_network
from galago.method import Method
from galago.models.resnet import ResNet
from galago.quantize.calibrated import Calibrated, CalibratedWeight
from galago.quantize.calibration import first_inputs
from galago.quantize.correct_bias import BiasedConv2d, BiasedLinear, CorrectBias, weight_shift
from galago.quantize.equalize import Equalize
from galago.quantize.ewgs import EWGS, EWGSWeight
from galago.quantize.layer import QuantOutput
from galago.quantize.quantize import Quantize
from galago.quantize.rest import rest, rests, wake
from galago.quantize.rounding import weight_quantized
from galago.spec import architecture, rebuild
from galago.testing import check_method


class Bare(nn.Module):
    """Layers without BatchNorm, with and without a bias of their own, and one with a BatchNorm that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 5, 3, bias=False), nn.Conv2d(5, 6, 3, padding=1)
        self.three, self.norm = nn.Conv2d(6, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).relu()).relu()
        return self.head(self.norm(self.three(x)).relu().mean((2, 3)))


def seasoned(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def plain() -> Quantize:
    return Quantize(CalibratedWeight(3), Calibrated(8), edge_bits=3, stream=Calibrated(8))


def prepared(model: nn.Module, *methods: Method, data: Data | None = None) -> nn.Module:
    for method in methods:
        model = method.prepare(model, data or TinyImages())
    return model.eval()


def test_one_layer_is_the_brute_force(golden):
    want = {key.removeprefix("bc_"): value for key, value in golden("ptq").items() if key.startswith("bc_")}
    outputs = [nn.functional.conv2d(want["x"], want[name], want["bias"]) for name in ("weight_q", "weight")]
    shift = outputs[0].mean((0, 2, 3)) - outputs[1].mean((0, 2, 3))
    torch.testing.assert_close(want["bias"] - shift, want["expected_bias"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_shift_of_a_changed_weight_is_that_of_constant_inputs(groups):
    layer = nn.Conv2d(4, 8, 3, groups=groups, bias=False).double()
    mean = torch.randn(4, dtype=torch.float64)
    expected = layer(mean.view(1, -1, 1, 1).expand(1, 4, 3, 3)).detach().flatten()
    torch.testing.assert_close(weight_shift(layer.weight.detach(), mean, groups), expected)
    linear = nn.Linear(4, 5, bias=False).double()
    torch.testing.assert_close(weight_shift(linear.weight.detach(), mean), linear(mean).detach())


@pytest.mark.parametrize("make", [lambda: ResNet([1, 1], [5, 8], 3), lambda: ResNet([1, 1], [5, 8], 3, project=True)])
def test_afterwards_mean_outputs_are_the_float_networks(make):
    float_model, data = seasoned(make()), TinyImages()
    model = prepared(copy.deepcopy(float_model), plain())
    inputs, exact, rounded = first_inputs(data, 2, torch.device("cpu")), {}, {}
    norms = {path: path.replace("conv", "bn") for path in weight_quantized(model) if "conv" in path}

    def means(network: nn.Module, found: dict[str, Tensor]) -> None:
        for path in [*norms.values(), "linear"]:
            module = network.get_submodule(path)
            module = module.layer if isinstance(module, QuantOutput) else module
            keep = lambda module, args, output, path=path: found.__setitem__(path, output)  # noqa: E731
            module.register_forward_hook(keep)
        with torch.no_grad():
            network(inputs)

    means(float_model, exact)
    before: dict[str, Tensor] = {}
    means(copy.deepcopy(model), before)
    method = CorrectBias(batches=2)
    means(prepared(model, method), rounded)
    for path, output in exact.items():
        axes = [axis for axis in range(output.ndim) if axis != 1]
        off = (rounded[path].double().mean(axes) - output.double().mean(axes)).abs().max() / output.abs().max()
        assert off < 1e-6, path
    assert (before["linear"].mean(0) - exact["linear"].mean(0)).abs().max() > 1e-3
    assert [row.layer for row in method.rows()][:2] == ["conv1", "layer1.0.conv1"]
    assert all("running mean" in row.corrected for row in method.rows() if "conv" in row.layer)
    assert isinstance(method.summary(), Table)


@pytest.mark.parametrize("quantize", [plain(), Quantize(EWGSWeight(3), EWGS(3), edge_weight=CalibratedWeight(3))])
def test_a_bias_is_made_where_none_is_and_the_layers_parameters_stay(quantize):
    torch.manual_seed(0)
    model, data = seasoned(Bare()), TinyImages()
    weights = {path: module.weight for path, module in model.named_children()}
    model = prepared(model, quantize)
    inputs = first_inputs(data, 2, torch.device("cpu"))
    with torch.no_grad():
        rest(model)
        wanted = model(inputs).mean(0)
        wake(model)
        before = (model(inputs).mean(0) - wanted).abs().max()
        method = CorrectBias(batches=2)
        model = prepared(model, method)
        assert (model(inputs).mean(0) - wanted).abs().max() < 1e-6 * wanted.abs().max() < before
    kinds = {path: type(layer.layer) for path, layer in weight_quantized(model).items()}
    assert kinds == {"one": BiasedConv2d, "two": nn.Conv2d, "three": nn.Conv2d, "head": BiasedLinear}
    assert {row.layer: row.corrected for row in method.rows()} == {
        "one": "a new bias",
        "two": "its bias",
        "three": "norm (running mean)",
        "head": "a new bias",
    }
    for path, layer in weight_quantized(model).items():
        assert layer.layer.weight is weights[path]


def test_without_images_the_shift_of_the_weights_is_computed():
    """Inputs drawn from the very distribution that the BatchNorm promises: computed and measured shifts agree."""
    torch.manual_seed(0)

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.bn, self.two = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.bn(self.one(x)).relu()).mean((2, 3))

    model = Drawn().eval()
    nn.init.normal_(model.bn.weight)
    nn.init.normal_(model.bn.bias)
    x = torch.randn(512, 3, 8, 8)
    with torch.no_grad():
        y = model.one(x)
        model.bn.running_mean.copy_(y.mean((0, 2, 3)))
        model.bn.running_var.copy_(y.var((0, 2, 3)))
    twin = copy.deepcopy(model)
    model, method, shifts = prepared(model, Quantize(CalibratedWeight(2), edge_bits=2)), CorrectBias(batches=0), []
    for corrected in (model, prepared(copy.deepcopy(model), method)):
        rounded = corrected.two(twin.bn(twin.one(x)).relu()).mean((2, 3))  # only the second layer is
        shifts.append((rounded - twin(x)).detach().mean(0).norm())
    assert [row.corrected for row in method.rows()] == ["bn (running mean)", "its bias"]
    assert method.rows()[0].shift == 0  # images have mean 0
    assert shifts[1] < 0.1 * shifts[0]


def test_without_images_equalized_networks_are_known_too():
    model = seasoned(ResNet([1, 1], [5, 8], 3))
    method = CorrectBias(batches=0)
    model = prepared(model, Equalize(), Quantize(CalibratedWeight(4, per_channel=False), Calibrated(8)), method)
    corrected = {row.layer: row for row in method.rows()}
    assert corrected["layer1.0.conv2"].shift > 0
    assert "running mean" in corrected["layer1.0.conv2"].corrected
    assert "not known" in corrected["layer2.0.conv1"].corrected or corrected["layer2.0.conv1"].shift > 0
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point())


def test_a_finished_network_is_written_down_rebuilt_and_lowered():
    bare = prepared(seasoned(Bare()), quantize := plain(), CorrectBias(batches=1))
    data = TinyImages()
    x = data.normalize(data.train()[0].input)
    finished = quantize.finish(bare)
    exact = finished(x).detach()
    assert ((lower(finished, x[:1])(x) - exact).abs().max() / exact.abs().max()) < 0.02
    tiny = tiny_network()
    init_args = {"classes": 3, "channels": 3, "width": 5}
    tiny.__dict__["built_from"] = {"class_path": "galago.models.tiny.Tiny", "init_args": init_args}
    tiny.head = nn.Linear(10, 3, bias=False)
    tiny = prepared(tiny, quantize := plain(), CorrectBias(batches=1))
    tiny = quantize.finish(tiny)
    again = rebuild(architecture(tiny))
    again.load_state_dict(tiny.state_dict())
    assert torch.equal(again.eval()(x), tiny(x))


def test_what_was_done_is_not_repeated_on_resume():
    model = seasoned(Bare())
    first = CorrectBias(batches=1)
    prepared(copy.deepcopy(model), plain(), first)
    resumed = CorrectBias(batches=1)
    resumed.load_state_dict(first.state_dict())
    again = prepared(copy.deepcopy(model), plain(), resumed)
    assert not resumed.rows()
    assert (weight_quantized(again)["one"].layer.bias == 0).all()


def test_a_network_that_rests_rests_again():
    model = prepared(tiny_network(), plain())
    rest(model)
    CorrectBias(batches=1).prepare(model, TinyImages())
    assert rests(model)
    assert not any(module._forward_hooks for module in model.modules())


class Behind(Method):
    """Quantize, then CorrectBias, as one method for the laws."""

    def __init__(self, batches: int = 2) -> None:
        super().__init__()
        self.batches = batches
        self.inner = CorrectBias(batches)
        self.__dict__["quantize"] = plain()

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        return self.inner.prepare(self.__dict__["quantize"].prepare(model, data), data)


def test_it_obeys_the_laws():
    check_method(Behind)


def test_what_cannot_be_corrected_is_refused_in_plain_words():
    with pytest.raises(UserError, match="batches is -1"):
        CorrectBias(batches=-1)
    with pytest.raises(UserError, match="behind Quantize"):
        CorrectBias().prepare(tiny_network(), TinyImages())
