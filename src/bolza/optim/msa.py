r"""Training by successive approximation of the maximum principle (Li, Chen, Tai & E, 2018).

The states x_t and costates p_t of a forward and a backward pass are held, and the parameters of every stage minimise
its own Hamiltonian, to several iterations of L-BFGS, in place of taking one step down its gradient:

    MSA     θ_t ← argmin_v  ⟨p_{t+1}, f_t(x_t, v)⟩ + λ/2 ‖v‖² + κ/2 ‖v − θ_t‖²
    E-MSA   … + ρ/(2S) ‖x_{t+1} − f_t(x_t, v)‖² + ρS/2 ‖p_t − ∇_x ⟨p_{t+1}, f_t(x_t, v)⟩‖²

Since H is minimised over a range and not followed down a slope, a stationary point of the loss is no obstacle: there
the gradients of all Hamiltonians vanish too, but not their curvature.

Departures from the paper: the sign of H and p; ρ weighs terms that are means over samples, so that it does not depend
on the batch; the minimisations of all stages run together, one evaluation of all Hamiltonians serving every stage,
each with its own curvature pairs and step length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core import Minimizer, Reference, Trajectory, cites
from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.ops.blockwise import blockwise_lbfgs
from bolza.ops.trees import float_leaves
from bolza.optim.hamiltonians import Hamiltonians
from bolza.optim.recorded import RecordedOptimizer, check_number
from bolza.systems.module import ModuleSystem
from bolza.systems.stages import Split

__all__ = ["EMSA", "MSA"]

REFERENCE = Reference(
    "li2018msa",
    "Li, Qianxiao and Chen, Long and Tai, Cheng and E, Weinan",
    "Maximum Principle Based Algorithms for Deep Learning",
    2018,
    venue="Journal of Machine Learning Research",
    arxiv="1710.09513",
)
_REJECTIONS = 12  # how often ρ is doubled for one batch before the parameters are left as they are


@cites(REFERENCE)
class MSA(RecordedOptimizer):
    r"""Successive approximation: every stage minimises its Hamiltonian, states and costates held.

        θ_t ← θ_t + lr (v_t − θ_t),   v_t = argmin_v ⟨p_{t+1}, f_t(x_t, v)⟩ + λ/2 ‖v‖² + κ/2 ‖v − θ_t‖²

    The basic method of the paper is κ = 0; it needs λ > 0, and diverges where the minimisers lie far away: use
    :class:`EMSA`. With ``minimizer=gradient_minimizer(η)`` and κ = λ = 0 the step is that of ``torch.optim.SGD``.

    A step costs fifteen to twenty gradient steps with three iterations of L-BFGS, each an evaluation of all stages.

    Args:
        model: the network, or a DistributedDataParallel around it; read as stages at its first run.
        lr: relaxation, the share of the way to the minimiser that is gone, in (0, 1].
        proximal: weight κ of the distance from the old parameters; 1/κ acts as the learning rate.
        weight_decay: weight λ of ‖θ‖²/2, part of the Hamiltonian.
        iterations: iterations of L-BFGS in a step.
        minimizer: (H, u) → v in place of L-BFGS, see :mod:`bolza.core.minimizers`; κ and λ are part of its H.
        params: parameters or groups; by default all that require a gradient. What is left out stays as it is.
        stages: where to cut the network, as for :func:`~bolza.systems.as_system`.
        split: ``'affine'`` makes activations stages of their own, for which alone a minimum of H is a necessary
            condition in discrete time; ``'parameters'`` joins them to the layer before.

    Raises:
        ArgumentError: a number is out of its range, or no term bounds the Hamiltonian.
        UnsupportedError: in ``step``: the passes were not seen, or the network runs in several processes and
            ``minimizer`` is given.
        DivergenceError: in ``step``: a gradient is not finite.

    Reference: algorithm 1. Departures: κ, lr; minimisation in place of maximisation.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> opt = MSA(net, proximal=8.0)
        >>> x = torch.linspace(-1, 1, 32).view(16, 2)
        >>> for _ in range(20):
        ...     opt.zero_grad()
        ...     loss = nn.functional.mse_loss(net(x), x[:, :1])
        ...     loss.backward()
        ...     opt.step()
        >>> loss.item() < 0.1
        True
    """

    _settings: tuple[str, ...] = ("_minimizer",)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        *,
        proximal: float = 4.0,
        weight_decay: float = 0.0,
        iterations: int = 3,
        minimizer: Minimizer | None = None,
        params: Iterable[Any] | None = None,
        stages: Sequence[str] | None = None,
        split: Split = "parameters",
    ) -> None:
        if not (proximal > 0 or weight_decay > 0 or minimizer is not None):
            raise ArgumentError(
                f"proximal is {proximal} and weight_decay is {weight_decay}: where a layer is affine its Hamiltonian "
                "is linear and has no minimum; make one of them positive, or give a minimizer, or use EMSA"
            )
        self._start(model, lr, 0.0, proximal, weight_decay, iterations, minimizer, params, stages, split)

    def _start(
        self,
        model: nn.Module,
        lr: float,
        rho: float,
        proximal: float,
        weight_decay: float,
        iterations: int,
        minimizer: Minimizer | None,
        params: Iterable[Any] | None,
        stages: Sequence[str] | None,
        split: Split,
    ) -> None:
        check_number("lr", lr)
        if lr > 1:
            raise ArgumentError(
                f"lr is {lr}: it is the share of the way to the minimiser, at most 1; the length of steps is set by "
                "proximal and rho"
            )
        for name, value in (("rho", rho), ("proximal", proximal), ("weight_decay", weight_decay)):
            check_number(name, value)
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ArgumentError(f"iterations is {iterations!r}: it must be a positive whole number")
        defaults = {
            "lr": lr,
            "rho": rho,
            "proximal": proximal,
            "weight_decay": weight_decay,
            "iterations": iterations,
        }
        super().__init__(model, defaults, params=params, stages=stages, split=split)
        self._minimizer = minimizer

    def _update(self, trajectories: tuple[Trajectory, ...]) -> None:
        assert self._recorder is not None
        systems = [one.layout.system for one in self._recorder.passes]
        self._minimise(list(zip(systems, trajectories, strict=True)))

    def _minimise(self, passes: Sequence[tuple[ModuleSystem, Trajectory]]) -> None:
        """One sweep over the stages, with the states and costates of the given passes."""
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        wanted: dict[str, Tensor] = {
            name: p
            for name, p in self.module.named_parameters()
            if id(p) in groups and p.grad is not None and p.requires_grad
        }
        for name, p in wanted.items():
            if p.grad is not None and not bool(p.grad.isfinite().all()):
                raise DivergenceError(f"the gradient of {name!r} is not finite, and no step was made")
        rho, iterations = self.param_groups[0]["rho"], self.param_groups[0]["iterations"]
        weights = {
            name: (groups[id(p)]["weight_decay"], groups[id(p)]["proximal"]) for name, p in wanted.items()
        }
        problem = Hamiltonians(passes, wanted, weights, rho, self.group)
        begin = problem.reconcile()
        if self._minimizer is None:
            found = blockwise_lbfgs(
                problem.evaluate,
                problem.start,
                problem.sizes,
                iterations=iterations,
                history=iterations,
                begin=begin,
            )
        else:
            found = self._each(problem, self._minimizer)
        for part in problem.split(found):
            for name, value in part.items():
                p = wanted[name]
                p.lerp_(value, groups[id(p)]["lr"])

    def _each(self, problem: Hamiltonians, minimizer: Minimizer) -> Tensor:
        if self.group is not None:
            raise UnsupportedError(
                "minimizer is given, but the batch is spread over processes, of which it sees one: leave it out, so "
                "that L-BFGS runs on the sum over all of them"
            )
        found = []
        regular = torch.split(torch.arange(len(problem.start)), problem.sizes)
        for b, part in enumerate(problem.split(problem.start)):
            first, last = int(regular[b][0]), int(regular[b][-1]) + 1

            def price(values: Any, b: int = b, first: int = first, last: int = last) -> Tensor:
                flat = torch.cat([value.reshape(-1) for value in values.values()])
                whole = torch.cat([problem.start[:first], flat, problem.start[last:]])
                return problem.of_block(b, values) + problem.regular(whole)[first:last].sum()

            values = minimizer(price, {name: value.clone() for name, value in part.items()})
            found.append(torch.cat([leaf.reshape(-1) for leaf in float_leaves(values)]))
        return torch.cat(found)


@cites(REFERENCE)
class EMSA(MSA):
    r"""Extended successive approximation: the Hamiltonians charge for leaving the states and costates they hold.

        v_t = argmin_v ⟨p_{t+1}, f_t(x_t, v)⟩ + λ/2 ‖v‖²
                       + ρ/(2S) ‖x_{t+1} − f_t(x_t, v)‖² + ρS/2 ‖p_t − ∇_x ⟨p_{t+1}, f_t(x_t, v)⟩‖²

    The sums run over the S samples of the batch. No learning rate: ρ is all there is, the larger the shorter the step.
    It leaves stationary points where gradient descent stays. With ``adapt`` each step asks the closure for the loss
    that it has brought, keeps the step only if the loss has fallen, and finds ρ by itself: halved then, and doubled
    otherwise; on one full batch the loss falls monotonically. On mini-batches every step solves for its own batch,
    which hurts the more the smaller it is: hence ``lr``, 1/2 by default; on full batches 1 is faster.

    A step costs thirty to forty gradient steps with five iterations of L-BFGS, and twice that with ten: each iteration
    evaluates all Hamiltonians once, with second derivatives.

    Args:
        model: the network, or a DistributedDataParallel around it; read as stages at its first run.
        lr: relaxation, the share of the way to the minimiser that is gone, in (0, 1].
        rho: weight ρ of the feasibility terms.
        proximal: weight κ of a further term κ/2 ‖v − θ‖²; needed where gradients are clipped, the loss has a penalty
            or there is dropout, because the Hamiltonians then do not see all of the gradient.
        weight_decay: weight λ.
        iterations: iterations of L-BFGS in a step; the paper takes 10.
        adapt: accept or reject by the loss; ``step`` needs a closure then, which is called twice or more.
        params: parameters or groups; by default all that require a gradient.
        stages: where to cut the network, as for :func:`~bolza.systems.as_system`.
        split: as for :class:`MSA`.

    Raises:
        ArgumentError: a number is out of its range; in ``step``: ``adapt`` without a closure.
        UnsupportedError: in ``step``: the passes were not seen, or the gradients are not theirs and ``proximal`` is 0.
        DivergenceError: in ``step``: a gradient is not finite.

    Reference: algorithm 2. Departures: means over samples, adaptation of ρ, lr, κ; minimisation.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> opt = EMSA(net, lr=1.0, adapt=True)
        >>> x = torch.linspace(-1, 1, 32)[:, None]
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = nn.functional.mse_loss(net(x), x)
        ...     loss.backward()
        ...     return loss
        >>> losses = [opt.step(closure).item() for _ in range(10)]
        >>> losses == sorted(losses, reverse=True), losses[-1] < 0.02
        (True, True)
    """

    _settings = ("_minimizer", "adapt")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.5,
        *,
        rho: float = 1.0,
        proximal: float = 0.0,
        weight_decay: float = 0.0,
        iterations: int = 5,
        adapt: bool = False,
        params: Iterable[Any] | None = None,
        stages: Sequence[str] | None = None,
        split: Split = "parameters",
    ) -> None:
        check_number("rho", rho, open_low=True)
        self._start(model, lr, rho, proximal, weight_decay, iterations, None, params, stages, split)
        self.adapt = adapt

    def _fresh(self) -> None:
        super()._fresh()
        self._held: Sequence[tuple[ModuleSystem, Trajectory]] = ()

    def _minimise(self, passes: Sequence[tuple[ModuleSystem, Trajectory]]) -> None:
        self._held = passes if self.adapt else ()
        super()._minimise(passes)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: computes the loss and its gradients, and returns the loss; needed with ``adapt``, and then called
                again after each trial step.

        Returns:
            The loss before the step, ``None`` without a closure.
        """
        if not self.adapt:
            return super().step(closure)
        if closure is None:
            raise ArgumentError(
                "adapt is set, but step() got no closure: give one, to measure the loss after a step"
            )
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        gradients: list[Tensor | None] = []

        def first() -> Any:
            loss = closure()
            gradients.extend(None if p.grad is None else p.grad.clone() for p in parameters)
            return loss

        loss = super().step(first)
        value, held = float(loss.detach()), self._held
        self._held = ()
        if not held:
            return loss
        for _ in range(_REJECTIONS):
            with torch.enable_grad():
                reached = float(closure().detach())
            better = reached < value
            for group in self.param_groups:
                group["rho"] = group["rho"] / 2 if better else 2 * group["rho"]
            if better:
                break
            for p, old, gradient in zip(parameters, before, gradients, strict=True):
                p.copy_(old)
                p.grad = gradient
            assert self._recorder is not None
            with self._recorder.paused():
                super()._minimise(held)
        else:
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
        self.zero_grad()
        return loss
