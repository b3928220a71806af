r"""Training a network in slices of its depth that run at the same time.

The network is cut into K slices X_k = S_k(λ_k; W_k), each with an input λ_k of its own (λ_0 is the data). What
ties them together is either a price on their mismatch,

    L = φ(X_{K−1}) + Σ_k [ κ_k·(X_{k−1} − λ_k) + β/2 |X_{k−1} − λ_k|² ]
    p_k = κ_k + β (X_{k−1} − λ_k)                              costate handed to the end of slice k − 1
    λ_k ← λ_k − η_λ ( ∂(slice k)/∂λ_k − p_k ),   κ_k ← κ_k + ρβ (X_{k−1} − λ_k)

(the penalty method has κ ≡ 0), or a parallel iteration for the states and costates of the uncut network
(:mod:`bolza.systems.parareal`). In both, the price or the iteration's costate stands for what back-propagation
would bring from behind, and the K forward and K backward passes need not wait for one another.

Reference: Sun et al. (2020), arXiv:2009.01462; Günther et al. (2018), arXiv:1812.04352.

Departures: λ_k and κ_k are those of a training example, in units of the loss of one example (the published
objective is that of a batch); where an example comes for the first time both start from one serial pass, so that
κ_k is its costate, not zero (``start="states"`` is the published start).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.ops.trees import (
    Tree,
    float_leaves,
    tree_add,
    tree_detach,
    tree_map,
    tree_norm,
    tree_scale,
    with_float_leaves,
)
from bolza.optim.interfaces import (
    InterfaceMemory,
    auxiliary_step,
    boundary_costate,
    gradient_of,
    leaf_of,
    mixed,
    multiplier_step,
    pull_back,
)
from bolza.optim.line import Line
from bolza.systems.module import as_system
from bolza.systems.parareal import GUNTHER
from bolza.systems.slices import SlicedNetwork

__all__ = ["LayerParallel"]

REFERENCE = Reference(
    "sun2020layer",
    "Sun, Qi and Dong, Hexin and {others}",
    "Penalty and Augmented Lagrangian Methods for Layer-parallel Training of Residual Networks",
    2020,
    arxiv="2009.01462",
)
Method = Literal["lagrangian", "penalty", "parareal", "mgrit"]
METHODS = ("lagrangian", "penalty", "parareal", "mgrit")


@cites(REFERENCE, GUNTHER)
class LayerParallel:
    r"""Gradients from slices of a network's depth that run at the same time.

    ``backward(x, y, index)`` takes the place of ``loss(model(x), y).backward()``: it fills ``.grad``, for any
    optimizer to use. One slice is ordinary back-propagation, bit for bit.

    With ``group`` each process runs the slices that are its share and holds the gradients of their parameters
    only; all processes call the same methods with the same batches. Without, one process does the work of
    all, and ``critical_path`` says what the others would have saved.

    Args:
        model: the network. For ``"parareal"`` and ``"mgrit"`` its slices must be jumped over, so it should be
            residual, with small steps and weights that change slowly with depth.
        loss: (output, target) → scalar.
        slices: number K of slices, or their boundaries in stages of :func:`~bolza.systems.as_system`.
        method: ``"lagrangian"``, ``"penalty"``, ``"parareal"``, or ``"mgrit"`` (FCF relaxation).
        beta: weight β of the mismatch, in units of the loss of an example per squared state.
        rho: step ρ of the multipliers, in units of β; for the augmented Lagrangian. At 1, that of the textbook, they
            overshoot while the weights move.
        interface_lr: step η_λ of the slices' inputs; β η_λ should stay below 1.
        iterations: corrections of states and of costates in each step, for parareal and MGRIT.
        start: what a new example begins from. ``"costates"``: λ and κ from a serial pass forward and
            backward; ``"states"``: λ from a serial pass forward, κ = 0; ``"coarse"``: both from jumps over the
            slices. Parareal and MGRIT always begin with jumps.
        samples: number of training examples, if ``index`` is given: how much is remembered.
        reduction: whether ``loss`` is a ``"mean"`` or a ``"sum"`` over the samples of a batch.
        group: process group of ``torch.distributed``; none for one process.

    Raises:
        ArgumentError: an argument makes no sense.

    Reference: Sun et al. (2020), arXiv:2009.01462; Günther et al. (2018), arXiv:1812.04352, §4.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(6, 4, generator=draw), torch.randn(6, 4, generator=draw)
        >>> net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
        >>> parallel = LayerParallel(net, nn.functional.mse_loss, slices=2, samples=6)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = parallel.backward(x, y, index=torch.arange(6))
        ...     optimizer.step()
        >>> parallel.critical_path, parallel.serial_path
        (6, 12)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        slices: int | Sequence[int] = 2,
        *,
        method: Method = "lagrangian",
        beta: float = 1.0,
        rho: float = 0.3,
        interface_lr: float = 0.5,
        iterations: int = 2,
        start: Literal["costates", "states", "coarse"] = "costates",
        samples: int | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if method not in METHODS:
            raise ArgumentError(f"method is {method!r}: choose one of {', '.join(METHODS)}")
        if start not in ("costates", "states", "coarse") or reduction not in ("mean", "sum"):
            raise ArgumentError(
                f"start is {start!r} and reduction is {reduction!r}: choose 'costates', 'states' or 'coarse', and "
                "'mean' or 'sum'"
            )
        if isinstance(slices, float):
            raise ArgumentError(f"slices is {slices}: give a whole number, or the boundaries in stages")
        for name, value in (("beta", beta), ("interface_lr", interface_lr)):
            if not 0 < value < float("inf"):
                raise ArgumentError(f"{name} is {value}: it must be positive")
        if not 0 <= rho < float("inf") or iterations < 0:
            raise ArgumentError(f"rho is {rho} and iterations is {iterations}: neither may be negative")
        self.module, self.loss, self.method, self.start = model, loss, method, start
        self.beta, self.rho, self.interface_lr = beta, rho, interface_lr
        self.iterations, self.reduction, self.group = iterations, reduction, group
        self.critical_path = 0
        self.violation = 0.0
        self.line = Line(slices if isinstance(slices, int) else len(slices) - 1, group)
        self._slices = slices
        self._sliced: SlicedNetwork | None = None
        self.memory = InterfaceMemory(samples)

    # ------------------------------------------------------------------------------- what it is

    @property
    def sliced(self) -> SlicedNetwork:
        """The slices; known from the first batch on.

        Raises:
            ArgumentError: no batch has been seen.
        """
        if self._sliced is None:
            raise ArgumentError(
                "the network is read at the first batch: call read(x) or backward(x, y) first"
            )
        return self._sliced

    def read(self, x: Any) -> LayerParallel:
        """Cut the network along an example, which :meth:`backward` otherwise does with its first batch.

        Raises:
            UnsupportedError: the network cannot be sliced as it was asked for.
        """
        sliced = SlicedNetwork(as_system(self.module, x), self._slices)
        where = {name: [self.line.owner[k] for k in ks] for name, ks in sliced.shared().items()}
        torn = next((name for name, owners in where.items() if len(set(owners)) > 1), None)
        if torn is not None:
            raise UnsupportedError(
                f"the parameter {torn!r} is used by slices of the processes {sorted(set(where[torn]))}: cut the "
                "network so that one process has them all, or use one process"
            )
        if self.method in ("parareal", "mgrit") and len(sliced) > 1 and not sliced.memoryless():
            raise UnsupportedError(
                f"method is {self.method!r}, which runs a slice several times for one step, but the network has "
                "dropout or running statistics (batch normalisation) in training mode: use method='lagrangian', or "
                "layers without memory such as nn.GroupNorm"
            )
        self._sliced = sliced
        return self

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of this process's slices: what its optimizer should be given."""
        found = {id(p): p for k in self.line.local for p in self.sliced.parameters(k)}
        return list(found.values())

    @property
    def serial_path(self) -> int:
        """Work of one step of back-propagation: a unit forward and two backward for each stage."""
        return 3 * self.sliced.system.horizon

    @torch.no_grad()
    def synchronize(self) -> None:
        """Give every process the parameters and running statistics of all slices, as for a test or a file."""
        for k in range(len(self.sliced)):
            for tensor in [*self.sliced.parameters(k), *self.sliced.buffers(k)]:
                tensor.copy_(self.line.same_everywhere(tensor, k))

    # --------------------------------------------------------------------------------- one step

    def backward(self, x: Any, y: Any, index: Tensor | None = None) -> Tensor:
        """Add the gradient of the batch to ``.grad``, and return its loss.

        Args:
            x: input of the network, samples first; a tuple where it takes several.
            y: target.
            index: number of each sample among the training examples, shape ``(batch,)``. With it the slices'
                inputs and multipliers are remembered from epoch to epoch; without, each batch begins from jumps
                over the slices.

        Returns:
            The loss at the output of the last slice, detached; that of the network itself if the slices fit.

        Raises:
            ArgumentError: ``index`` is given, but not ``samples``, or it does not fit.
            ShapeError: a slice cannot be jumped over, or changes the number of samples.
        """
        if self._sliced is None:
            self.read(x)
        net, line = self.sliced, self.line
        first = float_leaves(x) or [
            leaf for leaf in torch.utils._pytree.tree_leaves(x) if isinstance(leaf, Tensor)
        ]
        batch = len(first[0])
        if batch == 0:
            raise ArgumentError("x holds no samples: leave empty batches out")
        line.device = next((p.device for k in line.local for p in net.parameters(k)), first[0].device)
        self.critical_path = 0
        if len(net) == 1:
            loss = self.loss(net.run(0, x), y)
            loss.backward()
            self.critical_path = self.serial_path
            return loss.detach()
        rows = self.memory.rows(index, batch)
        if self.method in ("parareal", "mgrit"):
            loss = self._iterated(x, y, batch, rows)
        else:
            loss = self._decoupled(x, y, batch, rows)
        if rows is not None:
            self.memory.mark(rows)
        return line.same_everywhere(loss.detach(), len(net) - 1)

    def _scale(self, batch: int) -> float:
        """Units of the loss of one sample, per unit of the loss."""
        return float(batch) if self.reduction == "mean" else 1.0

    def _decoupled(self, x: Any, y: Any, batch: int, rows: Tensor | None) -> Tensor:
        """Penalty and augmented Lagrangian: every slice from its own input."""
        net, line, scale = self.sliced, self.line, self._scale(batch)
        lam, kappa = self._interfaces(x, y, batch, rows)
        if self.method == "penalty":
            kappa = {k: tree_map(torch.zeros_like, value) for k, value in kappa.items()}
        entered = {k: x if k == 0 else leaf_of(lam[k]) for k in line.local}
        left = {k: net.run(k, entered[k]) for k in line.local}
        came = line.up({k: tree_detach(left[k]) for k in line.local if k < len(net) - 1}, batch)
        p = {k: boundary_costate(came[k], lam[k], kappa[k], self.beta) for k in came}
        back = line.down({k: tree_scale(1 / scale, p[k]) for k in p}, batch)
        loss = first_of(x)
        for k in line.local:
            if k == len(net) - 1:
                loss = self.loss(left[k], y)
                loss.backward()
            else:
                pull_back(left[k], back[k])
        gaps = []
        for k in came:
            gradient = with_float_leaves(
                entered[k],
                [torch.zeros_like(a) if a.grad is None else scale * a.grad for a in float_leaves(entered[k])],
            )
            stepped = auxiliary_step(lam[k], gradient, p[k], self.interface_lr)
            price = kappa[k]
            if self.method == "lagrangian":
                price = multiplier_step(kappa[k], came[k], stepped, self.beta, self.rho)
            self._store(k, rows, stepped, price)
            gaps.append(float(tree_norm(tree_add(came[k], lam[k], alpha=-1.0)) / tree_norm(came[k])))
        self.violation = max(gaps, default=0.0)
        self.critical_path += 3 * max(net.lengths)
        return loss

    def _iterated(self, x: Any, y: Any, batch: int, rows: Tensor | None) -> Tensor:
        """Parareal or MGRIT with two levels: states, then costates with these states."""
        net, line, K = self.sliced, self.line, len(self.sliced)
        m, fcf, scale = max(net.lengths), self.method == "mgrit", self._scale(batch)
        remembered, kappa = self._interfaces(x, y, batch, rows)
        u = {k: x if k == 0 else remembered[k] for k in line.local}
        early = [k for k in line.local if k < K - 1]  # what leaves the last slice enters none
        with torch.no_grad():
            for _ in range(self.iterations):
                ends = {k: net.replay(k, u[k]) for k in early}
                self.critical_path += m + K
                if fcf:
                    u |= line.up(ends, batch)
                    ends = {k: net.replay(k, u[k]) for k in early}
                    self.critical_path += m
                change = {k: tree_add(ends[k], net.jump(k, u[k]), alpha=-1.0) for k in early}

                def ahead(k: int, value: Tree, change: dict[int, Tree] = change) -> Tree:
                    return value if k == K - 1 else tree_add(net.jump(k, value), change[k])

                entered = line.sweep_up(x, ahead, batch)
                u = {k: entered[k] for k in line.local}
        starts = {k: x if k == 0 else leaf_of(u[k]) for k in line.local}
        left = {k: net.run(k, starts[k]) for k in line.local}
        self.critical_path += m
        came = line.up({k: tree_detach(left[k]) for k in early}, batch)
        gaps = [float(tree_norm(tree_add(came[k], u[k], alpha=-1.0)) / tree_norm(came[k])) for k in came]
        self.violation = max(gaps, default=0.0)
        # costates: q_k stands at the end of slice k
        loss = self.loss(left[K - 1], y) if K - 1 in line.local else first_of(x)
        q = line.down({k: tree_scale(1 / scale, kappa[k]) for k in line.local if k > 0}, batch)
        jumps = _Jumps(net, u)
        inner = [k for k in line.local if k > 0]
        at_end = gradient_of([loss], [None], starts[K - 1]) if K - 1 in line.local else None  # exact as it is

        def pulled(k: int, q: dict[int, Tree]) -> Tree:
            return at_end if k == K - 1 else gradient_of(float_leaves(left[k]), float_leaves(q[k]), starts[k])

        for _ in range(self.iterations):
            back = {k: pulled(k, q) for k in inner}
            self.critical_path += 2 * m + 2 * K
            if fcf:
                q = line.down(back, batch)
                back = {k: pulled(k, q) for k in inner}
                self.critical_path += 2 * m
            fixed = {
                k: back[k] if k == K - 1 else tree_add(back[k], jumps.back(k, q[k]), alpha=-1.0)
                for k in inner
            }

            def behind(k: int, value: Tree, fixed: dict[int, Tree] = fixed) -> Tree:
                if k == 0:
                    return value  # nothing asks for the costate of the data
                return fixed[k] if k == K - 1 else tree_add(jumps.back(k, value), fixed[k])

            swept = line.sweep_down(None, behind, batch)
            q = {k: swept[k] for k in early}
        for k in line.local:
            if k == K - 1:
                loss.backward()
            else:
                pull_back(left[k], q[k])
        self.critical_path += 2 * m
        kept = line.up({k: tree_scale(scale, q[k]) for k in early}, batch)
        for k in kept:
            self._store(k, rows, u[k], kept[k])
        return loss

    # ------------------------------------------------------------------------ inputs and multipliers

    def _interfaces(
        self, x: Any, y: Any, batch: int, rows: Tensor | None
    ) -> tuple[dict[int, Tree], dict[int, Tree]]:
        """λ and κ of the batch at the beginnings of the local slices but the first."""
        fresh = torch.ones(batch, dtype=torch.bool) if rows is None else self.memory.fresh(rows)
        lam: dict[int, Tree] = {}
        kappa: dict[int, Tree] = {}
        if bool(fresh.any()):
            lam, kappa = self._begin(x, y, batch, coarse=rows is None or self.start == "coarse")
        if rows is None or bool(fresh.all()):
            return lam, kappa
        for k in (k for k in self.line.local if k > 0):
            known = self.memory.recall(k, rows, self.sliced.form(k))
            for found, old in zip((lam, kappa), known, strict=True):
                found[k] = mixed(fresh, found[k], old) if k in found else old
        return lam, kappa

    def _begin(self, x: Any, y: Any, batch: int, coarse: bool) -> tuple[dict[int, Tree], dict[int, Tree]]:
        """States and multipliers from one serial pass, or from jumps."""
        net, line, K, scale = self.sliced, self.line, len(self.sliced), self._scale(batch)
        coarse = coarse or self.method in ("parareal", "mgrit")
        ahead = net.jump if coarse else net.replay
        graphs: dict[int, tuple[Tree, Tree]] = {}

        def forward(k: int, value: Tree) -> Tree:
            with torch.enable_grad():
                leaf = value if k == 0 else leaf_of(value)
                graphs[k] = leaf, ahead(k, leaf)
            return tree_detach(graphs[k][1])

        entered = line.sweep_up(x, forward, batch)
        lam = {k: tree_detach(entered[k]) for k in line.local if k > 0}
        self.critical_path += K if coarse else net.system.horizon
        if self.method == "penalty" or (self.start == "states" and not coarse):
            return lam, {k: tree_map(torch.zeros_like, value) for k, value in lam.items()}

        def backward(k: int, q: Tree) -> Tree:
            leaf, out = graphs[k]
            if k == 0:
                return q
            if k == K - 1:
                with torch.enable_grad():
                    return gradient_of([self.loss(out, y)], [None], leaf)
            return gradient_of(float_leaves(out), float_leaves(q), leaf)

        swept = line.sweep_down(None, backward, batch)
        kappa = line.up({k: tree_scale(scale, swept[k]) for k in line.local if k < K - 1}, batch)
        self.critical_path += 2 * K if coarse else 2 * net.system.horizon
        return lam, kappa

    def _store(self, k: int, rows: Tensor | None, lam: Tree, kappa: Tree) -> None:
        if rows is not None:
            self.memory.store(k, rows, lam, kappa)

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of the training examples, for a checkpoint of this process."""
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            ArgumentError: it is that of another number of training examples.
        """
        self.memory.load_state_dict(state)


class _Jumps:
    """Transposes of the jumps at the states where slices begin."""

    def __init__(self, net: SlicedNetwork, u: dict[int, Tree]) -> None:
        self.net, self.u = net, u
        self._graphs: dict[int, tuple[Tree, Tree]] = {}

    def back(self, k: int, q: Tree) -> Tree:
        if k not in self._graphs:
            with torch.enable_grad():
                start = leaf_of(self.u[k])
                self._graphs[k] = start, self.net.jump(k, start)
        start, end = self._graphs[k]
        return gradient_of(float_leaves(end), float_leaves(q), start)


def first_of(x: Any) -> Tensor:
    """A scalar to receive the loss in, for a process that does not have the last slice."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
    dtype = next((leaf.dtype for leaf in leaves if leaf.is_floating_point()), torch.get_default_dtype())
    return torch.zeros((), dtype=dtype, device=leaves[0].device)
