"""Batches for what a controller measures: the place is all there is to remember."""

import pytest
import torch

from bolza.controllers.rounds import Rounds
from bolza.core.errors import DataError
from bolza.data import digits


@pytest.mark.parametrize("kind", ["list", "loader", "data set"])
def test_reading_goes_on_from_a_place_that_is_set(kind):
    pairs = [(torch.full((2, 1), float(i)), torch.zeros(2)) for i in range(3)]

    def made():
        source = {"list": pairs, "data set": digits()}.get(kind)
        return Rounds(
            torch.utils.data.DataLoader(pairs, batch_size=None) if source is None else source, seed=1
        )

    rounds, like = made(), torch.zeros(1)
    found = [rounds.next(like)[0].sum() for _ in range(100)]
    later = made()
    for place in (70, 2, 99):
        later.read = place
        assert later.next(like)[0].sum() == found[place]


def test_nothing_to_read_is_told():
    empty = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(0, 1), torch.zeros(0)))
    with pytest.raises(DataError, match="no batches"):
        Rounds(empty, seed=0).next(torch.zeros(1))
