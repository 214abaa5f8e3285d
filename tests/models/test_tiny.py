"""The tiny digits network."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from galago.models.tiny import Tiny, tiny
from galago.spec import build, describe


@pytest.mark.parametrize(("width", "parameters"), [(16, 9_850), (64, 149_962)])
def test_parameters_are_as_the_page_says(width: int, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in tiny(width=width).parameters()) == parameters


@pytest.mark.parametrize("pixels", [8, 16, 28])
def test_any_small_size_is_accepted(pixels: int) -> None:
    assert tiny(classes=5, channels=3, width=4)(torch.zeros(2, 3, pixels, pixels)).shape == (2, 5)


def test_it_learns_real_digits_in_seconds() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.from_numpy(digits.images).float()[:, None] / 8 - 1, torch.from_numpy(digits.target)
    network = tiny()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(3):
        for rows in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    network.eval()
    assert (network(x[1400:]).argmax(1) == y[1400:]).float().mean() > 0.85


def test_a_network_can_be_written_down_and_rebuilt() -> None:
    network = Tiny(classes=3, channels=2, width=4)
    twin = build(describe(network))
    assert [p.shape for p in twin.parameters()] == [p.shape for p in network.parameters()]
