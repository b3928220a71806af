import math

import pytest

from bolza.core import History


def filled(steps, history=None):
    history = history or History()
    for step in steps:
        if history.wants(step):
            history.add(step, {"lr": 1 / step})
    return history


@pytest.mark.parametrize("length", [1, 999, 1000, 1001, 5000])
def test_a_record_is_even_bounded_and_true(length):
    history = filled(range(1, length + 1))
    stride = history.stride
    assert history.steps == list(range(stride, length + 1, stride)) and len(history.steps) <= 1000
    assert history.values["lr"] == [1 / step for step in history.steps]


@pytest.mark.parametrize("stop", [10, 1000, 1003, 2500])
def test_a_record_goes_on_from_its_state(stop):
    history = History()
    history.load_state_dict(filled(range(1, stop)).state_dict())
    assert filled(range(stop, 3000), history) == filled(range(1, 3000))


def test_a_reading_that_comes_late_or_leaves_is_nan_elsewhere_and_names_keep_their_order():
    history = History()
    history.add(1, {"b": 1.0, "a": 2.0})
    history.add(2, {"b": 1.0, "c": 3.0})
    assert list(history.values) == ["b", "a", "c"]
    assert math.isnan(history.values["a"][1]) and math.isnan(history.values["c"][0])
