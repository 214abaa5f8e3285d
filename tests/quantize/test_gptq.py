"""GPTQ against the official code's integers, the plain algorithm, and what it promises about layers and networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.layers import find
from galago.probe import Deployed
from galago.quantize import gptq
from galago.quantize.calibrated import CalibratedWeight
from galago.quantize.ewgs import EWGSWeight
from galago.quantize.gptq import GPTQ, Grids, compensated_codes, output_error, second_moments
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.quantize.rounding import weight_quantized, weight_quantizer_of
from galago.recipe import Parts
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.train import train
from samples import SmallNet, Stripes, quantized_tiny_network


def signed(weight: Tensor, bits: int = 4) -> Grids:
    """A symmetric grid a row, as the paper's code has it."""
    scale = 2 * weight.abs().amax(-1, keepdim=True) / (2**bits - 1)
    return Grids(scale, torch.zeros_like(scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def alike(samples: int, columns: int) -> Tensor:
    """Inputs that are correlated, as neighboring pixels are."""
    return torch.randn(samples, columns).double() @ torch.randn(columns, columns).double()


@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize("order", ["", "_actorder"])
def test_the_integers_are_the_official_codes(golden, monkeypatch: pytest.MonkeyPatch, order: str, block: int):
    monkeypatch.setattr(gptq, "BLOCK", block)
    want = {key.removeprefix("gptq_"): value for key, value in golden("ptq").items() if key.startswith("gptq_")}
    x, weight = want["x"].double(), want["weight"].double()
    grids = Grids(want["scale"][:, None], want["zero_point"][:, None], 0, 2 ** int(want["bits"]) - 1)
    hessian = 2 / len(x) * x.t() @ x
    codes = compensated_codes(weight, hessian, grids, float(want["percdamp"]), bool(order))
    torch.testing.assert_close(grids.values(codes).float(), want[f"expected_q{order}"], rtol=0, atol=1e-6)
    error = float(output_error(grids.values(codes) - weight, x.t() @ x).sum())
    assert error == pytest.approx(float(want[f"expected_error{order}"]), rel=1e-4)
    nearest = float(output_error(grids.values(grids.codes(weight)) - weight, x.t() @ x).sum())
    assert nearest == pytest.approx(float(want["expected_error_nearest"]), rel=1e-4)


def plain(weight: Tensor, hessian: Tensor, grids: Grids, damping: float) -> Tensor:
    """The algorithm before it was made fast: after each column the rest is solved for anew."""
    weight, codes = weight.clone(), torch.zeros_like(weight)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    for j in range(len(hessian)):
        inverse = damped[j:, j:].inverse()
        codes[:, j] = ((weight[:, j] / grids.scale[:, 0]).round()).clamp(grids.low, grids.high)
        off = weight[:, j] - codes[:, j] * grids.scale[:, 0]
        weight[:, j:] -= off[:, None] / inverse[0, 0] * inverse[0]
    return codes


@pytest.mark.parametrize("columns", [1, 9, 140])
def test_the_rest_moves_to_where_least_squares_would_have_it(columns: int):
    x, weight = alike(400, columns), torch.randn(6, columns).double()
    grids, hessian = signed(weight), x.t() @ x
    assert torch.equal(compensated_codes(weight, hessian, grids), plain(weight, hessian, grids, 0.01))


@pytest.mark.parametrize("ordered", [False, True])
def test_with_inputs_that_have_nothing_in_common_it_is_rounding_to_the_nearest(ordered: bool):
    weight, hessian = torch.randn(3, 5, 20).double(), torch.diag(torch.rand(20).double() + 0.1).expand(3, 20, 20)
    grids = signed(weight)
    assert torch.equal(compensated_codes(weight, hessian, grids, ordered=ordered), grids.codes(weight))


@pytest.mark.parametrize("ordered", [False, True])
def test_the_output_is_nearer_than_with_the_nearest_integers(ordered: bool):
    for seed in range(10):
        torch.manual_seed(seed)
        x, weight = alike(200, 30), torch.randn(8, 30).double()
        grids, hessian = signed(weight, 3), x.t() @ x
        codes = compensated_codes(weight, hessian, grids, ordered=ordered)
        found, nearest = (output_error(grids.values(c) - weight, hessian) for c in (codes, grids.codes(weight)))
        assert found.sum() < nearest.sum()


def test_groups_are_solved_each_for_itself_and_dead_columns_become_zero():
    x, weight = torch.stack([alike(50, 12), alike(50, 12)]), torch.randn(2, 4, 12).double()
    x[0, :, 3] = 0
    hessian, grids = x.transpose(1, 2) @ x, signed(weight)
    codes = compensated_codes(weight, hessian, grids)
    for group in (0, 1):
        own = grids._replace(scale=grids.scale[group], zero_point=grids.zero_point[group])
        assert torch.equal(codes[group], compensated_codes(weight[group], hessian[group], own))
    assert (codes[0, :, 3] == 0).all()
    assert (codes[1, :, 3] != 0).any()


def test_second_moments_that_cannot_be_inverted_are_an_error_in_plain_words():
    weight, x = torch.randn(2, 4).double(), torch.ones(5, 4).double()
    with pytest.raises(UserError, match="damping"):
        compensated_codes(weight, x.t() @ x, signed(weight), damping=0.0)


class Kinds(nn.Module):
    """A depth-wise, a grouped and a transposed convolution, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 3, 1, 1, groups=3)
        self.up, self.head = nn.ConvTranspose2d(6, 5, 2, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.depthwise(self.norm(self.stem(x)).relu()).relu())
        return self.head(self.up(x.relu()).relu().mean((2, 3)))


def quantized(model: nn.Module, weight=None, inputs=None) -> nn.Module:
    method = Quantize(weight or CalibratedWeight(3), inputs or MinMax(8), edge_bits=4, edge_input=MinMax(8))
    return method.prepare(model, Stripes())


def images() -> Tensor:
    data = Stripes()
    return data.normalize(torch.cat([batch.input for batch in data.train()]))


@pytest.mark.parametrize("ordered", [False, True])
@torch.no_grad()
@pytest.mark.parametrize("weight", [CalibratedWeight(3), LSQWeight(3), CalibratedWeight(3, per_channel=False)])
def test_every_kind_of_layer_gives_better_outputs_and_stays_an_ordinary_quantized_one(weight, ordered):
    model = quantized(Kinds(), weight).eval()
    before = copy.deepcopy(model)
    GPTQ(batches=3, ordered=ordered).prepare(model, Stripes())
    layers, old = weight_quantized(model), weight_quantized(before)
    assert len(layers) == 5
    x = images()
    for path, layer in layers.items():
        caught: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda module, args, caught=caught: caught.append(args[0]))
        model(x)
        handle.remove()
        inputs, own = layer.input_quantizer(torch.cat(caught)), layer.layer.get_parameter("weight")
        wanted = old[path].layer(inputs)
        nearest, found = (
            float((torch.func.functional_call(old[path].layer, {"weight": w}, (inputs,)) - wanted).square().sum())
            for w in (weight_quantizer_of(old[path])(old[path].layer.weight), own)
        )
        assert found < (1.0001 if path == "head" else 0.97) * nearest, path  # few weights, nearly independent inputs
        assert torch.equal(layer.parameters_used()["weight"], own), "the weight lies on its grid"
        assert torch.equal(weight_quantizer_of(layer).grid().scale, weight_quantizer_of(old[path]).grid().scale)


def test_layers_see_what_the_rounded_layers_before_them_give():
    model = quantized(SmallNet())
    method = GPTQ(batches=3)
    method.prepare(model, Stripes())
    model.eval()
    layer, x, quantizer = find(model, "conv2"), images(), find(model, "conv2.input_quantizer")
    assert isinstance(layer, QuantLayer)
    given = quantizer(model.relu1(model.bn1(model.conv1(x))))
    columns = nn.functional.unfold(given, 3, padding=1).transpose(0, 1).flatten(1)
    expected = (2 / len(x)) * columns @ columns.t()
    found = second_moments(model, layer, x)[0]
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_everything_but_weights_stays_as_it_was():
    model = quantized(SmallNet()).train()
    state, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    seed = torch.get_rng_state()
    GPTQ(batches=2, keep=["Linear", "conv1"]).prepare(model, Stripes())
    assert modes == [part.training for part in model.modules()]
    assert torch.equal(seed, torch.get_rng_state())
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])]
    assert changed == ["conv2.layer.weight"]


def test_a_resumed_run_does_not_do_it_again():
    model, method = quantized(SmallNet()), GPTQ(batches=1)
    method.prepare(model, Stripes())
    again, fresh = GPTQ(batches=1), quantized(SmallNet())
    again.load_state_dict(method.state_dict())
    before = copy.deepcopy(fresh.state_dict())
    again.prepare(fresh, Stripes())
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())
    assert again.summary() is None
    table = method.summary()
    assert table is not None
    assert table.row_count == 3


def test_it_obeys_the_laws_of_a_method():
    check_method(lambda: GPTQ(batches=2), make_model=quantized_tiny_network)


def test_a_network_repaired_without_training_exports_and_is_verified(tmp_path: Path):
    data, task = Stripes(), Classify(2)
    torch.manual_seed(0)
    trained = train(SmallNet(), task, data, tmp_path / "float", epochs=3)
    methods = [Quantize(CalibratedWeight(3), MinMax(8), edge_bits=4, edge_input=MinMax(8), stream=MinMax(8)), GPTQ(3)]
    model = train(trained, task, data, tmp_path / "integer", epochs=0, methods=methods)
    deployed = Deployed(model, data.normalize, task).eval()
    path = onnx.export(deployed, data.example(), tmp_path / "model.onnx")
    outcome = compare(deployed, {"onnxruntime": path}, Parts(task, data, ()), images=32)
    assert outcome["passed"], outcome


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GPTQ(batches=0), "batches"),
        (lambda: GPTQ(damping=-1.0), "damping"),
        (lambda: GPTQ().prepare(SmallNet(), Stripes()), "behind Quantize"),
        (lambda: GPTQ(1).prepare(quantized(SmallNet(), EWGSWeight(2)), Stripes()), "stored range"),
        (lambda: GPTQ(1, keep=["layer9"]).prepare(quantized(SmallNet()), Stripes()), "layer9"),
    ],
)
def test_what_cannot_be_is_refused_in_plain_words(make: Callable[[], object], text: str):
    with pytest.raises(UserError, match=text):
        make()
