import sys
import types
from itertools import repeat

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bolza.core.errors import ArgumentError, DataError, UserCodeError
from bolza.data import digits, load

X, Y = torch.randn(20, 3), torch.arange(20) % 4


def same_samples(data):
    x = torch.cat([data.train_x, data.test_x])
    return torch.equal(x.sort(0).values, X.sort(0).values)


@pytest.mark.parametrize(
    "source",
    [
        (X, Y),
        [(X[:10], Y[:10]), (X[10:], Y[10:])],
        DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True),
        TensorDataset(X, Y),
        lambda: (X, Y),
        ((b[0], b[1]) for b in zip(X.split(5), Y.split(5), strict=True)),
        (X.numpy(), Y.numpy()),
    ],
    ids=["pair", "batches", "loader", "samples", "function", "generator", "numpy"],
)
def test_every_way_to_give_the_same_samples_gives_the_same_data(source):
    data = load(source)
    assert same_samples(data) and data.task == "classification" and data.num_classes == 4
    assert len(data.test_x) == 4 and data.test_y.sort().values.tolist() == [0, 1, 2, 3]


def test_a_tuple_of_two_pairs_is_training_and_test():
    data = load(((X[:15], Y[:15]), (X[15:], Y[15:])))
    assert torch.equal(data.test_x, X[15:])


def test_a_tuple_of_two_loaders_is_training_and_test():
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    data = load((loader, loader))
    assert torch.equal(data.train_x, X) and torch.equal(data.test_y, Y)


@pytest.mark.parametrize(
    ("targets", "task"),
    [(torch.randn(20, 1), "regression"), (torch.randn(20, 3), "regression"), (Y, "classification")],
)
def test_the_samples_of_a_torch_dataset_keep_their_shape(targets, task):
    """One sample of a regression is a pair of vectors, and must not be read as a batch."""
    data = load(TensorDataset(X[:, None], targets), test_fraction=0.0)
    assert data.task == task
    assert torch.equal(data.train_x, X[:, None]) and torch.equal(data.train_y, targets)


def test_lists_of_numbers_are_inputs_and_targets_not_two_parts():
    data = load(([[1.0, 2.0], [3.0, 4.0]], [0, 1]))
    assert data.train_x.tolist() == [[1.0, 2.0], [3.0, 4.0]] and data.train_y.tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "uint16", ">i4"])
def test_labels_of_any_integer_type_become_those_that_losses_take(kind):
    data = load((X, Y.numpy().astype(kind)))
    assert data.train_y.dtype == data.test_y.dtype == torch.int64
    assert torch.equal(data.train_y.bincount() + data.test_y.bincount(), Y.bincount())


def test_truth_values_are_two_classes():
    data = load((X, Y > 0))
    assert data.task == "classification" and data.num_classes == 2


def test_targets_say_which_task_it_is():
    assert load((X, torch.randn(20, 2))).task == "regression"
    assert load((torch.arange(20).view(4, 5), torch.arange(20).view(4, 5))).task == "language"


def test_dtype_of_the_source_is_kept():
    assert load((np.zeros((9, 2)), np.arange(9) % 2)).train_x.dtype == torch.float64


def test_a_name_finds_a_built_in_set_or_an_object_of_a_module(monkeypatch):
    module = types.ModuleType("users_data")
    module.loader = lambda: (X, Y)
    monkeypatch.setitem(sys.modules, "users_data", module)
    assert load("digits").name == "digits" and same_samples(load("users_data:loader"))
    data = digits()
    assert load(data) is data


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ArgumentError, match="'cifar' is not known: choose one of digits"):
        load("cifar")
    with pytest.raises(ArgumentError, match="cannot be imported"):
        load("no_such_package:loader")


def test_a_loader_that_raises_is_named_and_its_cause_kept():
    def broken():
        raise RuntimeError("disk on fire")

    with pytest.raises(UserCodeError, match="broken raised RuntimeError: disk on fire") as info:
        load(broken)
    assert isinstance(info.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "gave no batch"),
        (DataLoader(TensorDataset(X[:0], Y[:0])), "gave no batch"),
        ((X, Y[:5]), "20 samples but train_y holds 5"),
        ((X[:1], Y[:1]), "holds 1 sample"),
        ([X, X, X], "batch 0 of the data is a Tensor, not a pair"),
        ([(X, Y, Y)], "a tuple of 3 entries, not a pair"),
        ({"x": X}, "is a dict"),
        (3, "is a int"),
        ([(X, Y), (X[:, :2], Y)], r"batch 1 of the data has inputs of shape \(2,\) a sample"),
        ([(X, Y[:4])], "20 inputs and 4 targets"),
        ((X, torch.tensor(3)), r"train_y is a tensor of shape \(\)"),
        ((X.to_sparse(), Y), r"train_x is sparse: convert it with train_x.to_dense\(\)"),
        ((np.array(["a", "b"] * 10), Y), "an array of <U1 does not convert to a tensor"),
        ([([[1.0, 2.0], [3.0]], [0, 1])], "a list does not convert to a tensor"),
        ((np.array([None] * 20), Y), "an array of object does not convert"),
        ((X, Y * 0), "every label of train_y is 0: with one class"),
        ((X, Y + 10**9), "number the classes from 0 with y = torch.unique"),
    ],
)
def test_unusable_sources_are_refused_with_their_reason(source, message):
    with pytest.raises(DataError, match=message):
        load(source)


def test_float_labels_of_a_classification_are_refused_with_the_remedy():
    with pytest.raises(DataError, match=r"train_y.long\(\)"):
        load((X, Y.float()), task="classification")


def test_an_endless_loader_is_noticed():
    with pytest.raises(DataError, match="more than 50 batches"):
        load(repeat((X, Y)), max_batches=50)
