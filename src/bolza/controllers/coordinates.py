"""Room for numbers about every parameter, walked through in pieces that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, UnsupportedError

__all__ = ["Coordinates", "Piece"]

_CHUNK = 131072  # elements: a dozen such vectors stay near the processor, and few calls are made


@dataclass(frozen=True)
class Piece:
    """A stretch of the room: a part of one parameter, or several small ones.

    Attributes:
        room: which of the rooms, one a device and dtype.
        start, stop: where in the room.
        parts: (parameter, its index, start, stop) of each, one after the other.
        group: index of the parameter group.
    """

    room: int
    start: int
    stop: int
    parts: tuple[tuple[Tensor, int, int, int], ...]
    group: int

    @property
    def whole(self) -> bool:
        """Whether it is (part of) one contiguous tensor, so that views of it do."""
        return len(self.parts) == 1 and self.parts[0][0].is_contiguous()


class Coordinates:
    """Rows of numbers, one a parameter entry, kept as one matrix a device and dtype.

    Half-precision parameters have float32 rows.

    Args:
        groups: parameter groups of an optimizer.
        rows: number of rows.
        split: whether small parameters share pieces; otherwise each piece belongs to one parameter.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], rows: int, *, merge: bool = True) -> None:
        self.merge = merge
        self.index: dict[Tensor, int] = {}
        self.place: list[tuple[int, int, int]] = []  # room, start, group of each parameter
        kinds: list[tuple[torch.device, torch.dtype]] = []
        sizes: list[int] = []
        for group, entry in enumerate(groups):
            for p in entry["params"]:
                if not p.is_floating_point():
                    raise UnsupportedError(
                        f"a parameter of shape {tuple(p.shape)} is {p.dtype}: only real parameters can be controlled"
                    )
                kind = (p.device, p.dtype if p.dtype == torch.float64 else torch.float32)
                if kind not in kinds:
                    kinds.append(kind)
                    sizes.append(0)
                room = kinds.index(kind)
                self.index[p] = len(self.place)
                self.place.append((room, sizes[room], group))
                sizes[room] += p.numel()
        self.rows = [
            torch.zeros(rows, size, device=device, dtype=dtype)
            for (device, dtype), size in zip(kinds, sizes, strict=True)
        ]
        self.counts = [0] * len(self.place)  # observations of each parameter
        self._pieces: tuple[list[int], list[Piece]] | None = None
        self._scratch: dict[int, Tensor] = {}
        self._views: dict[tuple[int, int, int], tuple[Tensor, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """All but views and pieces: a copy makes them of its own rows."""
        return vars(self) | {"_pieces": None, "_scratch": {}, "_views": {}}

    def pieces(self, moving: Sequence[Tensor]) -> list[Piece]:
        """Pieces that cover some of the parameters, each of parameters that were observed equally often."""
        try:
            wanted = [self.index[p] for p in moving]
        except KeyError:
            raise ArgumentError(
                "the optimizer was given parameters after the controller was made: make the controller after "
                "add_param_group"
            ) from None
        if self._pieces is None or self._pieces[0] != wanted:
            self._pieces = (wanted, list(self._cut(moving, wanted)))
            self._views.clear()
        return self._pieces[1]

    def _cut(self, moving: Sequence[Tensor], wanted: Sequence[int]) -> Iterator[Piece]:
        parts: list[tuple[Tensor, int, int, int]] = []
        first = size = 0
        for p, i in zip(moving, wanted, strict=True):
            room, start, group = self.place[i]
            chunk = _CHUNK if p.device.type == "cpu" else p.numel()
            if parts:
                was = self.place[parts[0][1]]
                fits = self.merge and size + p.numel() <= chunk and was[0] == room and was[2] == group
                if not fits or first + size != start or self.counts[i] != self.counts[parts[0][1]]:
                    yield Piece(was[0], first, first + size, tuple(parts), was[2])
                    parts, size = [], 0
            if p.numel() > chunk and p.is_contiguous():
                for a in range(0, p.numel(), chunk):
                    b = min(a + chunk, p.numel())
                    yield Piece(room, start + a, start + b, ((p, i, a, b),), group)
                continue
            first = first if parts else start
            parts.append((p, i, 0, p.numel()))
            size += p.numel()
        if parts:
            was = self.place[parts[0][1]]
            yield Piece(was[0], first, first + size, tuple(parts), was[2])

    def of(self, piece: Piece) -> tuple[Tensor, ...]:
        """Rows of a piece, as views."""
        where = piece.room, piece.start, piece.stop
        if where not in self._views:
            self._views[where] = self.rows[piece.room][:, piece.start : piece.stop].unbind(0)
        return self._views[where]

    def row(self, number: int, p: Tensor) -> Tensor:
        """One row of a parameter, in its shape, as a view."""
        room, start, _ = self.place[self.index[p]]
        return self.rows[room][number, start : start + p.numel()].view(p.shape)

    def scratch(self, piece: Piece, count: int) -> tuple[Tensor, ...]:
        """Some vectors of a piece's length to write on."""
        held, size = self._scratch.get(piece.room), piece.stop - piece.start
        if held is None or held.shape[0] < count or held.shape[1] < size:
            width = max(size, 0 if held is None else held.shape[1])
            held = self.rows[piece.room].new_empty(count, width)
            self._scratch[piece.room] = held
        return held[:count, :size].unbind(0)

    def gather(self, piece: Piece, tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """The piece's entries of tensors that lie like its parameters: a view where it is one, else ``out`` filled.

        Args:
            piece: which.
            tensors: one a part of the piece.
            out: a vector to write on; a new one by default.
        """
        dtype = self.rows[piece.room].dtype
        if piece.whole and tensors[0].is_contiguous() and tensors[0].dtype == dtype:
            _, _, a, b = piece.parts[0]
            flat = tensors[0].view(-1)
            return flat if b - a == len(flat) else flat[a:b]
        flats = [t.reshape(-1) if t.dtype == dtype else t.reshape(-1).to(dtype) for t in tensors]
        if len(flats) == 1:
            _, _, a, b = piece.parts[0]
            flats[0] = flats[0][a:b]
        return torch.cat(flats, out=out) if out is not None else torch.cat(flats)

    def scatter(self, piece: Piece, values: Tensor) -> None:
        """Write entries of the piece back to its parameters; nothing to do for a view of them."""
        if piece.whole:
            p, _, a, b = piece.parts[0]
            flat = p.detach().view(-1)[a:b]
            if flat.data_ptr() != values.data_ptr():
                flat.copy_(values)
            return
        parts = values.split([b - a for _, _, a, b in piece.parts])
        whole = [part.view(p.shape) for part, (p, *_) in zip(parts, piece.parts, strict=True)]
        torch._foreach_copy_([p.detach() for p, *_ in piece.parts], whole)

    def saw(self, moving: Sequence[Tensor]) -> None:
        """Count an observation."""
        for p in moving:
            self.counts[self.index[p]] += 1
