"""ReestimateNorm: the statistics are the mean over the batches, and are there before biases settle."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from galago.batch_norms import measure_norms
from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.probe import Deployed
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.quantize.reestimate_norm import ReestimateNorm
from galago.recipe import Parts
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.train import train
from samples import SmallNet, Stripes, quantized_tiny_network


def quantize() -> Quantize:
    return Quantize(LSQWeight(3), LSQ(3), edge_input=MinMax(8), stream=MinMax(8))


def test_statistics_are_the_mean_over_batches_of_what_the_quantized_layers_give():
    data = Stripes()
    model = quantize().prepare(SmallNet(), data)
    model.bn1.running_mean.fill_(9.0)
    measure_norms(model, data, batches=3)
    with torch.no_grad():
        given = [model.conv1(data.normalize(batch.input)) for batch in data.train()]
    means = torch.stack([one.mean((0, 2, 3)) for one in given]).mean(0)
    variances = torch.stack([one.var((0, 2, 3)) for one in given]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, means, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.bn1.running_var, variances, rtol=1e-5, atol=1e-5)


def test_nothing_but_statistics_changes():
    data = Stripes()
    model = quantize().prepare(SmallNet(), data).train()
    model.bn2.eval()
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    seed = torch.get_rng_state()
    measure_norms(model, data, batches=2)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{norm}.{kind}" for norm in ("bn1", "bn2.layer") for kind in kinds}
    assert modes == [part.training for part in model.modules()]
    assert torch.equal(seed, torch.get_rng_state())
    assert model.bn1.momentum == 0.1


def test_listed_behind_quantize_it_comes_before_biases_settle(tmp_path: Path):
    """Settled biases lie on whole steps of the accumulator; statistics taken later would move them off."""
    data, task = Stripes(), Classify(2)
    torch.manual_seed(0)
    model = train(SmallNet(), task, data, tmp_path, epochs=2, methods=[quantize(), ReestimateNorm(3)])
    once = copy.deepcopy(model.state_dict())
    again = Quantize()
    again._example = data.normalize(data.example())
    again.finish(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, once[name], rtol=0, atol=1e-6, msg=name)
    measure_norms(other := copy.deepcopy(model), data, batches=2)  # too late
    moved = copy.deepcopy(other.bn1.bias)
    assert (again.finish(other).bn1.bias - moved).abs().max() > 1e-6
    trained = Deployed(model, data.normalize, task).eval()
    path = onnx.export(trained, data.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(task, data, ()), images=32)
    assert outcome["passed"], outcome


def test_statistics_that_had_drifted_away_are_repaired(tmp_path: Path):
    data, task = Stripes(), Classify(2)
    losses = []
    for methods in ([quantize()], [quantize(), ReestimateNorm(3)]):
        torch.manual_seed(0)
        net = SmallNet()
        net.bn1.momentum = net.bn2.momentum = 0.001  # which hardly follow
        model = train(net, task, data, tmp_path / str(len(methods)), epochs=3, methods=methods)
        (batch, *_) = data.validation()
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(model(data.normalize(batch.input)), batch.target).item())
    assert losses[1] < 0.9 * losses[0]


def test_it_obeys_the_laws_of_a_method():
    check_method(lambda: ReestimateNorm(2), make_model=quantized_tiny_network, same_answer=False)


def test_what_makes_no_sense_is_refused_in_plain_words():
    with pytest.raises(UserError, match="batches"):
        ReestimateNorm(0)
    with pytest.raises(UserError, match="behind Quantize"):
        ReestimateNorm().prepare(SmallNet(), Stripes())
    with pytest.raises(UserError, match="no BatchNorm"):
        ReestimateNorm().prepare(nn.Sequential(QuantLayer(nn.Linear(2, 2), LSQWeight(4))), Stripes())
