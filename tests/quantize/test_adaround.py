"""AdaRound: better roundings than the nearest, each one step from the weight, in an ordinary quantized network."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.models.tiny import Tiny
from galago.probe import Deployed
from galago.quantize import soft_rounding
from galago.quantize.adaround import AdaRound
from galago.quantize.calibrated import Calibrated, CalibratedWeight
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMaxWeight
from galago.quantize.quantize import Quantize
from galago.quantize.reconstruction import Features, float_copy, mending, walk
from galago.quantize.rounding import weight_quantized, weight_quantizer_of
from galago.quantize.soft_rounding import Course, rectified_sigmoid, round_unit
from galago.quantize.units import Unit, units
from galago.recipe import Parts
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network
from galago.train import train
from samples import Stripes


def quantized(data: Stripes, bits: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = Tiny(2, 3, width=6)
    model(data.normalize(torch.cat([batch.input for batch in data.train()])))  # statistics of BatchNorm
    return Quantize(CalibratedWeight(bits), Calibrated(8), stream=Calibrated(8), batches=3).prepare(model, data).eval()


def short(**options) -> AdaRound:
    return AdaRound(**{"iterations": 60, "batches": 3, "rate": 0.1, **options})


def alone(layer: QuantLayer) -> tuple[nn.Module, Unit]:
    return nn.Sequential(layer).eval(), Unit(("0",), ("0",), 0, 1)


@pytest.mark.parametrize("blocks", [False, True])
def test_every_weight_goes_to_one_of_its_two_neighbors_and_errors_are_smaller(stripes: Stripes, blocks: bool) -> None:
    model = quantized(stripes)
    before = {path: layer.layer.weight.detach().clone() for path, layer in weight_quantized(model).items()}
    method = short(blocks=blocks)
    method.prepare(model, stripes)
    assert all(after <= 1.01 * nearest for nearest, after in method._errors.values())
    assert len(method._errors) == (4 if blocks else 5)
    assert sum(after < 0.9 * nearest for nearest, after in method._errors.values()) >= 3
    moved = 0
    for path, layer in weight_quantized(model).items():
        quantizer = weight_quantizer_of(layer)
        grid, codes = quantizer.grid(), quantizer.codes(layer.layer.weight)
        place = before[path] / grid.scale.view(-1, *[1] * (before[path].ndim - 1))
        lower, upper = place.floor().clamp(grid.low, grid.high), (place.floor() + 1).clamp(grid.low, grid.high)
        assert ((codes == lower) | (codes == upper)).all()
        assert torch.equal(layer.layer.weight, grid.values(codes))
        moved += int((codes != quantizer.codes(before[path])).sum())
    assert moved > 10


def test_in_the_end_every_weight_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantLayer(nn.Conv2d(6, 6, 3), CalibratedWeight(3))
    model, unit = alone(layer)
    x = torch.randn(64, 6, 8, 8)
    features = Features(x, x, layer.layer(x).detach())
    hs: list[Tensor] = []

    def listening(v: Tensor) -> Tensor:
        hs.append(rectified_sigmoid(v).detach())
        return rectified_sigmoid(v)

    monkeypatch.setattr(soft_rounding, "rectified_sigmoid", listening)
    with mending(model, 0):
        round_unit(model, unit, features, Course(400, 0.1, 0.02, 32), "test")
    last = hs[-1]
    assert ((last == 0) | (last == 1)).float().mean() > 0.999
    assert ((hs[0] > 0) & (hs[0] < 1)).float().mean() > 0.9


def test_of_all_choices_for_a_few_weights_it_finds_good_ones() -> None:
    """Every combination of up and down is tried: AdaRound's is no better than the best, and near it on the whole."""
    totals = torch.zeros(3)
    for seed in range(4):
        torch.manual_seed(seed)
        layer = QuantLayer(nn.Linear(8, 1, bias=False), LSQWeight(3))
        x = torch.randn(256, 8) @ (torch.eye(8) + 0.5 * torch.randn(8, 8))
        grid, weight, target = layer.weight_quantizer.grid(), layer.layer.weight.detach(), layer.layer(x).detach()
        floor = (weight / grid.scale.view(-1, 1)).floor()
        errors = [
            float((x @ grid.values((floor + torch.tensor([up])).clamp(grid.low, grid.high)).T - target).square().mean())
            for up in itertools.product((0.0, 1.0), repeat=8)
        ]
        model, unit = alone(layer)
        with mending(model, 0):
            nearest, found = round_unit(model, unit, Features(x, x, target), Course(500, 0.05, 0.01, 64), "test")
        assert min(errors) * 0.999 <= found <= nearest
        assert min(abs(found - one) for one in errors) < 1e-4 * nearest
        totals += torch.tensor([min(errors), found, nearest])
    best, found, nearest = totals.tolist()
    assert (nearest - found) / (nearest - best) > 0.5


def test_what_cannot_be_improved_is_rounded_to_the_nearest(stripes: Stripes) -> None:
    model = quantized(stripes)
    nearest = {p: weight_quantizer_of(q).codes(q.layer.weight) for p, q in weight_quantized(model).items()}
    method = short(iterations=1, rate=1e3)  # leaps far beyond
    method.prepare(model, stripes)
    worse = [name for name, (before, after) in method._errors.items() if before == after]
    assert worse
    for path in worse:
        layer = model.get_submodule(path)
        assert torch.equal(weight_quantizer_of(layer).codes(layer.layer.weight), nearest[path])


def test_later_layers_make_up_for_earlier_ones(stripes: Stripes) -> None:
    """Inputs are those of the already rounded prefix: a layer's target differs from what it gives in float on them."""
    model = quantized(stripes)
    images = stripes.normalize(torch.cat([batch.input for batch in stripes.train()]))
    with mending(model, 0):
        sequence = units(model, images[:1], blocks=False)
        *_, (unit, features) = walk(model, float_copy(model), sequence, images)
    assert unit.name == "head"
    assert not torch.allclose(features.given, features.plain)
    torch.testing.assert_close(features.target, model.head.layer(features.plain))


def test_the_same_seed_chooses_the_same_and_random_numbers_are_as_before(stripes: Stripes) -> None:
    first, second = quantized(stripes), quantized(stripes)
    state = torch.get_rng_state()
    short(iterations=5).prepare(first, stripes)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    short(iterations=5).prepare(second, stripes)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_resumed_run_does_not_choose_again(stripes: Stripes) -> None:
    model, method = quantized(stripes), short(iterations=3)
    method.prepare(model, stripes)
    assert method.summary() is not None
    again, fresh = short(iterations=3), quantized(stripes)
    again.load_state_dict(method.state_dict())
    before = copy.deepcopy(fresh.state_dict())
    again.prepare(fresh, stripes)
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    assert again.summary() is None


def test_a_network_with_its_roundings_chosen_exports_and_is_verified(tmp_path: Path, stripes: Stripes) -> None:
    methods = [Quantize(LSQWeight(4), LSQ(8), stream=Calibrated(8)), short(iterations=5)]
    model = train(Tiny(2, 3, width=6), Classify(2), stripes, tmp_path, epochs=0, methods=methods)
    trained = Deployed(model, stripes.normalize, Classify(2)).eval()
    path = onnx.export(trained, stripes.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(Classify(2), stripes, ()), images=32)
    assert outcome["passed"], outcome


def test_trained_on_from_there_it_obeys_the_laws_of_a_method() -> None:
    def network() -> nn.Module:
        model = tiny_network()
        model.stem[0] = QuantLayer(model.stem[0], LSQWeight(4), LSQ(8, signed=True))
        model.stem[0].observe(torch.randn(4, 3, 8, 8))
        return model

    check_method(lambda: AdaRound(iterations=2, batches=1), make_model=network)


def test_a_range_that_follows_the_weights_is_refused_before_any_work(stripes: Stripes) -> None:
    model = Quantize(MinMaxWeight(4), LSQ(8)).prepare(Tiny(2, 3), stripes)
    with pytest.raises(UserError, match="CalibratedWeight"):
        AdaRound().prepare(model, stripes)
    with pytest.raises(UserError, match="behind Quantize"):
        AdaRound().prepare(Tiny(2, 3), stripes)


@pytest.mark.parametrize("name", ["iterations", "batches", "batch_size"])
def test_numbers_that_make_no_sense_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"AdaRound: {name} is 0"):
        AdaRound(**{name: 0})
