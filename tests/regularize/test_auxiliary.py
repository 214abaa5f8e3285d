import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.laws.trial import TinyImages, exported, tiny_network
from galago.layers import classifier
from galago.models.tiny import Tiny
from galago.regularize.auxiliary import Auxiliary, Branch, auxiliary_in, channels_at, joint_scores

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "ssal.npz")
GROUPS = [[0, 1, 1], [0, 1, 2]]


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def images() -> Tensor:
    data = TinyImages()
    return data.normalize(data.train()[0].input)


def with_branches(together: bool = False, exponent: float = 0.3) -> Auxiliary:
    torch.manual_seed(0)
    return Auxiliary(tiny_network(), [Branch(5, 2), Branch(10, 3)], ["stem", "down"], GROUPS, exponent, together)


def trained_statistics(network: nn.Module) -> nn.Module:
    """The same in evaluation mode, after BatchNorm has seen images."""
    for _ in range(3):
        network.train()(images())
    return network.eval()


def test_the_joint_prediction_is_the_one_of_the_golden_vectors_and_of_the_card() -> None:
    branches = [golden(f"joint_branch{number}_logits") for number in range(2)]
    groups = [golden(f"joint_branch{number}_map").long() for number in range(2)]
    found = joint_scores(golden("joint_main_logits"), branches, groups, float(golden("joint_exponent")))
    torch.testing.assert_close(found.exp(), golden("joint_probabilities"), rtol=1e-9, atol=1e-12)
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).double(), torch.tensor([[0.2, 0.8]]).double()
    found = joint_scores(p.log(), [q.log()], [torch.tensor([0, 1, 1])], 0.5).exp()
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 0.4, 4 / 15]]).double())


def test_the_joint_prediction_is_a_distribution_which_softmax_leaves_as_it_is() -> None:
    scores, branch = torch.randn(9, 3) * 20, torch.randn(9, 2) * 20
    found = joint_scores(scores, [branch], [torch.tensor([0, 1, 1])], 0.7)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(9))
    torch.testing.assert_close(found.softmax(1), found.exp())


def test_branches_that_say_nothing_or_have_no_say_change_nothing() -> None:
    scores, group = torch.randn(9, 3).double(), torch.tensor([0, 1, 1])
    silent = joint_scores(scores, [torch.randn(9, 2).double()], [group], 0.0)
    torch.testing.assert_close(silent.exp(), scores.softmax(1))
    uniform = joint_scores(scores, [torch.ones(9, 2).double()], [group], 0.5)
    assert torch.equal(uniform.argsort(1), scores.argsort(1))


def test_an_oracle_of_groups_decides_the_group_in_the_end() -> None:
    scores, group = 5 * torch.randn(50, 6), torch.tensor([0, 0, 1, 1, 2, 2])
    label = torch.arange(50) % 6
    oracle = 3 * nn.functional.one_hot(group[label], 3).float()
    found = joint_scores(scores, [oracle], [group], 1e4).argmax(1)
    assert torch.equal(group[found], group[label])


def test_in_training_the_output_is_the_networks_own_and_branches_are_asked_once() -> None:
    network = with_branches(together=True).train()
    output = network(images())
    torch.testing.assert_close(output, network.layer(images()))
    said = network.said()
    assert [one.shape for one in said] == [(8, 2), (8, 3)]
    assert network._said.value is None


def test_in_evaluation_it_answers_as_it_will_ship() -> None:
    alone, both = trained_statistics(with_branches()), trained_statistics(with_branches(together=True))
    for network in (alone, both):
        heads = network.heads(images())
        expected = heads.joint if network.together else heads.main
        torch.testing.assert_close(network(images()), expected)
        torch.testing.assert_close(exported(network, images()), expected)
    assert not torch.equal(alone(images()), both(images()))


def test_a_dict_of_outputs_has_its_main_entry_replaced() -> None:
    class Two(Tiny):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            scores = super().forward(x)
            return {"main": scores, "side": 2 * scores}

    network = Auxiliary(Two(3, 3, 5), [Branch(5, 2)], ["stem"], [[0, 1, 1]], together=True).eval()
    output = network(images())
    torch.testing.assert_close(output["main"], network.heads(images()).joint)
    torch.testing.assert_close(output["side"], 2 * network.heads(images()).main)


def test_a_copy_has_branches_and_ears_of_its_own() -> None:
    network = trained_statistics(with_branches(together=True))
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.branches[0].linear.weight.add_(1.0)
    expected = network(images())
    assert not torch.equal(other(images()), expected)
    assert torch.equal(network(images()), expected)


def test_the_network_alone_keeps_no_hook_and_answers_as_before() -> None:
    network = trained_statistics(with_branches())
    expected = network(images())
    alone = network.alone()
    assert type(alone) is Tiny
    assert not any(module._forward_hooks for module in alone.modules())
    assert torch.equal(alone(images()), expected)
    assert auxiliary_in(alone) is None
    assert auxiliary_in(nn.Sequential(network)) is network


def test_the_last_linear_layer_is_still_the_networks_classifier() -> None:
    assert classifier(with_branches()) == "layer.head"


def test_a_branch_learns_nothing_to_layers_behind_the_one_it_reads() -> None:
    network = with_branches().train()
    network(images())
    network.said()[0].sum().backward()
    reached = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("layer.stem.") for name in reached)
    assert not any(name.startswith(("layer.block.", "layer.down.", "layer.head.", "branches.1.")) for name in reached)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_branch_reads_maps_of_any_size(size: int) -> None:
    assert Branch(5, 4).eval()(torch.randn(2, 5, size, size)).shape == (2, 4)


def test_layers_that_no_branch_can_read_are_named() -> None:
    image = images()[:1]
    assert channels_at(tiny_network(), "down", image, "Mine") == 10
    for path in ("flatten", "head"):
        with pytest.raises(UserError, match=f"Mine: layer '{path}' does not give one feature map"):
            channels_at(tiny_network(), path, image, "Mine")
    with pytest.raises(UserError, match="no layer 'steam'"):
        channels_at(tiny_network(), "steam", image, "Mine")
    changing = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    with pytest.raises(UserError, match="'0' gives is changed in place behind it"):
        channels_at(changing, "0", image, "Mine")
