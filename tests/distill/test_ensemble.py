"""An ensemble in a network's place: what others see of it, and what a copy of it has of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from galago.distill.ensemble import Ensemble
from galago.distill.feature_fusion import FeatureFusion
from galago.errors import UserError
from galago.laws.trial import TinyImages, tiny_network
from galago.layers import find
from galago.models.tiny import Tiny
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.oscillation import FreezeOscillations
from galago.quantize.quantize import Quantize
from galago.quantize.sign_flips import SignFlips
from galago.taps import Held, Passed


def ensemble(together: bool = False) -> Ensemble:
    made = FeatureFusion(branch_at="down", ship_fused=together).prepare(tiny_network(), TinyImages())
    assert isinstance(made, Ensemble)
    return made


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("together", [False, True])
def test_it_gives_scores_of_the_batch_in_both_modes(together: bool) -> None:
    made = ensemble(together)
    assert made.train()(images()).shape == made.eval()(images()).shape == (4, 3)


def test_what_everyone_said_is_told_once_and_only_of_training() -> None:
    made = ensemble()
    made.train()(images())
    said = made.said()
    assert [one.shape for one in (*said.branches, said.joint)] == [(4, 3)] * 3
    assert made.said() is None
    made.eval()(images())
    assert made.said() is None


def test_in_evaluation_mode_every_head_can_be_heard_and_then_one_branch_runs_again() -> None:
    made = ensemble().eval()
    heads = made.heads(images())
    torch.testing.assert_close(made(images()), heads.branches[0])
    assert made.layer.down(torch.zeros(2, 5, 8, 8)).shape[0] == 2


def test_a_copy_taken_in_the_middle_of_a_step_looks_at_its_own_layers() -> None:
    made = ensemble().train()
    made(images())  # what was said hangs on the graph of this pass, which nobody can copy
    other = copy.deepcopy(made).eval()
    nn.init.zeros_(other.layer.down.layer[0].weight)
    nn.init.zeros_(other.layer.down.others[0][0].weight)
    made.eval()
    before, expected = made.heads(images()).joint, other.heads(images()).joint
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(made.heads(images()).joint, before)


def test_layers_of_the_network_are_found_under_their_names() -> None:
    made = ensemble()
    assert find(made, "stem.0") is made.layer.stem[0]
    assert find(made, "down.0") is made.layer.down.layer[0]


def test_an_output_of_several_tensors_is_cut_to_the_batch_as_a_whole() -> None:
    class Two(Tiny):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            scores = super().forward(x)
            return {"main": scores, "auxiliary": 2 * scores}

    made = FeatureFusion(branch_at="down").prepare(Two(3, 3), TinyImages()).train()
    output = made(images())
    assert {name: one.shape for name, one in output.items()} == {"main": (4, 3), "auxiliary": (4, 3)}
    torch.testing.assert_close(made.said().branches[0], output["main"])


def test_what_is_held_is_forgotten_when_taken() -> None:
    held = Held()
    held.keep(nn.Identity(), (1,), 2)
    assert held.take() == Passed(1, 2)
    assert held.take() is None


@pytest.mark.parametrize("counting", [SignFlips, FreezeOscillations])
def test_what_counts_layer_by_layer_stands_behind_what_adds_layers(counting: type) -> None:
    model, data, method = tiny_network(), TinyImages(), counting()
    for one in (Quantize(LSQWeight(4), LSQ(4)), method, FeatureFusion(branch_at="down")):
        model = one.prepare(model, data)
    with pytest.raises(UserError, match=f"{counting.__name__} knows 5 of 7 quantized layers; list it behind"):
        method.update(method.epoch(model, 0), lambda: None)
