"""The trainability map: numbers, files, interrupts."""

import math
import signal
import threading

import pytest
import torch
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, CheckpointError
from bolza.data import Dataset, digits
from bolza.models import mlp
from bolza.training import BatchOrder, TrainabilityMap, ensemble_parameters, trainability_map
from bolza.training.checkpoint import load_tree, save_tree
from bolza.training.trainability import _Job

DATA = digits()
SMALL = {"width": 16, "steps": 12, "batch_size": 32, "lr": 0.1}


def same(a: TrainabilityMap, b: TrainabilityMap) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "diverged")
    )


def test_each_entry_is_the_accuracy_of_that_network_trained_alone():
    found = trainability_map(DATA, [1.0, 2.0], [3, 5], seeds=2, seed=7, **SMALL)
    assert found.train_accuracy.shape == (2, 2, 2)
    for s in range(2):
        for p, w in enumerate((1.0, 2.0)):
            for d, depth in enumerate((3, 5)):
                net = mlp(depth, 16)
                start = ensemble_parameters(
                    lambda depth=depth: mlp(depth, 16), [w], 0.05, seed=7 + 1000 * s + depth
                )
                net.load_state_dict({name: q[0] for name, q in start.items()})
                optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
                order = BatchOrder(DATA.train_x, DATA.train_y, 32, 7)
                for _ in range(12):
                    x, y = order.next()
                    optimizer.zero_grad()
                    F.cross_entropy(net(x), y).backward()
                    optimizer.step()
                with torch.no_grad():
                    for split, x, y in (
                        ("train", DATA.train_x, DATA.train_y),
                        ("test", DATA.test_x, DATA.test_y),
                    ):
                        out = net(x)
                        loss = getattr(found, f"{split}_loss")[s, p, d]
                        assert float(loss) == pytest.approx(float(F.cross_entropy(out, y)), rel=1e-4)
                        share = float((out.argmax(1) == y).double().mean())
                        # one sample at a tie may fall to either side
                        assert abs(float(getattr(found, f"{split}_accuracy")[s, p, d]) - share) <= 1.5 / len(
                            y
                        )


def test_stacks_threads_and_order_of_depths_do_not_change_the_map():
    whole = trainability_map(DATA, [1.0, 1.5, 2.0], [2, 4, 3], seeds=2, **SMALL)
    cut = trainability_map(DATA, [1.0, 1.5, 2.0], [2, 4, 3], seeds=2, chunk=1, **SMALL)
    threads = trainability_map(DATA, [1.0, 1.5, 2.0], [2, 4, 3], seeds=2, jobs=2, **SMALL)
    turned = trainability_map(DATA, [1.0, 1.5, 2.0], [4, 3, 2], seeds=2, **SMALL)
    assert torch.allclose(whole.train_loss, cut.train_loss, rtol=1e-4)
    assert same(whole, threads)
    assert torch.equal(whole.train_loss[..., [1, 2, 0]], turned.train_loss)


def test_a_folder_is_resumed_and_only_what_is_missing_is_trained(tmp_path):
    first = trainability_map(DATA, [1.0, 2.0], [2, 3], folder=tmp_path / "map", **SMALL)
    files = sorted(p.name for p in (tmp_path / "map").iterdir())
    assert files == ["depth-00002.safetensors", "depth-00003.safetensors"]
    stamp = (tmp_path / "map" / files[0]).stat().st_mtime_ns
    told = []
    again = trainability_map(
        DATA, [1.0, 2.0], [2, 3, 4], folder=tmp_path / "map", progress=lambda *a: told.append(a), **SMALL
    )
    assert (tmp_path / "map" / files[0]).stat().st_mtime_ns == stamp
    assert torch.equal(again.train_loss[..., :2], first.train_loss)
    assert told[0] == (12 * 2 * 2, 12 * 2 * 9) and told[-1][0] == told[-1][1]
    assert again.status == "finished"


def test_a_folder_of_another_map_is_refused_by_what_differs(tmp_path):
    trainability_map(DATA, [1.0], [2], folder=tmp_path, **SMALL)
    with pytest.raises(CheckpointError, match="differs in weight_vars"):
        trainability_map(DATA, [1.1], [2], folder=tmp_path, **SMALL)
    other = Dataset(DATA.train_x * 1.01, DATA.train_y, DATA.test_x, DATA.test_y)
    with pytest.raises(CheckpointError, match="data"):
        trainability_map(other, [1.0], [2], folder=tmp_path, **SMALL)


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_keeps_the_depths_that_are_done(tmp_path, jobs):
    main = threading.get_ident()
    struck = []

    def strike(done, total):
        # the deepest of the first depths to train, some way in
        if done > total // 2 and not struck:
            struck.append(done)
            if threading.get_ident() == main:
                signal.raise_signal(signal.SIGINT)
            else:
                signal.pthread_kill(main, signal.SIGINT)

    options = SMALL | {"steps": 60}
    found = trainability_map(
        DATA, [1.0, 2.0], [4, 3, 2], folder=tmp_path, jobs=jobs, progress=strike, **options
    )
    assert struck and found.status == "interrupted"
    done = [p.name for p in tmp_path.iterdir()]
    measured = found.train_accuracy[0, 0].isfinite()
    assert int(measured.sum()) == len(done) < 3
    whole = trainability_map(DATA, [1.0, 2.0], [4, 3, 2], folder=tmp_path, **options)
    assert whole.status == "finished"
    assert same(whole, trainability_map(DATA, [1.0, 2.0], [4, 3, 2], **options))


def test_an_error_in_a_thread_reaches_the_caller_and_threads_are_given_back():
    before = torch.get_num_threads()

    def broken(done, total):
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        trainability_map(DATA, [1.0], [2, 3], jobs=2, progress=broken, **SMALL)
    assert torch.get_num_threads() == before


def test_the_user_s_signal_handler_is_given_back():
    before = signal.getsignal(signal.SIGINT)
    trainability_map(DATA, [1.0], [2], **SMALL)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_divergent_point_is_marked_and_spares_the_others():
    found = trainability_map(DATA, [1.0, 1.0], [3], activation="relu", width=16, steps=12, lr=[0.1, 1e25])
    assert found.diverged[0, :, 0].tolist() == [False, True]
    assert math.isinf(float(found.train_loss[0, 1, 0])) and math.isfinite(float(found.train_loss[0, 0, 0]))


def test_regression_and_missing_test_data_are_taken():
    x = torch.randn(64, 3, dtype=torch.float64)
    data = Dataset(x, x.sum(1, keepdim=True), x[:0], x[:0, :1], "regression")
    found = trainability_map(data, [1.0], [2], width=8, steps=100, lr=0.1)
    assert float(found.train_loss[0, 0, 0]) < 0.5
    assert found.test_loss.isnan().all() and found.train_accuracy.isnan().all()


def test_the_largest_depth_is_where_the_accuracy_crosses_the_threshold():
    accuracy = torch.tensor([[[0.2, 0.4, 0.8], [0.9, 0.9, 0.9], [0.1, 0.1, 0.2]]], dtype=torch.float64)
    one = torch.ones(3, dtype=torch.float64)
    found = TrainabilityMap(one, one, (30, 20, 10), accuracy, *[accuracy] * 3, accuracy > 1)
    assert found.largest_depth(0.3)[0, 0] == pytest.approx(25)
    assert found.largest_depth(0.3)[0, 1:].isnan().all()  # beyond the grid, and below it
    assert found.depth_over(torch.tensor([5.0, 1.0, 1.0]))[0, 0] == pytest.approx(5)


def test_the_mean_comes_with_its_standard_error():
    accuracy = torch.tensor([[[0.2]], [[0.4]], [[0.6]]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    found = TrainabilityMap(one, one, (3,), accuracy, *[accuracy] * 3, accuracy > 1)
    mean, error = found.accuracy()
    assert float(mean) == pytest.approx(0.4) and float(error) == pytest.approx(0.2 / 3**0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_vars": []}, "weight_vars"),
        ({"weight_vars": [-1.0]}, "weight_vars"),
        ({"bias_vars": [0.1, 0.2, 0.3]}, "bias_vars holds 3 values for 2 points"),
        ({"depths": []}, "depths"),
        ({"depths": [2, 2]}, "twice"),
        ({"depths": [0]}, "at least 1"),
        ({"momentum": 1.0}, "momentum"),
        ({"steps": 0}, "steps"),
        ({"jobs": 0}, "jobs"),
        ({"lr": -0.1}, "lr"),
        ({"activation": "nothing"}, "activation"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(change, words):
    options = {"weight_vars": [1.0, 2.0], "depths": [2], **SMALL, **change}
    with pytest.raises(ArgumentError, match=words):
        trainability_map(DATA, **options)


def test_a_stack_stays_within_its_memory():
    job = _Job.of(DATA, [1.0], [100], 0.05, 100, "tanh", 0.1, 0.0, 64, 1, 1, 0, None)
    assert 3 <= job.stack(100) <= 8
    assert job.stack(10) > 40


def test_two_functions_of_one_name_are_told_apart_in_a_folder(tmp_path):
    kept = {"width": 4, "steps": 2, "folder": tmp_path}
    first = trainability_map(digits(), [1.0], [2], activation=lambda x: 2 * x, **kept)
    with pytest.raises(CheckpointError, match="differs in activation"):
        trainability_map(digits(), [1.0], [2], activation=lambda x: 3 * x, **kept)
    again = trainability_map(digits(), [1.0], [2], activation=lambda x: 2 * x, **kept)
    assert torch.equal(first.train_loss, again.train_loss)


def test_a_file_of_another_depth_or_without_results_is_refused(tmp_path):
    kept = {"width": 4, "steps": 2, "folder": tmp_path}
    trainability_map(digits(), [1.0], [3], **kept)
    path = tmp_path / "depth-00002.safetensors"
    (tmp_path / "depth-00003.safetensors").rename(path)
    with pytest.raises(CheckpointError, match="does not hold the results of depth 2"):
        trainability_map(digits(), [1.0], [2], **kept)
    save_tree({k: v for k, v in load_tree(path).items() if k != "result"} | {"depth": 2}, path)
    with pytest.raises(CheckpointError, match="does not hold the results of depth 2"):
        trainability_map(digits(), [1.0], [2], **kept)


def test_depths_may_be_a_tensor_and_one_number_is_refused():
    found = trainability_map(digits(), [1.0], torch.tensor([1, 2]), width=4, steps=1)
    assert found.depths == (1, 2)
    with pytest.raises(ArgumentError, match="depths=3 must be a list"):
        trainability_map(digits(), [1.0], 3, width=4, steps=1)
