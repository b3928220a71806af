r"""Differential dynamic programming as an optimizer: back-propagation, and feedback.

Layers are time steps and weights are controls. The backward pass of an ordinary training step is the first-order half
of a Bellman sweep; its second-order half, taken of rank one a sample, needs two numbers a sample and layer
(:mod:`bolza.optim.feedback`). The update then runs forward through the network: when a layer is reached, the layers
before it have moved, the states of the samples deviate from those that the gradient was computed at, and each
sample's gradient is weighed anew by how far its own costate points along its deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bolza.core import Reference, cites
from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.core.trajectory import Trajectory
from bolza.ops.batches import count_samples
from bolza.ops.trees import Tree
from bolza.optim.curvature import Curvature, Diagonal, Identity, Kronecker, Layer
from bolza.optim.feedback import Mode, ValueFactors, feedback_weights, value_factors
from bolza.optim.recorded import RecordedOptimizer, check_number, loss_scale
from bolza.systems.module import ModuleSystem
from bolza.systems.passes import Pass
from bolza.systems.signals import LayerSignal, has_rule

__all__ = ["DDPNOpt"]

REFERENCE = Reference(
    "liu2021ddpnopt",
    "Liu, Guan-Horng and Chen, Tianrong and Theodorou, Evangelos A.",
    "DDPNOpt: Differential Dynamic Programming Neural Optimizer",
    2021,
    venue="International Conference on Learning Representations",
    arxiv="2002.08809",
)

CURVATURES: dict[str, Callable[[], Curvature]] = {
    "identity": Identity,
    "rmsprop": Diagonal,
    "kronecker": Kronecker,
}


@dataclass(frozen=True)
class Plan:
    """Which parameters a stage owns: by layers with known gradients of samples, or alone."""

    layers: tuple[tuple[str, ...], ...]  # paths, by stage
    alone: tuple[tuple[nn.Parameter, ...], ...]  # by stage; those of no stage stand in the first
    first: int  # stage from which on there is feedback: behind the last one that couples samples


@cites(REFERENCE)
class DDPNOpt(RecordedOptimizer):
    r"""Descend by differential dynamic programming: a gradient method with feedback from layer to layer.

        W_t ← W_t − η M_t⁻¹ Σ_i (β_i + α_i c_i) ∂J_i/∂W_t,   c_i = α_i P_{t,i}·(x̂_{t,i} − x_{t,i})

    with x̂ the states under the weights that are already new, P the costates of single samples, and α, β from the
    sweep of :func:`~bolza.optim.feedback.value_factors`. It bears learning rates at which the method without
    feedback diverges; ``feedback=False`` *is* that method, to the last digit.

    A step costs, beside forward and backward pass, one more forward pass and one more product per weight.

    Layers: feedback is given to dense and convolutional layers, normalisations of single samples (and batch norm in
    evaluation mode) and embeddings that are used in one stage. Every other parameter (fused attention and recurrent
    cells, tied weights) takes the step without feedback, when its stage is reached. So does every stage up to the last
    batch normalisation in training mode, which couples the samples; :meth:`coverage` lists them all.

    Args:
        model: the network, or a DistributedDataParallel around it.
        lr: learning rate η.
        momentum: momentum of the preconditioned step.
        weight_decay: weight λ of ½λ|W|²; with ``"kronecker"`` it is added after M⁻¹.
        curvature: M. ``"identity"``: as stochastic gradient descent; ``"rmsprop"``: as RMSprop; ``"kronecker"``: as
            KFAC, for dense and convolutional layers, the identity for others.
        feedback: whether the deviation of states is fed back.
        mode: ``"damped"``, or ``"paper"`` for the recursion as published, which is stable for small η only.
        scale: s in the terminal Hessian s²∇φ∇φᵀ; 0.5 damped, 1 in the paper's mode.
        alpha: decay of RMSprop's average.
        eps: added to RMSprop's root.
        damping: λ added to the Kronecker factors.
        trust: κ; a layer's step is shortened where η²∇J·M⁻¹∇J is above it (Kronecker factors only).
        decay: decay of the averages of the Kronecker factors.
        factor_every: steps between two updates of the factors.
        refresh: steps between two inversions of the factors.
        params: parameters or groups, each with its own ``lr``, ``momentum``, ``weight_decay``.
        example: a batch of inputs, to read the network at once; by default it is read when it first runs.
        stages: where to cut the network, as for :func:`~bolza.systems.as_system`.

    Raises:
        ArgumentError: a setting is out of its range.
        DivergenceError: in ``step``: a gradient is not finite (with feedback or Kronecker factors).
        UnsupportedError: in ``step``, if gradients were changed by more than a common factor after ``backward``, or
            passes were not seen; clipping by the norm and loss scaling are followed. The loss is taken to be a mean
            over the samples.

    Reference: Liu, Chen & Theodorou (2021), arXiv:2002.08809, Algorithm 1. Departures: ``mode="damped"``, which divides
    t₂ by the batch size, shrinks by 1/(1 + t₂), halves the terminal factor and limits c; no Tikhonov term.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = DDPNOpt(net, lr=0.5)
        >>> x = torch.randn(32, 2)
        >>> losses = []
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     loss = (net(x) - x.prod(1, keepdim=True)).square().mean()
        ...     loss.backward()
        ...     losses.append(loss.item())
        ...     _ = optimizer.step()
        >>> losses[-1] < losses[0]
        True
    """

    _layers = True
    _settings: tuple[str, ...] = ("curvature", "feedback", "mode", "scale")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        curvature: Literal["identity", "rmsprop", "kronecker"] = "identity",
        feedback: bool = True,
        mode: Mode = "damped",
        scale: float | None = None,
        alpha: float = 0.99,
        eps: float = 1e-8,
        damping: float = 0.03,
        trust: float = 1e-3,
        decay: float = 0.95,
        factor_every: int = 1,
        refresh: int = 10,
        params: Iterable[Any] | None = None,
        example: Any = None,
        stages: Sequence[str] | None = None,
    ) -> None:
        check_number("lr", lr)
        check_number("momentum", momentum, high=1.0)
        check_number("weight_decay", weight_decay)
        check_number("alpha", alpha, high=1.0)
        check_number("decay", decay, high=1.0)
        check_number("eps", eps)
        check_number("damping", damping, open_low=True)
        check_number("trust", trust, open_low=True)
        if curvature not in CURVATURES:
            raise ArgumentError(f"curvature is {curvature!r}: choose from {', '.join(CURVATURES)}")
        if mode not in ("damped", "paper"):
            raise ArgumentError(f"mode is {mode!r}: choose 'damped' or 'paper'")
        for name, value in (("factor_every", factor_every), ("refresh", refresh)):
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} is {value!r}: it must be a number of steps, at least 1")
        self.curvature, self.feedback, self.mode = curvature, feedback, mode
        self.scale = (0.5 if mode == "damped" else 1.0) if scale is None else scale
        check_number("scale", self.scale)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "eps": eps,
            "damping": damping,
            "trust": trust,
            "decay": decay,
            "factor_every": factor_every,
            "refresh": refresh,
        }
        record = feedback or curvature == "kronecker"
        super().__init__(model, defaults, params=params, example=example, stages=stages, record=record)

    def _fresh(self) -> None:
        super()._fresh()
        self._curvature = CURVATURES[self.curvature]()
        self._loss_scale = 1.0  # of the passes of the present step, see loss_scale
        self._plans: dict[tuple[int, tuple[bool, ...]], tuple[ModuleSystem, Plan]] = {}

    def coverage(self) -> dict[str, str]:
        """What each parameter gets: its layer's feedback, or the plain step, and why.

        Raises:
            ArgumentError: the network has not run yet.
        """
        system = self.system
        if system is None:
            raise ArgumentError("the network has not been read: run it once, or give an example")
        held = {id(p) for group in self.param_groups for p in group["params"]}
        uses, covered, first = system.uses(), _covered(system), _behind_coupling(system)
        words = {}
        for name, param in self.module.named_parameters():
            if id(param) not in held:
                words[name] = "not trained"
            elif name in covered and covered[name][0] < first:
                words[name] = f"plain: batch normalisation in stage {first - 1} couples the samples"
            elif name in covered:
                words[name] = f"feedback in stage {covered[name][0]}"
            elif name not in uses:
                words[name] = "plain: no stage uses it"
            elif len(uses[name]) > 1:
                words[name] = "plain: several layers or stages share it"
            else:
                words[name] = "plain: the gradients of single samples are not known for its layer"
        return words

    def _update(self, trajectories: tuple[Trajectory, ...]) -> None:
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        if not trajectories:
            for group in self.param_groups:
                for p in group["params"]:
                    self._alone(p, groups)
            return
        assert self._recorder is not None
        self._check_finite()
        passes = self._recorder.passes
        plan = self._plan(passes)
        counts = [count_samples(run.states[0]) for run in trajectories]
        layers = self._build(plan, passes, counts, groups)
        scale = self._gradient_scale(layers)
        self._loss_scale = loss_scale(scale)
        if self._loss_scale != 1:
            scale *= self._loss_scale
            for layer in layers.values():
                layer.rescale(1 / self._loss_scale)
        for layer in layers.values():
            self._curvature.observe(layer)
        inside = {id(p) for layer in layers.values() for p in layer.params.values()}
        factors = self._sweep(plan, layers, counts) if self.feedback else None
        with ExitStack() as stack:
            for run, source in zip(trajectories, passes, strict=True):
                stack.enter_context(source.layout.system.drawing_from(source.randomness, run.states))
            moved: list[Tree] | None = None
            acting = [
                t for t in range(plan.first, len(plan.layers)) if any(p in layers for p in plan.layers[t])
            ]
            last = max(acting, default=-1)
            for t, paths in enumerate(plan.layers):
                own = [layers[path] for path in paths if path in layers]
                weights = None
                if factors and own and t >= plan.first:
                    weights = self._weights(factors, t, trajectories, moved, counts)
                for layer in own:
                    self._curvature.apply(layer, weights, scale)
                for p in plan.alone[t]:
                    self._alone(p, groups)
                for path in paths:  # a layer that was not seen in every pass
                    if path not in layers:
                        for p in self.module.get_submodule(path)._parameters.values():
                            if p is not None and id(p) not in inside:
                                self._alone(p, groups)
                if factors and t < last:
                    starts = [run.states[0] for run in trajectories] if moved is None else moved
                    moved = [s.layout.system.step(t, x, {}) for s, x in zip(passes, starts, strict=True)]

    def _check_finite(self) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = torch._foreach_norm([g for g in grads if not g.is_sparse])
        if norms and not bool(torch.stack([n.to(norms[0]) for n in norms]).sum().isfinite()):
            raise DivergenceError(
                "a gradient is not finite, and no step was made: lower lr, or look at the batch"
            )

    def _alone(self, p: nn.Parameter, groups: dict[int, dict[str, Any]]) -> None:
        if p.grad is not None and id(p) in groups:
            if p.grad.is_sparse:
                raise UnsupportedError(
                    "a parameter has a sparse gradient, which this optimizer does not take: set sparse=False"
                )
            self._curvature.apply_alone(p, self.state[p], groups[id(p)])

    # -- reading the step

    def _plan(self, passes: Sequence[Pass]) -> Plan:
        plans = []
        for source in passes:
            system = source.layout.system
            key = id(system), system._mode()
            if key not in self._plans:
                self._plans[key] = (system, _plan(system))
            plans.append(self._plans[key][1])
        if any(plan.layers != plans[0].layers for plan in plans):
            raise UnsupportedError(
                "the passes that were accumulated for this step ran through different stages of the network: step "
                "after each of them"
            )
        return plans[0]

    def _build(
        self,
        plan: Plan,
        passes: Sequence[Pass],
        counts: Sequence[int],
        groups: dict[int, dict[str, Any]],
    ) -> dict[str, Layer]:
        """The layers whose gradients of samples are known in every pass."""
        calls: dict[str, list[list[LayerSignal]]] = {}
        for k, source in enumerate(passes):
            for signal in source.signals:
                calls.setdefault(signal.path, [[] for _ in passes])[k].append(signal)
        layers = {}
        for path in (path for paths in plan.layers for path in paths):
            params = {
                name: p
                for name, p in self.module.get_submodule(path)._parameters.items()
                if p is not None and p.grad is not None and id(p) in groups
            }
            mine = calls.get(path, [[]])
            known = all(
                signals and all(s.knows(params, n) for s in signals)
                for signals, n in zip(mine, counts, strict=False)
            )
            if params and known and len(mine) == len(passes):
                layers[path] = Layer(
                    path,
                    params,
                    {name: self.state[p] for name, p in params.items()},
                    {name: groups[id(p)] for name, p in params.items()},
                    mine,
                    sum(counts),
                    self._reduce if self.group is not None else None,
                )
        return layers

    def _reduce(self, value: Tensor) -> Tensor:
        """Mean over the processes."""
        value = value.contiguous()
        torch.distributed.all_reduce(value, group=self.group)
        return value.div_(torch.distributed.get_world_size(self.group))

    def _gradient_scale(self, layers: dict[str, Layer]) -> float:
        """The factor between ``.grad`` and what was recorded: 1, unless the gradient was clipped or unscaled."""
        found = [(p.numel(), layer, name) for layer in layers.values() for name, p in layer.params.items()]
        if not found:
            return 1.0
        _, layer, name = min(found, key=lambda entry: entry[0])
        grad = layer.params[name].grad
        assert grad is not None
        recorded = torch.zeros_like(grad).flatten()
        for blocks in layer.blocks:
            recorded += blocks[name].combine(recorded.new_ones(blocks[name].count, 1)).flatten()
        recorded = recorded if layer.reduce is None else layer.reduce(recorded)
        size = recorded.dot(recorded)
        if not bool(size > 0):
            return 1.0
        factor = recorded.dot(grad.flatten()) / size
        rest = (grad.flatten() - factor * recorded).norm()
        if bool(rest > 1e-2 * grad.norm()):
            raise UnsupportedError(
                f"the gradient of {layer.path}.{name} is not the one that backward() left: call zero_grad() after "
                "passes that are no part of the step, and change gradients by common factors only (clipping by "
                "the norm, loss scaling), not element by element"
            )
        return float(factor) if abs(float(factor) - 1) > 1e-3 else 1.0

    def _sweep(self, plan: Plan, layers: dict[str, Layer], counts: Sequence[int]) -> list[ValueFactors]:
        """The factors of the value function in each pass."""
        total = sum(counts)
        batch = total * (1 if self.group is None else torch.distributed.get_world_size(self.group))
        like = next(iter(layers.values())).params if layers else None
        result = []
        for k, n in enumerate(counts):
            rows = []
            for t, paths in enumerate(plan.layers):
                own = [layers[path] for path in paths if path in layers and t >= plan.first]
                # the recorded gradients carry 1/B: the gradient of one sample is B times its part
                parts = [self._curvature.norms(layer, k) * total**2 for layer in own]
                zero = next(iter(like.values())).new_zeros(n) if like else torch.zeros(n)
                rows.append(sum(parts[1:], parts[0]) if parts else zero)
            norms = torch.stack(rows)
            result.append(value_factors(norms, batch=batch, scale=self.scale, mode=self.mode))
        return result

    def _weights(
        self,
        factors: Sequence[ValueFactors],
        t: int,
        trajectories: Sequence[Trajectory],
        moved: Sequence[Tree] | None,
        counts: Sequence[int],
    ) -> list[Tensor]:
        weights = []
        total = sum(counts)
        for k, run in enumerate(trajectories):
            deviation = None
            if moved is not None and run.costates is not None:
                deviation = _deviation(moved[k], run.states[t], run.costates[t], counts[k])
                if deviation is not None:
                    deviation = deviation * (total / self._loss_scale)
            weights.append(feedback_weights(factors[k], t, deviation, self.mode))
        return weights


def _deviation(moved: Tree, state: Tree, costate: Tree, n: int) -> Tensor | None:
    """P · (x̂ − x) of each sample, over the leaves that have samples first."""
    if isinstance(state, Tensor):
        if not isinstance(costate, Tensor) or state.shape[:1] != (n,):
            return None
        return ((moved - state) * costate).flatten(1).sum(1) if state.ndim > 1 else (moved - state) * costate
    total = None
    entries = zip(moved, state, costate, strict=True) if isinstance(state, tuple | list) else ()
    for a, b, c in entries:
        part = _deviation(a, b, c, n)
        if part is not None:
            total = part if total is None else total + part
    return total


def _covered(system: ModuleSystem) -> dict[str, tuple[int, str]]:
    """Stage and layer of the parameters that one layer in one stage uses."""
    found = {}
    for name, places in system.uses().items():
        t, path = next(iter(places))
        if len(places) == 1 and path is not None and has_rule(system.module.get_submodule(path)):
            found[name] = (t, path)
    return found


def _plan(system: ModuleSystem) -> Plan:
    """Sort the parameters of a network by stages.

    A layer with a parameter that is shared has no feedback at all.
    """
    parameters, uses, covered = dict(system.module.named_parameters()), system.uses(), _covered(system)
    layers: list[list[str]] = [[] for _ in range(system.horizon)]
    whole: dict[str, tuple[int, str]] = {}
    for name, (t, path) in covered.items():
        own = [
            f"{path}.{local}".lstrip(".")
            for local, p in system.module.get_submodule(path)._parameters.items()
            if p is not None
        ]
        if all(other in covered for other in own):
            whole[name] = (t, path)
            if path not in layers[t]:
                layers[t].append(path)
    alone: list[list[nn.Parameter]] = [[] for _ in range(system.horizon)]
    for name, p in parameters.items():
        if name not in whole:
            alone[min((t for t, _ in uses.get(name, ())), default=0)].append(p)
    return Plan(tuple(map(tuple, layers)), tuple(map(tuple, alone)), _behind_coupling(system))


def _behind_coupling(system: ModuleSystem) -> int:
    """The first stage behind all that normalise by the batch.

    Before them the costate of a sample holds what it does to the others, and weighing samples apart moves means and
    scales that the loss does not see.
    """
    return 1 + max(
        (
            t
            for t, paths in enumerate(system.stage_modules)
            if any(map(_couples, map(system.module.get_submodule, paths)))
        ),
        default=-1,
    )


def _couples(layer: nn.Module) -> bool:
    norms = (part for part in layer.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    return any(part.training or not part.track_running_stats for part in norms)
