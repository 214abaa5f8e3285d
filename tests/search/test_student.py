from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from galago.data import Normalize
from galago.errors import UserError
from galago.models.tiny import Tiny
from galago.run import Run, load
from galago.search.cell_network import CellNetwork
from galago.search.space import ImageSpace, TextSpace
from galago.search.student import begin_with, factorized, student
from galago.search.super_network import SuperNetwork
from galago.tasks.classify import Classify
from galago.train import train
from samples import Stripes

BYTES = Normalize([0.0], [1 / 255])


def search(folder: Path) -> CellNetwork:
    derived = SuperNetwork(TextSpace(dropout=0.1), 3, width=6, nodes=2, depths=[1, 2]).derived()
    folder.mkdir(parents=True)
    Run(folder).save_model(derived, BYTES)
    return derived


def test_a_student_has_the_found_cells_and_weights_of_its_own(tmp_path: Path) -> None:
    derived = search(tmp_path / "search")
    made = student(str(tmp_path / "search"))
    assert isinstance(made, CellNetwork)
    assert (made.genotype, made.depth, made.space.dropout) == (derived.genotype, derived.depth, 0.1)
    assert not torch.equal(made.linear.weight, derived.linear.weight)
    assert made.affine
    assert not derived.affine


def test_a_student_s_run_does_not_need_the_search_any_more(tmp_path: Path) -> None:
    search = str(tmp_path / "search")
    recipe = {"model": {"class_path": "galago.search.student.student", "init_args": {"run": search}}}
    made = SuperNetwork(ImageSpace(), 2, width=4, nodes=1, depths=[1]).derived()
    (tmp_path / "search").mkdir()
    Run(tmp_path / "search").save_model(made, Stripes().normalize)
    trained = train(
        *(student(search), Classify(2), Stripes(), tmp_path / "run"),
        epochs=1,
        recipe=recipe,
        accelerator="cpu",
    )
    (tmp_path / "search").rename(tmp_path / "elsewhere")
    x = Stripes().normalize(Stripes().example())
    assert torch.equal(load(tmp_path / "run")(x), trained(x))


def test_what_is_no_search_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished search"):
        student(str(tmp_path / "nothing"))
    (tmp_path / "tiny").mkdir()
    Run(tmp_path / "tiny").save_model(Tiny(), Normalize([0.5], [0.5]))
    with pytest.raises(UserError, match="ended with a Tiny"):
        student(str(tmp_path / "tiny"))


def test_factorized_embeddings_keep_the_angles_of_the_best_approximation() -> None:
    embeddings = torch.randn(20, 3) @ torch.randn(3, 8)  # of rank 3
    made = factorized(embeddings, 3)
    products, wanted = made @ made.T, embeddings @ embeddings.T
    torch.testing.assert_close(products / products.norm(), wanted / wanted.norm())
    assert made.square().mean().item() == pytest.approx(1.0)


def test_a_teacher_s_bytes_become_the_student_s_and_padding_stays_zero() -> None:
    own = SuperNetwork(TextSpace(), 3, width=4, nodes=1, depths=[1]).derived()
    teacher = nn.Sequential(nn.Embedding(256, 6))
    begin_with(own, teacher)
    weight = own.stem.embedding.weight
    torch.testing.assert_close(weight[1:], factorized(teacher[0].weight, 4)[1:])
    assert not weight[0].any()


@pytest.mark.parametrize("teacher", [nn.Linear(2, 2), nn.Embedding(256, 3), nn.Embedding(100, 8)])
def test_a_teacher_without_such_embeddings_is_named(teacher: nn.Module) -> None:
    own = SuperNetwork(TextSpace(), 3, width=4, nodes=1, depths=[1]).derived()
    with pytest.raises(UserError, match="no embeddings of bytes"):
        begin_with(own, teacher)
    images = SuperNetwork(ImageSpace(), 3, width=4, nodes=1, depths=[1]).derived()
    with pytest.raises(UserError, match="no embeddings of bytes"):
        begin_with(images, nn.Embedding(256, 8))
