"""Dropout in front of a classifier, or of layers by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from galago.draws import dropouts
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, exported, tiny_network
from galago.layers import classifier, find
from galago.models.by_name import timm_model
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.regularize.dropout import Dropout, DropoutBefore
from galago.spec import architecture, rebuild
from galago.testing import check_method
from galago.trainer import finish


def test_a_share_of_what_the_layer_reads_is_left_out_and_the_rest_made_up_for() -> None:
    layer = nn.Linear(1000, 1, bias=False)
    nn.init.ones_(layer.weight)
    dropped = DropoutBefore(layer, 0.25)
    taken: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    dropped(torch.ones(50, 1000))
    assert (taken[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(taken[0][taken[0] != 0], torch.full_like(taken[0][taken[0] != 0], 1 / 0.75))
    assert not torch.equal(taken[0][0], taken[0][1])


def test_it_rests_when_the_network_predicts_and_at_rate_0() -> None:
    image, plain = torch.randn(4, 3, 8, 8), tiny_network()
    before = plain.eval()(image)
    model = Dropout(0.5).prepare(plain, TinyImages())
    assert torch.equal(model.eval()(image), before)
    model.train()
    assert not torch.equal(model.head(torch.ones(4, 10)), model.head(torch.ones(4, 10)))
    assert not dropouts(Dropout(0.0).prepare(tiny_network(), TinyImages()))


def test_it_goes_in_front_of_the_last_linear_layer_or_of_those_named() -> None:
    assert isinstance(Dropout().prepare(tiny_network(), TinyImages()).head, DropoutBefore)
    method = Dropout(0.1, ["down", "head"])
    model = method.prepare(tiny_network(), TinyImages())
    assert isinstance(model.down, DropoutBefore)
    assert isinstance(model.head, DropoutBefore)
    assert method.summary() == "Dropout: 0.1 in front of down, head"
    other = Dropout().prepare(timm_model("resnet18", 3), TinyImages())
    assert classifier(other) == "fc"
    assert isinstance(other.fc, DropoutBefore)


@pytest.mark.parametrize("first", [True, False])
def test_with_quantization_it_trains_finishes_exports_and_is_written_down(first: bool) -> None:
    both = [Dropout(0.3), Quantize(LSQWeight(4), LSQ(4))]
    model = tiny_network()
    model.__dict__["built_from"] = {
        "class_path": "galago.models.tiny.Tiny",
        "init_args": {"classes": 3, "channels": 3, "width": 5},
    }
    trial = Trial(lambda: model, classify(), TinyImages(), lambda: both if first else both[::-1])
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    done = finish(trial.learner)
    assert any(isinstance(part, QuantLayer) for part in find(done, "head").modules())
    scores = exported(done, trial.image())
    torch.testing.assert_close(scores, done(trial.image()))
    twin = rebuild(architecture(done)).eval()
    twin.load_state_dict(clone(done.state_dict()))
    assert torch.equal(twin(trial.image()), done(trial.image()))


def test_it_obeys_the_laws() -> None:
    check_method(lambda: Dropout(0.3))


def test_a_wrong_rate_or_layer_is_refused() -> None:
    with pytest.raises(UserError, match="rate is 1"):
        Dropout(1.0)
    with pytest.raises(UserError, match="no layer 'heat'; did you mean head"):
        Dropout(layers=["heat"]).prepare(tiny_network(), TinyImages())
    with pytest.raises(UserError, match="no linear layer"):
        Dropout().prepare(nn.Sequential(nn.Conv2d(3, 3, 8)), TinyImages())
