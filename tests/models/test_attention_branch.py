"""An attention branch in front of any network's last stage."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conftest import ROOT
from galago import cli, recipe
from galago.datasets.digits import Digits
from galago.errors import UserError
from galago.layers import classifier, find, flow
from galago.models.attention_branch import Attend, Attended, attended_in, attention_branch, attention_maps
from galago.models.resnet import resnet20
from galago.models.tiny import Tiny
from galago.probe import Deployed
from galago.quantize.layer import QuantLayer
from galago.run import Run, load
from galago.tasks.classify import Classify

GOLDEN = np.load(ROOT / "tests/golden/regularization/bayesian_abn.npz")


class Published(nn.Module):
    """The golden file's network behind its trunk: one convolution as last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=False)
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.flatten(self.pool(self.stage(x))))
        return scores


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def published(dropout: float = 0.0) -> nn.Module:
    model = attention_branch(Published(), "stage", dropout).double()
    attended = next(part for part in model.modules() if isinstance(part, Attended))
    weights = {"branch.stage": "stage_att", "branch.conv": "att_conv", "branch.score": "att_conv2"}
    weights |= {"branch.gather": "att_conv3", "layer": "stage_per"}
    with torch.no_grad():
        for path, name in weights.items():
            next(find(attended, path).parameters()).copy_(golden(name))
        head = find(model, classifier(model))
        for name in ("weight", "bias"):
            head.get_parameter(name).copy_(golden(f"fc_{name}"))
    for path, name in (("norm", "bn_att"), ("conv_norm", "bn_att2"), ("gather_norm", "bn_att3")):
        state = {part: golden(f"{name}_{part}") for part in ("weight", "bias", "running_mean", "running_var")}
        find(attended.branch, path).load_state_dict(state, strict=False)
    return model


def attended(model: nn.Module) -> Attended:
    found = find(model, attended_in(model) or "")
    assert isinstance(found, Attended)
    return found


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_scores_map_loss_and_gradients_are_those_of_the_published_code(mode: str) -> None:
    model = published().train(mode == "train")
    x = golden("x").requires_grad_()
    with attended(model).asked():
        output = model(x)
    loss = sum(cross_entropy(scores, golden("labels")) for scores in output.values())
    loss.backward()
    near = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(output["main"], golden(f"{mode}_perception_logits"), **near)
    torch.testing.assert_close(output["attention"], golden(f"{mode}_attention_logits"), **near)
    torch.testing.assert_close(loss, golden(f"{mode}_loss"), **near)
    torch.testing.assert_close(x.grad, golden(f"{mode}_grad_x"), **near)
    torch.testing.assert_close(attended(model).branch.gather.weight.grad, golden(f"{mode}_grad_att_conv3"), **near)
    if mode == "eval":
        torch.testing.assert_close(attention_maps(model, x), golden("eval_attention_map").squeeze(1), **near)


def test_it_answers_alone_when_it_predicts_and_says_the_same() -> None:
    model = published().eval()
    alone = model(golden("x"))
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(alone, golden("eval_perception_logits"), rtol=1e-9, atol=1e-12)
    assert not any("score" in call.module for call in flow(model, golden("x")).calls)


def test_no_attention_leaves_the_features_as_they_are() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(Attend()(x, torch.zeros(2, 1, 4, 4)), x)


def test_the_answer_alone_teaches_the_map() -> None:
    model = attention_branch(resnet20(), "layer3").train()
    output = model(torch.randn(4, 3, 32, 32))
    cross_entropy(output["main"], torch.arange(4)).backward()
    branch = attended(model).branch
    assert branch.gather.weight.grad.abs().sum() > 0
    assert branch.stage[0].conv1.weight.grad.abs().sum() > 0
    assert branch.score.weight.grad is None


def test_the_map_is_as_large_as_what_it_is_laid_over() -> None:
    model = attention_branch(resnet20(), "layer3")
    maps = attention_maps(model, torch.randn(3, 3, 32, 32))
    assert maps.shape == (3, 16, 16)
    assert bool(0 <= maps.min() < maps.max() <= 1)


def test_the_branch_is_drawn_as_the_published_code_draws_and_the_network_keeps_its_weights() -> None:
    network = resnet20()
    before = copy.deepcopy(network).layer3
    model = attended(attention_branch(network, "layer3"))
    assert torch.equal(model.layer[0].conv1.weight, before[0].conv1.weight)
    assert float(model.branch.stage[1].conv2.weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert not torch.equal(model.branch.stage[1].conv2.weight, before[1].conv2.weight)


@pytest.mark.parametrize(
    ("name", "stage"), [("resnet18", "layer4"), ("regnetx_002", "s4"), ("efficientnet_b0", "blocks.5")]
)
def test_networks_of_other_libraries_have_such_a_stage_too(name: str, stage: str) -> None:
    model = attention_branch(timm.create_model(name, num_classes=5), stage, dropout=0.2)
    output = model.train()(torch.randn(2, 3, 64, 64))
    assert output["main"].shape == output["attention"].shape == (2, 5)
    assert attention_maps(model, torch.randn(2, 3, 64, 64)).shape == (2, 4, 4)


def test_dropout_lies_behind_each_block_and_before_both_classifiers_and_rests_in_evaluation() -> None:
    plain, dropped = (attention_branch(resnet20(), "layer3", rate) for rate in (0.0, 0.3))
    rates = [part.p for part in dropped.modules() if isinstance(part, nn.Dropout)]
    assert rates == [0.3] * (3 + 1 + 3 + 1)
    assert [part.p for part in plain.modules() if isinstance(part, nn.Dropout)] == [0.0]
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(dropped.eval()(image), dropped(image))
    assert not torch.equal(dropped.train()(image)["main"], dropped(image)["main"])


def test_a_copy_of_it_keeps_its_own_answers() -> None:
    model = published().train()
    twin = copy.deepcopy(model)
    assert attended(twin).said is twin.said is not model.said
    assert twin(golden("x")).keys() == {"main", "attention"}


def test_nothing_is_seen_where_there_is_no_branch() -> None:
    assert attention_maps(Tiny(), torch.zeros(1, 1, 8, 8)) is None


def test_what_cannot_be_cut_is_refused_in_plain_words() -> None:
    with pytest.raises(UserError, match="no layer 'layer4'; did you mean layer3"):
        attention_branch(resnet20(), "layer4")
    with pytest.raises(UserError, match="a copy of 'linear' with stride 1 does not give a map"):
        attention_branch(resnet20(), "linear")
    with pytest.raises(UserError, match="dropout is 1; give a rate from 0 to below 1"):
        attention_branch(resnet20(), "layer3", 1.0)
    with pytest.raises(UserError, match="no linear layer"):
        attention_branch(nn.Sequential(nn.Conv2d(3, 5, 3)), "0")


def quantized_recipe(folder: Path, model: dict[str, object]) -> Path:
    content = {
        "run": str(folder / "run"),
        "model": {
            "class_path": "galago.models.attention_branch.attention_branch",
            "init_args": {"backbone": model, "stage": "down", "dropout": 0.2},
        },
        "task": {"class_path": "galago.tasks.classify.Classify", "init_args": {"classes": 10}},
        "data": {"class_path": "galago.datasets.digits.Digits"},
        "epochs": 1,
        "methods": [
            {"class_path": "galago.augment.cutmix.CutMix"},
            {"class_path": "galago.regularize.auxiliary_heads.AuxiliaryHeads"},
            {
                "class_path": "galago.quantize.quantize.Quantize",
                "init_args": {
                    "weight": {"class_path": "galago.quantize.lsq.LSQWeight", "init_args": {"bits": 4}},
                    "input": {"class_path": "galago.quantize.lsq.LSQ", "init_args": {"bits": 4}},
                    "stream": {"class_path": "galago.quantize.min_max.MinMax"},
                },
            },
        ],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def test_from_another_run_through_quantization_to_proved_files(tmp_path: Path) -> None:
    started = Run(tmp_path / "started")
    started.folder.mkdir()
    started.save_model(Tiny(width=4), Digits().normalize)
    model = {"class_path": "galago.run.load", "init_args": {"run": str(started.folder)}}
    recipe.train_recipe(["--config", str(quantized_recipe(tmp_path, model))])
    started.weights.unlink()  # it is needed no more
    run = str(tmp_path / "run")
    found = load(run)
    assert isinstance(find(found, "backbone.down.branch.conv"), QuantLayer)
    maps = attention_maps(Deployed(found, Digits().normalize, Classify(10)), Digits().example())
    assert maps.shape == (1, 8, 8)
    assert cli.main(["export", "--run", run]) == 0
    assert cli.main(["verify", "--run", run]) == 0
    verdict = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert all(verdict[engine]["agreement"] == 1 for engine in ("onnxruntime", "openvino"))
