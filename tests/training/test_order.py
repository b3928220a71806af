import pytest
import torch

from bolza.training import BatchOrder

X = torch.arange(10)


def draws(order, n):
    return [order.next()[0].tolist() for _ in range(n)]


def test_an_epoch_visits_no_sample_twice_and_epochs_differ():
    order = BatchOrder(X, X, 3, seed=0)
    first, second = draws(order, 3), draws(order, 3)
    assert len({i for batch in first for i in batch}) == 9 and first != second


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6])
def test_the_order_goes_on_from_its_state(stop):
    whole, part, rest = (BatchOrder(X, X, 3, seed=s) for s in (0, 0, 1))
    expected = draws(whole, 10)
    assert draws(part, stop) == expected[:stop]
    rest.load_state_dict(part.state_dict())
    assert draws(rest, 10 - stop) == expected[stop:]
