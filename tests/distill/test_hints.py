"""Hints and their regressors against the official code, and what must be true of them."""

from __future__ import annotations

import pytest
import torch

from galago.distill.hints import Hints, regressor
from galago.distill.lesson import View
from galago.errors import UserError
from lessons import Golden, equal, seen


@pytest.mark.parametrize("case", ["same", "half", "double", "crop"])
def test_hints_are_the_official_ones(case: str) -> None:
    golden = Golden("fitnet")
    own, its = golden.learnt(f"{case}_f_student"), golden(f"{case}_f_teacher")
    lesson = Hints(layers=["a"])
    lesson.paths = lesson.teacher_paths = ["a"]
    lesson.fit(View(own, [own]), View(its, [its]))
    convolution, norm, _ = lesson.double().regressors[0]
    with torch.no_grad():
        for layer, name in ((convolution, "conv"), (norm, "bn")):
            layer.weight.copy_(golden(f"{case}_{name}_weight"))
            layer.bias.copy_(golden(f"{case}_{name}_bias"))
    loss = lesson.train()(seen([own], [its]))
    loss.backward()
    equal(loss, golden(f"{case}_loss"))
    equal(own.grad, golden(f"{case}_grad_f_student"))
    equal(convolution.weight.grad, golden(f"{case}_grad_conv_weight"))
    equal(norm.weight.grad, golden(f"{case}_grad_bn_weight"))


def test_a_map_that_no_regressor_reaches_is_refused_with_both_sizes() -> None:
    with pytest.raises(UserError, match=r"from a map of 3×3 to one of 8×8"):
        regressor(torch.Size([1, 2, 3, 3]), torch.Size([1, 2, 8, 8]))
