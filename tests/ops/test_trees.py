from collections import OrderedDict

import pytest
import torch
from torch.testing import assert_close

from bolza.ops.trees import (
    float_leaves,
    is_differentiable,
    tree_add,
    tree_detach,
    tree_dot,
    tree_map,
    tree_norm,
    tree_scale,
    tree_to_vector,
    tree_zeros_like,
    vector_to_tree,
    with_float_leaves,
)

F64 = torch.float64


def example():
    """A tree with everything that a state may carry."""
    return {
        "a": torch.tensor([1.0, 2.0], dtype=F64),
        "rest": (torch.tensor([[3.0], [4.0]], dtype=F64), torch.tensor([7]), [None, "name", 5]),
        "mask": torch.tensor([True]),
    }


@pytest.mark.parametrize(
    ("leaf", "answer"),
    [
        (torch.zeros(1), True),
        (torch.zeros(1, dtype=torch.complex64), True),
        (torch.zeros(1, dtype=torch.bfloat16), True),
        (torch.zeros(1, dtype=torch.long), False),
        (torch.zeros(1, dtype=torch.bool), False),
        (1.0, False),
        (None, False),
    ],
)
def test_only_floating_and_complex_tensors_have_derivatives(leaf, answer):
    assert is_differentiable(leaf) is answer


def test_arithmetic_leaves_other_leaves_as_they_are():
    x = example()
    for y in (tree_map(lambda a: 2 * a, x), tree_scale(2.0, x), tree_add(x, x)):
        assert torch.equal(y["a"], 2 * x["a"]) and torch.equal(y["rest"][0], 2 * x["rest"][0])
        assert y["rest"][1] is x["rest"][1] and y["rest"][2] == [None, "name", 5] and y["mask"] is x["mask"]


def test_addition_scales_the_second_tree_and_takes_none_for_zero():
    x = example()
    y = with_float_leaves(x, [torch.ones(2, dtype=F64), None], other=None)
    total = tree_add(x, y, alpha=-0.5)
    assert torch.equal(total["a"], x["a"] - 0.5) and torch.equal(total["rest"][0], x["rest"][0])
    assert torch.equal(tree_add(x, x, alpha=torch.tensor(2.0, dtype=F64))["a"], 3 * x["a"])


def test_the_inner_product_is_that_of_the_flat_vectors():
    x = example()
    y = tree_map(lambda a: a.cos(), x)
    assert_close(tree_dot(x, y), tree_to_vector(x) @ tree_to_vector(y))
    assert_close(tree_norm(x), tree_to_vector(x).norm())
    partial = with_float_leaves(x, [None, torch.ones(2, 1, dtype=F64)], other=None)
    assert float(tree_dot(x, partial)) == 7 == float(tree_dot(partial, x))


def test_the_inner_product_of_complex_leaves_is_real():
    z = torch.tensor([1.0 + 2.0j, 3.0j])
    assert float(tree_norm(z)) == pytest.approx(14**0.5)
    assert tree_dot(z, 1j * z).dtype == torch.float32 and float(tree_dot(z, 1j * z)) == 0


def test_there_must_be_something_to_multiply():
    with pytest.raises(ValueError, match="nothing to multiply"):
        tree_dot({"n": 3}, {"n": 3})
    with pytest.raises(ValueError, match="1 and 2 leaves"):
        tree_dot(torch.ones(1), (torch.ones(1), torch.ones(1)))


def test_a_vector_goes_back_into_its_tree():
    x = example()
    vector = tree_to_vector(x)
    assert vector.tolist() == [1, 2, 3, 4]
    back = vector_to_tree(10 * vector, x)
    assert torch.equal(back["rest"][0], 10 * x["rest"][0]) and back["rest"][1] is x["rest"][1]
    with pytest.raises(ValueError, match="the vector has 3 entries, the tree 4"):
        vector_to_tree(vector[:3], x)


def test_leaves_come_out_and_go_back_in_one_order():
    x = example()
    filled = with_float_leaves(x, ["first", "second"])
    assert filled["a"] == "first" and filled["rest"][0] == "second" and filled["mask"] is x["mask"]
    assert [leaf.numel() for leaf in float_leaves(x)] == [2, 2]
    assert float_leaves(with_float_leaves(x, [1, 2], other=None)) == []


def test_containers_keep_their_type():
    x = OrderedDict(b=torch.ones(1), a=[torch.ones(2)])
    y = tree_zeros_like(x)
    assert type(y) is OrderedDict and list(y) == ["b", "a"] and y["a"][0].tolist() == [0, 0]


def test_detaching_cuts_the_graph_and_keeps_the_values():
    x = torch.ones(2, requires_grad=True)
    y = tree_detach({"y": x * 2})["y"]
    assert not y.requires_grad and y.tolist() == [2, 2]
