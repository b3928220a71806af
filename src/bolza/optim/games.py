r"""Training as a dynamic game: every layer is a player, and what a player sees decides its update.

Stage t of a network maps x_{t+1} = F_t(x_t; θ_{t,1}, …, θ_{t,N}), where x_t holds every tensor that is still needed:
inside a residual or inception block the skipped activations too. The players of a stage act at the same time.

    information    a player minimises                                  update
    open           its Hamiltonian H_{t,n}                             δθ = −M⁻¹ H_θ
    feedback       its Bellman objective Q_{t,n}, others fixed         δθ = −M⁻¹ (Q_θ + Q_θx δx)
    cooperative    the joint Bellman objective of the stage            the joint solve of all its players

Blind players make the standard optimizers, players with feedback differential dynamic programming
(:mod:`bolza.optim.ddp`), and cooperation adds the curvature between players (:mod:`bolza.optim.cooperation`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bolza.core import cites
from bolza.core.errors import ArgumentError
from bolza.core.trajectory import Trajectory
from bolza.ops.batches import count_samples
from bolza.optim.bandits import Exp3
from bolza.optim.cooperation import GAME_THEORETIC, KroneckerGame, Schur, damped_blocks
from bolza.optim.curvature import Kronecker, Layer, _joined, _momentum, add_combination
from bolza.optim.ddp import DDPNOpt, Plan, _deviation, _plan
from bolza.optim.feedback import Mode
from bolza.systems.aligned import REFERENCE, AlignedSystem, Alignment, aligned_system, alignments
from bolza.systems.recorder import Recorder

__all__ = ["GAME_THEORETIC", "REFERENCE", "DGNOpt", "Information"]

Information = Literal["open", "feedback", "cooperative"]


class JointKronecker(Kronecker):
    """M of the players of a stage together, with Kronecker blocks A_uv ⊗ G_uv; see :class:`KroneckerGame`.

    A player whose output has another number of places, or a layer without Kronecker factors, acts alone.
    """

    def __init__(self, schur: Schur = "exact") -> None:
        super().__init__()
        self.schur = schur
        self._teams: dict[str, list[Layer]] = {}
        self._partners: dict[str, list[Layer]] = {}
        self._seen: set[str] = set()
        self._games: dict[str, KroneckerGame] = {}
        self._gradients: dict[str, Tensor] = {}

    def assign(self, layers: Sequence[Layer], alignments: Sequence[Sequence[Sequence[str]]]) -> None:
        """Tell which layers act together in the coming step.

        Args:
            layers: of the step, by stages.
            alignments: names of the layers of each stage; first in the alignment that is played, then in others that
                may be, whose factors move on as well.
        """
        known = {layer.path: layer for layer in layers if layer.rows is not None}
        found = [self._teams_of(known, stages) for stages in alignments]
        self._teams = {layer.path: team for team in found[0] for layer in team}
        self._partners = {path: [] for path in known}
        for team in (team for teams in found for team in teams):
            for u, first in enumerate(team):
                for second in team[u + 1 :]:
                    one, two = sorted((first, second), key=lambda layer: layer.path)
                    if one not in self._partners[two.path]:
                        self._partners[two.path].append(one)
        self._gradients = {}

    @staticmethod
    def _teams_of(known: Mapping[str, Layer], stages: Sequence[Sequence[str]]) -> list[list[Layer]]:
        teams: dict[Any, list[Layer]] = {}
        for t, paths in enumerate(stages):
            for layer in (known[path] for path in sorted(paths) if path in known):
                assert layer.rows is not None
                places = tuple(part.inputs.shape[1] for part in layer.rows)
                teams.setdefault((t, places), []).append(layer)
        return list(teams.values())

    def forget(self) -> None:
        """Drop what is made of the optimizer's state; it is made again when it is needed."""
        self._games = {}

    def observe(self, layer: Layer) -> None:
        """Move the averages of the factors, those between players too, and prepare the joint solve."""
        super().observe(layer)
        if layer.rows is None:
            return
        state, group = layer.states["weight"], layer.groups["weight"]
        count = int(state["kronecker_step"]) - 1
        for partner in self._partners.get(layer.path, ()):
            name = f"with {partner.path}"
            if count % group["factor_every"] == 0 or name not in state:
                self._move_cross_factors(partner, layer, name)
        self._seen.add(layer.path)
        team = self._teams.get(layer.path, [layer])
        if len(team) == 1 or not all(member.path in self._seen for member in team):
            return
        self._seen -= {member.path for member in team}
        first, key = team[0], "game " + " ".join(member.path for member in team)
        state = first.states["weight"]
        if key not in state or count - int(state[f"{key} made"]) >= group["refresh"]:
            state[key], state[f"{key} made"] = _snapshot(team), count
            self._games.pop(key, None)
        if key not in self._games:
            self._games[key] = self._game(state[key], len(team), group["damping"])

    def _move_cross_factors(self, first: Layer, second: Layer, name: str) -> None:
        """Averages of A_uv and G_uv, beside the second of two players."""
        assert first.rows is not None and second.rows is not None
        pairs = list(zip(first.rows, second.rows, strict=True))
        inputs = _total([_moment(a.inputs, b.inputs) for a, b in pairs]) / first.samples
        signals = _total([_moment(a.signals, b.signals) for a, b in pairs])
        signals = signals * (first.samples / first.rows[0].inputs.shape[1])
        if first.reduce is not None:
            inputs, signals = first.reduce(inputs), first.reduce(signals)
        state = second.states["weight"]
        if name in state:
            for average, new in zip(state[name], (inputs, signals), strict=True):
                average.lerp_(new, 1 - second.groups["weight"]["decay"])
        else:
            state[name] = [inputs, signals]

    def _game(self, snapshot: Sequence[Tensor], players: int, damping: float) -> KroneckerGame:
        blocks: list[list[list[Tensor]]] = [[[snapshot[0]] * players for _ in range(players)] for _ in "AG"]
        rest = iter(snapshot)
        for side in blocks:
            for u in range(players):
                side[u][u] = next(rest)
        for u in range(players):
            for v in range(u + 1, players):
                for side in blocks:
                    side[u][v] = next(rest)
                    side[v][u] = side[u][v].mT
        schur: Schur = self.schur if players == 2 else "exact"
        inputs, signals = damped_blocks(blocks[0], blocks[1], damping)
        return KroneckerGame(inputs, signals, schur=schur)

    def apply(self, layer: Layer, weights: Sequence[Tensor] | None, scale: float) -> None:
        """Step, of all players of a stage when the last of them is reached."""
        team = self._teams.get(layer.path, [layer])
        if len(team) == 1:
            super().apply(layer, weights, scale)
            return
        self._gradients[layer.path] = _gradient(layer, weights, scale)
        if len(self._gradients) < len(team):
            return
        game = self._games["game " + " ".join(member.path for member in team)]
        right = [self._gradients[member.path] for member in team]
        for member, direction in zip(team, game.solve(right), strict=True):
            for name, param in member.params.items():
                part = direction[:, -1] if name == "bias" else direction[:, : param[0].numel()]
                group = member.groups[name]
                part = part.reshape(param.shape)
                part = part.add(param, alpha=group["weight_decay"]) if group["weight_decay"] else part
                param.add_(_momentum(part, member.states[name], group), alpha=-group["lr"])
        self._gradients = {}


def _no_memory() -> dict[str, Any]:
    return {"log_weights": [], "draws": 0, "usual": 0.0, "largest": 0.0}


def _snapshot(team: Sequence[Layer]) -> list[Tensor]:
    """The factors of a team: A_uu, G_uu, and A_uv, G_uv for u < v."""
    blocks = [m.states["weight"][name] for name in ("input_factor", "output_factor") for m in team]
    for u, first in enumerate(team):
        for second in team[u + 1 :]:
            blocks += second.states["weight"][f"with {first.path}"]
    return [block.clone() for block in blocks]


def _moment(left: Tensor, right: Tensor) -> Tensor:
    return left.flatten(0, 1).T @ right.flatten(0, 1)


def _total(terms: Sequence[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(list(terms)).sum(0)


def _gradient(layer: Layer, weights: Sequence[Tensor] | None, scale: float) -> Tensor:
    """Gradient of the weight, with that of the bias as last column, its samples weighed."""
    weight, bias = layer.params["weight"], layer.params.get("bias")
    assert weight.grad is not None and layer.rows is not None
    flat = _joined(weight, bias)
    if weights is None:
        return flat
    change = torch.zeros_like(flat)
    for part, w in zip(layer.rows, weights, strict=True):
        add_combination(change, part, w - 1, scale)
    return flat + (change if layer.reduce is None else layer.reduce(change))


@cites(REFERENCE, GAME_THEORETIC)
class DGNOpt(DDPNOpt):
    r"""Descend as the players of a dynamic game: one a layer, with feedback, and cooperating where they act together.

        δθ_t = −M_t⁻¹ Σ_i (β_i + α_i c_i) ∂J_i/∂θ_t,    c_i = α_i P_{t,i}·(x̂_{t,i} − x_{t,i})

    as :class:`DDPNOpt`, on stages that go through residual and inception blocks: x_t then holds the skipped
    activations too, and their deviations are fed back. With ``information="cooperative"`` M_t is the joint curvature of
    all dense and convolutional layers that act in stage t, blocks A_uv ⊗ G_uv, with A_uv the covariance of the inputs
    of two layers and G_uv that of the signals that come back to them.

    A chain has one player a stage and this is :class:`DDPNOpt`, to the last digit.

    Which layers of a block act together is the alignment: a skip with the first (``"early"``) or with the last layer
    of its block (``"late"``), or all of the block at once (``"whole"``). ``"bandit"`` tries them in turn and learns
    which gives the larger drop of the loss on its own batch, at the price of one more forward pass a step.

    Args:
        model: the network, or a DistributedDataParallel around it.
        lr: learning rate η.
        information: ``"open"``, ``"feedback"`` or ``"cooperative"``; see :mod:`bolza.optim.games`.
        alignment: ``"whole"``, ``"early"``, ``"late"`` or ``"bandit"``.
        schur: ``"exact"``, or ``"factored"`` for the paper's form of the joint solve of two players.
        exploration: share of draws at which the bandit picks an alignment at random.
        seed: of the bandit's draws.
        momentum: momentum of the preconditioned step.
        weight_decay: weight λ of ½λ|W|².
        curvature: as for :class:`DDPNOpt`; cooperation needs ``"kronecker"``, which is then the default, else
            ``"identity"``.
        mode: as for :class:`DDPNOpt`.
        scale: as for :class:`DDPNOpt`.
        alpha: decay of RMSprop's average.
        eps: added to RMSprop's root.
        damping: λ added to the Kronecker factors.
        decay: decay of the averages of the Kronecker factors.
        factor_every: steps between two updates of the factors.
        refresh: steps between two inversions of the factors.
        params: parameters or groups, each with its own ``lr``, ``momentum``, ``weight_decay``.
        example: a batch of inputs, to read the network at once; by default it is read when it first runs.

    Raises:
        ArgumentError: a setting is out of its range, or two of them do not go together.
        UnsupportedError: in ``step``, as for :class:`DDPNOpt`.

    Reference: Liu, Chen & Theodorou (2021), arXiv:2105.03788; with cooperation on residual networks it is the method of
    Liu, Chen & Theodorou (2020), arXiv:2007.08880. Departures: the exact Schur complement of the Kronecker blocks, as
    the factored one is singular where players share their input; the damped recursion of :class:`DDPNOpt`, in which
    the players' curvatures are taken one by one; EXP3 with three candidate alignments.

    Example:
        >>> from bolza.models import resnet
        >>> net = resnet(depth=4, width=4)
        >>> optimizer = DGNOpt(net, information="cooperative")
        >>> x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.cross_entropy(net(x), y)
        ...     loss.backward()
        ...     _ = optimizer.step()
        >>> sorted(optimizer.teams()[3])
        ['3.conv2', '3.skip.0']
    """

    _settings = (*DDPNOpt._settings, "information", "alignment", "exploration", "seed", "_schur")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        *,
        information: Information = "feedback",
        alignment: Alignment | Literal["bandit"] = "late",
        schur: Schur = "exact",
        exploration: float = 0.1,
        seed: int = 0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        curvature: Literal["identity", "rmsprop", "kronecker"] | None = None,
        mode: Mode = "damped",
        scale: float | None = None,
        alpha: float = 0.99,
        eps: float = 1e-8,
        damping: float = 0.03,
        decay: float = 0.95,
        factor_every: int = 1,
        refresh: int = 10,
        params: Iterable[Any] | None = None,
        example: Any = None,
    ) -> None:
        if information not in get_args(Information):
            raise ArgumentError(f"information is {information!r}: choose 'open', 'feedback' or 'cooperative'")
        if alignment not in (*get_args(Alignment), "bandit"):
            raise ArgumentError(f"alignment is {alignment!r}: choose 'whole', 'early', 'late' or 'bandit'")
        if schur not in get_args(Schur):
            raise ArgumentError(f"schur is {schur!r}: choose 'exact' or 'factored'")
        Exp3(1, exploration)  # for its check
        cooperative = information == "cooperative"
        if curvature is None:
            curvature = "kronecker" if cooperative else "identity"
        if cooperative and curvature != "kronecker":
            raise ArgumentError(
                f"curvature is {curvature!r}, but cooperating players need that between them: choose 'kronecker'"
            )
        self.information, self.alignment = information, alignment
        self.exploration, self.seed, self._schur = exploration, seed, schur
        super().__init__(
            model,
            lr,
            momentum=momentum,
            weight_decay=weight_decay,
            curvature=curvature,
            feedback=information != "open",
            mode=mode,
            scale=scale,
            alpha=alpha,
            eps=eps,
            damping=damping,
            decay=decay,
            factor_every=factor_every,
            refresh=refresh,
            params=params,
            example=example,
        )
        if alignment == "bandit":
            self.param_groups[0].setdefault("bandit", _no_memory())

    def _fresh(self) -> None:
        super()._fresh()
        if self.information == "cooperative":
            self._curvature = JointKronecker(self._schur)
        self._systems: dict[Alignment, AlignedSystem] = {}
        self._recorders: dict[Alignment, Recorder] = {}
        self._current: Alignment = "whole" if self.alignment == "bandit" else self.alignment

    def teams(self) -> tuple[tuple[str, ...], ...]:
        """The layers that act in each stage, by name, in the present alignment.

        Raises:
            ArgumentError: the network has not run yet.
        """
        system = self.system
        if system is None:
            raise ArgumentError("the network has not been read: run it once, or give an example")
        held = {id(p) for group in self.param_groups for p in group["params"]}

        def acts(path: str) -> bool:
            return any(p.ndim > 1 and id(p) in held for p in system.module.get_submodule(path).parameters())

        return tuple(tuple(path for path in paths if acts(path)) for paths in system.stage_modules)

    # -- alignments

    def probabilities(self) -> dict[str, float]:
        """Probability with which each alignment is drawn for the next step.

        Raises:
            ArgumentError: the network has not run yet.
        """
        if not self._systems:
            raise ArgumentError("the network has not been read: run it once, or give an example")
        return dict(zip(self._systems, self._bandit().probabilities(), strict=True))

    def _bandit(self) -> Exp3:
        weights = self.param_groups[0]["bandit"]["log_weights"] if self.alignment == "bandit" else None
        arms = len(self._systems)
        return Exp3(arms, self.exploration, weights if weights and len(weights) == arms else None)

    def _open(self, example: Any) -> Recorder:
        if self.alignment == "bandit":
            self._systems = alignments(self.module, example)
            self.param_groups[0].setdefault("bandit", _no_memory())
        else:
            self._systems = {self.alignment: aligned_system(self.module, example, self.alignment)}
        return self._choose()

    def _choose(self) -> Recorder:
        """Draw the alignment of the next step, and record along it."""
        names = list(self._systems)
        self._current = names[0]
        if len(names) > 1:
            draws = self.param_groups[0]["bandit"]["draws"]
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draws)
            self._current = names[self._bandit().draw(generator)]
        if self._current not in self._recorders:
            system = self._systems[self._current]
            self._recorders[self._current] = self._watched(Recorder(system, keep="all", layers=self._layers))
        for name, recorder in self._recorders.items():
            recorder._off = 0 if name == self._current else 1
        self._recorder = self._recorders[self._current]
        return self._recorder

    def close(self) -> None:
        """Take all hooks off the network; the optimizer cannot step any more."""
        super().close()
        for recorder in self._recorders.values():
            recorder.close()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        super().load_state_dict(state_dict)
        if isinstance(self._curvature, JointKronecker):
            self._curvature.forget()
        if self._systems:
            self._choose()

    # -- the step

    def _build(self, *args: Any, **kwargs: Any) -> dict[str, Layer]:
        layers = super()._build(*args, **kwargs)
        if isinstance(self._curvature, JointKronecker):
            played: Plan = args[0] if args else kwargs["plan"]
            others = [
                self._plan_of(system).layers
                for name, system in self._systems.items()
                if name != self._current
            ]
            self._curvature.assign(list(layers.values()), [played.layers, *others])
        return layers

    def _plan_of(self, system: AlignedSystem) -> Plan:
        key = id(system), system._mode()
        if key not in self._plans:
            self._plans[key] = (system, _plan(system))
        return self._plans[key][1]

    def _update(self, trajectories: tuple[Trajectory, ...]) -> None:
        super()._update(trajectories)
        if self.alignment == "bandit" and len(self._systems) > 1 and trajectories:
            self._learn(self._drop(trajectories))

    def step(self, closure: Any = None) -> Any:
        """Make one step, and choose the alignment of the next; as :meth:`torch.optim.Optimizer.step`."""
        loss = super().step(closure)
        if self.alignment == "bandit" and len(self._systems) > 1:
            self._choose()
        return loss

    def _drop(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """Drop of the loss on this batch, −(P·δx + ½ (P·δx)²) at the output, averaged."""
        assert self._recorder is not None
        changes = []
        for run, source in zip(trajectories, self._recorder.passes, strict=True):
            system, x, n = source.layout.system, run.states[0], count_samples(run.states[0])
            with system.drawing_from(source.randomness, run.states):
                for t in range(system.horizon):
                    x = system.step(t, x, {})
            assert run.costates is not None
            change = _deviation(x, run.states[-1], run.costates[-1], n)
            if change is not None:
                changes.append(change)
        a = torch.cat(changes) * (sum(map(len, changes)) / self._loss_scale) if changes else torch.zeros(1)
        drop = -(a + 0.5 * a.square()).mean()
        return drop if self.group is None else self._reduce(drop)

    def _learn(self, drop: Tensor) -> None:
        memory = dict(self.param_groups[0]["bandit"])  # a copy: a saved state stays as it is
        value, reward = float(drop), 0.0
        if math.isfinite(value):  # against the usual drop, in units of the largest difference of late
            usual = memory["usual"] if memory["draws"] else value
            memory["largest"] = max(0.98 * memory["largest"], abs(value - usual))
            reward = 0.5 + 0.5 * (value - usual) / memory["largest"] if memory["largest"] else 0.5
            memory["usual"] = 0.9 * usual + 0.1 * value
        bandit = self._bandit()
        bandit.update(list(self._systems).index(self._current), min(max(reward, 0.0), 1.0))
        memory["log_weights"], memory["draws"] = bandit.log_weights, memory["draws"] + 1
        self.param_groups[0]["bandit"] = memory
