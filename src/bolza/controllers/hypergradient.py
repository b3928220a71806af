r"""Hyper-gradients: costates, or tangents, of a training run.

    J = Φ(θ_T),   (θ, m)_{t+1} = f_t((θ, m)_t, u_t)
    reverse:   p_T = ∇Φ,  p_t = A_tᵀ p_{t+1},   ∂J/∂u_t = B_tᵀ p_{t+1}
    forward:   Z_0 = 0,   Z_{t+1} = A_t Z_t + B_t,   dJ/du = ∇Φ · Z_T

Reverse takes one sweep for every hyper-parameter of every step; forward carries one tangent a hyper-parameter and
stores nothing. A and B are the derivatives of a step in its state (parameters and what the optimizer remembers)
and in its hyper-parameters; both ways are exact and agree to rounding.

Reference: Maclaurin, Duvenaud & Adams (2015), *Gradient-based Hyperparameter Optimization through Reversible Learning*,
arXiv:1502.03492; Franceschi, Donini, Frasconi & Pontil (2017), *Forward and Reverse Gradient-Based Hyperparameter
Optimization*, arXiv:1703.01785.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bolza.controllers.online_hypergradient import FRANCESCHI
from bolza.core import CallableCost, checkpointed_adjoint, linearize
from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Batch, Data, batches_of, read, select_parameters
from bolza.ops.trees import Tree, tree_detach, tree_dot, tree_map
from bolza.systems import SGD, TrainingSystem, UpdateRule, module_loss

__all__ = ["HyperGradients", "hypergradients"]

MACLAURIN = Reference(
    "maclaurin2015gradient",
    "Maclaurin, Dougal and Duvenaud, David and Adams, Ryan P.",
    "Gradient-based Hyperparameter Optimization through Reversible Learning",
    2015,
    "International Conference on Machine Learning",
    "1502.03492",
)


@dataclass(frozen=True)
class HyperGradients:
    """Derivatives of the final cost of a run in its hyper-parameters.

    Attributes:
        value: J, the cost of the final parameters.
        total: dJ/du of a hyper-parameter held over the run, ``()``, or ``(groups,)``.
        per_step: ∂J/∂u_t, ``(steps,)`` or ``(steps, groups)``; empty in forward mode.
        initial: ∂J/∂θ_0 by parameter; empty in forward mode.
        final: θ_T by parameter.
        most_states: training states that were held at once, beside the present one.
    """

    value: Tensor
    total: dict[str, Tensor]
    per_step: dict[str, Tensor]
    initial: dict[str, Tensor]
    final: dict[str, Tensor]
    most_states: int


@cites(MACLAURIN, FRANCESCHI)
def hypergradients(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Iterable[Batch],
    validation: Data,
    optimizer: UpdateRule | None = None,
    *,
    hyper: Sequence[str] = ("lr",),
    mode: Literal["reverse", "forward"] = "reverse",
    groups: Sequence[Sequence[str]] | None = None,
    every: int | None = None,
    schedule: Sequence[Mapping[str, float]] | None = None,
    seed: int | None = None,
) -> HyperGradients:
    r"""Differentiate the validation loss at the end of a training run in the run's hyper-parameters.

    The run starts at the model's present parameters and leaves the model as it is.

    Args:
        model: the network, in the mode in which it is trained; running statistics do not move.
        loss: (prediction, target) → scalar.
        batches: one batch (x, y) a step.
        validation: what J is measured on: a pair, or batches whose losses are averaged.
        optimizer: the update rule, ``SGD(0.1)`` by default; its hyper-parameters are where the derivative is taken.
        hyper: controls of the rule: ``"lr"``, ``"weight_decay"``, with momentum ``"momentum"`` and ``"dampening"``; of
            ``Adam`` ``"beta1"`` and ``"beta2"``.
        mode: ``"reverse"`` for many hyper-parameters or one value a step; ``"forward"`` for few, in the memory of a
            step, at about three gradients a step and hyper-parameter.
        groups: names of parameters, or of modules, group by group, where each group has values of its own; every
            trainable parameter must be in one of them.
        every: distance of the states that the reverse mode keeps, √steps by default.
        schedule: hyper-parameters of each step that differ from those of the rule.
        seed: of dropout, the same at every evaluation of a step.

    Returns:
        :class:`HyperGradients`.

    Raises:
        ArgumentError: a name or mode that is unknown, or groups that overlap or leave parameters out.
        DataError: no batches.
        UnsupportedError: the network has no forward derivative.

    Reference: Maclaurin, Duvenaud & Adams (2015), arXiv:1502.03492, §2; Franceschi et al. (2017), arXiv:1703.01785,
    Alg. 1 and 2. Departure: checkpoints in place of reversed steps.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(net.weight)
        >>> data = (torch.ones(1, 1), torch.zeros(1, 1))                      # loss w², two steps: w ← (1 − 2η) w
        >>> found = hypergradients(net, nn.functional.mse_loss, [data] * 2, data, SGD(lr=0.25))
        >>> found.value, found.total["lr"], found.per_step["lr"]              # J = (1 − 2η)⁴
        (tensor(0.0625), tensor(-1., dtype=torch.float64), tensor([-0.5000, -0.5000], dtype=torch.float64))
    """
    if mode not in ("reverse", "forward"):
        raise ArgumentError(f"mode={mode!r} is unknown: choose 'reverse' or 'forward'")
    rule = SGD(0.1) if optimizer is None else optimizer
    hyper = (hyper,) if isinstance(hyper, str) else tuple(hyper)
    known = rule.controls()
    for name in hyper:
        if name not in known:
            raise ArgumentError(
                f"hyper has {name!r}, but {type(rule).__name__} has the controls {', '.join(known)}; momentum is one "
                "where it is not 0"
            )
    chosen = select_parameters(model)
    owner = _owners(model, list(chosen), groups)
    data = list(batches)
    device = next(iter(chosen.values())).device
    plans = [dict(known) | _tensors(u) for u in (schedule if schedule is not None else [{}] * len(data))]
    for plan in plans:
        for name in hyper if groups is not None else ():
            value = plan[name]
            if isinstance(value, Tensor) and value.ndim == 0:
                plan[name] = {
                    key: value.clone() for key in chosen
                }  # a leaf a parameter: groups are sums of them
    objective = module_loss(model, loss, seed=seed)
    system = TrainingSystem(objective, data, rule, controls=plans)
    held_out = list(read(batches_of(validation), device))
    cost = CallableCost(
        terminal=lambda x: torch.stack([objective(x["params"], batch) for batch in held_out]).mean()
    )
    start = system.initial_state(dict(chosen))
    if mode == "forward":
        return _forward(system, cost, start, hyper, owner)
    sweep = checkpointed_adjoint(system, cost, start, every=every)
    per_step = {
        name: torch.stack([_by_group(gradient[name], owner) for gradient in sweep.gradients])
        for name in hyper
    }
    return HyperGradients(
        sweep.value,
        {name: values.sum(0) for name, values in per_step.items()},
        per_step,
        dict(sweep.costate["params"]),
        dict(sweep.final["params"]),
        sweep.most_states,
    )


def _forward(
    system: TrainingSystem, cost: CallableCost, x: Any, hyper: Sequence[str], owner: Mapping[str, int] | None
) -> HyperGradients:
    count = 1 if owner is None else max(owner.values()) + 1
    tangents: dict[tuple[str, int], Tree] = {(name, i): None for name in hyper for i in range(count)}
    try:
        for t, u in enumerate(system.controls):
            step = linearize(system, t, x, u)
            tangents = {
                key: step.jvp(tangent, _direction(u, key, owner)) for key, tangent in tangents.items()
            }
            x = step.next_state
    except (RuntimeError, NotImplementedError) as error:
        if "forward" not in str(error).lower():
            raise
        raise UnsupportedError(
            f"the network has an operation without a forward derivative, so use mode='reverse': {error}"
        ) from error
    leaves = {name: p.detach().requires_grad_() for name, p in x["params"].items()}
    with torch.enable_grad():
        value = cost.terminal({"params": leaves})
        slope = dict(
            zip(
                leaves,
                torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True),
                strict=True,
            )
        )
    total = {}
    for name in hyper:
        found = [tree_dot(slope, tangents[name, i]["params"]).double() for i in range(count)]
        total[name] = found[0] if owner is None else torch.stack(found)
    return HyperGradients(value.detach(), total, {}, {}, tree_detach(x["params"]), 1)


def _direction(u: Mapping[str, Tree], key: tuple[str, int], owner: Mapping[str, int] | None) -> Tree:
    """The direction in the controls that raises one hyper-parameter of one group by one."""
    name, group = key
    found = {other: tree_map(torch.zeros_like, value) for other, value in u.items()}
    if owner is None:
        found[name] = tree_map(torch.ones_like, u[name])
    else:
        found[name] = {
            p: torch.ones_like(v) if owner[p] == group else torch.zeros_like(v) for p, v in u[name].items()
        }
    return found


def _by_group(gradient: Tree, owner: Mapping[str, int] | None) -> Tensor:
    """The derivative in a common change of a control, of every group."""
    if owner is None:
        return torch.stack([leaf.double().sum() for leaf in torch.utils._pytree.tree_leaves(gradient)]).sum()
    count = max(owner.values()) + 1
    found = [
        torch.stack([leaf.double().sum() for name, leaf in gradient.items() if owner[name] == i]).sum()
        for i in range(count)
    ]
    return torch.stack(found)


def _owners(
    model: nn.Module, names: list[str], groups: Sequence[Sequence[str]] | None
) -> dict[str, int] | None:
    if groups is None:
        return None
    owner: dict[str, int] = {}
    for i, group in enumerate(groups):
        for name in select_parameters(model, group):
            if name in owner:
                raise ArgumentError(f"groups has {name!r} in group {owner[name]} and in group {i}")
            owner[name] = i
    missing = [name for name in names if name not in owner]
    if missing:
        raise ArgumentError(f"groups leaves out {missing[0]!r}: put it into one, or freeze it")
    return owner


def _tensors(u: Mapping[str, Any]) -> dict[str, Tree]:
    return {
        k: v if not isinstance(v, int | float) else torch.tensor(float(v), dtype=torch.float64)
        for k, v in u.items()
    }
