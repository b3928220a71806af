r"""A training run as a system: the clock is the step, the state the parameters, the control the hyper-parameters.

    θ_{t+1} = θ_t − lr_t · v_t,   v_t from ∇ℓ(θ_t, batch_t), momentum_t, weight decay_t

Costates of this clock are hyper-gradients and meta-gradients: for J = Φ(θ_T), p_0 is the gradient in
the initial parameters (MAML), p_T the first-order shortcut (FOMAML), and ∇_u H_t is ∂J/∂lr_t.
:func:`~bolza.core.adjoint` evaluates each step again, so that memory is that of one step beside the
stored parameters.

Reference: Maclaurin, Duvenaud & Adams (2015), *Gradient-based Hyperparameter Optimization through
Reversible Learning*, arXiv:1502.03492; Finn, Abbeel & Levine (2017), *Model-Agnostic Meta-Learning*,
arXiv:1703.03400; Li, Zhou, Chen & Li (2017), *Meta-SGD*, arXiv:1707.09835.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.ops.replay import differentiable_kernels, frozen_statistics, same_randomness
from bolza.ops.trees import Tree, tree_add, tree_detach, tree_map, tree_zeros_like

__all__ = ["SGD", "Adam", "TrainingSystem", "UpdateRule", "module_loss"]

State: TypeAlias = dict[str, Tree]
Loss: TypeAlias = Callable[[Tree, Any], Tensor]


@runtime_checkable
class UpdateRule(Protocol):
    """An optimizer as a pure function of its hyper-parameters.

    ``controls()`` gives the nominal hyper-parameters of one step, ``init(params)`` what the rule
    remembers, by name, and ``update(t, params, memory, gradient, u)`` the new parameters and memory.

    Example:
        >>> isinstance(SGD(lr=0.1), UpdateRule)
        True
    """

    def controls(self) -> dict[str, Tree]:
        """Nominal control of one step."""
        ...

    def init(self, params: Tree) -> State:
        """Memory before the first step."""
        ...

    def update(
        self, t: int, params: Tree, memory: State, gradient: Tree, u: Mapping[str, Tree]
    ) -> tuple[Tree, State]:
        """Parameters and memory after step ``t``."""
        ...


@dataclass(frozen=True)
class SGD:
    r"""Stochastic gradient descent as ``torch.optim.SGD`` defines it, options included.

        g ← ∇ℓ + weight_decay·θ
        b ← momentum·b + (1 − dampening)·g       (b ← g in the first step)
        θ ← θ − lr·(g + momentum·b  if nesterov else  b)

    Each of ``lr``, ``momentum``, ``dampening`` and ``weight_decay`` is a number, a tensor, or a tree
    like the parameters (one learning rate for each entry is Meta-SGD).

    Args:
        lr: learning rate.
        momentum: factor of the old velocity; 0 keeps no velocity, so that it can't be controlled.
        dampening: part of the gradient that the velocity leaves out after the first step.
        weight_decay: weight of ½‖θ‖² in the loss.
        nesterov: look ahead by the velocity.
        maximize: climb the loss.

    Raises:
        ArgumentError: ``nesterov`` without momentum, or with dampening.

    Example:
        >>> sorted(SGD(lr=0.1, momentum=0.9).controls())
        ['dampening', 'lr', 'momentum', 'weight_decay']
    """

    lr: float | Tree
    momentum: float | Tree = 0.0
    dampening: float | Tree = 0.0
    weight_decay: float | Tree = 0.0
    nesterov: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and (not self._has_velocity or not _is_zero(self.dampening)):
            raise ArgumentError(
                f"nesterov is set, but momentum is {self.momentum} and dampening is {self.dampening}: "
                "it needs momentum and no dampening"
            )

    @property
    def _has_velocity(self) -> bool:
        return not _is_zero(self.momentum)

    def controls(self) -> dict[str, Tree]:
        """Return lr and weight_decay, and with momentum also momentum and dampening."""
        given = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self._has_velocity:
            given |= {"momentum": self.momentum, "dampening": self.dampening}
        return _as_tensors(given)

    def init(self, params: Tree) -> State:
        """Return a velocity of zero, if there is momentum."""
        return {"velocity": tree_zeros_like(params)} if self._has_velocity else {}

    def update(
        self, t: int, params: Tree, memory: State, gradient: Tree, u: Mapping[str, Tree]
    ) -> tuple[Tree, State]:
        """Return parameters and velocity after one step; what ``u`` lacks is as constructed."""
        u = {**self.controls(), **u}
        if self.maximize:
            gradient = tree_map(torch.neg, gradient)
        gradient = tree_add(gradient, _times(u["weight_decay"], params))
        direction = gradient
        if self._has_velocity:
            pushed = gradient if t == 0 else tree_add(gradient, _times(u["dampening"], gradient), alpha=-1.0)
            velocity = tree_add(_times(u["momentum"], memory["velocity"]), pushed)
            memory = {"velocity": velocity}
            direction = tree_add(gradient, _times(u["momentum"], velocity)) if self.nesterov else velocity
        return tree_add(params, _times(u["lr"], direction), alpha=-1.0), memory


@dataclass(frozen=True)
class Adam:
    r"""Adam and AdamW as ``torch.optim`` defines them, options included.

        g ← ∇ℓ + weight_decay·θ                        (decoupled: θ ← θ − lr·weight_decay·θ instead)
        m ← β₁m + (1 − β₁)g,   v ← β₂v + (1 − β₂)g²
        θ ← θ − lr · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + eps)

    Each of ``lr``, ``beta1``, ``beta2`` and ``weight_decay`` is a number, a tensor, or a tree like the parameters,
    and a control of the step. Where v is zero, its root counts as constant.

    Args:
        lr: learning rate.
        betas: (β₁, β₂), memories of the mean and of the square of the gradient.
        eps: what is added to the root.
        weight_decay: weight of ½‖θ‖² in the loss, or decay of the parameters where ``decoupled``.
        decoupled: AdamW.
        amsgrad: divide by the largest v so far.
        maximize: climb the loss.

    Example:
        >>> sorted(Adam().controls())
        ['beta1', 'beta2', 'lr', 'weight_decay']
        >>> run = TrainingSystem(lambda w, _: w.square().sum(), [None] * 3, Adam(lr=0.5))
        >>> from bolza.core import rollout
        >>> rollout(run, run.initial_state(torch.ones(1))).states[1]["params"]
        tensor([0.5000])
    """

    lr: float | Tree = 1e-3
    betas: tuple[float | Tree, float | Tree] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | Tree = 0.0
    decoupled: bool = False
    amsgrad: bool = False
    maximize: bool = False

    def controls(self) -> dict[str, Tree]:
        """Return lr, beta1, beta2 and weight_decay."""
        given = {"lr": self.lr, "beta1": self.betas[0], "beta2": self.betas[1]}
        return _as_tensors(given | {"weight_decay": self.weight_decay})

    def init(self, params: Tree) -> State:
        """Return means of zero, by the names that ``torch.optim.Adam`` gives them."""
        names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if self.amsgrad else ())
        return {name: tree_zeros_like(params) for name in names}

    def update(
        self, t: int, params: Tree, memory: State, gradient: Tree, u: Mapping[str, Tree]
    ) -> tuple[Tree, State]:
        """Return parameters and means after one step; what ``u`` lacks is as constructed."""
        u = {**self.controls(), **u}
        if self.maximize:
            gradient = tree_map(torch.neg, gradient)
        if self.decoupled:
            params = tree_add(params, _times(u["lr"], _times(u["weight_decay"], params)), alpha=-1.0)
        else:
            gradient = tree_add(gradient, _times(u["weight_decay"], params))
        first = _mix(u["beta1"], memory["exp_avg"], gradient)
        second = _mix(u["beta2"], memory["exp_avg_sq"], tree_map(torch.square, gradient))
        after: State = {"exp_avg": first, "exp_avg_sq": second}
        if self.amsgrad:
            second = tree_map(torch.maximum, memory["max_exp_avg_sq"], second)
            after["max_exp_avg_sq"] = second

        def direction(m: Tensor, v: Tensor, beta1: Any, beta2: Any) -> Tensor:
            there = v > 0  # the root has no derivative at zero
            root = torch.where(there, torch.where(there, v, 1.0).sqrt(), 0.0)
            scale = (1 - beta2 ** (t + 1)) ** 0.5
            return m / (root / scale + self.eps) / (1 - beta1 ** (t + 1))

        betas = (_spread(u[name], first) for name in ("beta1", "beta2"))
        step = tree_map(direction, first, second, *betas)
        return tree_add(params, _times(u["lr"], step), alpha=-1.0), after


def _as_tensors(given: Mapping[str, Any]) -> dict[str, Tree]:
    """Numbers in float64, so that 0.1 is that of torch.optim; they take the dtype of what they multiply."""
    return {
        name: torch.tensor(float(value), dtype=torch.float64) if isinstance(value, int | float) else value
        for name, value in given.items()
    }


def _spread(factor: Tree, like: Tree) -> Tree:
    """A number or tensor for every leaf of a tree; a tree as it is."""
    return tree_map(lambda _: factor, like) if isinstance(factor, int | float | Tensor) else factor


def _mix(beta: Tree, old: Tree, new: Tree) -> Tree:
    """β·old + (1 − β)·new, leaf by leaf."""
    return tree_map(lambda a, b, w: a + (b - a) * (1 - w).to(a.dtype), old, new, _spread(beta, old))


def _is_zero(value: object) -> bool:
    return isinstance(value, int | float) and value == 0


def _times(factor: Tree, tree: Tree) -> Tree:
    """A number, a tensor or a like tree times a tree, in the dtype of the tree."""

    def times(leaf: Tensor, by: Any) -> Tensor:
        return leaf * (by.to(leaf.dtype) if isinstance(by, Tensor) and by.ndim else by)

    if isinstance(factor, int | float | Tensor):
        return tree_map(lambda leaf: times(leaf, factor), tree)
    return tree_map(times, tree, factor)


class TrainingSystem:
    r"""An update rule on a sequence of batches.

    A state is a dict: ``"params"`` and what the rule remembers (``"velocity"``); a control is a dict
    of hyper-parameters, of which those that are missing are as the optimizer was made.

    Args:
        loss: (params, batch) → scalar, or with ``sample_weights`` → one loss a sample, shape ``(batch,)``.
        batches: one batch a step, in any form that the loss understands; or a function t → batch.
        optimizer: the update rule.
        horizon: number of steps; needed where ``batches`` is a function.
        controls: hyper-parameters of each step, the same nominal ones by default.
        sample_weights: weights w of the samples, one tensor ``(batch,)`` a step, as further controls
            ``"sample_weights"``; the objective of a step is then Σ wᵢ ℓᵢ.
        start: index of the first step, for a run that goes on: dampening spares only step 0.

    Raises:
        ArgumentError: no horizon for a function of batches.
        DataError: no batches.
        ShapeError: controls or weights are not as many as the batches.

    Example:
        >>> from bolza.core import CallableCost, adjoint, rollout
        >>> run = TrainingSystem(lambda w, c: (w - c).square().sum() / 2, [1.0, 1.0], SGD(lr=0.5))
        >>> cost = CallableCost(terminal=lambda x: x["params"].square().sum() / 2)
        >>> trajectory = adjoint(run, cost, rollout(run, run.initial_state(torch.zeros(1))))
        >>> trajectory.states[-1]["params"], trajectory.costates[0]["params"]      # ∂J/∂w_0
        (tensor([0.7500]), tensor([0.1875]))
        >>> [round(float(u["lr"]), 6) for u in trajectory.gradients]               # ∂J/∂lr_t
        [0.375, 0.375]
    """

    def __init__(
        self,
        loss: Loss,
        batches: Sequence[Any] | Callable[[int], Any],
        optimizer: UpdateRule,
        *,
        horizon: int | None = None,
        controls: Sequence[Mapping[str, Tree]] | None = None,
        sample_weights: Sequence[Tensor] | None = None,
        start: int = 0,
    ) -> None:
        if callable(batches):
            if horizon is None:
                raise ArgumentError("horizon is None, but batches is a function: give the number of steps")
            self.batch, self.horizon = batches, horizon
        else:
            self.batch = batches.__getitem__
            self.horizon = len(batches) if horizon is None else horizon
            if not 0 < self.horizon <= len(batches):
                raise DataError(
                    f"there are {len(batches)} batches for {self.horizon} steps: give one for each step"
                )
        self.loss, self.optimizer, self.start = loss, optimizer, start
        chosen = [optimizer.controls()] * self.horizon if controls is None else [dict(u) for u in controls]
        if len(chosen) != self.horizon:
            raise ShapeError(
                f"there are {len(chosen)} controls, but {self.horizon} steps: give one for each step"
            )
        if sample_weights is not None:
            if len(sample_weights) != self.horizon:
                raise ShapeError(
                    f"there are {len(sample_weights)} sample_weights, but {self.horizon} steps: give one tensor a step"
                )
            chosen = [u | {"sample_weights": w} for u, w in zip(chosen, sample_weights, strict=True)]
        self.controls: tuple[dict[str, Tree], ...] = tuple(chosen)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batches: Sequence[tuple[Any, Any]] | Callable[[int], tuple[Any, Any]],
        optimizer: UpdateRule,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> TrainingSystem:
        """Train a network: the loss is loss(module(x), y) on batches (x, y).

        Args:
            module: the network; neither its parameters nor its running statistics change.
            loss: (prediction, target) → scalar.
            batches: pairs (x, y), one a step.
            optimizer: the update rule.
            seed: for networks with dropout: every step draws with this seed, whenever it is evaluated.
            options: as for the constructor.

        Returns:
            TrainingSystem; its first state is ``initial_state(dict(module.named_parameters()))``, or that of
            those parameters alone that are to be trained: what is left out stays as it is.

        Example:
            >>> net, data = nn.Linear(2, 1), [(torch.ones(4, 2), torch.zeros(4, 1))] * 3
            >>> run = TrainingSystem.from_module(net, nn.functional.mse_loss, data, SGD(lr=0.1))
            >>> x = run.initial_state(dict(net.named_parameters()))
            >>> sorted(run.step(0, x, run.controls[0])["params"])
            ['bias', 'weight']
        """
        return cls(module_loss(module, loss, seed=seed), batches, optimizer, **options)

    def initial_state(self, params: Tree) -> State:
        """Return the state before the first step; its tensors are not those of ``params``.

        Args:
            params: tree of parameters, ``dict(module.named_parameters())`` for a network.
        """
        params = tree_map(Tensor.clone, tree_detach(params))
        return {"params": params, **self.optimizer.init(params)}

    def step(self, t: int, x: State, u: Mapping[str, Tree]) -> State:
        """Return the state after one update on batch ``t``; differentiable as often as the loss."""
        batch = self.batch(t)
        weights = u.get("sample_weights")

        def objective(params: Tree) -> Tensor:
            value = self.loss(params, batch)
            wanted: tuple[int, ...] = () if weights is None else tuple(weights.shape)
            if not isinstance(value, Tensor) or tuple(value.shape) != wanted:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ShapeError(
                    f"the loss of step {t} has shape {got}, not {wanted}: without sample_weights it is a scalar, "
                    "with them one number a sample (reduction='none')"
                )
            return value if weights is None else (weights * value).sum()

        params = x["params"]
        memory = {name: value for name, value in x.items() if name != "params"}
        gradient = grad(objective)(params)
        params, memory = self.optimizer.update(self.start + t, params, memory, gradient, u)
        return {"params": params, **memory}


def module_loss(module: nn.Module, loss: Callable[[Any, Any], Tensor], *, seed: int | None = None) -> Loss:
    """Make a loss of parameters of a network's loss: (params, (x, y)) → loss(module(x), y).

    Running statistics do not move, and the kernels are such that the loss has second derivatives.

    Args:
        module: the network; a tuple x is given to it as several arguments.
        loss: (prediction, target) → tensor.
        seed: draw random numbers (dropout) with this seed at every evaluation.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> objective = module_loss(net, nn.functional.mse_loss)
        >>> objective({"weight": torch.ones(1, 2)}, (torch.ones(4, 2), torch.zeros(4, 1)))
        tensor(4.)
    """

    def objective(params: Tree, batch: tuple[Any, Any]) -> Tensor:
        x, y = batch
        device = next((p.device for p in module.parameters()), None)
        random = nullcontext() if seed is None else same_randomness(seed, device)
        with frozen_statistics(module), differentiable_kernels(module), random:
            return loss(functional_call(module, params, x), y)

    return objective
