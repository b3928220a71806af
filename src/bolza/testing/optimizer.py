"""The contract of an optimizer: it is a ``torch.optim.Optimizer`` in everything a training loop relies on."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bolza.testing.clauses import ContractError, identical, require

__all__ = ["OPTIMIZER_CLAUSES", "check_optimizer"]

Factory = Callable[[Any], Optimizer]


class _Net(nn.Module):
    """A small network with a shared, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.middle = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.middle.weight
        self.last = nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.again(torch.tanh(self.middle(x))))
        return self.last(x)


@dataclass
class _Case:
    """One network with its data and an optimizer made by the factory under test."""

    factory: Factory
    takes_model: bool
    dtype: torch.dtype

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.net = _Net().to(self.dtype)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw, dtype=self.dtype))
        self.x = torch.randn(8, 4, generator=draw, dtype=self.dtype)
        self.y = torch.randn(8, 3, generator=draw, dtype=self.dtype)
        torch.manual_seed(1)  # for an optimizer that draws from the global generator
        self.optimizer = self.factory(self.net if self.takes_model else self.net.parameters())

    def loss(self) -> Tensor:
        return nn.functional.mse_loss(self.net(self.x), self.y)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()

    def steps(self, count: int, each: Callable[[], object] = lambda: None) -> None:
        for _ in range(count):
            self.backward()
            self.optimizer.step()
            each()

    def values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.net.named_parameters()}


def _is_an_optimizer(make: Callable[..., _Case]) -> None:
    case = make()
    kind = type(case.optimizer)
    require(
        isinstance(case.optimizer, Optimizer),
        "is_an_optimizer",
        f"{kind.__name__} is not a torch.optim.Optimizer, so schedulers and training loops refuse it: "
        "derive from torch.optim.Optimizer and call its __init__(params, defaults)",
    )
    held = {id(p) for group in case.optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in case.net.named_parameters() if p.requires_grad and id(p) not in held]
    require(not missing, "is_an_optimizer", f"param_groups does not hold the parameters {missing}")


def _descends(make: Callable[..., _Case]) -> None:
    case = make()
    before = case.loss().item()
    case.steps(30)
    after = case.loss().item()
    require(
        after < before,
        "descends",
        f"30 steps on a small regression took the loss from {before:.4g} to {after:.4g}: "
        "check the sign of the step, or pass a smaller lr; a sampler may leave this clause out",
    )


def _repeats(make: Callable[..., _Case]) -> None:
    one = make()
    one.steps(4)
    two = make()
    two.steps(4)
    require(
        identical(one.values(), two.values()),
        "repeats",
        "two runs with the same seed differ: draw from a generator that the factory seeds, "
        "and keep no state outside the optimizer",
    )


def _skips_parameters_without_gradient(make: Callable[..., _Case]) -> None:
    case = make()
    before = case.values()
    case.steps(3)
    moved = [n for n in ("unused", "first.bias") if not identical(before[n], case.values()[n])]
    require(
        not moved,
        "skips_parameters_without_gradient",
        f"{moved} have no gradient (unused or frozen) but were changed: skip parameters whose .grad is None",
    )
    rest = case.values()
    case.optimizer.zero_grad(set_to_none=True)
    case.optimizer.step()
    require(
        identical(rest, case.values()),
        "skips_parameters_without_gradient",
        "a step without any gradient changed parameters: skip parameters whose .grad is None",
    )


def _keeps_shared_parameters(make: Callable[..., _Case]) -> None:
    case = make()
    before = case.values()
    case.steps(2)
    net = case.net
    require(
        net.middle.weight is net.again.weight,
        "keeps_shared_parameters",
        "a parameter that two layers share is no longer shared: change parameters in place",
    )
    require(
        not identical(before["middle.weight"], case.values()["middle.weight"]),
        "keeps_shared_parameters",
        "a parameter that two layers share did not move",
    )


def _keeps_dtype_and_identity(make: Callable[..., _Case]) -> None:
    for dtype in (torch.float32, torch.float64):
        case = make(dtype)
        ids = {name: id(p) for name, p in case.net.named_parameters()}
        case.steps(1)
        for name, p in case.net.named_parameters():
            require(
                p.dtype == dtype and id(p) == ids[name] and bool(p.isfinite().all()),
                "keeps_dtype_and_identity",
                f"after a step in {dtype}, {name} has dtype {p.dtype}, "
                f"{'is another object' if id(p) != ids[name] else 'is the same object'} and "
                f"{'is' if p.isfinite().all() else 'is not'} finite: "
                "update parameters in place in their own dtype",
            )


def _leaves_gradients_alone(make: Callable[..., _Case]) -> None:
    case = make()
    case.steps(1)
    case.backward()
    before = [None if p.grad is None else p.grad.clone() for p in case.net.parameters()]
    case.optimizer.step()
    after = [p.grad for p in case.net.parameters()]
    require(
        identical(before, after),
        "leaves_gradients_alone",
        "step() changed .grad in place, which breaks gradient clipping, logging and accumulation: "
        "work on a copy, or return a new tensor",
    )


def _accepts_a_closure(make: Callable[..., _Case]) -> None:
    plain = make()
    plain.steps(3)
    closed = make()
    for _ in range(3):
        calls: list[float] = []

        def closure(calls: list[float] = calls) -> Any:
            require(
                torch.is_grad_enabled(),
                "accepts_a_closure",
                "the closure was called without gradients: wrap the call in torch.enable_grad()",
            )
            closed.optimizer.zero_grad()
            loss = closed.loss()
            loss.backward()
            calls.append(loss.item())
            return loss

        returned: Any = closed.optimizer.step(closure)
        require(bool(calls), "accepts_a_closure", "step(closure) never called the closure")
        value = float(returned.detach() if isinstance(returned, Tensor) else returned or 0.0)
        require(
            returned is not None and abs(value - calls[0]) <= 1e-6 * abs(calls[0]),
            "accepts_a_closure",
            f"step(closure) returned {returned!r} where the loss was {calls[0]:.6g}: "
            "return what the closure returns",
        )
    require(
        identical(plain.values(), closed.values()),
        "accepts_a_closure",
        "step(closure) and backward() with step() lead to different parameters",
    )


def _follows_a_scheduler(make: Callable[..., _Case]) -> None:
    groups = make().optimizer.param_groups
    require(
        all("lr" in group for group in groups),
        "follows_a_scheduler",
        "param_groups have no 'lr', which every scheduler changes: put lr into the defaults",
    )

    def run(factor: float) -> dict[str, Tensor]:
        case = make()
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            case.optimizer, lambda step: 1.0 if step == 0 else factor
        )
        case.steps(3, each=scheduler.step)
        return case.values()

    alone = make()
    alone.steps(3)
    require(
        identical(run(1.0), alone.values()),
        "follows_a_scheduler",
        "a scheduler that leaves the learning rate as it is changed the run",
    )
    require(
        not identical(run(0.25), alone.values()),
        "follows_a_scheduler",
        "a scheduler that quarters the learning rate had no effect: read lr from the group at each step",
    )


def _respects_groups(make: Callable[..., _Case]) -> None:
    case = make()
    if case.takes_model:
        return  # groups are made by the optimizer itself
    first, last = list(case.net.first.parameters()), list(case.net.last.parameters())
    case.optimizer = case.factory([{"params": first}, {"params": last}])
    require(
        len(case.optimizer.param_groups) == 2,
        "respects_groups",
        "two groups were given, but not kept as two groups",
    )
    case.optimizer.param_groups[1]["lr"] = 0.0
    before = case.values()
    case.steps(2)
    after = case.values()
    require(
        identical(before["last.weight"], after["last.weight"]),
        "respects_groups",
        "a group with lr = 0 moved: use the values of each group, not those of the first one or of self",
    )
    require(
        not identical(before["first.weight"], after["first.weight"]),
        "respects_groups",
        "the first group did not move, although only the second has lr = 0",
    )
    case.optimizer.add_param_group({"params": list(case.net.middle.parameters())})
    case.steps(1)
    require(
        not identical(after["middle.weight"], case.values()["middle.weight"]),
        "respects_groups",
        "a group added by add_param_group did not move",
    )


def _resumes_bit_for_bit(make: Callable[..., _Case]) -> None:
    whole = make()
    whole.steps(3)
    file = io.BytesIO()
    torch.save({"net": whole.net.state_dict(), "optimizer": whole.optimizer.state_dict()}, file)
    file.seek(0)
    try:
        saved = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ContractError(
            "resumes_bit_for_bit", f"state_dict() holds more than tensors and plain data: {error}"
        ) from error
    state = torch.get_rng_state()
    whole.steps(3)

    resumed = make()
    resumed.net.load_state_dict(saved["net"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(state)
    resumed.steps(3)
    require(
        identical(whole.values(), resumed.values()),
        "resumes_bit_for_bit",
        "a run restored from state_dict() does not continue as the run that was saved: keep everything that "
        "the step depends on in self.state and param_groups (the state of a generator too)",
    )
    require(
        identical(whole.optimizer.state_dict(), resumed.optimizer.state_dict()),
        "resumes_bit_for_bit",
        "the parameters continue bit for bit, but state_dict() does not: "
        "a counter or a buffer was not restored",
    )


def _accumulates_gradients(make: Callable[..., _Case]) -> None:
    whole = make(torch.float64)
    whole.steps(1)
    parts = make(torch.float64)
    parts.optimizer.zero_grad()
    for piece in (slice(0, 4), slice(4, 8)):
        (nn.functional.mse_loss(parts.net(parts.x[piece]), parts.y[piece]) / 2).backward()
    parts.optimizer.step()
    same = all(
        torch.allclose(a, parts.values()[name], rtol=1e-9, atol=1e-9) for name, a in whole.values().items()
    )
    require(
        same,
        "accumulates_gradients",
        "two backward passes over halves of a batch, then one step, differ from one pass over the batch: "
        "use the accumulated .grad, or refuse accumulation with an error",
    )


OPTIMIZER_CLAUSES: dict[str, Callable[[Callable[..., _Case]], None]] = {
    "is_an_optimizer": _is_an_optimizer,
    "descends": _descends,
    "repeats": _repeats,
    "skips_parameters_without_gradient": _skips_parameters_without_gradient,
    "keeps_shared_parameters": _keeps_shared_parameters,
    "keeps_dtype_and_identity": _keeps_dtype_and_identity,
    "leaves_gradients_alone": _leaves_gradients_alone,
    "accepts_a_closure": _accepts_a_closure,
    "follows_a_scheduler": _follows_a_scheduler,
    "respects_groups": _respects_groups,
    "resumes_bit_for_bit": _resumes_bit_for_bit,
    "accumulates_gradients": _accumulates_gradients,
}
"""The clauses by name, in the order in which `check_optimizer` runs them."""


def check_optimizer(factory: Factory, *, takes_model: bool = False, without: Iterable[str] = ()) -> None:
    """Check that an optimizer can stand wherever a ``torch.optim.Optimizer`` stands.

    Runs every clause of `OPTIMIZER_CLAUSES` on a network of 114 parameters with a shared, a frozen
    and an unused one; well under a second for a plain optimizer. The global random state is put
    back afterwards.

    Args:
        factory: called with the parameters (an iterable of tensors, or a list of groups), returns a
            new optimizer. If the optimizer draws random numbers from a generator of its own, the
            factory makes and seeds it.
        takes_model: call ``factory`` with the ``nn.Module`` instead, for optimizers that need layers.
        without: clauses to leave out, each for a reason that belongs beside the call.

    Raises:
        ContractError: names the first clause that does not hold.
        ValueError: ``without`` names no clause.

    Example:
        >>> check_optimizer(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    """
    without = set(without)
    unknown = sorted(without - OPTIMIZER_CLAUSES.keys())
    if unknown:
        raise ValueError(f"without={unknown} names no clause: choose from {list(OPTIMIZER_CLAUSES)}")

    def make(dtype: torch.dtype = torch.float32) -> _Case:
        return _Case(factory, takes_model, dtype)

    state = torch.get_rng_state()
    try:
        for name, clause in OPTIMIZER_CLAUSES.items():
            if name not in without:
                clause(make)
    finally:
        torch.set_rng_state(state)
