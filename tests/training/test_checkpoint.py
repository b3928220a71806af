import math
import os

import pytest
import torch

from bolza.core.errors import CheckpointError
from bolza.training import load_tree, save_tree


def test_a_tree_comes_back_with_its_types_and_every_bit(tmp_path):
    tree = {
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "empty": torch.zeros(0, 2),
        "view": torch.randn(4, 4).t(),
        0: [1, 2.0, None, True, "é"],
        "nested": {(1): (math.inf, 0.1 + 0.2)},
    }
    save_tree(tree, tmp_path / "a")
    back = load_tree(tmp_path / "a")
    assert list(back) == list(tree) and back[0] == tree[0] and back["nested"] == tree["nested"]
    for name in ("half", "scalar", "empty", "view"):
        assert back[name].dtype == tree[name].dtype and torch.equal(back[name], tree[name])


def test_two_names_of_one_tensor_are_both_stored(tmp_path):
    w = torch.randn(3)
    save_tree({"a": w, "b": w}, tmp_path / "a")
    assert torch.equal(load_tree(tmp_path / "a")["b"], w)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_tree({"step": 1}, tmp_path / "a")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        save_tree({"step": 2}, tmp_path / "a")
    assert load_tree(tmp_path / "a") == {"step": 1} and os.listdir(tmp_path) == ["a"]


def test_what_needs_pickle_is_refused_by_its_place(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"state\.0 is a function, which cannot be stored without pickle"
    ):
        save_tree({"state": [len.__call__ and (lambda: 0)]}, tmp_path / "a")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not a checkpoint", lambda b: b""])
def test_a_damaged_file_is_called_so(damage, tmp_path):
    save_tree({"w": torch.randn(100)}, tmp_path / "a")
    (tmp_path / "a").write_bytes(damage((tmp_path / "a").read_bytes()))
    with pytest.raises(CheckpointError, match="damaged"):
        load_tree(tmp_path / "a")


def test_tensors_of_another_program_are_no_checkpoint(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="no checkpoint of this library"):
        load_tree(tmp_path / "a")


def test_one_wrong_bit_in_a_weight_is_noticed(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64)
    state = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds}
    save_tree({**state, "scalar": torch.tensor(1.0), "empty": torch.zeros(0)}, tmp_path / "a")
    assert load_tree(tmp_path / "a")["torch.bfloat16"].dtype == torch.bfloat16
    content = bytearray((tmp_path / "a").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged .its checksum does not match.: delete it"):
        load_tree(tmp_path / "a")
