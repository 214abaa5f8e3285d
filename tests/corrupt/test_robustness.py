"""Robustness to common corruptions: names of views, numbers by hand, the laws of probes, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from galago.corrupt.blur import GlassBlur
from galago.corrupt.digital import Contrast, JPEGCompression, Saturate
from galago.corrupt.noise import GaussianNoise
from galago.corrupt.published import ALEXNET, benchmark
from galago.corrupt.robustness import CorruptionRobustness
from galago.corrupt.weather import Fog, Frost
from galago.datasets.digits import Digits
from galago.errors import UserError
from galago.laws.trial import TinyImages
from galago.probe import Deployed, Outputs
from galago.tasks.classify import Classify
from galago.testing import check_probe


def outputs(predicted: list[int], classes: int = 3, sure: float = 100.0) -> Outputs:
    """Four images of class 0, decided so."""
    one_hot = torch.nn.functional.one_hot
    return Outputs(
        sure * one_hot(torch.tensor(predicted), classes).float(), one_hot(torch.zeros(4).long(), classes).float()
    )


def test_views_are_named_after_all_that_decides_their_images() -> None:
    probe = CorruptionRobustness([Fog(), GaussianNoise()], severities=[1, 3])
    names = ["test", "corrupted/fog/1", "corrupted/fog/3", "corrupted/gaussian_noise/1", "corrupted/gaussian_noise/3"]
    assert list(probe.views(TinyImages())) == names
    few = CorruptionRobustness([Fog()], severities=[2], images=12).views(TinyImages())
    assert list(few) == ["test/12", "corrupted/fog/2/12"]
    assert [sum(len(batch.input) for batch in view) for view in few.values()] == [12, 12]


def test_all_fifteen_types_at_five_severities_are_the_default() -> None:
    views = CorruptionRobustness().views(TinyImages())
    assert len(views) == 1 + 15 * 5
    assert "corrupted/frost_synthetic/5" in views


def test_numbers_are_means_over_types_and_severities() -> None:
    probe = CorruptionRobustness([Fog(), Contrast()], severities=[1, 5])
    found = probe.score(
        {
            "test": outputs([0, 0, 0, 0]),
            "corrupted/fog/1": outputs([0, 0, 0, 1]),
            "corrupted/fog/5": outputs([0, 0, 1, 1]),
            "corrupted/contrast/1": outputs([0, 0, 0, 0]),
            "corrupted/contrast/5": outputs([1, 2, 1, 2]),
        },
        Classify(3),
    )
    assert found["clean_error"] == 0
    assert found["corruption_error_fog"] == pytest.approx(0.375)
    assert found["corruption_error_contrast"] == pytest.approx(0.5)
    assert found["corruption_error"] == pytest.approx(0.4375)
    assert found["corruption_ece"] == pytest.approx(0.4375)  # always sure: as wrong as it is overconfident
    assert "mce" not in found


def whole_benchmark(classes: int, frost: Frost) -> dict[str, float]:
    types = [frost if isinstance(one, Frost) else one for one in benchmark()]
    wrong = outputs([1, 1, 1, 1], classes)
    views = {f"corrupted/{one.identity()}/{severity}": wrong for one in types for severity in range(1, 6)}
    return CorruptionRobustness(types).score(views | {"test": outputs([0] * 4, classes)}, Classify(classes))


def test_a_thousand_classes_are_compared_with_alexnet(tmp_path) -> None:
    found = whole_benchmark(1000, Frost(tmp_path))
    assert found["mce"] == pytest.approx(100 * sum(1 / error for error in ALEXNET.values()) / 15)
    assert found["relative_mce"] == pytest.approx(100 * sum(1 / (e - 0.4348) for e in ALEXNET.values()) / 15)
    assert "mce" not in whole_benchmark(100, Frost(tmp_path))


def test_made_up_frost_is_never_called_the_published_benchmark() -> None:
    found = whole_benchmark(1000, Frost())
    assert {"mce_frost_synthetic", "relative_mce_frost_synthetic", "corruption_error_frost_synthetic"} <= {*found}
    assert "mce" not in found
    assert "corruption_error_frost" not in found


class Brightness(nn.Module):
    """Says class 1 of bright images and class 0 of dark ones."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        light = image.mean((1, 2, 3))
        return torch.stack([-light, light, *[torch.full_like(light, -9.0)] * 8], 1)


def test_errors_are_those_of_the_network_on_the_corrupted_images() -> None:
    data = Digits(batch_size=100, size=32)
    found = CorruptionRobustness([Fog()], [5])(Deployed(Brightness(), data.normalize, Classify(10)), Classify(10), data)
    wrong = []
    for batch in data.test():
        foggy = Fog()(batch.input, 5, batch.extra["index"].tolist())
        bright = data.normalize(foggy).mean((1, 2, 3)) > 0
        wrong.append(bright.long() != batch.target.argmax(1))
    assert found["corruption_error_fog"] == pytest.approx(torch.cat(wrong).double().mean().item())
    assert found["corruption_error"] == found["corruption_error_fog"] != found["clean_error"]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match=r"corruptions is \['fog', 'fog'\]; name one or more, each once"):
        CorruptionRobustness([Fog(), Fog()])
    with pytest.raises(UserError, match=r"corruptions is \[\]"):
        CorruptionRobustness([])
    with pytest.raises(UserError, match=r"severities is \[\]"):
        CorruptionRobustness(severities=[])
    with pytest.raises(UserError, match="severity is 6"):
        CorruptionRobustness(severities=[6])
    with pytest.raises(UserError, match="images is 0; give 1 or more, or null for all"):
        CorruptionRobustness(images=0)
    with pytest.raises(UserError, match="saturate: it changes colors"):
        CorruptionRobustness([Saturate()]).views(Digits(size=32))


def test_the_laws_of_probes_hold() -> None:
    check_probe(lambda: CorruptionRobustness([Fog(), GlassBlur(), JPEGCompression()], severities=[1, 5], images=24))
