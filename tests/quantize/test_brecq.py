"""BRECQ and QDrop: blocks come closer to what they give in float, ranges learn, and a plain network is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.models.tiny import Tiny
from galago.probe import Deployed
from galago.quantize.brecq import BRECQ, importance, ranges_of
from galago.quantize.calibrated import Calibrated, CalibratedWeight
from galago.quantize.ewgs import EWGS
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.quantize.quantizer import Quantizer
from galago.quantize.reconstruction import float_copy, inputs, mending, outputs
from galago.quantize.rest import rests
from galago.quantize.rounding import weight_quantized, weight_quantizer_of
from galago.quantize.soft_rounding import Mixed
from galago.quantize.units import units
from galago.recipe import Parts
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network
from galago.train import train
from samples import Stripes

KINDS = {"BRECQ": {}, "BRECQ, weighted": {"fisher": True}, "QDrop": {"drop": 0.5}}


def quantized(data: Stripes, weight_bits: int = 2, input_bits: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = Tiny(2, 3, width=6)
    model(images_of(data))  # statistics of BatchNorm
    prototypes = CalibratedWeight(weight_bits), LSQ(input_bits)
    return Quantize(*prototypes, edge_input=LSQ(8), stream=Calibrated(8), batches=3).prepare(model, data).eval()


def images_of(data: Stripes) -> Tensor:
    return data.normalize(torch.cat([batch.input for batch in data.train()]))


def short(**options) -> BRECQ:
    return BRECQ(**{"iterations": 40, "scale_iterations": 30, "batches": 3, "rate": 0.1, "scale_rate": 1e-2, **options})


def output_error(model: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((model(images) - teacher(images)).square().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_the_network_come_closer_to_float(stripes: Stripes, kind: str) -> None:
    model, images = quantized(stripes), images_of(stripes)
    teacher, before = float_copy(model), output_error(model, float_copy(model), images)
    ranges = [parameter.detach().clone() for parameter in ranges_of(model)]
    method = short(**KINDS[kind])
    method.prepare(model, stripes)
    assert [*method._errors] == ["stem.0", "block", "down.0", "head"]
    assert all(after <= nearest for nearest, after in method._errors.values())
    assert output_error(model, teacher, images) < before
    assert any(not torch.equal(old, new) for old, new in zip(ranges, ranges_of(model), strict=True))
    assert all(parameter > 0 for parameter in ranges_of(model))
    for layer in weight_quantized(model).values():
        quantizer = weight_quantizer_of(layer)
        assert isinstance(quantizer, CalibratedWeight)
        assert torch.equal(layer.layer.weight, quantizer.grid().values(quantizer.codes(layer.layer.weight)))
        assert isinstance(layer.input_quantizer, LSQ)
    assert not any(isinstance(module, Mixed) for module in model.modules())
    assert not rests(model)


def test_ranges_stay_where_they_are_not_to_be_learned(stripes: Stripes) -> None:
    for options in ({}, {"drop": 0.5}):
        model = quantized(stripes)
        before = [parameter.detach().clone() for parameter in ranges_of(model)]
        short(iterations=3, scale_iterations=0, **options).prepare(model, stripes)
        assert all(torch.equal(old, new) for old, new in zip(before, ranges_of(model), strict=True))


def test_roundings_of_brecq_do_not_depend_on_input_ranges_and_those_of_qdrop_do(stripes: Stripes) -> None:
    """BRECQ chooses them with float activations."""
    for options, same in (({}, True), ({"drop": 0.5}, False)):
        weights = []
        for bits in (2, 8):
            model = quantized(stripes, input_bits=bits)
            short(iterations=8, scale_iterations=0, **options).prepare(model, stripes)
            weights.append(torch.cat([layer.layer.weight.flatten() for layer in weight_quantized(model).values()]))
        assert torch.equal(*weights) is same


def test_importance_is_the_gradient_of_each_images_divergence(stripes: Stripes) -> None:
    """Of the block's output, everything before it and in it quantized, everything behind it in float."""
    model, images = quantized(stripes), images_of(stripes)[:5]
    with mending(model, 0):
        teacher, sequence = float_copy(model), units(model, images[:1])
        unit = sequence[1]
        found = importance(model, teacher, unit, images)
        given = outputs(model, unit, inputs(model, unit, images)).requires_grad_()
        plain = teacher.head(teacher.flatten(teacher.pool(teacher.down(given))))
        p, q = teacher(images).softmax(1), plain.softmax(1)
        divergence = (p * (p.log() - q.log())).sum()
        (expected,) = torch.autograd.grad(divergence, given)
    assert unit.name == "block"
    torch.testing.assert_close(found, expected.abs() + 1, rtol=1e-4, atol=1e-7)
    assert (found >= 1).all()
    assert not rests(model)


def test_importance_of_the_last_unit_is_softmax_minus_softmax(stripes: Stripes) -> None:
    model, images = quantized(stripes), images_of(stripes)
    with mending(model, 0):
        teacher, unit = float_copy(model), units(model, images[:1])[-1]
        found = importance(model, teacher, unit, images)
        expected = (model(images).softmax(1) - teacher(images).softmax(1)).abs() + 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_and_random_numbers_are_as_before(stripes: Stripes, kind: str) -> None:
    models, state = [quantized(stripes), quantized(stripes)], torch.get_rng_state()
    for model in models:
        torch.set_rng_state(state)
        short(iterations=3, scale_iterations=3, **KINDS[kind]).prepare(model, stripes)
        assert torch.equal(torch.get_rng_state(), state)
        state = torch.get_rng_state() if model is models[1] else torch.manual_seed(5).get_state()
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name


def test_a_resumed_run_does_not_learn_again(stripes: Stripes) -> None:
    model, method = quantized(stripes), short(iterations=2, scale_iterations=2)
    method.prepare(model, stripes)
    again, fresh = short(), quantized(stripes)
    again.load_state_dict(method.state_dict())
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    again.prepare(fresh, stripes)
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())
    assert before.keys() == model.state_dict().keys()


def test_a_network_that_was_mended_exports_and_is_verified(tmp_path: Path, stripes: Stripes) -> None:
    methods = [
        Quantize(CalibratedWeight(3), LSQ(4), stream=Calibrated(8)),
        short(iterations=5, scale_iterations=5, drop=0.5),
    ]
    model = train(Tiny(2, 3, width=6), Classify(2), stripes, tmp_path, epochs=0, methods=methods)
    trained = Deployed(model, stripes.normalize, Classify(2)).eval()
    path = onnx.export(trained, stripes.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(Classify(2), stripes, ()), images=32)
    assert outcome["passed"], outcome


@pytest.mark.parametrize("kind", KINDS)
def test_trained_on_from_there_it_obeys_the_laws_of_a_method(kind: str) -> None:
    def network() -> nn.Module:
        model = tiny_network()
        model.stem[0] = QuantLayer(model.stem[0], LSQWeight(4), LSQ(8, signed=True))
        model.stem[0].observe(torch.randn(4, 3, 8, 8))
        return model

    check_method(lambda: BRECQ(iterations=2, scale_iterations=2, batches=1, **KINDS[kind]), make_model=network)


def test_inputs_whose_size_the_layer_makes_up_for_stay_quantized(stripes: Stripes) -> None:
    model = Quantize(LSQWeight(4), EWGS(4), edge_input=LSQ(8)).prepare(Tiny(2, 3, width=6), stripes).eval()
    short(iterations=2, scale_iterations=2).prepare(model, stripes)
    assert model(images_of(stripes)).isfinite().all()


@pytest.mark.parametrize("inputs_quantizer", [MinMax(8), Calibrated(8), None])
def test_without_a_range_that_learns_it_says_so_before_any_work(
    stripes: Stripes, inputs_quantizer: Quantizer | None
) -> None:
    model = Quantize(LSQWeight(4), inputs_quantizer).prepare(Tiny(2, 3), stripes)
    with pytest.raises(UserError, match="scale_iterations to 0"):
        BRECQ().prepare(model, stripes)
    short(iterations=2, scale_iterations=0).prepare(model, stripes)


def test_a_float_network_is_refused(stripes: Stripes) -> None:
    with pytest.raises(UserError, match="behind Quantize"):
        BRECQ().prepare(Tiny(2, 3), stripes)


@pytest.mark.parametrize("options", [{"iterations": 0}, {"scale_iterations": -1}, {"drop": 1.0}, {"batches": 0}])
def test_numbers_that_make_no_sense_are_refused_by_name(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"BRECQ: {next(iter(options))}"):
        BRECQ(**options)
