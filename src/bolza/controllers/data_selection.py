r"""Data as a control: which examples of a pool bring the loss on a target down fastest.

    θ_{t+1} = θ_t − η Σ_n γ_n ∇ℓ_n(θ_t),      J(γ) = Σ_{t=1..T} L(θ_t),      γ in the simplex

ℓ_n is the loss of example n of the pool, L that on the target examples, J the area under its curve. With the
costate λ_t = ∂J/∂θ_t of the training clock

    λ_T = ∇L(θ_T),      λ_t = ∇L(θ_t) − η H_γ(θ_t) λ_{t+1} + λ_{t+1},
    G_n = −∂J/∂γ_n = η Σ_t ⟨λ_{t+1}, ∇ℓ_n(θ_t)⟩

an example is good if its gradient points along the costate. One sweep gives all scores: with
s(θ, γ) = ⟨Σ γ_n ∇ℓ_n(θ), q⟩ the derivative in γ is every ⟨q, ∇ℓ_n⟩ at once and the derivative in θ is H_γ q.
Any update rule takes the place of plain descent; q is then what its adjoint hands to the gradient.

Reference: Gu, Dong, Wang, Hao, Dong, Wei & Huang (2025), *Data Selection via Optimal Control for Language Models*,
arXiv:2410.07064. Departures: any update rule; the projected loop accepts a round only if J falls; the paper's
sign of the costate is that of :mod:`bolza.core` already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree

from bolza.controllers.data_scores import GU, project_simplex
from bolza.controllers.weighted_run import (
    Objective,
    State,
    WeightedRun,
    batches_of_steps,
    joined,
    one_number_each,
    outputs_of,
    refuse_shuffled,
)
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.core.reference import cites
from bolza.ops.batches import Data, Loss, batches_of, count_samples, read, select_parameters
from bolza.ops.replay import differentiable_kernels, frozen_statistics, same_randomness
from bolza.ops.sample_losses import sample_losses
from bolza.ops.trees import tree_detach, tree_map
from bolza.systems.training import SGD, UpdateRule

__all__ = ["DataValues", "Selection", "data_values", "example_losses", "gradient_similarity", "select_data"]

Progress = Callable[[float], None]
_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class DataValues:
    """What one sweep found.

    Attributes:
        scores: G_n = −∂J/∂γ_n for each example of the pool, shape ``(N,)``; larger is better.
        weights: γ at which it was taken.
        cost: J.
        target_losses: L(θ_0), …, L(θ_T).
        params: θ_T by name.
        states_held: most states of the run that were kept at the same time.
    """

    scores: Tensor
    weights: Tensor
    cost: float
    target_losses: tuple[float, ...]
    params: dict[str, Tensor]
    states_held: int


@dataclass(frozen=True)
class Selection:
    """What the projected loop found.

    Attributes:
        weights: the last γ.
        scores: G at that γ.
        costs: J before each round and at the end; it never rises.
    """

    weights: Tensor
    scores: Tensor
    costs: tuple[float, ...]


def _problem(
    model: nn.Module,
    loss: Loss,
    pool: Data,
    target: Data,
    steps: int,
    lr: float | None,
    optimizer: UpdateRule | None,
    batches: Sequence[Tensor] | None,
    batch_size: int | None,
    cost: Objective,
    chunk: int | None,
    seed: int,
    params: Iterable[str] | None,
) -> tuple[WeightedRun, dict[str, Tensor]]:
    if steps < 1:
        raise ArgumentError(f"steps={steps} must be at least 1")
    if (lr is None) == (optimizer is None):
        raise ArgumentError(
            f"lr={lr} and optimizer={optimizer}: give one of them, lr= for plain descent or an update rule such as "
            "bolza.systems.SGD(lr=0.1, momentum=0.9)"
        )
    if cost not in ("area", "final"):
        raise ArgumentError(f"cost={cost!r} is not known: choose 'area' or 'final'")
    selected = {name: p.detach() for name, p in select_parameters(model, params).items()}
    device = next(iter(selected.values())).device
    refuse_shuffled(pool, "pool")
    x, y = joined(pool, device, "pool")
    n = count_samples(x)
    if chunk is not None and chunk < 1:
        raise ArgumentError(f"chunk={chunk} must be at least 1 example")
    chosen = batches_of_steps(n, steps, batches, batch_size, seed, device)
    live = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.training]
    if live and chunk is not None and chunk < max(len(index) for index in chosen):
        raise ArgumentError(
            f"chunk={chunk} cuts batches apart, but a {type(live[0]).__name__} in training mode normalises over them: "
            "call model.eval(), or leave chunk out"
        )
    rule = SGD(lr=float(lr)) if lr is not None else optimizer
    assert rule is not None
    aim = joined(target, device, "target")
    few = torch.arange(0, n, max(1, n // 64), device=device)  # of all classes, where they are sorted
    with torch.no_grad(), frozen_statistics(model), same_randomness(seed, device):
        sample = _pytree.tree_map(lambda leaf: leaf[few], (x, y))
        loss = one_number_each(loss, outputs_of(model, selected, sample[0]), sample[1], len(few))
    whole = batches is None and batch_size is None
    return WeightedRun(model, loss, x, y, aim, rule, chosen, whole, cost, chunk or n, seed, device), selected


def _weights(weights: Tensor | None, problem: WeightedRun, like: Tensor) -> Tensor:
    n = problem.count
    if weights is None:
        return torch.full((n,), 1 / n, dtype=like.dtype, device=like.device)
    weights = torch.as_tensor(weights)
    if tuple(weights.shape) != (n,):
        raise ShapeError(
            f"weights has shape {tuple(weights.shape)}, but the pool holds {n} examples: one number each"
        )
    if not bool(weights.isfinite().all()):
        raise ArgumentError("weights holds a number that is not finite: give one finite weight an example")
    return weights.detach().to(like)


@cites(GU)
def data_values(
    model: nn.Module,
    loss: Loss,
    pool: Data,
    target: Data,
    *,
    steps: int,
    lr: float | None = None,
    optimizer: UpdateRule | None = None,
    weights: Tensor | None = None,
    batches: Sequence[Tensor] | None = None,
    batch_size: int | None = None,
    score_every: int | None = None,
    cost: Objective = "area",
    checkpoint_every: int | None = None,
    chunk: int | None = None,
    seed: int = 0,
    params: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> DataValues:
    r"""Score the examples of a pool by what they do for a target: one adjoint sweep over a training run.

    G_n = −∂J/∂γ_n with J = Σ_{t=1..T} L(θ_t), the area under the curve of the loss on the target, for the run
    θ_{t+1} = U(θ_t, Σ_n γ_n ∇ℓ_n(θ_t)) from the parameters that the model has now. The model is not changed.
    A sweep costs six to eight gradients of a batch a step; the states of every ``checkpoint_every``-th step are kept
    and the others computed again, so that about T/k + k of them are held.

    Args:
        model: the network, evaluated in the mode it is in; running statistics do not move.
        loss: ``loss(prediction, y)``, the mean over samples or one number a sample; class weights need the latter.
        pool: pair ``(x, y)`` of N examples, or batches of them, always in the same order.
        target: examples whose loss is to fall.
        steps: T.
        lr: η of plain descent; or give ``optimizer``.
        optimizer: an update rule of :mod:`bolza.systems.training`; its memory becomes part of the state.
        weights: γ, shape ``(N,)``; 1/N by default.
        batches: indices into the pool, one tensor a step; everything by default. A batch B stands for the pool:
            its gradient is (N/|B|) Σ_{n∈B} γ_n ∇ℓ_n.
        batch_size: draw such batches without replacement, epoch after epoch, by ``seed``.
        score_every: with batches: score the whole pool at every k-th step, as the paper does, in place of the exact
            derivative, which sees an example only in the steps that took it.
        cost: ``'area'``, or ``'final'`` for J = L(θ_T).
        checkpoint_every: k; √T by default, 1 keeps every state.
        chunk: examples in one pass, to bound memory; the result does not depend on it.
        seed: of the batches, and of dropout, which draws anew at every step.
        params: names of parameters or modules that train; all that have ``requires_grad`` by default.
        progress: called with the share that is done.

    Returns:
        DataValues. Scores are relative: see :func:`~bolza.controllers.normalise_scores`.

    Raises:
        ArgumentError: a setting makes no sense.
        DataError: pool or target cannot be read, or the pool is shuffled.
        ShapeError: the loss or the weights have a wrong shape.
        DivergenceError: the run diverged; the error names the step.

    Reference: Gu et al. (2025), arXiv:2410.07064, theorem 2.1 and algorithm 1.

    Example:
        >>> x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])     # the second label is wrong
        >>> net = nn.Linear(1, 1, bias=False)
        >>> good = (torch.ones(1, 1), torch.ones(1, 1))
        >>> values = data_values(net, nn.functional.mse_loss, (x, y), good, steps=5, lr=0.1)
        >>> bool(values.scores[0] > values.scores[1])
        True
    """
    problem, start = _problem(
        model, loss, pool, target, steps, lr, optimizer, batches, batch_size, cost, chunk, seed, params
    )
    full = batches is None and batch_size is None
    if score_every is not None and (full or score_every < 1):
        raise ArgumentError(
            f"score_every={score_every} must be at least 1, and needs batches= or batch_size=: a run on the whole pool "
            "scores every example at every step anyway"
        )
    every = checkpoint_every if checkpoint_every is not None else max(1, math.isqrt(steps))
    if every < 1:
        raise ArgumentError(f"checkpoint_every={checkpoint_every} must be at least 1 step")
    gamma = _weights(weights, problem, next(iter(start.values())))
    with ExitStack() as stack:
        stack.enter_context(frozen_statistics(model))
        stack.enter_context(differentiable_kernels(model))
        return _sweep(problem, start, gamma, every, score_every, progress or (lambda share: None))


def _sweep(
    problem: WeightedRun,
    start: dict[str, Tensor],
    gamma: Tensor,
    every: int,
    score_every: int | None,
    report: Progress,
) -> DataValues:
    steps = len(problem.batches)
    kept: dict[int, State] = {}
    last: State = {}

    def keep(t: int, state: State) -> None:
        nonlocal last
        last = state
        if t % every == 0 and t < steps:
            kept[t] = state
        report(0.25 * t / steps)

    first = {"params": tree_map(Tensor.clone, start), **problem.rule.init(start)}
    losses = problem.run(first, gamma, keep)
    scores, everything = torch.zeros_like(gamma), torch.arange(problem.count, device=gamma.device)
    aim = iter(problem.target_gradient(last["params"]))
    costate: State = tree_map(torch.zeros_like, last)
    costate["params"] = tree_map(lambda leaf: next(aim), costate["params"])
    held = len(kept) + 1
    for begin in sorted(kept, reverse=True):
        states = [kept[begin]]
        for t in range(begin, min(begin + every, steps) - 1):
            states.append(problem.step(t, states[-1], gamma))
        held = max(held, len(kept) + len(states))
        for t in range(begin + len(states) - 1, begin - 1, -1):
            state = states.pop()
            index, params = problem.batches[t], state["params"]
            gradient = problem.gradient(t, params, gamma) if _needs_gradient(problem.rule) else params
            costate, q = problem.pull_back(t, state, gradient, costate)
            dots, along = problem.products(t, params, gamma, q, index, True)
            if score_every is None:
                scores.index_add_(0, index, dots, alpha=-1.0)
            elif t % score_every == 0:
                share = min(score_every, steps - t)
                scores.sub_(problem.products(t, params, gamma, q, everything, False)[0], alpha=share)
            add = [along]
            if problem.cost == "area" and t > 0:
                add.append(problem.target_gradient(params))
            for terms in add:
                torch._foreach_add_(list(costate["params"].values()), terms)
            report(1 - 0.75 * t / steps)
        kept.pop(begin)
    total = sum(losses[1:]) if problem.cost == "area" else losses[-1]
    return DataValues(scores, gamma, total, tuple(losses), tree_detach(last["params"]), held)


def _needs_gradient(rule: UpdateRule) -> bool:
    """Whether the adjoint of the rule depends on the gradient: it does not where the rule is linear in it."""
    return type(rule) is not SGD


def example_losses(
    model: nn.Module, loss: Loss, pool: Data, params: dict[str, Tensor] | None = None
) -> Tensor:
    """Loss of each example of a pool: low ones first is the rule that trusts what is learned early.

    Args:
        model: the network.
        loss: as for :func:`data_values`.
        pool: pair ``(x, y)``, or batches.
        params: parameters by name that stand in for those of the model.

    Returns:
        Shape ``(N,)``.

    Example:
        >>> example_losses(nn.Identity(), nn.functional.mse_loss, (torch.eye(2), torch.zeros(2, 2)))
        tensor([0.5000, 0.5000])
    """
    found = []
    refuse_shuffled(pool, "pool")
    with torch.no_grad(), frozen_statistics(model):
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for x, y in read(batches_of(pool), device):
            out, n = outputs_of(model, params or {}, x), count_samples(x)
            found.append(sample_losses(one_number_each(loss, out, y, n), out, y, n))
    return torch.cat(found)


def gradient_similarity(
    model: nn.Module,
    loss: Loss,
    pool: Data,
    target: Data,
    *,
    params: dict[str, Tensor] | None = None,
    cosine: bool = False,
) -> Tensor:
    r"""Alignment of the gradient of each example with that of the target, ⟨∇L(θ), ∇ℓ_n(θ)⟩, at one θ.

    Args:
        model: the network.
        loss: as for :func:`data_values`.
        pool: pair ``(x, y)`` of N examples, or batches.
        target: examples whose gradient the others are compared with.
        params: θ by name; the parameters the model has now by default.
        cosine: divide by the norms of both gradients, which needs every gradient by itself.

    Returns:
        Shape ``(N,)``.

    Example:
        >>> net, f = nn.Linear(1, 1, bias=False), nn.functional.mse_loss
        >>> pair = (torch.ones(1, 1), torch.full((1, 1), 9.0))
        >>> bool(gradient_similarity(net, f, pair, pair) > 0)
        True
    """
    problem, own = _problem(
        model, loss, pool, target, 1, 1.0, None, None, None, "final", None, 0, params if params else None
    )
    theta = own if params is None else {name: params[name].detach() for name in own}
    ones = torch.ones(problem.count, dtype=next(iter(theta.values())).dtype, device=problem.device)
    with frozen_statistics(model), differentiable_kernels(model):
        aim = problem.target_gradient(theta)
        dots, _ = problem.products(0, theta, ones, aim, problem.batches[0], False)
        if not cosine:
            return dots

        def alone(x: Any, y: Any) -> Tensor:
            x, y = _pytree.tree_map(lambda leaf: leaf[None], (x, y))
            slopes = torch.func.grad(lambda p: problem.losses(p, x, y, 0).sum())(theta)
            return torch.stack([slope.square().sum() for slope in slopes.values()]).sum()

        squares = vmap(alone, randomness="different", chunk_size=64)(problem.x, problem.y)
    size = torch.stack([g.square().sum() for g in aim]).sum()
    return dots / (squares * size).sqrt().clamp_min(torch.finfo(dots.dtype).tiny)


@cites(GU)
def select_data(
    model: nn.Module,
    loss: Loss,
    pool: Data,
    target: Data,
    *,
    rounds: int = 5,
    step: float = 1.0,
    progress: Progress | None = None,
    **options: Any,
) -> Selection:
    r"""Weights of a pool that bring a target's loss down: projected ascent γ ← Proj(γ + a G) on the simplex.

    The first ``a`` moves the best or worst score by ``step`` mean weights; a round after which J did not fall is
    taken back and ``a`` halved, so that J never rises.

    Args:
        model: the network; it is not changed.
        loss: as for :func:`data_values`.
        pool: examples to weigh.
        target: examples whose loss is to fall.
        rounds: sweeps after the first.
        step: largest first move of a weight, in units of the mean weight.
        progress: called with the share that is done.
        options: as for :func:`data_values`: ``steps``, ``lr``, ``optimizer``, ``weights``, …

    Returns:
        Selection.

    Raises:
        ArgumentError: a setting makes no sense.

    Reference: Gu et al. (2025), arXiv:2410.07064, algorithm 1. Departure: the step is chosen so that J falls.

    Example:
        >>> x, y = torch.ones(4, 1), torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
        >>> with torch.no_grad():
        ...     net = nn.Linear(1, 1, bias=False); _ = net.weight.zero_()
        >>> aim = (torch.ones(1, 1), torch.ones(1, 1))
        >>> select_data(net, nn.functional.mse_loss, (x, y), aim, steps=3, lr=0.1, rounds=2).weights
        tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """
    if rounds < 1 or not step > 0:
        raise ArgumentError(f"rounds={rounds} must be at least 1 and step={step} positive")
    refuse_shuffled(pool, "pool")
    if options.get("params") is not None:
        options["params"] = list(options["params"])
    device = next(iter(select_parameters(model, options.get("params")).values())).device
    pool, target = joined(pool, device, "pool"), joined(target, device, "target")  # iterators are read once
    values = data_values(model, loss, pool, target, **options)
    costs, size = [values.cost], 1.0
    total = float(values.weights.sum())
    for k in range(rounds):
        centred = values.scores - values.scores.mean()
        largest = float(centred.abs().max())
        if largest == 0:
            break
        a = size * step * total / len(centred) / largest
        moved = project_simplex(values.weights + a * centred, total)
        try:
            trial = data_values(model, loss, pool, target, **{**options, "weights": moved})
        except DivergenceError:
            trial = values
        if trial.cost < values.cost:
            values = trial
        else:
            size /= 2
        costs.append(values.cost)
        if progress is not None:
            progress((k + 1) / rounds)
    return Selection(values.weights, values.scores, tuple(costs))
