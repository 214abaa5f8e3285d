"""ShakeDrop: two factors, their distribution, and networks that train, quantize and ship with it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from galago.augment.cutmix import CutMix
from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, close, exported, identical, tiny_network
from galago.layers import find
from galago.method import Method
from galago.models.resnet import resnet20
from galago.probe import Deployed
from galago.quantize.layer import QuantOutput
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.regularize.residual import Branch
from galago.regularize.shake_drop import ShakeDrop, ShakenBranch, passed, shaken
from galago.testing import check_method
from galago.trainer import finish


def test_forward_and_backward_have_factors_of_their_own() -> None:
    y = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    forward, backward = torch.randn(2, 4, 1, 1, 1, dtype=torch.float64)
    found, weight = shaken(y, forward, backward), torch.randn_like(y)
    torch.testing.assert_close(found, forward * y)
    torch.testing.assert_close(torch.autograd.grad((weight * found).sum(), y)[0], backward * weight)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_an_open_gate_passes_everything_and_a_shut_one_the_noise(gate: float) -> None:
    noise = torch.rand(9)
    assert torch.equal(passed(torch.tensor(gate), noise), torch.ones(9) if gate else noise)


def factors(survival: float, passes: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Of many passes of two images: what they were multiplied by, forward and backward, passes×2."""
    branch, both = ShakenBranch(nn.Identity(), survival).train(), []
    for _ in range(passes):
        y = torch.ones(2, 1, requires_grad=True)
        found = branch(y)
        both.append((found.detach().flatten(), torch.autograd.grad(found.sum(), y)[0].flatten()))
    forward, backward = (torch.stack(list(values)) for values in zip(*both, strict=True))
    return forward, backward


def test_factors_are_drawn_as_the_paper_has_it() -> None:
    forward, backward = factors(0.6)
    open_ = (forward == 1).all(1)
    assert torch.equal(open_, (backward == 1).all(1)), "the gate is the same backward"
    assert abs(open_.float().mean() - 0.6) < 0.03
    alpha, beta = forward[~open_], backward[~open_]
    assert abs(alpha.mean()) < 0.05
    assert abs(alpha.std() - 1 / 3**0.5) < 0.03
    assert -1 <= alpha.min() < -0.95
    assert 0.95 < alpha.max() <= 1
    assert abs(beta.mean() - 0.5) < 0.03
    assert 0 <= beta.min() < 0.05
    assert 0.95 < beta.max() <= 1
    assert not torch.equal(alpha[:, 0], alpha[:, 1]), "each image has its own"
    assert abs(forward.mean() - 0.6) < 0.03, "the expectation of the factor is p_l, which is what evaluation uses"


def test_a_branch_that_always_survives_is_exactly_the_branch() -> None:
    y = torch.randn(2, 3, 4, 4)
    assert torch.equal(ShakenBranch(nn.Identity(), 1.0).train()(y), y)


def test_it_obeys_the_laws() -> None:
    check_method(ShakeDrop)


def test_a_network_that_always_survives_is_trained_exactly_as_without_it() -> None:
    trained = []
    for methods in ([ShakeDrop(1.0)], []):
        trial = Trial(tiny_network, classify(), TinyImages(), lambda methods=methods: methods)
        for number in range(3):
            trial.step(number)
        trained.append(finish(trial.learner).state_dict())
    assert identical(*trained)


def test_summary_says_which_branch_passes_how_often() -> None:
    method = ShakeDrop()
    assert method.summary() is None
    method.prepare(resnet20(), TinyImages())
    assert str(method.summary()).startswith("ShakeDrop: branches pass with probability layer1.0.bn2 0.944, layer1.1")
    assert str(method.summary()).endswith("layer3.2.bn2 0.5")


def test_it_compiles_as_one_graph() -> None:
    model = ShakeDrop().prepare(tiny_network(), TinyImages()).train()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_half_precision_stays_half_precision() -> None:
    y = torch.randn(2, 3, 4, 4).bfloat16()
    assert ShakenBranch(nn.Identity(), 0.0).train()(y).dtype == torch.bfloat16


def quantize() -> Quantize:
    return Quantize(LSQWeight(4), LSQ(4), edge_input=MinMax(8), stream=MinMax(8))


def test_the_wrapper_stands_inside_the_stream_and_its_range_is_set_anew() -> None:
    plain = quantize().prepare(copy.deepcopy(network := tiny_network()), TinyImages())
    model = ShakeDrop(0.0).prepare(quantize().prepare(network, TinyImages()), TinyImages())
    stream = find(model, "block.bn")
    assert isinstance(stream, QuantOutput)
    assert isinstance(stream.layer, ShakenBranch)
    ranges = [find(one, "block.bn").output_quantizer.state_dict() for one in (plain, model)]
    assert not identical(*ranges)


@pytest.mark.parametrize("first", [lambda: [CutMix()], lambda: [quantize()], lambda: [CutMix(), quantize()]])
def test_it_trains_finishes_and_exports_behind_others(first) -> None:
    def methods() -> list[Method]:
        return [*first(), ShakeDrop()]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    before = clone(trial.learner.model.eval()(trial.image()))
    finished = finish(trial.learner)
    assert not any(isinstance(part, Branch) for part in finished.modules())
    after = finished(trial.image())
    assert close(after, exported(finished, trial.image()))
    assert close(before, after, 0.05), "up to biases that settle and codes that lay between two"


def test_a_quantized_network_ships_as_it_was_measured(tmp_path: Path) -> None:
    """With p_l in the weights before biases settle, the file computes what was measured."""
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: [quantize(), ShakeDrop()])
    for number in range(4):
        trial.step(number)
    data, task = TinyImages(), classify()
    trained = Deployed(finish(trial.learner), data.normalize, task).eval()
    path = onnx.export(trained, data.example(), tmp_path / "model.onnx")
    verdict = compare(trained, {"onnx": path}, Parts(task, data, ()), images=48)
    assert verdict["passed"], verdict


def test_quantizers_behind_it_are_refused_before_the_first_step() -> None:
    with pytest.raises(UserError, match="ShakeDrop is listed before Quantize"):
        Trial(tiny_network, classify(), TinyImages(), lambda: [ShakeDrop(), quantize()])


@pytest.mark.parametrize("last", [-0.1, 1.5])
def test_a_survival_that_is_no_probability_is_refused(last: float) -> None:
    with pytest.raises(UserError, match="last_survival"):
        ShakeDrop(last)
