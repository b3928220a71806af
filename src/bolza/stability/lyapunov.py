r"""Lyapunov exponents of recurrent networks over time, deep networks over layers, training runs over steps, and maps.

    λᵢ = lim (1/T) log σᵢ(J_{T−1} ⋯ J_0),   λ₁ ≥ λ₂ ≥ …,   Σᵢ λᵢ = mean log |det J_t|

λ₁ > 0: near states separate, and gradients explode, as e^{λ₁ T}; λ₁ < 0: they vanish so. 1/|λ₁| is the number of
steps over which a gradient is worth propagating; the number of exponents near 0 is the number of directions with
memory.

Reference: Vogt, Puelma Touzel, Shlizerman & Lajoie (2022), *On Lyapunov Exponents for RNNs*; Benettin et al.
    (1980).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.core.system import System
from bolza.ops.noise import batch_statistics, each_sample_alone
from bolza.ops.operators import Estimate
from bolza.ops.replay import differentiable_kernels, same_randomness
from bolza.ops.trees import Tree, float_leaves, tree_detach
from bolza.stability.cocycle import Cocycle, Flow, run_cocycle
from bolza.stability.recurrent import RECURRENT, as_driven_map

__all__ = ["LayerFlow", "LyapunovSpectrum", "driven_flow", "layer_flow", "lyapunov_exponents"]

VOGT = Reference(
    "vogt2022lyapunov",
    "Vogt, Ryan and Puelma Touzel, Maximilian and Shlizerman, Eli and Lajoie, Guillaume",
    "On Lyapunov Exponents for RNNs: Understanding Information Propagation Using Dynamical Systems Tools",
    2022,
    venue="Frontiers in Applied Mathematics and Statistics",
    arxiv="2006.14123",
)

_ALL = 512  # states up to this size get all their exponents by default
_SOME = 16  # larger ones this many
_BLOCKS = 10  # stretches of time behind the error of a single trajectory


@dataclass(frozen=True)
class LyapunovSpectrum:
    """Lyapunov exponents, largest first, in nats per ``unit``.

    Attributes:
        exponents: mean over samples, ``(k,)``, float64. −∞ for directions that a step maps to zero, to rounding.
        error: standard error ``(k,)`` over samples; for a single sample its ``per_sample_error``. It does not contain
            the bias of a finite time, which ``finite_time`` shows.
        per_sample: exponents of each sample, ``(batch, k)``, in the order of ``exponents``.
        per_sample_error: their standard errors from ten stretches of time, ``(batch, k)``; nan below twenty records.
        finite_time: exponents up to ``times``, ``(len(times), batch, k)``: about 200 of them.
        times: from the end of the warm-up, in ``unit``.
        unit: ``"step"``, ``"layer"`` or ``"time"``.
        steps: steps that counted.
        dt: ``unit`` per step.
        size: numbers in the state; with ``k == size`` the spectrum is complete.
        lost: how often a direction was mapped to zero, to rounding, over samples, directions and steps. In float32
            this can be saturation; float64 then resolves it.
        final_state: state after the last step, in the form that it was given.
    """

    exponents: Tensor
    error: Tensor
    per_sample: Tensor
    per_sample_error: Tensor
    finite_time: Tensor
    times: Tensor
    unit: str
    steps: int
    dt: float
    size: int
    lost: int
    final_state: Tree

    @property
    def k(self) -> int:
        """Number of exponents."""
        return self.exponents.numel()

    @property
    def largest(self) -> Estimate:
        """λ₁ and its standard error."""
        return Estimate(float(self.exponents[0]), float(self.error[0]))

    @property
    def sum(self) -> Estimate:
        """Σ λᵢ over the k exponents, the mean of log |det J| if the spectrum is complete; its error is over samples."""
        sums = self.per_sample.sum(1)
        return Estimate(float(sums.mean()), float(_standard_error(sums)) if sums.numel() > 1 else 0.0)

    @property
    def memory(self) -> float:
        """1/|λ₁|: the time over which perturbations and gradients change by a factor e."""
        return 1 / abs(float(self.exponents[0])) if float(self.exponents[0]) else math.inf

    @property
    def dimension(self) -> float:
        """Kaplan–Yorke dimension j + Σ_{i≤j} λᵢ / |λ_{j+1}|; nan if k exponents do not reach a negative sum."""
        total = 0.0
        for j, value in enumerate(self.exponents.tolist()):
            if total + value < 0:
                return j + total / abs(value)
            total += value
        return float(self.size) if self.k == self.size else math.nan

    def __str__(self) -> str:
        shown = ", ".join(f"{value:.4g}" for value in self.exponents[:4].tolist())
        more = f", … ({self.k} of {self.size})" if self.k > 4 else ""
        return f"{shown}{more} per {self.unit}; largest {self.largest}"


@dataclass(frozen=True)
class _Plan:
    """A flow, how long it can run, and its clock."""

    flow: Callable[[bool], Flow]
    unit: str
    dt: float = 1.0
    available: int | None = None
    room: int | None = None  # fewest numbers of any state on the way
    form: Callable[[Any], Tree] = lambda state: state


@cites(VOGT)
def lyapunov_exponents(
    system: System | nn.Module | Callable[..., Tree],
    x0: Tree = None,
    steps: int | None = None,
    k: int | None = None,
    *,
    inputs: Any = None,
    warmup: int = 0,
    every: int = 1,
    dt: float | None = None,
    stages: tuple[int, int] | None = None,
    batched: bool | None = None,
    seed: int = 0,
) -> LyapunovSpectrum:
    r"""The k largest Lyapunov exponents, by tangent vectors and QR: λᵢ = (1/T) Σ_t log |R_t|ᵢᵢ.

    * ``nn.RNN``, ``nn.GRU``, ``nn.LSTM`` and their cells: over time, driven by ``inputs``. The state is that of
      all layers, cell states included.
    * any other ``nn.Module``: over its layers, the stages of :func:`bolza.as_system`; ``x0`` is a batch of inputs.
    * a :class:`~bolza.core.System`: over its steps. An ``ODESystem`` gives exponents per unit of time, a
      ``TrainingSystem`` those of the training map in the space of parameters (and velocities).
    * a function x → x', or with ``inputs`` (x, u) → x': a map, which must depend on its arguments alone.

    J is never formed; one step costs k forward-mode products, taken together, and a QR of ``(size, k)``.

    Args:
        system: what moves the state.
        x0: first state. Samples come first: a tensor of two or more dimensions is ``(batch, …)``; a vector is one
            state. Recurrent modules take it in their own form, and zeros by default.
        steps: steps that count; by default all that inputs, layers or horizon allow after the warm-up.
        k: number of exponents; by default all if the state has at most 512 numbers, else 16.
        inputs: driving sequence, time first, in a recurrent module's own form.
        warmup: steps on which state and directions settle before anything counts.
        every: steps between two QRs; more is faster, until directions fall together.
        dt: time of one step; the exponents are divided by it. By default that of an ``ODESystem``, else 1.
        stages: ``(start, stop)`` of a network's stages, for instance without its head.
        batched: whether the first axis of the state counts samples that do not see each other; by default found
            from ``x0`` as said above, and false for a ``TrainingSystem``.
        seed: of the random first directions; those of a smaller ``k`` are among those of a larger one.

    Returns:
        LyapunovSpectrum.

    Raises:
        ArgumentError: steps, k, warmup or every out of range, or x0 missing.
        DivergenceError: the trajectory leaves every bound.
        ShapeError: states or inputs do not fit.
        UnsupportedError: the state has no derivative, or the module runs both ways in time.

    Reference: Vogt et al. (2022), algorithm 1. Departures: natural logarithm; the Jacobian is that of the whole
    state, with the cell state of an LSTM; singular steps give −∞.

    Example:
        >>> henon = lambda x: torch.stack([1 - 1.4 * x[..., 0] ** 2 + x[..., 1], 0.3 * x[..., 0]], -1)
        >>> spectrum = lyapunov_exponents(henon, torch.zeros(2, dtype=torch.float64), steps=300, warmup=50)
        >>> round(float(spectrum.sum), 6)                                     # log 0.3, exactly
        -1.203973
        >>> net = nn.LSTM(3, 4)
        >>> lyapunov_exponents(net, inputs=torch.randn(20, 2, 3), k=3).exponents.shape
        torch.Size([3])
    """
    for name, count in (("steps", steps), ("k", k), ("warmup", warmup), ("every", every)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise ArgumentError(f"{name} is {count!r}: give a whole number")
    if every < 1 or warmup < 0 or (steps is not None and steps < 1):
        raise ArgumentError(
            f"steps is {steps}, warmup {warmup} and every {every}: steps and every must be at least 1, warmup 0"
        )
    if dt is not None and (dt == 0 or not math.isfinite(dt)):
        raise ArgumentError(f"dt is {dt}: the time of a step must be finite and not zero")
    with ExitStack() as stack:
        plan = _plan(system, x0, inputs, stages, batched, seed, stack)
        steps = _steps(plan, steps, warmup)
        start = plan.flow(False)
        size = start.flat(start.state).shape[1]
        most = size if plan.room is None else plan.room
        if k is None:
            k = most if most <= _ALL else _SOME
        if not 1 <= k <= most:
            raise ArgumentError(
                f"k is {k}: between 1 and {most} exponents exist, the size of the smallest state"
            )
        found = run_cocycle(plan.flow, k, steps, warmup, every, seed)
    unit = "time" if dt is not None else plan.unit
    return _spectrum(found, steps, plan.dt if dt is None else dt, unit, size, plan.form(found.state))


def _steps(plan: _Plan, steps: int | None, warmup: int) -> int:
    if steps is None:
        if plan.available is None:
            raise ArgumentError("steps is None, but this map has no end: say how many steps count")
        steps = plan.available - warmup
    if steps < 1 or (plan.available is not None and warmup + steps > plan.available):
        raise ArgumentError(
            f"steps is {steps} after a warmup of {warmup}, but {plan.available} steps can be taken: "
            "give longer inputs, a longer horizon, or fewer steps"
        )
    return steps


def _spectrum(found: Cocycle, steps: int, dt: float, unit: str, size: int, state: Tree) -> LyapunovSpectrum:
    times = torch.tensor(found.marks, dtype=torch.float64) * dt
    finite = found.history / times[:, None, None]
    per_sample = found.sums / (steps * dt)
    order = per_sample.mean(0).argsort(descending=True, stable=True)
    per_sample, finite = per_sample[:, order], finite[:, :, order]
    in_time = _error_in_time(found, order, dt)
    return LyapunovSpectrum(
        exponents=per_sample.mean(0),
        error=in_time[0] if per_sample.shape[0] == 1 else _standard_error(per_sample),
        per_sample=per_sample,
        per_sample_error=in_time,
        finite_time=finite,
        times=times,
        unit=unit,
        steps=steps,
        dt=dt,
        size=size,
        lost=found.lost,
        final_state=state,
    )


def _standard_error(values: Tensor) -> Tensor:
    return values.std(0) / math.sqrt(values.shape[0])


def _error_in_time(found: Cocycle, order: Tensor, dt: float) -> Tensor:
    """Standard errors (batch, k) of single trajectories, from the exponents of ten stretches of each."""
    sums = found.history[:, :, order]
    if len(found.marks) < 2 * _BLOCKS:
        return torch.full(sums.shape[1:], math.nan, dtype=torch.float64)
    ends = [round((i + 1) * len(found.marks) / _BLOCKS) - 1 for i in range(_BLOCKS)]
    at = torch.tensor([0, *(found.marks[i] for i in ends)], dtype=torch.float64)
    parts = torch.cat([torch.zeros_like(sums[:1]), sums[ends]]).diff(dim=0)
    return _standard_error(parts / (at.diff()[:, None, None] * dt))


# ------------------------------------------------------------------------------ what can be read as a flow


def _plan(
    system: Any,
    x0: Tree,
    inputs: Any,
    stages: tuple[int, int] | None,
    batched: bool | None,
    seed: int,
    stack: ExitStack,
) -> _Plan:
    layered = isinstance(system, nn.Module) or isinstance(getattr(system, "module", None), nn.Module)
    if stages is not None and (not layered or isinstance(system, RECURRENT)):
        raise ArgumentError(
            f"stages is {stages}, but {type(system).__name__} is not read as stages of a network"
        )
    if isinstance(system, RECURRENT):
        return _recurrent(system, x0, inputs)
    if x0 is None:
        raise ArgumentError("x0 is None: give the state (for a network, the inputs) to start from")
    x0 = tree_detach(x0)
    if layered:
        if inputs is not None:
            raise ArgumentError(
                f"inputs are given, but {type(system).__name__} is no recurrent module of torch.nn: its clock is the "
                "layer; for a cell of your own give the function (state, input) -> state"
            )
        layers = layer_flow(system, x0, stages, seed, stack)
        return _Plan(lambda trace: layers.flow(), "layer", available=layers.count, room=layers.room)
    if isinstance(system, System):
        if inputs is not None:
            raise ArgumentError("inputs are given, but a System has controls of its own: leave inputs out")
        return _system(system, x0, batched)
    if not callable(system):
        raise UnsupportedError(
            f"system is {type(system).__name__}: give a network, a System (horizon, controls, step), or a function"
        )
    return _map(system, x0, inputs, batched)


def _recurrent(module: nn.Module, x0: Tree, inputs: Any) -> _Plan:
    driven = as_driven_map(module, None if x0 is None else tree_detach(x0), inputs)
    available = None if driven.inputs is None else driven.inputs.shape[0]

    def flow(traceable: bool) -> Flow:
        return Flow(driven.step, driven.state, True, driven.input, traceable)

    return _Plan(flow, "step", available=available, form=driven.module_form)


def _map(function: Callable[..., Tree], x0: Tree, inputs: Any, batched: bool | None) -> _Plan:
    samples = _has_samples(x0) if batched is None else batched
    if inputs is None:
        return _Plan(lambda trace: Flow(lambda t, x, u: function(x), x0, samples, traceable=trace), "step")
    sequence: Any = inputs.detach() if isinstance(inputs, Tensor) else inputs
    if not hasattr(sequence, "__getitem__") or (isinstance(sequence, Tensor) and not sequence.ndim):
        raise ArgumentError(f"inputs is {inputs!r}: give a sequence with one input a step, time first")

    def flow(traceable: bool) -> Flow:
        return Flow(lambda t, x, u: function(x, u), x0, samples, sequence.__getitem__, traceable)

    return _Plan(flow, "step", available=len(sequence))


def _system(system: System, x0: Tree, batched: bool | None) -> _Plan:
    from bolza.systems import ODESystem, TrainingSystem

    if batched is None:
        batched = not isinstance(system, TrainingSystem) and _has_samples(x0)
    controls = [tree_detach(u) for u in system.controls]
    pure = isinstance(system, ODESystem) and _is_autonomous(system, controls, x0)

    def flow(traceable: bool) -> Flow:
        return Flow(system.step, x0, batched, controls.__getitem__, traceable and pure)

    if isinstance(system, ODESystem):
        return _Plan(flow, "time", system.dt, system.horizon)
    return _Plan(flow, "step", available=system.horizon)


@torch.no_grad()
def _is_autonomous(system: Any, controls: Sequence[Tree], x0: Tree) -> bool:
    """Whether the step is the same at 64 times spread over the horizon."""
    if any(field is not system.fields[0] for field in system.fields):
        return False
    if any(float_leaves(u) for u in controls):
        return False
    count = min(system.horizon, 64)
    first = float_leaves(system.step(0, x0, controls[0]))
    for i in range(1, count):
        t = i * (system.horizon - 1) // (count - 1)
        other = float_leaves(system.step(t, x0, controls[t]))
        if not all(torch.equal(a, b) for a, b in zip(first, other, strict=True)):
            return False
    return True


@dataclass(frozen=True)
class LayerFlow:
    """The layers of a network as a flow.

    Attributes:
        flow: makes it, at the first state.
        count: number of layers.
        room: fewest numbers a sample in any state on the way.
    """

    flow: Callable[[], Flow]
    count: int
    room: int


def layer_flow(
    model: Any, x: Tree, stages: tuple[int, int] | None, seed: int, stack: ExitStack, *, head: bool = True
) -> LayerFlow:
    """Read a network, or a system made of one, as a flow over its stages, every sample alone.

    Args:
        model: a network, or what :func:`bolza.as_system` returns.
        x: a batch of inputs.
        stages: ``(start, stop)``; all by default.
        seed: of random layers.
        stack: holds the mode of the network until the flow has been used.
        head: whether the last stage counts, where ``stages`` is not given.

    Raises:
        ArgumentError: stages out of range, or there is nothing but a head.
    """
    from bolza.systems import as_system

    module: nn.Module = model if isinstance(model, nn.Module) else model.module
    x = tree_detach(x)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    stack.enter_context(differentiable_kernels(module))
    stack.enter_context(same_randomness(seed, device))
    stack.enter_context(each_sample_alone(module, batch_statistics(module, [(x, None)], device)))
    system = as_system(module, x) if isinstance(model, nn.Module) else model
    start, stop = (0, system.horizon - (not head)) if stages is None else stages
    if not 0 <= start < stop <= system.horizon:
        what = (
            f"stages is {stages}"
            if stages is not None
            else "the network is nothing but a head (head=True keeps it)"
        )
        raise ArgumentError(
            f"{what}: layers are stages (start, stop) with 0 <= start < stop <= {system.horizon}"
        )
    controls = [tree_detach(u) for u in system.controls]
    state, sizes = x, []
    with torch.no_grad():
        for t in range(start):
            state = system.step(t, state, controls[t])
        # an integer input is followed to the first state that has derivatives
        while stages is None and not float_leaves(state) and start < stop - 1:
            state = system.step(start, state, controls[start])
            start += 1
        follow = state
        for t in range(start, stop):
            sizes.append(_numbers(follow, t))
            follow = system.step(t, follow, controls[t])
        sizes.append(_numbers(follow, stop))

    def flow() -> Flow:
        return Flow(lambda t, x, u: system.step(start + t, x, u), state, True, lambda t: controls[start + t])

    return LayerFlow(flow, stop - start, min(sizes))


def driven_flow(response: Any, x0: Tree, inputs: Any) -> tuple[Flow, int]:
    """A driven system as a flow, and the number of steps that its input allows.

    Raises:
        ArgumentError: no inputs, or no first state for a function.
    """
    if inputs is None:
        raise ArgumentError("inputs is None: give the driving sequence")
    if isinstance(response, RECURRENT):
        plan = _recurrent(response, x0, inputs)
    elif x0 is None:
        raise ArgumentError("x0 is None: give the first state of the response, samples first")
    else:
        plan = _map(response, x0, inputs, None)
    assert plan.available is not None
    return plan.flow(False), plan.available


def _numbers(state: Tree, t: int) -> int:
    leaves = float_leaves(state)
    if any(leaf.ndim == 0 for leaf in leaves):
        raise ShapeError(
            f"the state at stage {t} holds a scalar: samples must come first in every part of it"
        )
    return sum(leaf.numel() // max(1, leaf.shape[0]) for leaf in leaves)


def _has_samples(x0: Tree) -> bool:
    leaves = float_leaves(x0)
    return (
        bool(leaves)
        and all(leaf.ndim >= 2 for leaf in leaves)
        and len({leaf.shape[0] for leaf in leaves}) == 1
    )
