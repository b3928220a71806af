import pytest
import torch

from bolza.core.errors import ArgumentError, DataError
from bolza.data import Dataset, batches, digits, hold_out


def make(x=None, y=None, task="classification", **options):
    x = torch.randn(6, 3) if x is None else x
    y = torch.tensor([0, 1, 2, 0, 1, 2]) if y is None else y
    return Dataset(x, y, x[:0], y[:0], task, **options)


def test_one_epoch_of_batches_visits_every_sample_once_and_repeats_from_its_seed():
    x = torch.arange(12.0)[:, None]
    data = make(x, torch.arange(12) % 3)
    first, second = (list(batches(data, 4, torch.Generator().manual_seed(1))) for _ in range(2))
    assert sorted(torch.cat([b[0] for b in first]).flatten().tolist()) == list(range(12))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert all(torch.equal((b[0].flatten() % 3).long(), b[1]) for b in first)  # inputs keep their targets


def test_a_batch_size_of_zero_is_refused_before_the_first_batch():
    with pytest.raises(ArgumentError, match="batch_size=0"):
        batches(make(), 0)


def test_a_stratified_split_keeps_the_share_of_each_class_and_loses_no_sample():
    labels = torch.tensor([0] * 50 + [1] * 10)
    train, test = hold_out(labels, 0.2)
    assert labels[test].bincount().tolist() == [10, 2]
    assert sorted(torch.cat([train, test]).tolist()) == list(range(60))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_not_finite_are_counted_and_located(value):
    x = torch.randn(6, 3)
    x[4, 1] = x[5, 2] = value
    with pytest.raises(DataError, match=r"train_x holds 2 value\(s\) not finite.* at index \(4, 1\)"):
        make(x)


def test_a_large_finite_value_is_not_mistaken_for_infinity():
    x = torch.full((6, 3), 3e38)  # the sum overflows, the values do not
    assert make(x).train_x is x


@pytest.mark.parametrize(("label", "place"), [(7, 3), (-1, 3)])
def test_labels_out_of_range_are_named_with_value_and_place(label, place):
    y = torch.tensor([0, 1, 2, label, 1, 2])
    with pytest.raises(DataError, match=f"train_y holds the label {label} at index {place}, outside 0 … 2"):
        make(y=y, num_classes=3)


def test_more_outputs_are_no_remedy_for_a_negative_label():
    with pytest.raises(DataError, match="the label -1 at index 0.*number the classes from 0$"):
        Dataset(torch.zeros(4, 1), torch.tensor([-1, 0, 1, 2]), torch.zeros(0, 1), torch.zeros(0).long())


def test_labels_beyond_the_outputs_of_the_model_are_refused():
    data = digits()
    data.check_outputs(torch.zeros(2, 10))
    with pytest.raises(DataError, match="label 9 .* number of outputs of the model is 9"):
        data.check_outputs(torch.zeros(2, 9))


def test_regression_outputs_must_have_the_shape_of_the_targets():
    data = make(y=torch.randn(6), task="regression")
    with pytest.raises(DataError, match=r"shape \(4, 1\) for targets of shape \(4,\)"):
        data.check_outputs(torch.zeros(4, 1), torch.zeros(4))


@pytest.mark.parametrize(
    ("x", "y", "task", "message"),
    [
        (
            torch.randn(5, 3),
            torch.zeros(6, dtype=torch.long),
            "classification",
            "5 samples but train_y holds 6",
        ),
        (torch.randn(1, 3), torch.zeros(1, dtype=torch.long), "classification", "holds 1 sample:"),
        (torch.randn(0, 3), torch.zeros(0, dtype=torch.long), "classification", "holds 0 samples"),
        (torch.randn(4, 3), torch.zeros(4), "classification", r"train_y is float32.*train_y.long\(\)"),
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.long), "regression", "train_y is int64"),
        (torch.randn(4, 3), torch.zeros(4, 2, dtype=torch.long), "classification", r"argmax\(-1\)"),
        ([1.0, 2.0], torch.zeros(2), "regression", "train_x is a list"),
    ],
)
def test_unusable_data_is_refused_with_its_reason(x, y, task, message):
    with pytest.raises(DataError, match=message):
        Dataset(x, y, torch.zeros(0, 3), y[:0], task)


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(ArgumentError, match="classification, regression, language"):
        make(task="clustering")


def test_conversion_leaves_labels_alone():
    moved = digits().to(dtype=torch.float64)
    assert moved.train_x.dtype == torch.float64 and moved.train_y.dtype == torch.int64
