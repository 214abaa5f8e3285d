"""DropBlock: how many squares, which pixels, and what training and the finished network see of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, close, exported, identical, tiny_network
from galago.method import Forward, Method
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.regularize.drop_block import DropBlock, blocks, corner_rate, dropped
from galago.testing import check_method
from galago.trainer import finish
from noise import normalized_batch

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "reg_robustness_eval.npz")


def test_the_rate_of_corners_is_the_cards() -> None:
    for height, width, size, kept, rate in GOLDEN["dropblock_gamma"]:
        assert corner_rate(int(height), int(width), int(size), kept) == pytest.approx(rate, rel=1e-9)


def test_each_corner_drops_its_square_and_nothing_else() -> None:
    corners = (torch.rand(3, 2, 5, 4) < 0.15).float()
    wanted = torch.ones(3, 2, 7, 6)
    for image, channel, row, column in corners.nonzero().tolist():
        wanted[image, channel, row : row + 3, column : column + 3] = 0
    assert torch.equal(blocks(corners, 3), wanted)


def test_about_the_share_that_is_asked_for_stays_and_the_sum_is_kept() -> None:
    y = torch.ones(64, 16, 14, 14)
    found = dropped(y, 7, 0.1)
    left = (found != 0).float().mean()
    assert 0.9 < left < 0.93, "a little more than 0.9, as squares overlap"
    torch.testing.assert_close(found.sum(), y.sum(), rtol=1e-4, atol=0)
    assert len(found.unique()) == 2


def test_images_and_channels_have_squares_of_their_own() -> None:
    masks = (dropped(torch.ones(8, 8, 9, 9), 3, 0.2) != 0).flatten(2).flatten(0, 1)
    assert len({tuple(mask.tolist()) for mask in masks}) > 32


def test_a_square_is_no_larger_than_the_map() -> None:
    found = dropped(torch.ones(200, 4, 3, 5), 7, 0.3)
    assert found.shape == (200, 4, 3, 5)
    columns = (found != 0).float()
    assert torch.equal(columns.amin(2), columns.amax(2)), "3 pixels high, so the whole height or nothing"


@pytest.mark.parametrize(("dropping", "wanted"), [(0.0, 1.0), (1.0, 0.0)])
def test_nothing_and_everything_can_be_dropped(dropping: float, wanted: float) -> None:
    y = torch.randn(2, 3, 1, 1)
    assert torch.equal(dropped(y, 1, dropping), wanted * y)


def test_half_precision_loses_no_count() -> None:
    found = dropped(torch.ones(32, 16, 32, 32).bfloat16(), 3, 0.1)
    assert found.dtype == torch.bfloat16
    assert abs(found.float().mean() - 1) < 0.01


def test_it_drops_more_and_more_and_only_in_training_mode() -> None:
    model, batch, method = tiny_network(), normalized_batch(), DropBlock(["block"], size=2, kept=0.5)
    method.prepare(model, TinyImages())
    seen: list[Tensor] = []
    model.down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    shares = []
    for progress in (0.0, 0.5, 1.0):
        model.train()
        with torch.no_grad():
            method.step(batch, Forward(model, classify(), (), progress))
            plain = model.block(model.stem(batch.input)) if progress else None
        shares.append((seen[-1] == 0).float().mean())
        assert plain is None or plain.shape == seen[-1].shape
    assert shares[0] < shares[1] - 0.05 < shares[2] - 0.1
    first, second = model.eval()(batch.input), model(batch.input)
    assert torch.equal(first, second)


def test_at_the_start_training_is_as_without_it() -> None:
    with_it, batch = tiny_network(), normalized_batch()
    before = with_it.train()(batch.input)
    method = DropBlock()
    method.prepare(with_it, TinyImages())
    torch.testing.assert_close(method.step(batch, Forward(with_it, classify())).output, before)


def test_it_obeys_the_laws() -> None:
    check_method(DropBlock)
    check_method(lambda: DropBlock(["stem", -1], size=2, kept=0.5))


def test_it_compiles_as_one_graph_whatever_is_dropped() -> None:
    model, method = tiny_network(), DropBlock(size=2)
    method.prepare(model, TinyImages())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model.train().compile(backend=backend, fullgraph=True)
    for progress in (0.0, 0.3, 0.9):
        method.step(normalized_batch(), Forward(model, classify(), (), progress))
    assert len(graphs) == 1


def quantize() -> Quantize:
    return Quantize(LSQWeight(4), LSQ(4), edge_input=MinMax(8), stream=MinMax(8))


@pytest.mark.parametrize(
    "listed", [lambda: [quantize(), DropBlock()], lambda: [DropBlock(), quantize()], lambda: [CutMix(), DropBlock()]]
)
def test_it_trains_finishes_and_exports_with_others(listed) -> None:
    def methods() -> list[Method]:
        return listed()

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    finished = finish(trial.learner)
    assert not any(part._forward_hooks for part in finished.modules())
    assert close(finished(trial.image()), exported(finished, trial.image()))


def test_everything_kept_trains_exactly_as_nothing_done() -> None:
    trained = []
    for methods in ([DropBlock(kept=1.0)], []):
        trial = Trial(tiny_network, classify(), TinyImages(), lambda methods=methods: methods)
        for number in range(3):
            trial.step(number)
        trained.append(trial.learner.model.state_dict())
    assert identical(*trained)


def test_summary_names_the_layers() -> None:
    method = DropBlock(size=3)
    assert method.summary() is None
    method.prepare(tiny_network(), TinyImages())
    assert method.summary() == "DropBlock: squares of 3×3 in what block, down give"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": 0}, "squares of 0 pixels"),
        ({"kept": 0.0}, "leave 0 of a map"),
        ({"layers": []}, "layers is empty"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(arguments, said: str) -> None:
    with pytest.raises(UserError, match=said):
        DropBlock(**arguments)


@pytest.mark.parametrize(
    ("layer", "said"),
    [("head", "gives 1×3; name one that gives a map"), (7, "has no stage 7"), ("nowhere", "no layer 'nowhere'")],
)
def test_layers_without_a_map_are_refused_before_training(layer: str | int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        DropBlock([layer]).prepare(tiny_network(), TinyImages())


def test_a_layer_that_does_not_run_is_refused() -> None:
    model = tiny_network()
    model.idle = nn.ReLU()
    with pytest.raises(UserError, match="'idle' gives nothing"):
        DropBlock(["idle"]).prepare(model, TinyImages())
