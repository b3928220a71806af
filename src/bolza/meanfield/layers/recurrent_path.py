r"""A wide recurrent layer over its actual steps, with weights that are the same at every step.

With tied weights the pre-activations of all steps and samples are jointly Gaussian over the units,

    Cov(e_t^a, e_s^b) = σ_w² E h_{t-1}^a h_{s-1}^b + σ_v² K_x[(t,a),(s,b)] + σ_b²,

and so are the parts W^T δ of the gradient. For a plain layer h = φ(e) both are closed recursions of kernels
(`PlainPath`). Where gates multiply values that depend on each other, ``units`` virtual units are drawn from
that Gaussian step by step, with exactly its covariance, and run through the cell itself (`GatedPath`): only
moments of higher order carry sampling error, about 1/√units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.meanfield.activations import Activation

__all__ = ["Cell", "Gate", "GatedPath", "PlainPath", "cell_of"]

UNITS = 4096
_TOLERANCE = 3e-5  # of two-point moments, relative


@dataclass(frozen=True)
class Gate:
    """One pre-activation of a cell.

    Args:
        recurrent: σ_w², width times the mean square of the recurrent weights.
        into: σ_v², inputs times the mean square of the input weights.
        bias: variance of the biases over the units.
        mean: their mean.
    """

    recurrent: float
    into: float
    bias: float = 0.0
    mean: float = 0.0


@dataclass(frozen=True)
class Cell:
    """A cell: its pre-activations, and what each unit makes of them.

    Args:
        gates: the pre-activations.
        advance: from the pre-activations and the unit's own memory s to the new (s, h), elementwise.
    """

    gates: tuple[Gate, ...]
    advance: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]


def _gru(e: Sequence[Tensor], s: Tensor) -> tuple[Tensor, Tensor]:
    r, z, x, a = e
    z = torch.sigmoid(z)
    h = (1 - z) * torch.tanh(x + torch.sigmoid(r) * a) + z * s
    return h, h


def _lstm(e: Sequence[Tensor], s: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = e
    c = torch.sigmoid(f) * s + torch.sigmoid(i) * torch.tanh(g)
    return c, torch.sigmoid(o) * torch.tanh(c)


def _minimal(e: Sequence[Tensor], s: Tensor) -> tuple[Tensor, Tensor]:
    u = torch.sigmoid(e[0])
    h = u * s + (1 - u) * e[1]
    return h, h


def cell_of(kind: str, gates: Sequence[Gate], activation: Activation | None = None) -> Cell:
    """The cell of a kind.

    Args:
        kind: ``"gru"`` (gates r, z, and the two parts x, a of n = tanh(x + r a)), ``"lstm"`` (i, f, g, o),
            ``"minimal"`` (u and the embedded input) or ``"rnn"``.
        gates: its pre-activations, in that order.
        activation: of ``"rnn"``.
    """
    if kind == "rnn":
        assert activation is not None
        phi = _differentiable(activation)
        return Cell(tuple(gates), lambda e, s: (s, phi(e[0])))
    return Cell(tuple(gates), {"gru": _gru, "lstm": _lstm, "minimal": _minimal}[kind])


def _differentiable(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The activation as a function that autograd differentiates by the activation's own derivative."""

    def phi(e: Tensor) -> Tensor:
        value, slope = activation.phi(e.detach()), activation.derivative(e.detach())
        return value + slope * (e - e.detach())

    return phi


# ------------------------------------------------------------------------------- plain layers


class PlainPath:
    r"""h_t = φ(e_t) over the steps, in closed form.

    Args:
        gate: variances of the layer's weights and biases.
        activation: φ.
        x: kernel of the input, ``(T, B, T, B)``.
        start: kernel of the first state, ``(B, B)``; zero by default.
    """

    def __init__(self, gate: Gate, activation: Activation, x: Tensor, start: Tensor | None = None) -> None:
        self.gate, self.act = gate, activation
        steps, batch = x.shape[:2]
        self.steps, self.batch = steps, batch
        self.e = gate.into * x + gate.bias + gate.mean**2
        self.h = torch.zeros_like(x)
        if start is not None:
            self.e[0, :, 0] += gate.recurrent * start
        for t in range(steps):
            if t:
                self.e[t, :, 1 : t + 1] += gate.recurrent * self.h[t - 1, :, :t]
                self.e[1 : t + 1, :, t] = self.e[t, :, 1 : t + 1].permute(1, 2, 0)
            rows = self._moments(t)
            self.h[t, :, : t + 1] = rows
            self.h[: t + 1, :, t] = rows.permute(1, 2, 0)

    def _pairs(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Variances and correlations of step t with the steps before: (B, 1, 1), (t+1, B), (B, t+1, B)."""
        q = self.e.reshape(self.steps * self.batch, -1).diagonal().reshape(self.steps, -1).clamp_min(0)
        q_t, q_s = q[t, :, None, None], q[: t + 1]
        scale = (q_t * q_s).sqrt()
        c = torch.where(scale > 0, self.e[t, :, : t + 1] / scale, 0.0).clamp(-1, 1)
        return q_t, q_s, c

    def _moments(self, t: int) -> Tensor:
        q_t, q_s, c = self._pairs(t)
        rows = self.act.cross(q_t.expand_as(c), q_s.expand_as(c), c, tol=_TOLERANCE)
        own = rows[:, t]
        own = (own + own.T) / 2
        own.diagonal().copy_(self.act.second(q_t.reshape(-1)))
        rows[:, t] = own
        return rows

    @property
    def mean(self) -> Tensor:
        """E h, ``(T, B)``."""
        q = self.e.reshape(self.steps * self.batch, -1).diagonal().reshape(self.steps, -1).clamp_min(0)
        return self.act.mean(q)

    def backward(self, g: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gradient kernels at the input, per unit of this layer, and at the first state.

        Args:
            g: kernel of the gradient at the states, ``(T, B, T, B)``.
            memory: unused; a plain layer has no memory of its own.
        """
        delta = torch.zeros_like(g)
        for t in range(self.steps - 1, -1, -1):
            q_t, q_s, c = self._pairs(t)
            slopes = self.act.cross_slope(q_t.expand_as(c), q_s.expand_as(c), c, tol=_TOLERANCE)
            slopes[:, t].diagonal().copy_(self.act.slope(q_t.reshape(-1)))
            total = g[t, :, : t + 1].clone()
            if t < self.steps - 1:  # W^T δ of the next steps, the same W at each
                total += self.gate.recurrent * delta[t + 1, :, 1 : t + 2]
            rows = slopes * total
            delta[t, :, : t + 1] = rows
            delta[: t + 1, :, t] = rows.permute(1, 2, 0)
        return self.gate.into * delta, self.gate.recurrent * delta[0, :, 0]


# ------------------------------------------------------------------------------- gated layers


class _Noise:
    """Rows of white noise over the units, orthogonal to all rows before, in mirrored pairs."""

    def __init__(self, units: int, seed: int) -> None:
        self.units = units
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = torch.zeros(0, units // 2, dtype=torch.float64)

    def take(self, count: int) -> Tensor:
        half = self.units // 2
        new = torch.randn(count, half, generator=self.generator, dtype=torch.float64)
        if len(self.rows) + count <= half // 4:
            new = new - (new @ self.rows.T / half) @ self.rows
            factor = torch.linalg.cholesky(new @ new.T / half)
            new = torch.linalg.solve_triangular(factor, new, upper=False)
            self.rows = torch.cat([self.rows, new])
        return torch.cat([new, -new], -1)


class _Process:
    """Gaussian rows over the units whose covariance is told block by block."""

    def __init__(self, units: int) -> None:
        self.factor = torch.zeros(0, 0, dtype=torch.float64)
        self.white = torch.zeros(0, units, dtype=torch.float64)

    def extend(self, cross: Tensor, own: Tensor, white: Tensor) -> Tensor:
        """New rows with covariance ``own`` among themselves and ``cross`` with the rows before."""
        n, b = len(self.factor), len(own)
        a = torch.linalg.solve_triangular(self.factor, cross.T, upper=False).T if n else cross
        d = _cholesky(own - a @ a.T, float(own.diagonal().max()))
        grown = torch.zeros(n + b, n + b, dtype=torch.float64)
        grown[:n, :n], grown[n:, :n], grown[n:, n:] = self.factor, a, d
        rows = a @ self.white + d @ white
        self.factor, self.white = grown, torch.cat([self.white, white])
        return rows


def _cholesky(matrix: Tensor, scale: float) -> Tensor:
    """Triangular root of a positive semi-definite matrix up to rounding."""
    eye = torch.eye(len(matrix), dtype=torch.float64)
    if scale <= 0:
        return 1e-150 * eye
    matrix = (matrix + matrix.T) / (2 * scale)
    for jitter in (1e-12, 1e-10, 1e-8, 1e-6):
        root, failed = torch.linalg.cholesky_ex(matrix + jitter * eye)
        if not bool(failed):
            return torch.as_tensor(root * scale**0.5)
    values, vectors = torch.linalg.eigh(matrix)  # far from semi-definite: the nearest one that is
    near = (vectors * values.clamp_min(1e-6)) @ vectors.T
    return torch.as_tensor(torch.linalg.cholesky(near) * scale**0.5)


class GatedPath:
    """A cell over the steps, by virtual units.

    Args:
        cell: the cell.
        batch: number of samples.
        units: number of virtual units.
        seed: of their draws.

    Example:
        >>> path = GatedPath(cell_of("gru", [Gate(1.0, 1.0)] * 2 + [Gate(0.0, 1.0), Gate(1.0, 0.0)]), 1)
        >>> path.run(torch.ones(1, 1, 1, 1, dtype=torch.float64)).kernel.shape
        torch.Size([1, 1, 1, 1])
    """

    def __init__(self, cell: Cell, batch: int, units: int = UNITS, seed: int = 0) -> None:
        self.cell, self.batch, self.units = cell, batch, units
        self.noise = _Noise(units, seed)
        self.backward_seed = seed + 1
        self.processes = [_Process(units) for _ in cell.gates]
        self.e: list[list[Tensor]] = []  # of each step, of each gate, (B, units)
        self.s = [torch.zeros(batch, units, dtype=torch.float64)]
        self.h = [torch.zeros(batch, units, dtype=torch.float64)]

    def start(self, h: Tensor | None, s: Tensor | None = None) -> GatedPath:
        """Draw the first state with kernel ``h``, and the memory of an LSTM with kernel ``s``."""
        own_memory = self.cell.advance is _lstm
        if h is not None:
            self.h[0] = _cholesky(h, float(h.diagonal().max())) @ self.noise.take(self.batch)
            if not own_memory:
                self.s[0] = self.h[0]
        if s is not None and own_memory:
            self.s[0] = _cholesky(s, float(s.diagonal().max())) @ self.noise.take(self.batch)
        return self

    def step(self, x_own: Tensor, x_before: Tensor) -> None:
        """One step on.

        Args:
            x_own: kernel of this step's input, ``(B, B)``.
            x_before: with the inputs of all steps before, ``(B, t·B)``.
        """
        last = self.h[-1]
        own = last @ last.T / self.units
        before = torch.cat(self.h[:-1]) if len(self.h) > 1 else last[:0]
        cross = last @ before.T / self.units
        e = []
        for gate, process in zip(self.cell.gates, self.processes, strict=True):
            rows = process.extend(
                gate.recurrent * cross + gate.into * x_before + gate.bias,
                gate.recurrent * own + gate.into * x_own + gate.bias,
                self.noise.take(self.batch),
            )
            e.append(rows + gate.mean)
        s, h = self.cell.advance(e, self.s[-1])
        self.e.append(e)
        self.s.append(s)
        self.h.append(h)

    def run(self, x: Tensor) -> GatedPath:
        """All steps of an input with kernel ``(T, B, T, B)``."""
        for t in range(len(x)):
            self.step(x[t, :, t], x[t, :, :t].reshape(self.batch, -1))
        return self

    @property
    def kernel(self) -> Tensor:
        """E h h of all steps, ``(T, B, T, B)``."""
        h = torch.cat(self.h[1:])
        t = len(self.h) - 1
        return (h @ h.T / self.units).reshape(t, self.batch, t, self.batch)

    @property
    def mean(self) -> Tensor:
        """E h, ``(T, B)``."""
        return torch.stack(self.h[1:]).mean(-1)

    @property
    def memory(self) -> tuple[Tensor, Tensor]:
        """Kernel and mean of the last memory s."""
        return self.s[-1] @ self.s[-1].T / self.units, self.s[-1].mean(-1)

    def pull(self, t: int, h: Tensor, s: Tensor) -> list[Tensor]:
        """Gradients at the pre-activations of step t and at the memory before it, unit by unit."""
        with torch.enable_grad():
            leaves = [e.detach().clone().requires_grad_(True) for e in (*self.e[t], self.s[t])]
            s_new, h_new = self.cell.advance(leaves[:-1], leaves[-1])
            outs, seeds = ((h_new,), (h + s,)) if h_new is s_new else ((s_new, h_new), (s, h))
            live = [(o, g) for o, g in zip(outs, seeds, strict=True) if o.requires_grad]
            grads = torch.autograd.grad([o for o, _ in live], leaves, [g for _, g in live], allow_unused=True)
        return [torch.zeros_like(e) if g is None else g for e, g in zip(leaves, grads, strict=True)]

    def backward(self, g: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gradient kernels at the input, per unit of this layer, and at the first state.

        Args:
            g: kernel of the gradient at the states, ``(T, B, T, B)``.
            memory: kernel of the gradient at the last memory, ``(B, B)``.
        """
        steps, batch = len(self.e), self.batch
        back = BackwardPath(self)
        flat = g.reshape(steps * batch, -1)
        values, vectors = torch.linalg.eigh((flat + flat.T) / 2)
        rows = (vectors * values.clamp_min(0).sqrt()) @ back.noise.take(steps * batch)
        if memory is not None:
            back.s = _cholesky(memory, float(memory.diagonal().max())) @ back.noise.take(batch)
        for t in range(steps - 1, -1, -1):
            back.step(t, rows[t * batch : (t + 1) * batch])
        return back.at_input(), back.at_state()


class BackwardPath:
    """The gradient on its way back through a `GatedPath`.

    Args:
        path: the way forward.
    """

    def __init__(self, path: GatedPath) -> None:
        self.path = path
        self.noise = _Noise(path.units, path.backward_seed)
        self.process = _Process(path.units)
        self.deltas: list[list[Tensor]] = []  # of each step, latest step first
        self.w = torch.zeros(path.batch, path.units, dtype=torch.float64)  # W^T δ at the state before
        self.s = torch.zeros_like(self.w)  # gradient at the memory

    def step(self, t: int, outside: Tensor) -> None:
        """Through step t, with gradient rows ``outside`` at its state besides those of later steps."""
        path = self.path
        *delta, self.s = path.pull(t, outside + self.w, self.s)
        gates = [(k, gate.recurrent) for k, gate in enumerate(path.cell.gates) if gate.recurrent]
        own, cross = torch.zeros(path.batch, path.batch, dtype=torch.float64), None
        for k, weight in gates:
            own = own + weight * delta[k] @ delta[k].T / path.units
            if self.deltas:
                later = torch.cat([d[k] for d in self.deltas])
                part = weight * delta[k] @ later.T / path.units
                cross = part if cross is None else cross + part
        if cross is None:
            cross = torch.zeros(path.batch, len(self.deltas) * path.batch, dtype=torch.float64)
        self.deltas.append(delta)
        self.w = self.process.extend(cross, own, self.noise.take(path.batch))

    def at_input(self) -> Tensor:
        """Σ_k σ_v² E δ δ over the steps so far, in the order of time, ``(T, B, T, B)``."""
        path, steps = self.path, len(self.deltas)
        total = torch.zeros(steps * path.batch, steps * path.batch, dtype=torch.float64)
        for k, gate in enumerate(path.cell.gates):
            if gate.into:
                rows = torch.cat([d[k] for d in reversed(self.deltas)])
                total += gate.into * rows @ rows.T / path.units
        return total.reshape(steps, path.batch, steps, path.batch)

    def at_state(self) -> Tensor:
        """Kernel of the gradient at the state before the last step taken, ``(B, B)``."""
        total = self.rows_at_state()
        return total @ total.T / self.path.units

    def rows_at_state(self) -> Tensor:
        """The gradient there, unit by unit."""
        return self.w if self.path.cell.advance is _lstm else self.w + self.s
