from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from galago.data import Normalize
from galago.errors import UserError
from galago.models.bert import Bert
from galago.run import Run, load


def texts(count: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(1, 256, (count, 1, 1, length)).float()


@pytest.fixture
def _transformers() -> None:
    pytest.importorskip("transformers", reason="the extra `text` is not installed")


@pytest.mark.usefixtures("_transformers")
@pytest.mark.parametrize("patch", [1, 4])
def test_padding_changes_nothing(patch: int) -> None:
    made = Bert(4, 12, width=8, layers=2, heads=2, patch=patch).eval()
    x = texts(length=8)
    padded = torch.cat([x, torch.zeros(3, 1, 1, 4)], 3)
    assert made(padded).shape == (3, 4)
    if patch == 1:  # with patches a convolution sees where the text ends
        torch.testing.assert_close(made(padded), made(x))
    assert made(torch.zeros(1, 1, 1, 12)).isfinite().all()


@pytest.mark.usefixtures("_transformers")
def test_the_order_of_bytes_counts() -> None:
    made, x = Bert(4, 12, width=8, layers=1, heads=2).eval(), texts()
    assert not torch.allclose(made(x), made(x.flip(3)))


@pytest.mark.usefixtures("_transformers")
@pytest.mark.parametrize("patch", [1, 2])
def test_every_weight_learns(patch: int) -> None:
    made = Bert(4, 12, width=8, layers=1, heads=2, patch=patch, dropout=0.0)
    made(texts()).square().sum().backward()
    idle = [name for name, parameter in made.named_parameters() if parameter.grad is None]
    assert not idle


@pytest.mark.usefixtures("_transformers")
def test_a_run_gives_it_back(tmp_path: Path) -> None:
    made = Bert(4, 12, width=8, layers=1, heads=2, patch=2).eval()
    Run(tmp_path).save_model(made, Normalize([0.0], [1 / 255]))
    x = texts()
    assert torch.equal(load(tmp_path)(x), made(x))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'galago\[text\]'"):
        Bert(4, 12)


def test_sizes_that_do_not_divide_are_named() -> None:
    with pytest.raises(UserError, match="3 heads do not divide a width of 8"):
        Bert(4, 12, width=8, heads=3)
    for patch in (0, 5):
        with pytest.raises(UserError, match=f"patches of {patch} bytes"):
            Bert(4, 12, patch=patch)
