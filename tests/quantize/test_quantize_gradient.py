"""Gradients quantized in a whole network: where, from when on, exactly resumed, and without a trace in the end."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from galago.deploy.integer import lower
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, tiny_network
from galago.method import Forward
from galago.probes.gradient_error import GradientError
from galago.quantize.gradient_quantizer import GradientQuantizer, QuantGradient, arriving_gradients, gradient_quantizers
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.lbt import LBT, AdaptiveInterval, FixedInterval, LBTWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize, Rule
from galago.quantize.quantize_gradient import QuantizeGradient
from galago.run import Run
from galago.spec import architecture
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.train import train
from galago.trainer import finish
from samples import SmallNet, Stripes


def quantize():
    return Quantize(LBTWeight(4), LBT(4), stream=MinMax(8))


def adaptive(**arguments):
    return QuantizeGradient(AdaptiveInterval(4, alpha=0.3), **arguments)


def trial(*methods, saved=None):
    return Trial(tiny_network, classify(), TinyImages(), lambda: [make() for make in methods], saved)


def placed(model):
    return [path for path, module in model.named_modules() if isinstance(module, QuantGradient)]


def test_it_obeys_the_laws_of_a_method_on_a_float_network():
    check_method(adaptive)


def test_it_obeys_the_laws_of_a_method_on_a_quantized_network():
    def model():
        return quantize().prepare(tiny_network(), TinyImages())

    check_method(lambda: adaptive(edge_bits=8), make_model=model)


def test_it_stands_directly_behind_quantized_layers_and_leaves_the_edges_float(small_net, stripes):
    small_net.conv3, small_net.fc = nn.Conv2d(7, 7, 1), nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 2))
    model = quantize().prepare(small_net, stripes)
    method = adaptive()
    model = method.prepare(model, stripes)
    assert all(isinstance(module.layer, QuantLayer) for module in model.modules() if isinstance(module, QuantGradient))
    assert not any(
        isinstance(one.layer, QuantGradient | QuantOutput) for one in model.modules() if type(one) is QuantLayer
    )
    assert "conv2" in placed(model)[0]
    assert placed(model)[1:] == ["fc.0", "fc.1"]
    rows = {one.path: one for one in method._rows}
    assert rows["conv1"].gradient == rows["fc.2"].gradient == "float"
    assert rows["fc.1"].gradient == "AdaptiveInterval 4"
    assert rows["fc.1"].values == 5 * stripes.batch_size
    assert "conv3" not in rows, "it does not run and is not quantized"


def test_edges_take_bits_of_their_own_and_patterns_choose(stripes):
    model = adaptive(edge_bits=8).prepare(SmallNet(), stripes)
    assert [one.bits for one in gradient_quantizers(model).values()] == [8, 4, 8]
    for arguments, expected in (
        ({"layers": ["conv*"], "edge_bits": 8}, ["conv1", "conv2"]),
        ({"layers": ["Conv2d", "fc"], "keep": ["conv1"]}, ["conv2"]),
        ({"keep": ["Linear"], "edge_bits": 8}, ["conv1", "conv2"]),
    ):
        assert placed(adaptive(**arguments).prepare(SmallNet(), stripes)) == expected


def test_a_layer_that_stayed_float_among_quantized_ones_is_left_alone_unless_named(small_net, stripes):
    model = Quantize(LBTWeight(4), LBT(4), rules=[Rule("conv2")]).prepare(small_net, stripes)
    assert placed(adaptive(edge_bits=8).prepare(copy.deepcopy(model), stripes)) == ["conv1", "fc"]
    assert placed(adaptive(layers=["conv2"]).prepare(model, stripes)) == ["conv2"]


def test_names_that_mean_nothing_and_nothing_left_to_do_are_errors(stripes):
    with pytest.raises(UserError, match="did you mean conv2"):
        adaptive(layers=["conv3"]).prepare(SmallNet(), stripes)
    with pytest.raises(UserError, match="no layer is left"):
        adaptive(keep=["conv2"]).prepare(SmallNet(), stripes)


def test_small_layers_are_pointed_out(stripes):
    method = QuantizeGradient(AdaptiveInterval(4))
    method.prepare(SmallNet(), stripes)
    notes = {one.path: one.note for one in method._rows}
    assert notes["conv2"].startswith("small")
    assert notes["conv1"].startswith("float")
    assert method.summary().row_count == 3


def test_intervals_start_from_the_first_batch_in_a_side_trip_without_a_trace():
    started, plain = trial(adaptive), trial(lambda: QuantizeGradient(FixedInterval(32)))
    batch = started.batches[0]._replace(input=started.data.normalize(started.batches[0].input))
    outputs = []
    for one in (started, plain):
        torch.manual_seed(7)
        one.learner.train()
        outputs.append(Forward(one.learner.model, one.learner.task, one.learner.ideas)(batch).output)
        outputs.append(torch.get_rng_state())
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    gammas = [float(one.gamma) for one in gradient_quantizers(started.learner.model).values()]
    assert all(0 < gamma < 0.9 for gamma in gammas)
    states = [one.learner.model.state_dict() for one in (started, plain)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if "gamma" not in name)
    assert all(p.grad is None for p in started.learner.parameters())


def test_what_ran_before_intervals_start_is_differentiated_all_the_same():
    quantizer = AdaptiveInterval(4, alpha=0.3).train()
    y = torch.randn(4, 8, requires_grad=True)
    early = quantizer(y)  # by a method in front that runs the network first
    quantizer.start(torch.randn(4, 8))
    (early + quantizer(y)).sum().backward()
    assert y.grad.isfinite().all()


def test_intervals_move_by_a_thousandth_a_step_and_the_optimizer_does_not_see_the_report():
    one = trial(quantize, adaptive)
    one.step(0)
    quantizers = gradient_quantizers(one.learner.model).values()
    before = [float(quantizer.gamma) for quantizer in quantizers]
    one.step(1)
    for quantizer, old in zip(quantizers, before, strict=True):
        assert abs(float(quantizer.gamma) - old) in (pytest.approx(1e-3, rel=1e-3), 0)
        assert quantizer.report == 0
        assert quantizer.report not in one.optimizer.state


def test_saved_and_resumed_it_rounds_as_if_it_had_not_stopped():
    straight = trial(quantize, adaptive)
    straight.step(0)
    saved = straight.save()
    for number in (1, 2, 3):
        straight.step(number)
    resumed = trial(quantize, adaptive, saved=saved)
    assert resumed.learner.ideas[1].started
    for number in (1, 2, 3):
        resumed.step(number)
    first, second = straight.learner.state_dict(), resumed.learner.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first if isinstance(first[name], torch.Tensor))
    assert any("gamma" in name for name in first)


def test_rounding_is_drawn_anew_in_each_step_and_from_the_recipes_seed():
    gradients = []
    for seed in (1, 1, 2):
        one = trial(lambda: QuantizeGradient(FixedInterval(2)))
        torch.manual_seed(seed)
        one.learner.train()
        one.learner(one.batches[0]).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.learner.model.parameters()]))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


def test_compiled_a_step_is_the_same():
    weights = []
    for compiled in (False, True):
        one = trial(quantize, adaptive)
        if compiled:
            one.learner.model.compile(backend="aot_eager", fullgraph=True)
        torch.manual_seed(3)
        for number in (0, 1):
            one.step(number)
        weights.append(one.learner.model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_at_32_bits_training_is_that_without_it_to_the_bit():
    weights = []
    for methods in ([quantize], [quantize, lambda: QuantizeGradient(AdaptiveInterval(32), edge_bits=32)]):
        one = trial(*methods)
        for number in (0, 1):
            one.step(number)
        weights.append(finish(one.learner).state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_nothing_is_left_of_it_in_what_ships():
    one = trial(quantize, adaptive)
    one.learner.model.__dict__["built_from"] = {"class_path": "galago.models.tiny.Tiny", "init_args": {"width": 5}}
    one.step(0)
    model = one.learner.model.eval()
    assert placed(model)
    model = finish(one.learner)
    assert not placed(model)
    assert not gradient_quantizers(model)
    assert not any("gradient" in name or "gamma" in name for name in model.state_dict())
    assert "radient" not in str(architecture(model))
    image = one.image()
    assert lower(model, image)(image).shape == (2, 3)


def test_listed_before_quantize_by_mistake_it_still_works():
    """The float layer inside is then what `Quantize` wraps."""
    found = []
    for methods in ([quantize, adaptive], [adaptive, quantize]):
        one = trial(*methods)
        torch.manual_seed(5)
        one.step(0)
        found.append(finish(one.learner).state_dict())
    assert found[0].keys() == found[1].keys()


def test_a_run_of_two_epochs_logs_the_error_and_ships_a_plain_quantized_network(tmp_path: Path):
    methods = [quantize(), adaptive()]
    train(SmallNet(), Classify(2), Stripes(), tmp_path, epochs=2, methods=methods, probes=[GradientError()])
    epochs = [line for line in Run(tmp_path).history() if line["kind"] == "epoch"]
    assert all(0 < line["gradient_error_large"] < 1 for line in epochs)
    assert 0 < epochs[-1]["gradient_interval"] < 1
    assert "radient" not in Run(tmp_path).architecture.read_text()


def test_gradients_that_arrive_are_true_ones_also_where_a_layer_runs_twice():
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
    net[0] = QuantGradient(net[0], FixedInterval(32))
    twice, x = nn.Sequential(net[0], nn.ReLU(), net[0]), torch.randn(3, 2, 4, 4)
    arrived = arriving_gradients(twice, [], lambda: twice(x).sum())
    (gradient,) = arrived.values()
    assert gradient.numel() == 2 * x.numel()
    assert (gradient == 1).sum() >= x.numel()
    quantizer: GradientQuantizer = net[0].gradient_quantizer
    assert not quantizer._forward_hooks
