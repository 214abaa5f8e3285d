"""The laws that every Method, Quantizer, Task and Probe obeys, for Galago's own and for yours.

Each `check_…` takes a function that makes the thing afresh, tries it on small stand-ins, and raises an `AssertionError`
that names the law broken. They need no test framework; in a test file two lines each are enough:

    def test_my_method_obeys_the_laws():
        check_method(lambda: MyMethod(weight=0.3))

A call takes a few seconds. The caller's random state is left as it was.
"""

from __future__ import annotations

from galago.laws.method import check_method as check_method
from galago.laws.probe import check_probe as check_probe
from galago.laws.quantizer import check_quantizer as check_quantizer
from galago.laws.task import check_task as check_task
from galago.laws.trial import TinyImages as TinyImages
from galago.laws.trial import classify as classify
from galago.laws.trial import tiny_network as tiny_network
