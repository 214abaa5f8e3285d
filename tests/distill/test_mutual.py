"""Deep mutual learning against the reference's losses and updates, and what must be true of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.distill.distill import Distill
from galago.distill.hints import Hints
from galago.distill.mutual import MutualLearning, mutual_divergence
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported
from galago.method import Forward, Method
from galago.models.tiny import Tiny
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network
from galago.trainer import finish
from lessons import Golden, equal


def trial(make_methods: Callable[[], list[Method]]) -> Trial:
    return Trial(tiny_network, classify(), TinyImages(), make_methods)


def test_losses_and_gradients_are_the_reference_ones() -> None:
    golden = Golden("dml")
    said = [golden.learnt("z0"), golden.learnt("z1")]
    for number in range(2):
        loss = nn.functional.cross_entropy(said[number], golden("y")) + mutual_divergence(said, number)
        loss.backward()
        equal(loss, golden(f"loss{number}"))
    for number in range(2):  # the other's loss has added nothing: as a target, it is a constant
        equal(said[number].grad, golden(f"grad_z{number}"))
    matrix = torch.stack([torch.stack([divergence(said[j], said[i]) for j in range(2)]) for i in range(2)])
    equal(matrix, golden("kl_matrix"))


def divergence(target: Tensor, own: Tensor) -> Tensor:
    """KL(p_target ‖ p_own), number by number."""
    total = torch.zeros((), dtype=own.dtype)
    for p, q in zip(target.softmax(1), own.softmax(1), strict=True):
        for a, b in zip(p, q, strict=True):
            total = total + a * (a / b).log()
    return total / len(own)


def test_divergences_of_known_scores_have_known_values() -> None:
    count = torch.arange(1, 21, dtype=torch.float64).view(4, 5)
    said = [2 * (frequency * count).sin() for frequency in (1.0, 1.3)]
    assert mutual_divergence(said, 0).item() == pytest.approx(1.383559574, abs=1e-9)
    assert mutual_divergence(said, 1).item() == pytest.approx(1.241263825, abs=1e-9)


def test_several_others_count_by_their_mean() -> None:
    said = [torch.randn(3, 4, dtype=torch.float64) for _ in range(4)]
    expected = sum(divergence(said[j], said[2]) for j in (0, 1, 3)) / 3
    torch.testing.assert_close(mutual_divergence(said, 2), expected)


@pytest.mark.parametrize(("way", "sequential"), [("sync", False), ("seq", True)])
def test_an_update_moves_both_networks_as_the_reference_does(way: str, sequential: bool) -> None:
    golden = Golden("dml")
    networks = [linear(golden(f"step_w{number}")) for number in range(2)]
    method = MutualLearning([networks[1]], sequential)
    optimizer = torch.optim.SGD([*networks[0].parameters(), *networks[1].parameters()], lr=float(golden("step_lr")))
    target = nn.functional.one_hot(golden("y"), 6).double()
    train(method, networks[0], Batch(golden("step_x"), target), optimizer)
    for number in range(2):
        equal(networks[number].weight, golden(f"{way}_w{number}_after"), 1e-6)  # scores are compared in float32


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def train(
    method: MutualLearning, model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, passes: int = 1
) -> dict[str, Tensor]:
    for _ in range(passes):
        step = method.step(batch, Forward(model, Classify(batch.target.shape[1])))
        torch.autograd.backward(step.loss / passes)
    method.update(model, optimizer.step)
    optimizer.zero_grad()
    return step.losses


def given(networks: list[nn.Module], momentum: float = 0.0) -> tuple[Batch, torch.optim.Optimizer]:
    batch = Batch(torch.randn(8, 5), torch.eye(4)[torch.arange(8) % 4])
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return batch, torch.optim.SGD(parameters, lr=0.3, momentum=momentum, weight_decay=0.01)


def test_three_networks_take_turns_on_one_batch_each_seeing_those_before_it_updated() -> None:
    networks: list[nn.Module] = [nn.Linear(5, 4) for _ in range(3)]
    twins = copy.deepcopy(networks)
    batch, optimizer = given(networks, momentum=0.9)
    method = MutualLearning(networks[1:], sequential=True)
    apart = [torch.optim.SGD(twin.parameters(), 0.3, momentum=0.9, weight_decay=0.01) for twin in twins]
    for _ in range(3):
        train(method, networks[0], batch, optimizer)
        for number, own in enumerate(apart):
            said = [twin(batch.input) for twin in twins]
            loss = nn.functional.cross_entropy(said[number], batch.target) + mutual_divergence(said, number)
            own.zero_grad()
            loss.backward()
            own.step()
    for network, twin in zip(networks, twins, strict=True):
        torch.testing.assert_close(network.weight, twin.weight)


@pytest.mark.parametrize("sequential", [False, True])
def test_batches_between_two_updates_count_by_their_mean(sequential: bool) -> None:
    networks: list[nn.Module] = [nn.Linear(5, 4) for _ in range(2)]
    twins = copy.deepcopy(networks)
    batch, optimizer = given(networks)
    train(MutualLearning(networks[1:], sequential), networks[0], batch, optimizer)
    _, other = given(twins)
    train(MutualLearning(twins[1:], sequential), twins[0], batch, other, passes=2)
    for network, twin in zip(networks, twins, strict=True):
        torch.testing.assert_close(network.weight, twin.weight)


def test_a_turn_moves_nothing_a_second_time_not_even_other_methods_parameters() -> None:
    def methods(sequential: bool) -> list[Method]:
        hints = Distill(tiny_network(), [Hints(1.0, layers=[-1])])
        return [hints, MutualLearning([tiny_network()], sequential)]

    together, in_turn = (trial(partial(methods, sequential)) for sequential in (False, True))
    for one in (together, in_turn):
        one.step(0)
    for one, other in zip(together.learner.ideas[0].parameters(), in_turn.learner.ideas[0].parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(together.learner.model.parameters(), in_turn.learner.model.parameters(), strict=True):
        assert torch.equal(one, other)  # the model learns first, of peers as they were
    peers = [one.learner.ideas[1].state_dict() for one in (together, in_turn)]
    assert not torch.equal(peers[0]["peers.0.head.weight"], peers[1]["peers.0.head.weight"])


def test_swapped_networks_have_swapped_losses() -> None:
    first, second = tiny_network(), tiny_network()
    image = torch.randn(8, 3, 8, 8)
    batch = Batch(image, torch.eye(3)[torch.arange(8) % 3])
    one = MutualLearning([second]).step(batch, Forward(first, Classify(3))).losses
    other = MutualLearning([first]).step(batch, Forward(second, Classify(3))).losses
    assert list(one) == ["cross_entropy", "mutual", "peer_1_cross_entropy", "peer_1_mutual"]
    for name in ("cross_entropy", "mutual"):
        torch.testing.assert_close(one[name], other[f"peer_1_{name}"])
        torch.testing.assert_close(other[name], one[f"peer_1_{name}"])


def test_a_turn_computes_in_the_precision_of_the_step() -> None:
    kinds: list[torch.dtype] = []
    networks: list[nn.Module] = [nn.Linear(5, 4) for _ in range(2)]
    for network in networks:
        network.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    batch, optimizer = given(networks)
    method = MutualLearning(networks[1:], sequential=True)
    with torch.autocast("cpu", torch.bfloat16):
        step = method.step(batch, Forward(networks[0], Classify(4)))
    step.loss.backward()
    method.update(networks[0], optimizer.step)
    assert kinds == 3 * [torch.bfloat16]  # both in the step, and the model again after its update


@pytest.mark.parametrize("sequential", [False, True])
def test_losses_are_logged_either_way_and_a_peer_learns(sequential: bool) -> None:
    started = trial(lambda: [MutualLearning([tiny_network()], sequential)])
    heard = [started.step(number % 3).losses for number in range(12)]
    for name in ("cross_entropy", "peer_1_cross_entropy"):
        assert heard[-1][name] < heard[0][name]
    assert heard[0]["peer_1_mutual"].requires_grad is not sequential


def test_peers_see_the_mixed_batch_of_a_method_behind() -> None:
    started = trial(lambda: [MutualLearning([tiny_network()]), CutMix(probability=1.0)])
    seen: list[Tensor] = []
    started.learner.ideas[0].peers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    step = started.step(0)
    assert len(seen) == 1
    assert torch.equal(seen[0], step.batch.input)
    assert not torch.equal(seen[0], started.data.normalize(started.batches[0].input))
    assert (step.batch.target.max(1).values < 1).any()


@pytest.mark.parametrize("sequential", [False, True])
def test_it_obeys_the_laws(sequential: bool) -> None:
    check_method(lambda: MutualLearning([tiny_network(), Tiny(classes=3, channels=3, width=3)], sequential))


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("behind", [False, True])
def test_a_quantized_model_learns_from_float_peers_and_ships_alone(sequential: bool, behind: bool) -> None:
    def methods() -> list[Method]:
        mutual, quantize = MutualLearning([tiny_network()], sequential), Quantize(LSQWeight(4), LSQ(4))
        return [mutual, CutMix(), quantize] if behind else [quantize, CutMix(), mutual]

    started = trial(methods)
    for number in range(2):
        assert started.step(number).loss.isfinite()
    image = started.image()
    finished = finish(started.learner)
    with torch.no_grad():
        torch.testing.assert_close(exported(finished, image), finished(image))
    assert not any("peer" in name for name in finished.state_dict())


def test_without_peers_there_is_nobody_to_learn_with() -> None:
    with pytest.raises(UserError, match="peers is empty"):
        MutualLearning([])


def test_a_peer_for_other_classes_is_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match="peer 2 tells 7 classes apart, the model 3"):
        trial(lambda: [MutualLearning([tiny_network(), Tiny(classes=7, channels=3, width=3)])])


def test_networks_that_begin_alike_are_refused() -> None:
    model, peer = tiny_network(), tiny_network()
    with pytest.raises(UserError, match="peer 1 begins with the weights of the model"):
        MutualLearning([copy.deepcopy(model)]).prepare(model, TinyImages())
    with pytest.raises(UserError, match="peer 2 begins with the weights of peer 1"):
        MutualLearning([peer, copy.deepcopy(peer)]).prepare(model, TinyImages())


def test_turns_in_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    MutualLearning([tiny_network()]).prepare(tiny_network(), TinyImages())
    with pytest.raises(UserError, match="run in one process"):
        MutualLearning([tiny_network()], sequential=True).prepare(tiny_network(), TinyImages())
