"""Contrastive distillation against the official code, and what must be true of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.distill.contrastive import Contrastive, Memory, contrastive_loss, draw_pairs
from galago.distill.distill import Distill
from galago.distill.lesson import Seen, View
from galago.distill.similarity import Similarity
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, exported
from galago.method import Forward, Method
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network
from galago.trainer import finish
from lessons import Golden, equal


def official(golden: Golden) -> Contrastive:
    """A lesson with the official code's embeddings and memories."""
    lesson = Contrastive(9, float(golden("temperature")), float(golden("momentum")), 8)
    lesson.images = int(golden("n_data"))
    own, its = golden("f_student"), golden("f_teacher")
    lesson.fit(View(own, [own]), View(its, [its]))
    lesson.double()
    for number, side in enumerate("st"):
        lesson.embeds[number].weight.data.copy_(golden(f"embed_{side}_weight"))
        lesson.embeds[number].bias.data.copy_(golden(f"embed_{side}_bias"))
        lesson.memories[number].rows.copy_(golden(f"memory_{side}"))
    return lesson


def given(own: Tensor, its: Tensor, index: Tensor | None) -> Seen:
    batch = Batch(own, own, {} if index is None else {"index": index})
    return Seen(View(own, [own]), View(its, [its]), batch, 0.5)


def test_loss_gradients_and_memories_are_the_official_ones() -> None:
    golden = Golden("crd")
    lesson, own = official(golden), golden.learnt("f_student")
    seen = given(own, golden("f_teacher"), golden("index"))
    loss = lesson.contrast(seen, golden("index"), golden("contrast_index"))
    loss.backward()
    equal(loss, golden("expected_loss"))
    equal(own.grad, golden("grad_f_student"))
    for number, side in enumerate("st"):
        equal(lesson.embeds[number].weight.grad, golden(f"grad_embed_{side}_weight"))
        equal(lesson.memories[number].rows, golden(f"memory_{side}_after"))
    equal(lesson.memories[1].normalizer, golden("z_student"))  # of the model's embeddings, told from the teacher's
    equal(lesson.memories[0].normalizer, golden("z_teacher"))


def test_a_second_batch_finds_new_memories_and_the_first_ones_constants() -> None:
    golden = Golden("crd")
    lesson = official(golden)
    seen = given(golden("f_student"), golden("f_teacher"), golden("index"))
    losses = [lesson.contrast(seen, golden("index"), golden("contrast_index")) for _ in range(2)]
    equal(losses[1], golden("second_call_loss"))
    equal(lesson.memories[1].normalizer, golden("z_student"))


def test_the_loss_is_that_of_a_loop_over_images_and_negatives() -> None:
    probability = torch.rand(3, 5, dtype=torch.float64)
    total, share = 0.0, 4 / 60
    for row in probability.tolist():
        total -= math.log(row[0] / (row[0] + share + 1e-7))
        total -= sum(math.log(share / (value + share + 1e-7)) for value in row[1:])
    assert contrastive_loss(probability, share).item() == pytest.approx(total / 3, rel=1e-12)


def test_comparisons_are_those_of_a_loop_over_rows() -> None:
    memory = Memory(6, 4).double()
    anchor = nn.functional.normalize(torch.randn(2, 4, dtype=torch.float64))
    pairs = torch.tensor([[3, 1, 1], [0, 5, 2]])
    exponents = [[math.exp(float(memory.rows[k] @ anchor[i]) / 0.07) for k in pairs[i]] for i in range(2)]
    expected = torch.tensor(exponents, dtype=torch.float64)
    torch.testing.assert_close(memory.compare(anchor, pairs, 0.07), expected / (expected.mean() * 6))


def test_pairs_begin_with_the_image_itself_and_go_on_with_every_other_one_equally_often() -> None:
    pairs = draw_pairs(torch.tensor([0, 3, 4]), images=5, negatives=4000)
    assert pairs[:, 0].tolist() == [0, 3, 4]
    for row in pairs:
        counts = torch.bincount(row[1:], minlength=5)
        assert counts[row[0]] == 0
        others = counts[torch.arange(5) != row[0]]
        assert (others - 1000).abs().max() < 5 * math.sqrt(4000 * 0.25 * 0.75)


def test_memories_begin_with_rows_of_length_one_on_average() -> None:
    rows = Memory(500, 128).rows
    assert rows.abs().max() <= math.sqrt(3 / 128)
    assert rows.square().sum(1).mean().item() == pytest.approx(1, abs=0.02)


def test_only_rows_of_the_batch_change_and_end_with_length_one() -> None:
    golden = Golden("crd")
    lesson = official(golden)
    before = clone(lesson.memories[0].rows)
    lesson(given(golden("f_student"), golden("f_teacher"), golden("index")))
    after = lesson.memories[0].rows
    changed = (after != before).any(1)
    assert changed.nonzero().flatten().tolist() == sorted(golden("index").tolist())
    torch.testing.assert_close(after[changed].norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_in_evaluation_nothing_is_remembered() -> None:
    golden = Golden("crd")
    lesson = official(golden).eval()
    before = clone(lesson.state_dict())
    lesson(given(golden("f_student"), golden("f_teacher"), golden("index")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in lesson.state_dict().items())


def test_mixed_precision_does_not_touch_it() -> None:
    golden = Golden("crd")
    found = []
    for enabled in (False, True):
        lesson = official(golden).float()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled):
            features = golden("f_student").float(), golden("f_teacher").float()
            found.append(lesson(given(*features, golden("index"))))
    assert torch.equal(*found)


def test_batches_without_an_index_are_refused() -> None:
    golden = Golden("crd")
    with pytest.raises(UserError, match="do not say which images are in a batch"):
        official(golden)(given(golden("f_student"), golden("f_teacher"), None))


def test_data_that_do_not_know_their_number_of_images_are_refused_before_training() -> None:
    data = TinyImages()
    data.images = None
    with pytest.raises(UserError, match="attribute `images`"):
        Distill(tiny_network(), [Contrastive()]).prepare(tiny_network(), data)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Contrastive(layers=[-2, -1]), "one layer of each network, not 2"),
        (lambda: Contrastive(temperature=0.0), "temperature is 0.0"),
        (lambda: Contrastive(negatives=0), "negatives 0 must be at least 1"),
        (lambda: Contrastive(momentum=1.0), r"momentum 1.0 in \[0, 1\)"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make: Callable[[], Contrastive], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_what_it_compares_is_shown_before_training() -> None:
    method = Distill(tiny_network(), [Contrastive(8), Similarity()])
    method.prepare(tiny_network(), TinyImages())
    table = method.summary()
    assert table is not None
    assert list(table.columns[-1].cells) == ["linear, to 128 numbers each", ""]


def test_it_teaches_the_layers_below_and_the_positive_pair_comes_closer() -> None:
    model, lesson = tiny_network(), Contrastive(16, size=16, weight=1.0)
    method = Distill(tiny_network(), [lesson], task_weight=0.0)
    data = TinyImages()
    method.prepare(model, data)
    optimizer = torch.optim.SGD([*model.parameters(), *lesson.parameters()], lr=0.02)
    losses = []
    for number in range(30):
        batch = data.train()[number % 2]
        step = method.step(batch._replace(input=data.normalize(batch.input)), Forward(model, Classify(3)))
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        losses.append(step.losses["contrastive"].item())
    assert sum(losses[-5:]) < sum(losses[:5])
    assert model.stem[0].weight.grad.abs().sum() > 0


def test_it_obeys_the_laws() -> None:
    check_method(lambda: Distill(tiny_network(), [Contrastive(16)]))


@pytest.mark.parametrize("outer", [True, False])
def test_a_quantized_model_learns_from_mixed_images_and_ships(outer: bool) -> None:
    def methods() -> list[Method]:
        others: list[Method] = [CutMix(probability=1.0), Quantize(LSQWeight(4), LSQ(4))]
        distill = Distill(tiny_network(), [Contrastive(16)])
        return [distill, *others] if outer else [*others, distill]

    started = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        assert started.step(number).losses["contrastive"].isfinite()
    image, finished = started.image(), finish(started.learner)
    with torch.no_grad():
        torch.testing.assert_close(exported(finished, image), finished(image))
