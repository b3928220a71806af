r"""Who stays: a model that is deployed round after round moves the people it serves.

    λ_{t+1,k} = M(λ_{t,k}, ℓ_k(θ_t)),      J = Σ_{t=1..T} ρ^{t−1} Σ_k (1 − λ_{t,k})²  +  floor terms

λ_k is the active share of group k, ℓ_k(θ) the risk that the model θ of a round has for it, M how many stay and come:
it falls with the risk. A learner that fits whoever is there serves the large groups, the others leave, and the
imbalance grows. The state is λ, the control the model of each round, and the maximum principle plans the models,

    p_T = ∂J/∂λ_T,      p_t = ∂J_t/∂λ_t + (∂M/∂λ)ᵀ p_{t+1},      θ_t ← θ_t − a (∂M/∂θ_t)ᵀ p_{t+1},

which is :func:`bolza.core.adjoint` on this system. The sum of costs does not protect a group: where risks are steep the
best plan can give one up. ``floor`` adds w Σ_t Σ_k max(0, f_k − λ_{t,k})².

Reference: Chen, Li & Zhang (2023), *Asymptotically Fair Participation in Machine Learning Models: an Optimal Control
Perspective*, arXiv:2311.10223. Departures: M is the caller's, with one surrogate to begin with; the gradient goes to
L-BFGS, from several first plans, because J is not convex.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bolza.core import CallableCost, Reference, adjoint, cites, rollout
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.ops.trees import Tree, float_leaves, tree_map, with_float_leaves

__all__ = [
    "Participation",
    "ParticipationPlan",
    "active_share",
    "exponential_retention",
    "group_risks",
    "minimax_plan",
    "myopic_plan",
    "plan_participation",
]

CHEN = Reference(
    "chen2023participation",
    "Chen, Zhuotong and Li, Qianxiao and Zhang, Zheng",
    "Asymptotically Fair Participation in Machine Learning Models: an Optimal Control Perspective",
    2023,
    arxiv="2311.10223",
)

_ONE_GRAPH = 100_000  # numbers in all models together

Risks: TypeAlias = Callable[[Tree], Tensor]
Retention: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def exponential_retention(rate: float = 1.0, arrival: float = 0.3) -> Retention:
    r"""Stay with probability r = e^{−aℓ}, come back with probability b·r: M(λ, ℓ) = λr + (1 − λ)br.

    Args:
        rate: a, in units of 1/risk.
        arrival: b, between 0 and 1.

    Returns:
        M, a function of shares and risks.

    Raises:
        ArgumentError: a is not positive, or b lies outside [0, 1].

    Example:
        >>> exponential_retention()(torch.tensor(0.5), torch.tensor(0.0))
        tensor(0.6500)
    """
    if not rate > 0 or not 0 <= arrival <= 1:
        raise ArgumentError(f"rate={rate} must be positive and arrival={arrival} between 0 and 1")

    def retention(share: Tensor, risk: Tensor) -> Tensor:
        r = (-rate * risk).exp()
        return share * r + (1 - share) * arrival * r

    return retention


def active_share(risk: Tensor, rate: float = 1.0, arrival: float = 0.3) -> Tensor:
    r"""Share at which :func:`exponential_retention` comes to rest, λ* = br / (1 − r + br) with r = e^{−aℓ}.

    Args:
        risk: ℓ, any shape.
        rate: a.
        arrival: b.

    Returns:
        λ*, the shape of ``risk``.

    Example:
        >>> active_share(torch.tensor(0.3))
        tensor(0.4616)
    """
    r = (-rate * risk).exp()
    return arrival * r / (1 - r + arrival * r)


@cites(CHEN)
class Participation:
    r"""Active shares of groups under the models of each round: λ_{t+1} = M(λ_t, ℓ(θ_t)), a :class:`bolza.core.System`.

    Args:
        risks: θ → the risks ℓ of K groups, shape ``(K,)``; see :func:`group_risks` for a network.
        controls: the model θ_t of each round: numbers or trees of tensors.
        retention: M(λ, ℓ), both ``(K,)``; :func:`exponential_retention` by default.

    Raises:
        ArgumentError: there are no rounds.

    Reference: Chen, Li & Zhang (2023), arXiv:2311.10223.

    Example:
        >>> system = Participation(lambda theta: (theta - torch.tensor([0.0, 1.0])) ** 2, [torch.tensor(0.5)] * 2)
        >>> rollout(system, torch.tensor([0.9, 0.5])).states[-1]
        tensor([0.6285, 0.5096])
    """

    def __init__(self, risks: Risks, controls: Sequence[Tree], retention: Retention | None = None) -> None:
        if not len(controls):
            raise ArgumentError("controls is empty: give the model of at least one round")
        self.risks, self.controls, self.horizon = risks, tuple(controls), len(controls)
        self.retention = retention or exponential_retention()

    def step(self, t: int, x: Tensor, u: Tree) -> Tensor:
        """Return the shares after round ``t`` with the model ``u``."""
        risk = self.risks(u)
        if not isinstance(risk, Tensor) or risk.shape != x.shape:
            got = tuple(risk.shape) if isinstance(risk, Tensor) else type(risk).__name__
            raise ShapeError(
                f"risks returned {got} for {tuple(x.shape)} shares: it must give one risk a group, (K,)"
            )
        share = self.retention(x, risk)
        if not bool(torch.isfinite(share.detach()).all()):
            raise DivergenceError(f"a share of round {t} is not finite: check risks and retention", step=t)
        return share


@dataclass(frozen=True)
class ParticipationPlan:
    """A sequence of models, and what comes of it.

    Attributes:
        controls: θ_0 … θ_{T−1}.
        shares: λ_0 … λ_T, shape ``(T + 1, K)``.
        risks: ℓ(θ_t), shape ``(T, K)``.
        cost: J with the floor term.
        gradient_norm: ‖∂J/∂θ‖ over all rounds at the end of the search.
        start: name of the first plan that it came from.
        compared: J of the first plans.
    """

    controls: tuple[Tree, ...]
    shares: Tensor
    risks: Tensor
    cost: float
    gradient_norm: float = float("nan")
    start: str = ""
    compared: Mapping[str, float] = field(default_factory=dict)


def group_risks(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], groups: Sequence[tuple[Tensor, Tensor]]
) -> Risks:
    """Risks of the groups as a function of the parameters of a network: the mean loss on each group's samples.

    Args:
        model: the network; neither its parameters nor its running statistics change.
        loss: (prediction, target) → scalar.
        groups: samples ``(x, y)`` of each group.

    Returns:
        Function of a dict of parameters, ``dict(model.named_parameters())`` say.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> pairs = [(torch.ones(3, 1), torch.zeros(3, 1)), (torch.ones(2, 1), torch.ones(2, 1))]
        >>> group_risks(net, nn.functional.mse_loss, pairs)(dict(net.named_parameters())).shape
        torch.Size([2])
    """
    from bolza.systems.training import module_loss

    objective = module_loss(model, loss)
    return lambda params: torch.stack([objective(params, group) for group in groups])


def _cost(floor: Tensor | None, floor_weight: float, discount: float, horizon: int) -> CallableCost:
    def stage(t: int, x: Tensor) -> Tensor:
        value = (1 - x).square().sum()
        if floor is not None:
            value = value + floor_weight * (floor - x).clamp_min(0).square().sum()
        return discount ** (t - 1) * value

    return CallableCost(
        terminal=lambda x: stage(horizon, x), running=lambda t, x, u: stage(t, x) if t else 0.0
    )


def _descend(
    start: Tree, slope: Callable[[Tree], tuple[float, Sequence[Tensor]]], iterations: int, tolerance: float
) -> tuple[Tree, float, float]:
    """L-BFGS on the leaves of a tree: where it ends, the value and the norm of the gradient there."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in float_leaves(start)]
    optimizer = torch.optim.LBFGS(
        leaves,
        max_iter=iterations,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value, slopes = slope(with_float_leaves(start, [leaf.detach() for leaf in leaves]))
        for leaf, g in zip(leaves, slopes, strict=True):
            leaf.grad = g.detach().clone()
        return torch.tensor(value, dtype=torch.float64)

    optimizer.step(closure)
    best = with_float_leaves(start, [leaf.detach() for leaf in leaves])
    value, slopes = slope(best)
    return best, value, float(torch.stack([g.square().sum() for g in slopes]).sum().sqrt())


def _minimise(function: Callable[[Tree], Tensor], start: Tree, iterations: int) -> Tree:
    def slope(theta: Tree) -> tuple[float, Sequence[Tensor]]:
        theta = tree_map(lambda leaf: leaf.detach().requires_grad_(), theta)
        with torch.enable_grad():
            value = function(theta)
            return float(value.detach()), torch.autograd.grad(
                value, float_leaves(theta), materialize_grads=True
            )

    return _descend(start, slope, iterations, 1e-10)[0]


def _record(
    risks: Risks,
    shares: Tensor,
    controls: Sequence[Tree],
    retention: Retention | None,
    cost: CallableCost,
    **found: Any,
) -> ParticipationPlan:
    system = Participation(risks, controls, retention)
    with torch.no_grad():
        states = rollout(system, shares).states
        value = cost.terminal(states[-1]) + sum(cost.running(t, x, None) for t, x in enumerate(states[:-1]))
        seen = torch.stack([risks(u) for u in controls])
    return ParticipationPlan(tuple(controls), torch.stack(list(states)), seen, float(value), **found)


def _checked(theta: Tree, shares: Tensor, horizon: int, discount: float) -> Tensor:
    if horizon < 1:
        raise ArgumentError(f"horizon={horizon} must be at least 1 round")
    if not 0 < discount <= 1:
        raise ArgumentError(f"discount={discount} must lie in (0, 1]")
    if not float_leaves(theta):
        raise ArgumentError("theta holds no floating tensor: give the parameters of the model")
    shares = torch.as_tensor(shares)
    if shares.ndim != 1 or not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ArgumentError(f"shares={shares.tolist()} must be one number between 0 and 1 for each group")
    return shares.detach() if shares.is_floating_point() else shares.to(float_leaves(theta)[0].dtype)


def myopic_plan(
    risks: Risks,
    shares: Tensor,
    theta: Tree,
    horizon: int,
    *,
    retention: Retention | None = None,
    discount: float = 1.0,
    iterations: int = 100,
) -> ParticipationPlan:
    r"""What a learner does that fits whoever is there: θ_t = argmin Σ_k λ_{t,k} ℓ_k(θ).

    Args:
        risks: θ → risks of K groups.
        shares: λ_0, shape ``(K,)``.
        theta: first guess, a tensor or a tree; each round starts from the model of the last.
        horizon: T, number of rounds.
        retention: M(λ, ℓ).
        discount: ρ.
        iterations: of L-BFGS in a round.

    Returns:
        ParticipationPlan.

    Example:
        >>> quadratic = lambda theta: (theta - torch.tensor([0.0, 1.0])) ** 2
        >>> plan = myopic_plan(quadratic, torch.tensor([0.9, 0.3]), torch.tensor(0.0), 1)
        >>> round(float(plan.controls[0]), 3)
        0.25
    """
    shares = _checked(theta, shares, horizon, discount)
    controls: list[Tree] = []
    share, now = shares, theta
    for t in range(horizon):
        held = share

        def fit(theta: Tree, held: Tensor = held) -> Tensor:
            return (held * risks(theta)).sum() / held.sum().clamp_min(torch.finfo(held.dtype).tiny)

        now = _minimise(fit, now, iterations)
        controls.append(now)
        with torch.no_grad():
            share = Participation(risks, [now], retention).step(t, share, now)
    return _record(risks, shares, controls, retention, _cost(None, 0.0, discount, horizon), start="myopic")


def minimax_plan(
    risks: Risks,
    shares: Tensor,
    theta: Tree,
    horizon: int,
    *,
    retention: Retention | None = None,
    discount: float = 1.0,
    iterations: int = 100,
    sharpness: float = 1e4,
) -> ParticipationPlan:
    r"""One model for all rounds that serves the worst-served group best: θ = argmin max_k ℓ_k(θ).

    The maximum is smoothed, (1/β) log Σ_k e^{βℓ_k}, with β raised tenfold up to ``sharpness``: its error is at most
    log(K)/β.

    Args:
        risks: θ → risks of K groups.
        shares: λ_0, shape ``(K,)``.
        theta: first guess, a tensor or a tree.
        horizon: T, number of rounds.
        retention: M(λ, ℓ).
        discount: ρ.
        iterations: of L-BFGS for each β.
        sharpness: last β, in units of 1/risk.

    Returns:
        ParticipationPlan.

    Example:
        >>> quadratic = lambda theta: (theta - torch.tensor([0.0, 1.0])) ** 2
        >>> plan = minimax_plan(quadratic, torch.tensor([0.9, 0.3]), torch.tensor(0.0), 1)
        >>> round(float(plan.controls[0]), 3)
        0.5
    """
    shares = _checked(theta, shares, horizon, discount)
    beta, best = 1.0, theta
    while True:
        beta = min(beta * 10, sharpness)

        def worst(u: Tree, b: float = beta) -> Tensor:
            return (b * risks(u)).logsumexp(0) / b

        best = _minimise(worst, best, iterations)
        if beta >= sharpness:
            break
    cost = _cost(None, 0.0, discount, horizon)
    return _record(risks, shares, [best] * horizon, retention, cost, start="minimax")


@cites(CHEN)
def plan_participation(
    risks: Risks,
    shares: Tensor,
    theta: Tree,
    horizon: int,
    *,
    retention: Retention | None = None,
    discount: float = 1.0,
    floor: float | Tensor | None = None,
    floor_weight: float = 10.0,
    iterations: int = 100,
    starts: Sequence[Sequence[Tree]] | None = None,
    progress: Callable[[float], None] | None = None,
) -> ParticipationPlan:
    r"""Plan the model of each round so that the groups stay: minimise J = Σ_t ρ^{t−1} Σ_k (1 − λ_{t,k})².

    Costates p_t = ∂J/∂λ_t carry what a round does to all later ones; L-BFGS moves the models of all rounds along
    ∂J/∂θ_t = (∂M/∂θ_t)ᵀ p_{t+1}, from the myopic plan, from the minimax plan, and from the best model of each group
    alone; the best end is returned. It is never worse than any of these plans.

    Args:
        risks: θ → risks of K groups, differentiable; see :func:`group_risks` for a network.
        shares: λ_0, shape ``(K,)``.
        theta: first guess of a model, a tensor or a tree.
        horizon: T, number of rounds.
        retention: M(λ, ℓ), differentiable; :func:`exponential_retention` by default.
        discount: ρ in (0, 1].
        floor: share below which no group should fall, a number or one a group; adds a cost, not a guarantee.
        floor_weight: weight of that cost.
        iterations: of L-BFGS for each first plan.
        starts: first plans of your own, each T models, in place of those above.
        progress: called with the share that is done.

    Returns:
        ParticipationPlan, with J of the first plans in ``compared``.

    Raises:
        ArgumentError: shares, horizon or discount make no sense.
        ShapeError: ``risks`` gives another number of groups.
        DivergenceError: a share is not finite.

    Reference: Chen, Li & Zhang (2023), arXiv:2311.10223. Pitfalls: a finite horizon ends in a last model that
    looks ahead no more; M is a model of people, so judge the plan under another one too.

    Example:
        >>> quadratic = lambda theta: (theta - torch.tensor([0.0, 1.0])) ** 2 + 0.05
        >>> plan = plan_participation(quadratic, torch.tensor([0.9, 0.5]), torch.tensor(0.0), 2, iterations=5)
        >>> all(plan.cost <= cost for cost in plan.compared.values())
        True
    """
    shares = _checked(theta, shares, horizon, discount)
    low = None if floor is None else torch.as_tensor(floor, dtype=shares.dtype, device=shares.device)
    if low is not None and not (low.isfinite().all() and low.shape in ((), shares.shape)):
        raise ArgumentError(
            f"floor={floor!r} must be finite, one number or one for each of {len(shares)} groups"
        )
    if not floor_weight >= 0:
        raise ArgumentError(f"floor_weight={floor_weight} must not be negative: it would reward a fall")
    cost = _cost(low, floor_weight, discount, horizon)
    first = _first_plans(risks, shares, theta, horizon, retention, iterations, starts)
    found: list[ParticipationPlan] = []
    compared = {}
    for i, (name, controls) in enumerate(first.items()):
        before = _record(risks, shares, controls, retention, cost, start=name)
        compared[name] = before.cost

        def slope(plan: Tree) -> tuple[float, Sequence[Tensor]]:
            return _swept(risks, shares, plan, retention, cost)

        plan, _, norm = _descend(list(controls), slope, iterations, 1e-6)
        after = _record(risks, shares, plan, retention, cost, gradient_norm=norm, start=name)
        found.append(after if after.cost <= before.cost else before)
        if progress is not None:
            progress((i + 1) / len(first))
    best = min(found, key=lambda plan: plan.cost)
    return ParticipationPlan(
        best.controls, best.shares, best.risks, best.cost, best.gradient_norm, best.start, compared
    )


def _swept(
    risks: Risks, shares: Tensor, plan: Sequence[Tree], retention: Retention | None, cost: CallableCost
) -> tuple[float, Sequence[Tensor]]:
    """J and its slope in the models of all rounds; large models one round at a time, small ones in one graph."""
    system = Participation(risks, plan, retention)
    if sum(leaf.numel() for leaf in float_leaves(list(plan))) > _ONE_GRAPH:
        with torch.no_grad():
            states = rollout(system, shares)
        swept = adjoint(system, cost, states)
        assert swept.value is not None
        return float(swept.value), float_leaves(list(swept.gradients or ()))
    attached = [tree_map(lambda leaf: leaf.detach().requires_grad_(), u) for u in plan]
    with torch.enable_grad():
        x = rollout(system, shares, attached).states
        value = cost.terminal(x[-1]) + sum(cost.running(t, x[t], None) for t in range(1, len(plan)))
        slopes = torch.autograd.grad(value, float_leaves(attached), materialize_grads=True)
    return float(value.detach()), slopes


def _first_plans(
    risks: Risks,
    shares: Tensor,
    theta: Tree,
    horizon: int,
    retention: Retention | None,
    iterations: int,
    starts: Sequence[Sequence[Tree]] | None,
) -> dict[str, Sequence[Tree]]:
    if starts is not None:
        if not starts or any(len(plan) != horizon for plan in starts):
            raise ArgumentError(
                f"starts holds plans of {[len(plan) for plan in starts]} models for {horizon} rounds: give one model "
                "for each round"
            )
        return {f"start {i}": plan for i, plan in enumerate(starts)}
    options: dict[str, Any] = {"retention": retention, "iterations": iterations}
    found: dict[str, Sequence[Tree]] = {
        "minimax": minimax_plan(risks, shares, theta, horizon, **options).controls,
        "myopic": myopic_plan(risks, shares, theta, horizon, **options).controls,
    }
    for k in range(len(shares)):

        def own(u: Tree, k: int = k) -> Tensor:
            return risks(u)[k]

        best = _minimise(own, theta, iterations)
        found[f"group {k}"] = [best] * horizon
    return found
