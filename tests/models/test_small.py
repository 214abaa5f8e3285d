"""Small plain networks: golden numbers of parameters, shapes, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from galago.errors import UserError
from galago.models.small import SmallCNN, cnn_lc
from galago.spec import build, describe

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "small_data.npz")


@pytest.mark.parametrize("row", GOLDEN["cnn_lc_parameters"].tolist(), ids=str)
def test_parameters_are_as_many_as_the_golden_table_says(row: list[int]) -> None:
    width, depth, classes, channels, size, pooled, expected = row
    net = cnn_lc(classes, channels, size, width, depth, global_pool=bool(pooled))
    assert sum(parameter.numel() for parameter in net.parameters()) == expected
    assert net.eval()(torch.zeros(2, channels, size, size)).shape == (2, classes)


def test_activations_keep_their_size_at_the_beginning() -> None:
    torch.manual_seed(0)
    net = SmallCNN(width=64, dropout=0.0).eval()
    image = torch.randn(16, 3, 32, 32)
    out = [image]
    for block in net.features:
        out.append(block[0](out[-1]).relu())
        out[-1] = nn.functional.max_pool2d(out[-1], 2)
    squares = [part.square().mean().item() for part in out]
    assert all(0.5 < after / before < 4 for before, after in pairwise(squares))
    assert not any(module.bias.any() for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear))


def test_scores_are_small_at_the_beginning_even_with_dropout() -> None:
    torch.manual_seed(0)
    scores = SmallCNN(width=32).train()(torch.randn(64, 3, 32, 32))
    assert nn.functional.cross_entropy(scores, torch.arange(64) % 10).item() < 4


def test_dropout_acts_in_training_only() -> None:
    net, image = SmallCNN(), torch.randn(2, 3, 32, 32)
    assert torch.equal(net.eval()(image), net(image))
    assert not torch.equal(net.train()(image), net(image))


def test_it_can_be_written_down_and_too_many_blocks_are_refused() -> None:
    again = build(describe(SmallCNN(5, 1, 28, 8, 2, 0.1, True)))
    assert isinstance(again, SmallCNN)
    assert (again.size, again.width, again.depth, again.dropout, again.global_pool) == (28, 8, 2, 0.1, True)
    with pytest.raises(UserError, match="make depth smaller"):
        SmallCNN(size=8, depth=4)
