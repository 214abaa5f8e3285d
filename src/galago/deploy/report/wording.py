"""Numbers and names as people read them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from galago.deploy.report.predictions import Interval
from galago.deploy.report.reading import LayerNote, Record, text

ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}
FORMS = {"model": "trained model", "onnx": "ONNX file", "openvino": "OpenVINO file"}
MADE_BY = {"onnxruntime": "onnx", "openvino": "openvino", "torch": "model"}  # which form an engine runs
MISSING = "–"
ZOOS = ("create_model", "get_model", "timm_model", "torchvision_model")  # functions that make a network from its name
_UNIT = re.compile(r"(?<=\d) (?=(?:%|×|MB|kB|ms|dB|points|GB)(?!\w))")


def significant(value: float | None, digits: int = 3) -> str:
    """A number with this many digits that mean something, thousands apart, never as 1e+03.

    >>> significant(41.2345), significant(0.012345, 2), significant(123456.0), significant(None)
    ('41.2', '0.012', '123,456', '–')
    """
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(decimals, 0), 12)}f}".replace("-", "−")


def unbroken(said: str) -> str:
    """Keeps numbers and their units, and ranges, on one line.

    >>> unbroken("2.3 × faster, 91 % right") == "2.3\u00a0×\u00a0faster, 91\u00a0% right"
    True
    """
    joined = re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", re.sub(r"× (?=[a-z])", "×\u00a0", said))
    return _UNIT.sub("\u00a0", joined)


def percent(share: float | None, decimals: int = 1) -> str:
    """
    >>> percent(0.9123), percent(None)
    ('91.2 %', '–')
    """
    return MISSING if share is None else f"{100 * share:.{decimals}f} %"


def signed(value: float, decimals: int) -> str:
    """With its sign, and none for what rounds to zero.

    >>> signed(-0.52, 1), signed(0.04, 1), signed(3, 1)
    ('−0.5', '0.0', '+3.0')
    """
    said = f"{value:+.{decimals}f}"
    return said[1:] if not float(said) else said.replace("-", "−")


def between(interval: Interval, scale: float, decimals: int) -> str:
    """Where 95 % of the resampled differences lie, such as −1.0 to +0.2."""
    return f"{signed(interval.low * scale, decimals)} to {signed(interval.high * scale, decimals)}"


def megabytes(size: float | None) -> str:
    """
    >>> megabytes(0.1912), megabytes(0.0449), megabytes(44.7)
    ('0.19 MB', '45 kB', '45 MB')
    """
    if size is None:
        return MISSING
    return f"{significant(size, 2)} MB" if size >= 0.1 else f"{significant(size * 1000, 2)} kB"


def counted(count: float | None) -> str:
    """
    >>> counted(41_000_000), counted(272474), counted(2.6e9), counted(12)
    ('41.0 M', '272 k', '2.60 G', '12')
    """
    if count is None:
        return MISSING
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{significant(count / size)} {letter}"
    return significant(count) if count % 1 else str(int(count))


def milliseconds(time: float | None) -> str:
    """
    >>> milliseconds(1.534), milliseconds(0.08714)
    ('1.53 ms', '0.0871 ms')
    """
    return MISSING if time is None else f"{significant(time)} ms"


def times(ratio: float, more: str, less: str) -> str:
    """A ratio in words.

    >>> times(6.12, "smaller", "larger"), times(0.5, "faster", "slower"), times(1.004, "faster", "slower")
    ('6.1 × smaller', '2.0 × slower', 'unchanged')
    """
    if abs(ratio - 1) < 0.01:
        return "unchanged"
    digits = 3 if max(ratio, 1 / ratio) < 1.1 else 2
    return f"{significant(ratio, digits)} × {more}" if ratio > 1 else f"{significant(1 / ratio, digits)} × {less}"


def name_of(record: Record) -> str:
    """The network's name: the function or class it came from, or the name that a model zoo knows it by."""
    model = record.recipe.get("model")
    path = text(model.get("class_path")) if isinstance(model, dict) else text(model)
    given = model.get("init_args") if isinstance(model, dict) else None
    if path in ("timm.create_model", "torchvision.models.get_model") and isinstance(given, dict):
        return text(given.get("model_name") or given.get("name")) or path
    if path == "galago.run.load":  # it went on from another run: what that one's network was
        path = record.base
    return path.rpartition(".")[2] or record.folder.resolve().name


def width_of(layers: Sequence[LayerNote]) -> str:
    """The bits that most of the multiplications use."""
    shares: Counter[tuple[float | None, float | None]] = Counter()
    for layer in layers:
        shares[layer.weight_bits, layer.input_bits] += max(1, int(layer.macs or 1))
    if not shares:
        return ""
    (weight, activation), _ = shares.most_common(1)[0]
    if weight is None:
        return "float"
    if activation is None or activation == weight:
        return f"{weight:g}-bit" + (" weights" if activation is None else "")
    return f"{weight:g}-bit weights, {activation:g}-bit activations"


def reference(record: Record) -> str:
    """What another run is called beside this one."""
    return "float" if width_of(record.layers) in ("", "float") else width_of(record.layers)
