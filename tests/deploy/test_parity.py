"""Parity: the exported net held to torch, with numbers and with sentences."""

from __future__ import annotations

import numpy as np
import pytest

from edgecl.deploy.parity import prove_parity
from edgecl.errors import ParityError
from edgecl.target import Tolerance

FORM = {"name": "input", "shape": [1, 3, 4, 4], "dtype": "float32", "dynamic_batch": True, "max_batch": 4}
STATIC = {**FORM, "shape": [4, 3, 4, 4], "dynamic_batch": False}
IMAGES = np.random.default_rng(0).normal(size=(10, 3, 4, 4)).astype(np.float32)


def torch_would_say(images):
    return images.reshape(len(images), -1)[:, :6].copy()


class Runner:
    """A net whose every output is off by so much."""

    def __init__(self, change=lambda outputs: outputs):
        self.change = change
        self.batches = []

    def run(self, images):
        self.batches.append(len(images))
        return self.change(torch_would_say(images))


def prove(runner, *, form=FORM, tolerance=None):
    return prove_parity(
        runner, IMAGES, torch_would_say(IMAGES), form=form, tolerance=tolerance or Tolerance()
    )


def test_equal_outputs_differ_by_nothing():
    assert prove(Runner()) == {
        "images": 10,
        "max_abs_difference": 0,
        "mean_abs_difference": 0,
        "max_relative_difference": 0,
        "top1_agreement": 1,
    }


def test_differences_are_counted_as_they_are():
    found = prove(Runner(lambda outputs: outputs + 0.001), tolerance=Tolerance(max_relative_difference=0.1))
    assert found["max_abs_difference"] == pytest.approx(0.001, rel=1e-3)
    assert found["mean_abs_difference"] == pytest.approx(0.001, rel=1e-3)
    assert found["max_relative_difference"] == pytest.approx(
        0.001 / np.abs(torch_would_say(IMAGES)).max(), rel=1e-3
    )


def test_difference_above_the_tolerance_is_an_error_with_both_numbers():
    with pytest.raises(ParityError) as caught:
        prove(Runner(lambda outputs: outputs * 1.01))
    assert caught.value.problem == (
        "the exported net disagrees with torch on 10 images: "
        "the largest relative difference is 0.01, allowed 0.001"
    )
    assert caught.value.hint.startswith("no bundle was written; ")


def test_disagreement_on_the_largest_output_is_an_error_of_its_own():
    def swap(outputs):
        outputs[:2] = np.roll(outputs[:2], 1, axis=1)
        return outputs

    with pytest.raises(ParityError, match=r"the largest output agrees on \d+\.0%, required 99\.0%"):
        prove(Runner(swap), tolerance=Tolerance(max_relative_difference=100))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_output_that_is_no_number_is_an_error(bad):
    def spoil(outputs):
        outputs[0, 0] = bad
        return outputs

    with pytest.raises(ParityError, match="disagrees with torch"):
        prove(Runner(spoil), tolerance=Tolerance(max_relative_difference=1e9, top1_agreement=0))


def test_another_shape_is_an_error_with_both():
    with pytest.raises(ParityError, match=r"gives outputs \(10, 5\), torch \(10, 6\)"):
        prove(Runner(lambda outputs: outputs[:, :5]))


def test_dynamic_batches_stay_within_the_limit():
    runner = Runner()
    prove(runner)
    assert runner.batches == [4, 4, 2]


def test_static_batches_are_filled_up_and_the_filling_is_not_compared():
    runner = Runner()
    assert prove(runner, form=STATIC)["images"] == 10
    assert runner.batches == [4, 4, 4]
