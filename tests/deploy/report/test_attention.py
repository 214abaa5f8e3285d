"""Images and where a network looked, stored by `measure` and drawn without an image file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from galago.datasets.digits import Digits
from galago.deploy.report.attention import attention_drawn, overlaid, read_attention, resized
from galago.deploy.report.report import write_report
from galago.errors import UserError
from galago.measure import measure_run
from galago.models.attention_branch import attention_branch
from galago.models.tiny import Tiny
from galago.run import Run

HOSTILE = "<script>alert(1)</script>"


def store(folder: Path, **changed: np.ndarray) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "image": draw.integers(0, 256, (3, 3, 8, 8), dtype=np.uint8),
        "map": draw.random((3, 4, 4), dtype=np.float32),
        "target": np.array([0, 1, 1]),
        "answer": np.array([0, 0, 1]),
        "classes": np.array(["cat", HOSTILE]),
    }
    np.savez(folder / "attention.npz", **(arrays | changed))


def test_measuring_a_network_with_a_branch_puts_its_maps_on_the_page(tmp_path: Path) -> None:
    model = attention_branch(Tiny(width=4), "down")
    data, run = Digits(), Run(tmp_path / "run")
    content = {
        "task": {"class_path": "galago.tasks.classify.Classify", "init_args": {"classes": 10}},
        "data": {"class_path": "galago.datasets.digits.Digits"},
        "probes": [],
    }
    run.begin(content, 0)
    run.save_model(model, data.normalize)
    measure_run(run.folder)
    looked = read_attention(run.folder)
    assert len(looked) == 6
    for one in looked:
        assert one.image.shape == (8, 8, 3)
        assert one.map.shape == (8, 8)
        assert one.right == ("taken for" not in one.words)
    test = torch.cat([batch.input for batch in data.test()])
    first = torch.from_numpy(looked[0].image[:, :, 0])
    assert (test[:, 0].double() == first).flatten(1).all(1).any()
    page = write_report(run.folder).read_text()
    assert "What does it look at?" in page
    assert yaml.safe_load(run.recipe.read_text()) == content
    run.clear()
    assert not (run.folder / "attention.npz").exists()


def test_a_network_without_a_branch_has_no_such_section(write_run: Callable[..., Path]) -> None:
    assert "What does it look at?" not in write_report(write_run("student")).read_text()
    assert attention_drawn([]) is None


def test_the_page_shows_names_as_text_and_fetches_nothing(write_run: Callable[..., Path]) -> None:
    run = write_run("student")
    store(run)
    page = write_report(run).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<img" not in page
    assert "href" not in page
    assert len(page) < 2_000_000


def test_the_map_glows_where_it_is_greatest_and_leaves_the_rest_gray() -> None:
    image = np.full((4, 4, 3), 100.0)
    image[..., 0] = 40
    shown = overlaid(image, np.array([[0.1, 0.1], [0.1, 0.9]]))
    np.testing.assert_allclose(shown[0, 0], image[0, 0].mean())
    assert shown[3, 3, 0] > shown[3, 3, 2]
    flat = overlaid(image, np.full((2, 2), 0.4))
    np.testing.assert_allclose(flat, image.mean(2, keepdims=True).repeat(3, 2))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 4), (12, 9)])
def test_resizing_is_a_mean_over_what_falls_together(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).random((6, 8, 2))
    found = resized(values, *size)
    assert found.shape == (*size, 2)
    if size == (1, 1):
        np.testing.assert_allclose(found[0, 0], values.mean((0, 1)))
    assert values.min() <= found.min() <= found.max() <= values.max()


@pytest.mark.parametrize(
    "changed",
    [
        {"image": np.array([{}], object)},
        {"image": np.zeros((3, 8), np.uint8)},
        {"map": np.full((3, 4, 4), np.nan, np.float32)},
        {"map": np.zeros((2, 4, 4), np.float32)},
        {"target": np.array([0, 1, 7])},
        {"answer": np.array([0, -1, 1])},
        {"classes": np.array([1, 2])},
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, changed: dict[str, np.ndarray]) -> None:
    store(tmp_path, **changed)
    with pytest.raises(UserError, match=r"attention\.npz is damaged"):
        read_attention(tmp_path)


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "attention.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match=r"attention\.npz is damaged"):
        read_attention(tmp_path)
