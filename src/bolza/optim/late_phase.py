r"""Late-phase weights: an ensemble of a few of the weights, averaged at the end.

From step T0 on a small set φ of the weights (normalisation, head) has K versions φ_k, the rest θ is shared.
One round takes K mini-batches, one a version:

    φ_k ← U(φ_k, ∇_φ L_k)   for k = 1 … K;      θ ← U(θ, γ Σ_k ∇_θ L_k)

At the end φ ← mean_k φ_k: at the noise level of the run, the mean has a K-th of the variance of one version.

Reference: von Oswald, Kobayashi, Meulemans, Henning, Grewe & Sacramento (2021), arXiv:2007.12927, Algorithm 1.

Departures: γ = 1/K by default, so that θ takes the mean gradient. Versions inherit the optimizer's state of φ (its
momentum), each its own copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.optim.recorded import check_number

__all__ = ["LatePhase", "late_parameters", "mean_of_members", "noisy_members"]

REFERENCE = Reference(
    "oswald2021late",
    "von Oswald, Johannes and Kobayashi, Seijin and Meulemans, Alexander and Henning, Christian and "
    "Grewe, Benjamin F. and Sacramento, João",
    "Neural networks with late-phase weights",
    2021,
    venue="International Conference on Learning Representations (ICLR)",
    arxiv="2007.12927",
)
_KEPT = ("members", "start", "gamma", "noise", "seed", "_counts", "_steps", "_turn")
_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def noisy_members(phi: Tensor, K: int, sigma: float, generator: torch.Generator | None = None) -> Tensor:
    """K versions φ_k = φ + σ rms(φ) ξ_k, ξ_k standard normal; the first dimension counts them.

    Example:
        >>> noisy_members(torch.ones(2), 3, 0.0)
        tensor([[1., 1.],
                [1., 1.],
                [1., 1.]])
    """
    members = phi.detach().expand(K, *phi.shape).clone()
    if sigma:
        noise = torch.randn(members.shape, generator=generator, dtype=torch.float64)
        members += sigma * phi.detach().square().mean().sqrt() * noise.to(members)
    return members


def mean_of_members(members: Tensor) -> Tensor:
    """The mean of the versions, φ = (1/K) Σ_k φ_k.

    Example:
        >>> mean_of_members(torch.tensor([[1.0], [3.0]]))
        tensor([2.])
    """
    return members.mean(0)


def late_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The usual late-phase weights: scales and shifts of normalisation layers, and the last linear layer.

    Args:
        model: a network.

    Returns:
        Trainable parameters, in the order of the network.

    Raises:
        ArgumentError: the network has neither.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        >>> [tuple(p.shape) for p in late_parameters(net)]
        [(3,), (3,), (1, 3), (1,)]
    """
    chosen = {id(p) for layer in model.modules() if isinstance(layer, _NORMS) for p in layer.parameters()}
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    chosen |= {id(p) for layer in linear[-1:] for p in layer.parameters()}
    found = [p for p in model.parameters() if id(p) in chosen and p.requires_grad]
    if not found:
        raise ArgumentError(
            "the network has no trainable normalisation and no linear layer: give the late-phase weights as late="
        )
    return found


@cites(REFERENCE)
class LatePhase(torch.optim.Optimizer):
    r"""A wrapper that gives a few weights K versions late in training, and averages them at the end.

    Use it as any optimizer; from step ``start`` (or :meth:`begin`) on, each ``step`` moves the version whose turn
    it is, and every K-th one the shared weights, by the accumulated gradient. Between steps the network holds the
    version whose turn is next. At the end call :meth:`finish`, and recompute the statistics of batch
    normalisation with ``torch.optim.swa_utils.update_bn``.

    Per step it costs what the base optimizer costs; memory is K copies of the late weights and their
    optimizer state. K mini-batches make one step of the shared weights: count epochs accordingly.

    Args:
        model: the network; or groups of parameters, if ``late`` is given.
        lr: learning rate of the base optimizer.
        base: class of the base optimizer; one instance serves θ, and one each version.
        members: number K of versions; one is the base optimizer itself.
        start: step at which they part; by default when :meth:`begin` is called.
        late: the late-phase weights φ; :func:`late_parameters` by default.
        gamma: factor γ of the accumulated gradient of θ; 1/K by default.
        noise: σ of the versions' first difference, in units of each weight's root mean square.
        seed: of that noise.
        options: of the base optimizer.

    Raises:
        ArgumentError: a number makes no sense, or a late weight is none of the network's.

    Reference: von Oswald et al. (2021), arXiv:2007.12927, Algorithm 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
        >>> optimizer = LatePhase(net, lr=0.1, members=2, start=1)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     net(torch.ones(4, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> optimizer.finish()
        >>> optimizer.late_phase
        False
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float = 0.1,
        base: type[torch.optim.Optimizer] = torch.optim.SGD,
        *,
        members: int = 5,
        start: int | None = None,
        late: Sequence[nn.Parameter] | None = None,
        gamma: float | None = None,
        noise: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        whole = isinstance(members, int) and (start is None or isinstance(start, int))
        if not whole or members < 1 or (start is not None and start < 0):
            raise ArgumentError(
                f"members is {members} and start is {start}: whole numbers, at least 1, and no negative step"
            )
        gamma = 1 / members if gamma is None else gamma
        for name, value in (("lr", lr), ("gamma", gamma), ("noise", noise)):
            check_number(name, value)
        if isinstance(model, nn.Module):
            groups: list[Any] = [p for p in model.parameters() if p.requires_grad]
            late = late_parameters(model) if late is None else late
        else:
            groups = list(model)
            if late is None:
                raise ArgumentError(
                    "late is None, but parameters were given: say which are late-phase weights"
                )
        if base is torch.optim.SGD:
            options.setdefault("momentum", 0.9)
        chosen = {id(p) for p in late}
        if not chosen:
            raise ArgumentError("late is empty: name at least one late-phase weight")
        shared, own = _parted(groups, chosen)
        if len(chosen) != sum(len(group["params"]) for group in own):
            raise ArgumentError(
                "late holds a parameter that is none of the given ones, or does not require a gradient"
            )
        self.members, self.start, self.gamma, self.noise, self.seed = members, start, gamma, noise, seed
        self._shared = base(shared, lr=lr, **options) if shared else None  # type: ignore[call-arg]
        self._own = [base(own, lr=lr, **options)]  # type: ignore[call-arg]
        super().__init__(
            [*(self._shared.param_groups if self._shared else []), *self._own[0].param_groups], {"lr": lr}
        )
        # the base optimizers read the very groups that schedulers change
        counts = len(shared)
        if self._shared is not None:
            self._shared.param_groups = self.param_groups[:counts]
        self._own[0].param_groups = self.param_groups[counts:]
        self._counts = counts
        self._steps, self._turn = 0, 0
        self._versions: dict[nn.Parameter, Tensor] = {}
        self._sum: dict[nn.Parameter, Tensor] = {}
        if start == 0:
            self.begin()

    @property
    def late_phase(self) -> bool:
        """Whether there are versions now."""
        return bool(self._versions)

    def _late(self) -> list[nn.Parameter]:
        return [p for group in self._own[0].param_groups for p in group["params"]]

    @torch.no_grad()
    def begin(self) -> None:
        """Part the versions from here on."""
        if self._versions:
            return
        draw = torch.Generator().manual_seed(self.seed)
        for p in self._late():
            self._versions[p] = noisy_members(p, self.members, self.noise, draw)
            p.copy_(self._versions[p][0])
        first = self._own[0]
        self._own = [first, *(_twin(first) for _ in range(self.members - 1))]
        self._turn, self._sum = 0, {}

    @torch.no_grad()
    def mean(self, p: Tensor) -> Tensor:
        """What :meth:`finish` would make of a parameter, for a test on the way; itself if it has no versions."""
        for q, versions in self._versions.items():
            if q is p:
                return mean_of_members(versions)
        return p.detach().clone()

    @torch.no_grad()
    def finish(self) -> None:
        """Put the mean of the versions into the network, and end the late phase."""
        for p, versions in self._versions.items():
            p.copy_(mean_of_members(versions))
        self._versions, self._sum, self._turn = {}, {}, 0
        self._own, self.start = self._own[:1], None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step of the version whose turn it is, and of the shared weights if the round is complete."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        everything = [p for group in self.param_groups for p in group["params"]]
        if all(p.grad is None for p in everything):
            return loss
        self._steps += 1
        if not self._versions:
            for optimizer in (self._shared, self._own[0]):
                if optimizer is not None:
                    optimizer.step()
            if self.start is not None and self._steps >= self.start:
                self.begin()  # now, not before the next step, whose gradient is that of the first version
            return loss
        self._own[self._turn].step()
        for p in everything:
            if p.grad is not None and p not in self._versions:
                self._sum[p] = self._sum[p] + p.grad if p in self._sum else p.grad.clone()
        for p, versions in self._versions.items():
            versions[self._turn].copy_(p)
        self._turn = (self._turn + 1) % self.members
        for p, versions in self._versions.items():
            p.copy_(versions[self._turn])
        if self._turn == 0 and self._shared is not None:
            self._move_shared()
        return loss

    def _move_shared(self) -> None:
        assert self._shared is not None
        gradients = {p: p.grad for group in self._shared.param_groups for p in group["params"]}
        try:
            for p in gradients:
                p.grad = self._sum[p].mul_(self.gamma) if p in self._sum else None
            self._shared.step()
        finally:
            for p, gradient in gradients.items():
                p.grad = gradient
            self._sum = {}

    # -- what is saved

    def __getstate__(self) -> dict[str, Any]:
        own = (*_KEPT, "_shared", "_own", "_versions", "_sum")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are made when the optimizer is.

        Raises:
            ArgumentError: the optimizer exists already.
        """
        if hasattr(self, "_counts"):
            raise ArgumentError("a group cannot be added later: give all parameters when making LatePhase")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Base optimizers, versions and the place in the round, beside the groups."""
        late, shared = self._late(), self._shared_parameters()
        versions = [self._versions[p] for p in late] if self._versions else []
        sums = {i: self._sum[p] for i, p in enumerate(shared) if p in self._sum}
        plain = super().state_dict()
        return {
            **plain,
            "late_phase": {
                "shared": self._shared.state_dict() if self._shared else None,
                "own": [optimizer.state_dict() for optimizer in self._own],
                "versions": versions,
                "sums": sums,
                "steps": self._steps,
                "turn": self._turn,
                "start": self.start,
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        saved = copy.deepcopy(state_dict["late_phase"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "late_phase"})
        counts = self._counts
        first = self._own[0]
        self._own = [first, *(_twin(first) for _ in saved["own"][1:])]
        pairs = [*zip(self._own, saved["own"], strict=True)]
        if self._shared is not None:
            pairs.append((self._shared, saved["shared"]))
        for optimizer, state in pairs:
            optimizer.load_state_dict(state)
            optimizer.param_groups = (
                self.param_groups[:counts] if optimizer is self._shared else self.param_groups[counts:]
            )
        late, shared = self._late(), self._shared_parameters()
        self._versions = {p: v.to(p) for p, v in zip(late, saved["versions"], strict=False)}
        self._sum = {shared[i]: value.to(shared[i]) for i, value in saved["sums"].items()}
        self._steps, self._turn, self.start = saved["steps"], saved["turn"], saved["start"]

    def _shared_parameters(self) -> list[nn.Parameter]:
        return [] if self._shared is None else [p for g in self._shared.param_groups for p in g["params"]]


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Another optimizer of the same parameters and groups, with a copy of the state."""
    twin = copy.copy(optimizer)
    twin.__dict__.update(optimizer.__dict__)  # a copy of an optimizer has no attributes of its class
    twin.param_groups = optimizer.param_groups
    state: Any = type(optimizer.state)(dict)
    for p, values in optimizer.state.items():
        state[p] = copy.deepcopy(values)
    twin.state = state
    return twin


def _parted(groups: list[Any], chosen: set[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups of the shared and of the late weights, each with the options of the group it comes from."""
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for group in groups:
        members = list(group["params"]) if not isinstance(group["params"], Tensor) else [group["params"]]
        for part, late in zip(parts, (False, True), strict=True):
            picked = [p for p in members if (id(p) in chosen) == late]
            if picked:
                part.append({**group, "params": picked})
    return parts
