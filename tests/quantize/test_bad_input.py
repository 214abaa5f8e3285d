"""What may be wrong with bits, weights, images, networks and files: a clear word each, and nothing lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from galago.batch_norms import measure_norms
from galago.catalogue import ideas
from galago.deploy import onnx
from galago.deploy.integer import lower
from galago.errors import UserError
from galago.models.weights import load_weights
from galago.probe import Deployed
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.quantize import Quantize, Rule
from galago.quantize.quantizer import Quantizer
from galago.quantize.settle import settle_biases
from galago.quantize.stat_assist import set_ranges
from galago.run import Run
from galago.tasks.classify import Classify
from galago.train import train
from samples import Batches, SmallNet, Stripes

PATHS = [idea.class_path.rpartition(".") for idea in ideas() if idea.kind == "quantizer"]
QUANTIZERS = {name: getattr(import_module(module), name) for module, _, name in PATHS}
WEIGHTS = sorted(name for name in QUANTIZERS if name.endswith("Weight"))
INPUTS = sorted(QUANTIZERS.keys() - set(WEIGHTS))
WITH_BITS = sorted(name for name, kind in QUANTIZERS.items() if "bits" in signature(kind).parameters)
UNSIGNED = ("DAQ", "DoReFa", "N2UQ", "PACT")  # by their papers; the others take both signs


def made(name: str, **arguments: object) -> Quantizer:
    kind: Callable[..., Quantizer] = QUANTIZERS[name]
    return kind(**({"bits": 2} if name in WITH_BITS else {}) | arguments)


def float_edges(weight: Quantizer | None = None, inputs: Quantizer | None = None, **more: object) -> Quantize:
    return Quantize(weight or MinMaxWeight(4), inputs or MinMax(4), edge_bits=None, **more)


def inner() -> nn.Sequential:
    """Three convolutions; the one in the middle, "2", is quantized when edges are float."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        nn.Conv2d(5, 2, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


# bits out of range


@pytest.mark.parametrize("bits", [0, -3, 9, 32])
@pytest.mark.parametrize("name", WITH_BITS)
def test_bits_that_a_quantizer_does_not_have_are_refused(name, bits):
    with pytest.raises(UserError, match=rf"bits is {bits}\b.*must be"):
        made(name, bits=bits)


@pytest.mark.parametrize("name", WITH_BITS)
def test_bits_from_elsewhere_in_the_recipe_are_refused_too_with_what_to_change(name, stripes):
    quantizers = {"weight" if name in WEIGHTS else "input": made(name)}
    with pytest.raises(UserError, match=r"edge_bits: .*bits is 9.*give `edge_(weight|input)` another kind"):
        Quantize(**quantizers, edge_bits=9).prepare(inner(), stripes)
    with pytest.raises(UserError, match=r"the rule for '2': .*bits is 9"):
        Quantize(**quantizers, edge_bits=None, rules=[Rule("2", bits=9)]).prepare(inner(), stripes)


# signed activations on an unsigned quantizer


@pytest.mark.parametrize("name", INPUTS)
def test_negative_values_that_are_cut_off_are_told_by_layer_with_a_remedy(name, stripes):
    network = inner()
    network[1] = nn.Identity()
    method = float_edges(inputs=made(name))
    method.prepare(network, stripes)
    notes = {row.path: row.note for row in method.rows()}
    assert ("is negative" in notes["2"]) == (name in UNSIGNED)
    assert name not in UNSIGNED or f"reaches its {name}" in notes["2"]
    assert name not in UNSIGNED or "use one that holds both signs" in notes["2"]
    assert not any(row.stays_float for row in method.rows() if row.path == "2")


@pytest.mark.parametrize("name", INPUTS)
def test_behind_a_relu_nothing_is_told(name, stripes):
    method = float_edges(inputs=made(name))
    method.prepare(inner(), stripes)
    assert not {row.path: row.note for row in method.rows()}["2"]


def test_a_quantizer_told_to_be_unsigned_and_a_stream_are_told_too(stripes, small_net):
    method = Quantize(LSQWeight(4), LSQ(4, signed=False), stream=LSQ(8, signed=False))
    method.prepare(small_net, stripes)
    notes = {row.path: row.note for row in method.rows()}
    assert "is negative" in notes["conv1"]  # images
    assert "is negative" in notes["bn2"]  # before the addition
    assert not notes["conv2"]


# NaN weights, NaN images


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_finite_are_refused_by_the_layers_name_and_the_network_is_left_alone(name, value, stripes):
    network = inner()
    network[2].weight.data[1, 2, 0, 0] = value
    with pytest.raises(UserError, match=r"^2: 1 of the 180 numbers of its weight are NaN or infinite"):
        float_edges(weight=made(name)).prepare(network, stripes)
    assert not any(isinstance(module, QuantLayer) for module in network.modules())


@pytest.mark.parametrize("name", INPUTS)
def test_values_that_are_not_finite_are_refused_by_the_name_of_the_layer_they_reach(name, stripes):
    network = inner()
    network[0].bias.data[0] = float("nan")  # stays float
    modes = [module.training for module in network.train().modules()]
    with pytest.raises(UserError, match=r"^2: what comes into it holds NaN"):
        float_edges(inputs=made(name)).prepare(network, stripes)
    layers = [module for module in network.modules() if not isinstance(module, QuantLayer | Quantizer)]
    assert [module.training for module in layers] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_stream_of_nan_is_refused_and_statistics_are_as_before(stripes, small_net):
    small_net.bn2.running_var[0] = float("nan")
    before = small_net.bn1.running_mean.clone()
    with pytest.raises(UserError, match="bn2: what it gives out holds NaN"):
        Quantize(MinMaxWeight(), MinMax(), stream=MinMax(), post_training=True).prepare(small_net, stripes)
    assert torch.equal(small_net.bn1.running_mean, before)


def test_a_float_phase_that_diverged_is_not_quantized(stripes, small_net):
    model = Quantize(MinMaxWeight(), MinMax()).prepare(small_net, stripes)
    model.conv2.layer.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"conv2: .* of its weight are NaN"):
        set_ranges(model, stripes.normalize(stripes.example()))


# dead channels, first batches that say nothing


def one_layer(weight: str = "MinMaxWeight", inputs: str = "MinMax", layer: nn.Module | None = None) -> QuantLayer:
    return QuantLayer(layer or nn.Conv2d(3, 4, 3), made(weight), made(inputs)).eval()


def check_sound(layer: QuantLayer, x: Tensor) -> None:
    """Output and gradients are finite, and the integer form computes the same."""
    assert (layer.weight_quantizer.grid().scale > 0).all()
    assert (layer.input_quantizer.grid().scale > 0).all()
    assert layer.output_scale is None or 1e-3 < layer.output_scale.item() < 1e3
    layer.train()(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    settle_biases(layer.eval(), x)
    with torch.no_grad():
        expected = layer(x)
        assert expected.isfinite().all()
        torch.testing.assert_close(lower(layer, x)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_dead_channels_and_dead_layers_stay_finite(name, whole):
    layer = nn.Conv2d(3, 4, 3)
    layer.weight.data[slice(None) if whole else 1] = 0.0
    quant, x = one_layer(weight=name, layer=layer), torch.rand(2, 3, 6, 6)
    quant.observe(x)
    check_sound(quant, x)


@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("name", INPUTS)
def test_a_first_batch_of_one_value_leaves_a_range_that_later_ones_fit_in(name, value):
    quant, x = one_layer(inputs=name), 4 * torch.rand(2, 3, 6, 6)  # PACT's range begins at 8
    quant.observe(torch.full_like(x, value))
    seen = x - 2 if name == "RSign" else x
    assert len(quant.input_quantizer(seen).unique()) > 1
    check_sound(quant, x)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_inputs_too_small_for_any_level_do_not_blow_up_the_output(weight):
    quant = one_layer(weight, "DoReFa", nn.Conv2d(3, 4, 3, bias=False))
    quant.observe(torch.full((2, 3, 6, 6), 0.1))  # everything is rounded to 0
    check_sound(quant, torch.rand(2, 3, 6, 6))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_of_one_element_is_rounded_to_something_finite(name):
    quant, x = one_layer(weight=name, layer=nn.Conv2d(1, 1, 1)), torch.rand(2, 1, 4, 4)
    quant.observe(x)
    check_sound(quant, x)


@pytest.mark.parametrize("name", INPUTS)
def test_a_first_batch_of_one_element_is_enough(name):
    quant = one_layer(inputs=name, layer=nn.Linear(1, 3))
    quant.observe(torch.rand(1, 1))
    check_sound(quant, torch.rand(4, 1))


# empty calibration set


class Empty(Stripes):
    """A training set smaller than a batch."""

    def train(self, epoch: int = 0, start: int = 0) -> Batches:
        return Batches()


def test_a_training_set_without_a_batch_is_an_error_and_the_network_is_left_alone(small_net):
    before = copy.deepcopy(small_net.state_dict())
    with pytest.raises(UserError, match=r"no training batch.*batch_size"):
        Quantize(MinMaxWeight(), MinMax()).prepare(small_net, Empty())
    with pytest.raises(UserError, match=r"no training batch.*batch_size"):
        measure_norms(small_net, Empty(), batches=2)
    assert small_net.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in small_net.state_dict().items())


# a layer used twice, shared weights, control flow that depends on the data


class Odd(nn.Module):
    """Two tied layers, a layer and a ReLU that run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.relu = nn.Conv2d(3, 4, 1), nn.Linear(4, 2), nn.ReLU()
        self.twice, self.one, self.other = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.twice(self.relu(self.twice(self.stem(x)))))
        return self.head((self.one(x) + self.other(x)).mean((2, 3)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_layers_used_twice_and_shared_weights_stay_float_say_why_and_train(name, stripes):
    method = float_edges(weight=made(name), stream=MinMax(8))
    model = method.prepare(Odd(), stripes)
    notes = {row.path: row.note for row in method.rows() if row.weight}
    assert "runs 2 times" in notes["twice"]
    assert "shared with other" in notes["one"]
    assert "shared with one" in notes["other"]
    assert model.one.weight is model.other.weight
    model.train()(stripes.normalize(stripes.example())).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Fork(nn.Module):
    """Goes left or right by the values it sees: bright images left."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        way = self.left if x.mean() > 0 else self.right
        return way(self.stem(x)).mean((2, 3))


def test_a_way_that_depends_on_the_values_is_told_with_what_to_do():
    class Dark(Stripes):
        def example(self) -> Tensor:
            return torch.zeros_like(super().example())

        def train(self, epoch: int = 0, start: int = 0) -> Batches:
            return Batches(b._replace(input=b.input.clamp_min(200)) for b in super().train(epoch, start))

    with pytest.raises(UserError, match=r"right.*choose by the values it sees.*add 'right' to `keep`"):
        Quantize(MinMaxWeight(), MinMax()).prepare(Fork(), Dark())
    method = Quantize(MinMaxWeight(), MinMax(), keep=["right"])
    model = method.prepare(Fork(), Dark())
    assert "does not run" in {row.path: row.note for row in method.rows()}["left"]
    assert isinstance(model.stem, QuantLayer)
    deployed = Deployed(model.eval(), Dark().normalize, Classify(2))
    with pytest.raises(UserError, match=r"cannot be exported.*independent of tensor values"):
        onnx.build(deployed, Dark().example())


# a checkpoint of another architecture


def test_weights_of_another_architecture_are_refused_before_anything_is_written(tmp_path: Path, small_net):
    path = tmp_path / "other.pt"
    torch.save(SmallNet(width=9).state_dict(), path)
    before = copy.deepcopy(small_net.state_dict())
    with pytest.raises(UserError, match=r"does not fit SmallNet: other shapes .*conv1\.weight"):
        load_weights(small_net, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in small_net.state_dict().items())


@pytest.mark.parametrize("other", ["wider", "float"])
def test_a_checkpoint_of_another_architecture_is_refused_and_kept(tmp_path: Path, other):
    class Killed(BaseException):
        pass

    class Dying(Stripes):
        at = 1

        def train(self, epoch: int = 0, start: int = 0) -> Batches:
            if epoch == self.at:
                raise Killed
            return super().train(epoch, start)

    def run(model: nn.Module, data: Stripes, methods: list[Quantize]) -> None:
        train(model, Classify(2), data, tmp_path, epochs=2, methods=methods, optimizer=lambda p: SGD(p, lr=0.1))

    with pytest.raises(Killed):
        run(SmallNet(), Dying(), [Quantize(LSQWeight(4), LSQ(4), stream=LSQ(8))])
    kept = Run(tmp_path).last.read_bytes()
    model, methods = (
        (SmallNet(width=9), [Quantize(LSQWeight(4), LSQ(4), stream=LSQ(8))]) if other == "wider" else (SmallNet(), [])
    )
    with pytest.raises(UserError, match="another recipe"):
        run(model, Dying(), methods)
    assert Run(tmp_path).last.read_bytes() == kept
    Dying.at = -1
    run(SmallNet(), Dying(), [Quantize(LSQWeight(4), LSQ(4), stream=LSQ(8))])
    assert Run(tmp_path).finished


def test_state_of_another_quantizer_does_not_load_by_accident(stripes):
    model = Quantize(LSQWeight(4), LSQ(4)).prepare(SmallNet(), stripes)
    other = Quantize(MinMaxWeight(4), MinMax(4)).prepare(SmallNet(), stripes)
    with pytest.raises(RuntimeError, match="quantizer"):
        other.load_state_dict(model.state_dict())
    assert not any(isinstance(module, QuantOutput) for module in other.modules())
