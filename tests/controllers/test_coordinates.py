"""Rows of numbers about parameters: every entry once, whatever the shapes, strides and sizes."""

import torch

from bolza.controllers import coordinates
from bolza.controllers.coordinates import Coordinates


def test_pieces_read_and_write_every_entry_once(monkeypatch):
    monkeypatch.setattr(coordinates, "_CHUNK", 10)
    shapes = [(3,), (2, 2), (25,), (), (4, 6), (0,), (5,)]
    parameters = [torch.randn(shape) for shape in shapes]
    parameters[4] = parameters[4].t()  # strided, and larger than a piece
    parameters[6] = parameters[6].bfloat16()
    room = Coordinates([{"params": parameters[:5]}, {"params": parameters[5:]}], 2)
    before = [p.clone() for p in parameters]
    for piece in room.pieces(parameters):
        values = room.gather(piece, [p for p, *_ in piece.parts], room.scratch(piece, 1)[0])
        assert values.dtype == torch.float32
        assert len(values) == piece.stop - piece.start
        room.of(piece)[1].copy_(values)
        room.scatter(piece, values + 1)
    for p, old in zip(parameters, before, strict=True):
        torch.testing.assert_close(p, old + 1)
        torch.testing.assert_close(room.row(1, p).to(p.dtype), old)
