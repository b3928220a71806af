r"""A trained network that heals itself: feedback at every layer towards the states of clean inputs.

    x_{t+1} = f_t(x_t + u_t),      min Σ_t ½‖Q_t(x_t + u_t − m_t)‖² + c/2 ‖u_t‖²

With Q_t = I − V_t V_tᵀ and layers that act orthogonally on what Q_t keeps, the value is λ_t/2 ‖Q_t(x − m_t)‖²:

    λ_T = 0,   λ_t = c (1 + λ_{t+1})/(1 + c + λ_{t+1}),   α_t = c/(1 + c + λ_{t+1})
    u_t = −(1 − α_t) Q_t (x_t − m_t)

One low-rank product a layer. What lies in the subspaces is left alone, by design: an attack inside of them is not seen.

Reference: Chen, Wang, Yang, Li & Zhang (2024), arXiv:2404.00828; Chen, Li & Zhang (2022), arXiv:2206.12963.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Loss
from bolza.ops.trees import float_leaves
from bolza.robust.balls import Clip, Norm
from bolza.robust.closed_loop import CHEN_CLOSED, ClosedLoopControls, closed_loop_controls, shifted
from bolza.robust.healing_report import HealingReport, healing_report, right_answers
from bolza.robust.healing_states import (
    Form,
    Residual,
    StageStep,
    StageSystem,
    first_tensor,
    gather,
    read_forms,
    stage_steps,
    taken,
)
from bolza.robust.manifolds import Autoencoder, MakeNetwork, Manifold, Subspace
from bolza.systems import as_system

__all__ = ["CHEN_HEALING", "CHEN_PID", "SelfHealing", "control_gains"]

CHEN_PID = Reference(
    "chen2024pid",
    "Chen, Zhuotong and Wang, Zihu and Yang, Yifan and Li, Qianxiao and Zhang, Zheng",
    "PID Control-Based Self-Healing to Improve the Robustness of Large Language Models",
    2024,
    venue="Transactions on Machine Learning Research",
    arxiv="2404.00828",
)
CHEN_HEALING = Reference(
    "chen2022self",
    "Chen, Zhuotong and Li, Qianxiao and Zhang, Zheng",
    "Self-Healing Robust Neural Networks via Closed-Loop Control",
    2022,
    venue="Journal of Machine Learning Research",
    arxiv="2206.12963",
)

Terms = Literal["P", "PI", "PD", "PID"]
_DIFFERS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.instancenorm._InstanceNorm,
)


@cites(CHEN_PID)
def control_gains(c: float, horizon: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    r"""Share of a deviation that optimal control of hidden states leaves at each layer, and its value.

        λ_T = 0,   α_t = c/(1 + c + λ_{t+1}),   λ_t = c (1 + λ_{t+1})/(1 + c + λ_{t+1})

    Exact where layers act orthogonally on what is controlled. With c = 1 they are ratios of Fibonacci numbers; c → 0 is
    a hard projection, c → ∞ no control.

    Args:
        c: price of control, positive; infinity is allowed.
        horizon: number T of controlled layers.

    Returns:
        (α_0 … α_{T−1}, λ_0 … λ_T); the optimal cost of a deviation d is λ_0/2 ‖d‖².

    Raises:
        ArgumentError: c is not positive, or the horizon is below 1.

    Reference: Chen et al. (2024), section 3.

    Example:
        >>> alpha, value = control_gains(1.0, 4)
        >>> [round(a, 6) for a in alpha]                     # 13/34, 5/13, 2/5, 1/2
        [0.382353, 0.384615, 0.4, 0.5]
    """
    if not c > 0:
        raise ArgumentError(f"c={c} must be positive: it is the price of control")
    if horizon < 1:
        raise ArgumentError(f"horizon={horizon} must be at least 1")
    alpha: list[float] = []
    value = [0.0]
    for _ in range(horizon):
        keep = 1.0 if c == float("inf") else c / (1 + c + value[0])
        alpha.insert(0, keep)
        value.insert(0, keep * (1 + value[0]))
    return tuple(alpha), tuple(value)


@cites(CHEN_PID, CHEN_HEALING, CHEN_CLOSED)
class SelfHealing(nn.Module):
    r"""A trained network with control of its hidden states; its parameters stay as they are.

        x_{t+1} = f_t(x_t + u_t),   u_t = −(1 − α_t) (x_t − E_t(x_t)),   α_t = c/(1 + c + λ_{t+1})

    Cheap protection against noise and corruption of inputs, for a network that may not be trained again. It is no
    protection against an adversary who knows of it, and may harm a network that was trained against one:
    :meth:`report` measures both.

    Args:
        model: the trained network, in evaluation mode if it has dropout or batch statistics.
        c: price of control: small takes all that is off the manifold away, large takes nothing.
        terms: which states span the subspaces: of the layer (P), means over the layers up to it (I) and differences to
            the layer before (D); maps are averaged, so that all cost the same. I and D begin anew where the shape of
            states changes.
        fraction: of the variance of clean states that a subspace carries; an autoencoder's code is as wide as that of
            95 %. A smaller one heals more, and costs clean accuracy.
        manifold: ``"linear"``, ``"autoencoder"``, or a function of the width d that makes an autoencoder
            ``(n, d) → (n, d)``, which :meth:`fit` trains.
        layers: which states are controlled: ``"all"`` that enter a stage, ``"input"`` the first that is floating,
            ``"hidden"`` all others, or their numbers; 0 is the input of the network.
        stages: names of modules after which to cut the network; by default a stage begins at each layer with
            parameters, and a residual block is one.
        form: ``"flat"``: a state is one vector; ``"embedding"``: one for each position of a sequence ``(n, T, d)`` or
            pixel of an image ``(n, C, H, W)``; ``"auto"``: embedding for sequences and states above 4096 numbers.

    Attributes:
        model: the network itself.
        manifolds: one for each controlled stage, after :meth:`fit`; in the state dict, with the means of training.

    Raises:
        ArgumentError: an option makes no sense.

    Reference: Chen et al. (2024), section 3 (linear, P, I and D, gains); Chen, Li & Zhang (2022) (autoencoders).
    Departures: training means are kept and used, never those of the batch; a stage without a subspace has no cost.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(200, 2) @ torch.randn(2, 20)              # inputs live in a plane
        >>> net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
        >>> healed = SelfHealing(net, c=0.1, fraction=0.999).fit(x, net(x).argmax(1))
        >>> noisy = x + torch.randn(200, 20)
        >>> errors = [float((f(noisy).argmax(1) != net(x).argmax(1)).float().mean()) for f in (net, healed)]
        >>> errors[1] < 0.7 * errors[0]
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        c: float = 0.1,
        terms: Terms = "P",
        fraction: float = 0.95,
        manifold: Literal["linear", "autoencoder"] | MakeNetwork = "linear",
        layers: Literal["all", "input", "hidden"] | Sequence[int] = "all",
        stages: Sequence[str] | None = None,
        form: Literal["auto", "flat", "embedding"] = "auto",
    ) -> None:
        super().__init__()
        control_gains(c, 1)
        if terms not in ("P", "PI", "PD", "PID"):
            raise ArgumentError(f"terms={terms!r} is unknown: choose 'P', 'PI', 'PD' or 'PID'")
        if not 0 < fraction <= 1:
            raise ArgumentError(f"fraction={fraction} of the variance must lie above 0 and not above 1")
        if manifold not in ("linear", "autoencoder") and not callable(manifold):
            raise ArgumentError(
                f"manifold={manifold!r} is unknown: choose 'linear', 'autoencoder' or a function of the width"
            )
        if manifold != "linear" and terms != "P":
            raise ArgumentError(f"terms={terms!r} averages linear maps: with an autoencoder use terms='P'")
        if form not in ("auto", "flat", "embedding"):
            raise ArgumentError(f"form={form!r} is unknown: choose 'auto', 'flat' or 'embedding'")
        if isinstance(layers, str) and layers not in ("all", "input", "hidden"):
            raise ArgumentError(f"layers={layers!r} is unknown: choose 'all', 'input', 'hidden' or numbers")
        self.model = model
        self.c, self.terms, self.fraction, self.manifold, self.form = c, terms, fraction, manifold, form
        self.layers = layers if isinstance(layers, str) else tuple(int(t) for t in layers)
        self.stages = None if stages is None else list(stages)
        self.manifolds = nn.ModuleList()
        self._forms: tuple[Form, ...] = ()
        self._horizon = 0  # stages of the network, once it was read
        self._cut: tuple[Any, tuple[StageStep, ...]] | None = None  # its mode and device, and its stages then

    # -- learning where clean states live

    def fit(
        self,
        x: Any,
        y: Tensor | None = None,
        *,
        samples: int = 1000,
        steps: int = 500,
        batch_size: int = 256,
        seed: int = 0,
    ) -> SelfHealing:
        """Learn the manifolds from clean inputs; the network itself is not changed.

        Args:
            x: training inputs, samples first, or the tuple of the arguments of ``forward``.
            y: their classes: only what the network gets right counts, sample by sample, in sequences position by
                position; by default everything counts.
            samples: how many samples to learn from, drawn at random.
            steps: steps of training of each autoencoder.
            batch_size: samples evaluated at a time.
            seed: of the draw, and of autoencoders.

        Returns:
            Itself.

        Raises:
            ArgumentError: the network is in training mode, with layers for which that matters, or a layer to control
                does not exist.
            DataError: fewer than two samples are right.
            ShapeError: y does not fit what the network returns.
        """
        args = x if isinstance(x, tuple) else (x,)
        if isinstance(x, dict):
            raise DataError("x is a dict: give the arguments of forward in order, as a tensor or a tuple")
        if samples < 2 or batch_size < 1:
            raise ArgumentError(
                f"samples={samples} must be at least 2, and batch_size={batch_size} at least 1"
            )
        n = len(first_tensor(args))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        self._cut, self._horizon = None, 0
        forms: tuple[Form, ...] = ()
        gathered: dict[tuple[int, str], list[Tensor]] = {}
        count = 0
        with torch.no_grad():
            for rows in order.split(batch_size):
                states, out = self._states(taken(args, rows))
                right = None if y is None else right_answers(out, y[rows.to(y.device)])
                forms = forms or read_forms(states, self.layers, self.form)
                count += gather(states, right, forms, self.terms, samples - count, gathered)
                if count >= samples:
                    break
        if count < 2:
            raise DataError(
                f"the network is right on {count} of {n} samples: give more of them, or leave y out to learn from all"
            )
        joined = {key: torch.cat(parts) for key, parts in gathered.items()}
        self.manifolds = nn.ModuleList(self._learn(form, joined, steps, seed) for form in forms)
        self._forms = forms
        return self

    def _learn(self, form: Form, gathered: dict[tuple[int, str], Tensor], steps: int, seed: int) -> Manifold:
        rows = {term: gathered[form.stage, term] for term in self.terms if (form.stage, term) in gathered}
        if self.manifold == "linear":
            return Subspace.average([Subspace.fit(part, self.fraction) for part in rows.values()])
        net = self._network(rows["P"].shape[1])
        code = None if net is not None else Subspace.fit(rows["P"], 0.95).rank
        return Autoencoder.fit(rows["P"], code, net=net, steps=steps, seed=seed)

    def _network(self, width: int) -> nn.Module | None:
        return None if isinstance(self.manifold, str) else self.manifold(width)

    # -- the controlled network

    @property
    def gains(self) -> tuple[float, ...]:
        """α_t of the controlled layers: the share of a deviation that control leaves.

        Raises:
            ArgumentError: not yet fitted.
        """
        self._check_fitted()
        return control_gains(self.c, len(self._forms))[0]

    def forward(self, *args: Any) -> Any:
        """What the network returns for its arguments under control."""
        x, _ = self._run(args)
        return x

    def controls(self, *args: Any) -> tuple[Tensor | None, ...]:
        """The feedback u_t that each stage receives; None where there is none. Large controls are a sign of trouble."""
        return tuple(self._run(args)[1])

    def solve(self, x: Any, *, iterations: int = 20, lr: float = 0.01) -> ClosedLoopControls:
        """Controls by the maximum principle, input by input, from the feedback law on.

        Slower than the feedback, and never of higher cost.

        Args:
            x: inputs, or the tuple of the arguments of ``forward``.
            iterations: steps of descent, each one forward and one backward pass.
            lr: rate of Adam, in the units of the states.

        Returns:
            ClosedLoopControls: output, controls, and cost of each sample.

        Raises:
            ArgumentError: not yet fitted, or ``terms`` is not 'P': means and differences have no cost of their own.
        """
        args = x if isinstance(x, tuple) else (x,)
        if self.terms != "P":
            raise ArgumentError(
                f"terms={self.terms!r}: the maximum principle needs one cost a layer, terms='P'"
            )
        with torch.no_grad():
            _, start = self._run(args)
        residuals: list[Callable[[Tensor], Tensor] | None] = [None] * len(start)
        for form, manifold in self._places():
            residuals[form.stage] = Residual(form, manifold)
        first = args if len(args) > 1 else args[0]
        system = StageSystem(self._steps(args))
        return closed_loop_controls(
            system, first, residuals, self.c, start=start, iterations=iterations, lr=lr
        )

    def report(
        self,
        x: Any,
        y: Tensor,
        eps: float | None = None,
        *,
        noise: float | None = None,
        norm: Norm = "linf",
        steps: int = 20,
        step_size: float | None = None,
        clip: Clip = (0.0, 1.0),
        loss: Loss = F.cross_entropy,
        batch_size: int = 512,
        seed: int = 0,
    ) -> HealingReport:
        """Accuracy with and without control: clean, under noise, and under attacks that do not and do know of it.

        Args:
            x: test inputs, samples first, in the units of ``eps`` and ``clip``; or tokens.
            y: their classes.
            eps: radius of the attacks; None for none.
            noise: standard deviation of Gaussian noise, not clipped; for tokens the share that is replaced.
            norm: ``"linf"`` or ``"l2"``.
            steps: steps of projected gradient ascent.
            step_size: its step; 2.5 ε / steps by default.
            clip: range of the data for the attacks; None for no limits.
            loss: what the attacks raise.
            batch_size: samples at a time.
            seed: of noise and starts.

        Returns:
            HealingReport; ``print`` shows it as a table with its warnings.

        Raises:
            ArgumentError: not yet fitted.
            DataError: x lies outside of ``clip``, or cannot be attacked.
        """
        self._check_fitted()
        form = self._forms[0]
        inside = self.manifolds[0] if form.stage == 0 and self.manifold == "linear" else None
        restrict = None
        if isinstance(inside, Subspace):
            restrict = lambda d: form.back(inside.along(form.rows(d)), d)  # noqa: E731
        return healing_report(
            self.model, self, x, y, eps,
            noise=noise, norm=norm, steps=steps, step_size=step_size, clip=clip, loss=loss,
            restrict=restrict, batch_size=batch_size, seed=seed,
        )  # fmt: skip

    # -- stages

    def _run(self, args: tuple[Any, ...]) -> tuple[Any, list[Tensor | None]]:
        """The output under control, and the controls."""
        self._check_fitted()
        alpha = control_gains(self.c, len(self._forms))[0]
        places = {
            form.stage: (Residual(form, part), a)
            for (form, part), a in zip(self._places(), alpha, strict=True)
        }
        controls: dict[int, Tensor] = {}

        def control(t: int, x: Any) -> Any:
            if t not in places:
                return x
            residual, keep = places[t]
            controls[t] = (keep - 1) * residual(float_leaves(x)[0])
            return shifted(x, controls[t])

        out, horizon = self._through(args, control)
        return out, [controls.get(t) for t in range(horizon)]

    @torch.no_grad()
    def _states(self, args: tuple[Any, ...]) -> tuple[list[Any], Any]:
        """States that enter the stages without control, and the output."""
        states: dict[int, Any] = {}

        def keep(t: int, x: Any) -> Any:
            states[t] = _pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, x)
            return x

        out, _ = self._through(args, keep)
        return list(states.values()), out

    def _through(self, args: tuple[Any, ...], visit: Callable[[int, Any], Any]) -> tuple[Any, int]:
        """Run the stages, with a look at each state; read the network anew if its control flow is another one."""

        def run(steps: Sequence[StageStep]) -> Any:
            x = args if len(args) > 1 else args[0]
            for t, step in enumerate(steps):
                x = step(visit(t, x))
            return x

        steps = self._steps(args)
        try:
            return run(steps), len(steps)
        except ShapeError:
            self._cut = None
            steps = self._steps(args, whole=True)
            return run(steps), len(steps)

    def _steps(self, args: tuple[Any, ...], whole: bool = False) -> tuple[StageStep, ...]:
        """The stages in the present mode and on the present device of the network."""
        if any(part.training and isinstance(part, _DIFFERS) for part in self.model.modules()):
            raise ArgumentError(
                "the network is in training mode, with dropout or batch statistics: call eval() on it first"
            )
        parts = tuple(part.training for part in self.model.modules())
        place = next((p.device for p in self.model.parameters()), None)
        if self._cut is None or self._cut[0] != (parts, place):
            few = args if whole else taken(args, slice(0, 2))
            example = _pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, few)
            system = as_system(self.model, example if len(example) > 1 else example[0], self.stages)
            steps = stage_steps(system)
            if len(steps) != (self._horizon or len(steps)):
                raise ShapeError(
                    f"the network has {len(steps)} stages for inputs of these sizes, but had {self._horizon} when the "
                    "manifolds were learned: give inputs of those sizes, or fit again"
                )
            self._cut, self._horizon = ((parts, place), steps), len(steps)
        return self._cut[1]

    def _places(self) -> list[tuple[Form, Manifold]]:
        """Which states are controlled, and the manifold of each."""
        return list(zip(self._forms, cast("list[Manifold]", list(self.manifolds)), strict=True))

    def _check_fitted(self) -> None:
        if not self._forms or len(self.manifolds) != len(self._forms):
            raise ArgumentError(
                "the manifolds are not known yet: call fit(x, y) on clean training inputs first"
            )

    # -- saving, loading, copying

    def get_extra_state(self) -> dict[str, Any]:
        """What the state dict needs beside the tensors."""
        parts = []
        for _, part in self._places():
            rank = part.rank if isinstance(part, Subspace) else 0
            layers = [layer for layer in part.modules() if isinstance(layer, nn.Linear)]
            sizes = (
                [layers[1].out_features, layers[0].out_features] if self.manifold == "autoencoder" else [0, 0]
            )
            parts.append([type(part).__name__, len(part.mean), rank, *sizes])
        return {
            "c": self.c,
            "horizon": self._horizon,
            "forms": [[form.stage, form.axis] for form in self._forms],
            "parts": parts,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Make room for what the state dict holds."""
        self.c, self._horizon, self._cut = state["c"], state["horizon"], None
        self._forms = tuple(Form(stage, axis) for stage, axis in state["forms"])
        like = next((p for p in self.model.parameters() if p.is_floating_point()), torch.zeros(()))
        parts: list[Manifold] = []
        for kind, d, rank, code, hidden in state["parts"]:
            mean = like.new_zeros(d)
            if kind == "Subspace":
                parts.append(Subspace(mean, like.new_zeros(d, rank)))
                continue
            net = self._network(d) or Autoencoder.network(d, code, hidden)
            parts.append(Autoencoder(net.to(mean), mean, like.new_zeros(())).requires_grad_(False).eval())
        self.manifolds = nn.ModuleList(parts)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the traced stages, which are made again when needed."""
        return {**self.__dict__, "_cut": None}

    def extra_repr(self) -> str:
        """Options."""
        return (
            f"c={self.c:g}, terms={self.terms!r}, controlled stages: {[form.stage for form in self._forms]}"
        )
