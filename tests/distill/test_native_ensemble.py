"""The gated ensemble against the official code, and what the paper's method has to keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.data import Normalize
from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.distill.ensemble import Ensemble
from galago.distill.native_ensemble import Gate, NativeEnsemble, branch_divergences, gated
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, tiny_network
from galago.method import Forward
from galago.models.tiny import Tiny
from galago.probe import Deployed
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.run import load
from galago.schedule import RampUp
from galago.testing import check_method
from galago.train import train
from galago.trainer import finish
from lessons import Golden, equal

GOLDEN = Golden("one")


class Trunkless(nn.Module):
    """The network of the golden vectors: one convolution with ReLU, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(5, 4, 3, 2, 1, bias=False), nn.ReLU())
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear(self.stage(x).mean((2, 3)))
        return scores


class FiveChannels(TinyImages):
    """Images like the golden trunk's output."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize([0.0] * 5, [1.0] * 5)

    def example(self) -> Tensor:
        return torch.zeros(1, 5, 4, 4)


def official() -> tuple[NativeEnsemble, Ensemble]:
    method = NativeEnsemble("stage")
    ensemble = method.prepare(Trunkless(), FiveChannels()).double()
    stages, heads = ([layer.layer, *layer.others] for layer in (ensemble.layer.stage, ensemble.layer.linear))
    with torch.no_grad():
        for number, (stage, head) in enumerate(zip(stages, heads, strict=True), 1):
            stage[0].weight.copy_(GOLDEN(f"branch{number}_conv"))
            head.weight.copy_(GOLDEN(f"branch{number}_fc_weight"))
            head.bias.copy_(GOLDEN(f"branch{number}_fc_bias"))
        gate = ensemble.joint
        for layer, prefix in ((gate.linear, "gate"), (gate.norm, "gate_bn")):
            layer.weight.copy_(GOLDEN(f"{prefix}_weight"))
            layer.bias.copy_(GOLDEN(f"{prefix}_bias"))
        gate.norm.running_mean.copy_(GOLDEN("gate_bn_mean"))
        gate.norm.running_var.copy_(GOLDEN("gate_bn_var"))
    return method, ensemble


def test_the_gate_and_the_gated_sum_are_the_official_ones_in_both_modes() -> None:
    _, ensemble = official()
    trunk = GOLDEN("trunk_output")
    equal(ensemble.eval().joint.weigh(trunk), GOLDEN("gate_eval"))
    equal(ensemble.heads(trunk).joint, GOLDEN("z_e_eval"))
    equal(ensemble.train().joint.weigh(trunk), GOLDEN("gate_train"))
    equal(ensemble.joint.norm.running_mean, GOLDEN("gate_bn_mean_after"))
    equal(ensemble.joint.norm.running_var, GOLDEN("gate_bn_var_after"))
    assert torch.allclose(ensemble.joint.weigh(trunk).sum(1), torch.ones(6).double())


def test_a_whole_training_step_has_the_official_losses_and_gradients() -> None:
    method, ensemble = official()
    trunk = GOLDEN.learnt("trunk_output")
    target = nn.functional.one_hot(GOLDEN("y"), 6).double()
    given = Batch(trunk, target)
    progress = float(GOLDEN("epoch")) / 300
    assert RampUp()(progress) == pytest.approx(float(GOLDEN("ramp_weight")), rel=1e-12)
    step = method.step(given, Forward(ensemble.train(), classify(), progress=progress))
    crossed = [loss for name, loss in step.losses.items() if name.startswith("cross_entropy")]
    taught = [loss for name, loss in step.losses.items() if name.endswith("_from_gated")]
    assert (len(crossed), len(taught)) == (4, 3)
    equal(sum(crossed), GOLDEN("loss_ce"))
    equal(sum(taught), GOLDEN("ramp_weight") * GOLDEN("loss_kl"), 1e-8)
    equal(step.output, GOLDEN("z1"))
    total = sum(step.losses.values())
    equal(total, GOLDEN("total"))
    total.backward()
    equal(trunk.grad, GOLDEN("grad_trunk_output"))
    equal(ensemble.joint.linear.weight.grad, GOLDEN("grad_gate_weight"))
    equal(ensemble.joint.norm.weight.grad, GOLDEN("grad_gate_bn_weight"))
    equal(ensemble.layer.linear.layer.weight.grad, GOLDEN("grad_branch1_fc_weight"))


def test_the_gated_sum_is_the_loop_over_images_and_branches() -> None:
    branches, gate = [torch.randn(4, 5) for _ in range(3)], torch.randn(4, 3).softmax(1)
    expected = torch.stack([sum(gate[n, i] * branches[i][n] for i in range(3)) for n in range(4)])
    torch.testing.assert_close(gated(branches, gate), expected)


def test_the_gate_learns_from_the_cross_entropy_of_its_answer_alone() -> None:
    branches = [GOLDEN.learnt(f"z{number}") for number in (1, 2, 3)]
    teacher = GOLDEN.learnt("z_e")
    sum(branch_divergences(branches, teacher, 3.0).values()).backward()
    assert teacher.grad is None
    assert all(one.grad is not None for one in branches)


def test_the_branch_that_ships_answers_as_it_did_and_is_as_large_as_the_network_was() -> None:
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: [NativeEnsemble("down")])
    trial.step(0)
    model, images = trial.learner.model.eval(), trial.image()
    with torch.no_grad():
        expected = model.heads(images).branches[0]
        single = finish(trial.learner)
        torch.testing.assert_close(single(images), expected, rtol=0, atol=1e-6)
    assert type(single) is Tiny
    assert sum(p.numel() for p in single.parameters()) == sum(p.numel() for p in tiny_network().parameters())


def test_it_obeys_the_laws() -> None:
    check_method(lambda: NativeEnsemble("down"))
    check_method(lambda: NativeEnsemble("block", branches=2, ship_ensemble=True))


def test_a_quantized_ensemble_trains_with_mixed_images_ships_and_is_verified(tmp_path: Path) -> None:
    data = TinyImages()
    quantize = Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8))
    methods = [CutMix(probability=1.0), quantize, NativeEnsemble("down", ship_ensemble=True)]
    model = train(tiny_network(), classify(), data, tmp_path, epochs=1, methods=methods)
    image = data.normalize(data.example())
    torch.testing.assert_close(load(tmp_path)(image), model(image), rtol=0, atol=0)
    trained = Deployed(model, data.normalize, classify()).eval()
    path = onnx.export(trained, data.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(classify(), TinyImages(), ()), images=48)
    assert outcome["passed"], outcome


def test_what_cannot_work_is_refused_before_training() -> None:
    with pytest.raises(UserError, match="branches is 1"):
        NativeEnsemble("down", branches=1)
    with pytest.raises(UserError, match="temperature is -1"):
        NativeEnsemble("down", temperature=-1.0)
    with pytest.raises(UserError, match="no layer 'dwon'"):
        NativeEnsemble("dwon").prepare(tiny_network(), TinyImages())
    with pytest.raises(UserError, match="two images a batch"):
        NativeEnsemble("down").prepare(tiny_network(), TinyImages(batch_size=1))
    with pytest.raises(UserError, match="NativeEnsemble: the network cannot be branched at"):
        NativeEnsemble("block.conv").prepare(tiny_network(), TinyImages())


def test_the_gate_reads_tokens_as_well_as_maps() -> None:
    gate = Gate(4, 3)
    assert gate.weigh(torch.randn(2, 7, 4)).shape == gate.weigh(torch.randn(2, 4, 5, 5)).shape == (2, 3)


def test_the_summary_tells_what_is_branched() -> None:
    method = NativeEnsemble("down")
    method.prepare(tiny_network(), TinyImages())
    assert method.summary() == "NativeEnsemble: 3 branches of down, head"
