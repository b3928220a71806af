r"""A learning rate that follows its own gradient: exactness, the bias of a short horizon, and bad starts.

    ∂J/∂η_t = p_{t+1} · ∂θ_{t+1}/∂η_t;   the online rule takes g_{t+1} for the costate p_{t+1}

Three parts: hyper-gradients of a network against autograd through the run; a noisy quadratic ½ Σ aᵢ(θᵢ − cᵢ)², c drawn
anew at each step, whose expected loss obeys E(θᵢ²) ← (1 − ηaᵢ)² E(θᵢ²) + η²aᵢ²σ², so that the rates that are best for
the next step, for K steps ahead, and for the whole run are known; and digits from initial rates over five decades.

Reference: Baydin, Cornish, Rubio, Schmidt & Wood (2018), arXiv:1703.04782; the bias is that of Wu, Ren, Liao & Grosse
(2018), arXiv:1803.02021.

Departures: the cosine form in log η, with steps taken back; digits and a small MLP in place of MNIST and CIFAR-10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bolza.controllers import HyperGradient, hypergradients
from bolza.controllers.online_hypergradient import BAYDIN as REFERENCE
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error
from bolza.systems import SGD

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "baydin2018_hypergradient"
TITLE = "Learning rates along their own gradient"
CLAIM = (
    "A learning rate that descends its hyper-gradient needs no tuning; the one-step form decays it too early"
)

F = torch.float64
MODES, NOISE, TIME = 50, 1.0, 200
LARGEST = 2.0  # rate at which the steepest mode stops being stable
WINDOWS = (1, 50)
DECADES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
METHODS = {"sgd": "SGD", "cosine": "SGD, cosine", "adam": "Adam", "hyper": "hyper-gradient"}


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    run_steps: int
    horizons: tuple[int, ...]
    chains: int
    network_steps: int
    seeds: int
    windowed: bool


BUDGETS = {
    "small": Budget(12, (1, 4, 16, 64), 400, 200, 2, False),
    "full": Budget(40, (1, 2, 4, 8, 16, 32, 64, 128), 5000, 720, 5, True),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check hyper-gradients against autograd, measure the bias of short horizons, and start digits from bad rates.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: longer runs, more seeds and horizons.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("baydin2018_hypergradient").reference.year
        2018
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "hyper-gradients of a network")
    rows = exactness_rows(budget.run_steps)
    report(0.1, "a noisy quadratic")
    plans = {k: ahead(k) for k in budget.horizons} | {TIME: best()}
    rows += horizon_rows(plans, 50 * budget.chains)
    online = {window: online_quadratic(window, budget.chains) for window in WINDOWS}
    rows += online_rows(online, plans)
    report(0.4, "digits")
    table = digits_table(budget, lambda share, text: report(0.4 + 0.6 * share, text))
    rows += digits_rows(table, budget)
    notes = (
        f"Quadratic: curvatures 1/i for i to {MODES}, σ = {NOISE}, start at E θ² = 1, {TIME} steps; rates for K steps "
        "ahead are planned anew at each step and only the first is used, none beyond the stability limit, where the "
        "loss may grow by many decades in between. The best rates are found by descent on all of them through the "
        "equations of the moments, and are a local optimum.",
        "The online rule judges past rates by the present loss; unlike a plan it cannot trade a higher loss now for a "
        "lower one later, whatever its window.",
        "Online runs on the quadratic average their gradient over parallel copies, so that what is left of the "
        "hyper-gradient is its mean; the window of 50 takes a Hessian product a step, which is not counted there.",
        f"Digits: MLP 64-64-10 with tanh, batch 32, {budget.network_steps} gradients a run, {budget.seeds} seeds. A "
        "run that diverges counts as chance, 0.1.",
    )
    facts = {
        "quadratic": {str(k): {"rate": r.tolist(), "loss": v.tolist()} for k, (r, v) in plans.items()},
        "online": {str(w): {"rate": found[0], "loss": found[1]} for w, found in online.items()},
        "digits": {name: values.tolist() for name, values in table.items()},
    }
    report(1.0, "done")
    return StudyResult(
        KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(plans, online, table),), notes, facts
    )


# ------------------------------------------------------------------------------------- exactness


def exactness_rows(steps: int) -> list[Row]:
    """Both modes against autograd through the whole run."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=F, generator=generator) / 2)
    data = [
        (torch.randn(16, 4, dtype=F, generator=generator), torch.randint(3, (16,), generator=generator))
        for _ in range(steps + 1)
    ]
    loss, held_out = nn.functional.cross_entropy, data.pop()
    values: dict[str, Any] = {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.01}
    leaves = {name: torch.tensor(value, dtype=F, requires_grad=True) for name, value in values.items()}
    theta: dict[str, Tensor] = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
    for x, y in data:
        value = loss(functional_call(net, theta, x), y)
        grads = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        for (name, p), g in zip(list(theta.items()), grads, strict=True):
            velocity[name] = leaves["momentum"] * velocity[name] + g + leaves["weight_decay"] * p
            theta[name] = p - leaves["lr"] * velocity[name]
    value = loss(functional_call(net, theta, held_out[0]), held_out[1])
    truth = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    rows = []
    for mode in ("reverse", "forward"):
        found = hypergradients(net, loss, data, held_out, SGD(**values), hyper=list(values), mode=mode)
        worst = max(float((found.total[name] - truth[name]).abs()) for name in values)
        rows.append(
            Row(
                f"{mode} mode: largest error in dJ/d(lr, momentum, weight decay)",
                0.0,
                worst,
                1e-10,
                worst < 1e-10,
                f"against autograd through {steps} steps of an MLP; less than 1e-10",
            )
        )
    return rows


# ------------------------------------------------------------------------------- the noisy quadratic


CURVATURES = 1 / torch.arange(1, MODES + 1, dtype=F)


def moment_step(m: Tensor, rate: Tensor | float) -> Tensor:
    """E θ² of every mode after a step: (1 − ηa)² m + η² a² σ²."""
    return (1 - rate * CURVATURES) ** 2 * m + (rate * CURVATURES * NOISE) ** 2


def expected_loss(m: Tensor) -> Tensor:
    """½ Σ a E θ², the part of the loss that can be reduced."""
    return (CURVATURES * m).sum() / 2


def greedy_rate(m: Tensor) -> Tensor:
    """The rate that is best for the next step: Σ a² m / Σ a³ (m + σ²)."""
    return (CURVATURES**2 * m).sum() / (CURVATURES**3 * (m + NOISE**2)).sum()


def planned(m: Tensor, logs: Tensor, iterations: int) -> Tensor:
    """Log rates that lower the loss at the end of as many steps, by L-BFGS with costates, from those given."""
    import numpy as np
    from scipy.optimize import minimize

    a, start = CURVATURES.numpy(), m.numpy()

    def value(x: Any) -> tuple[float, Any]:
        rates, states = np.exp(x), [start]
        for rate in rates:
            states.append((1 - rate * a) ** 2 * states[-1] + (rate * a * NOISE) ** 2)
        final = float(a @ states[-1])
        p, slopes = a / final, np.empty_like(x)  # costate of the log of the loss
        for t in range(len(rates) - 1, -1, -1):
            rate, kept = rates[t], 1 - rates[t] * a
            slopes[t] = rate * 2 * (p @ (a * (rate * a * NOISE**2 - kept * states[t])))
            p = kept**2 * p
        return float(np.log(final)), slopes

    limits = [(math.log(1e-4), math.log(LARGEST))] * len(logs)
    options: Any = {"maxiter": iterations}
    found = minimize(value, logs.numpy(), jac=True, method="L-BFGS-B", bounds=limits, options=options)
    return torch.as_tensor(found.x)


def follow(rates: Tensor) -> tuple[Tensor, Tensor]:
    """Rates and the loss after each step."""
    m, losses = torch.ones(MODES, dtype=F), []
    for rate in rates:
        m = moment_step(m, rate)
        losses.append(expected_loss(m))
    return rates, torch.stack(losses)


def ahead(horizon: int) -> tuple[Tensor, Tensor]:
    """Rates planned for so many steps ahead, at every step again, and the losses that follow."""
    m, rates = torch.ones(MODES, dtype=F), []
    logs = greedy_rate(m).log().repeat(horizon)
    for t in range(TIME):
        left = min(horizon, TIME - t)
        if horizon == 1:
            rate = greedy_rate(m)
        else:
            # plans of long horizons change little from step to step: a few iterations keep up
            logs = planned(m, torch.cat([logs[1:], logs[-1:]])[:left] if t else logs, 3 if t else 60)
            rate = logs[0].exp()
        rates.append(rate)
        m = moment_step(m, rate)
    return follow(torch.stack(rates))


def best() -> tuple[Tensor, Tensor]:
    """Rates for the loss at the end of the whole run."""
    m = torch.ones(MODES, dtype=F)
    return follow(planned(m, torch.linspace(0.0, -3.0, TIME, dtype=F), 150).exp())


def horizon_rows(plans: dict[int, tuple[Tensor, Tensor]], draws: int) -> list[Row]:
    """What looking ahead a few steps only costs, and where the online rule rests."""
    final = {k: float(plan[1][-1]) for k, plan in plans.items()}
    ratio = final[1] / final[TIME]
    early = TIME // 10
    earlier = float(plans[1][0][early] / plans[TIME][0][early])
    horizons = sorted(final)
    falls = all(final[b] <= final[a] * (1 + 1e-3) for a, b in zip(horizons, horizons[1:], strict=False))
    return [
        Row(
            "noisy quadratic: loss of greedy rates over that of the best",
            "> 1",
            ratio,
            None,
            ratio > 1.05,
            "by 5 %",
        ),
        Row(
            f"noisy quadratic: greedy rate over the best one, at step {early}",
            "< 1",
            earlier,
            None,
            earlier < 1,
            "the greedy rate decays too early",
        ),
        Row(
            "noisy quadratic: the longer the horizon, the lower the loss at the end",
            " ≥ ".join(f"{k}" for k in horizons),
            " ≥ ".join(f"{final[k]:.4f}" for k in horizons),
            None,
            falls,
            "falling, to a part in a thousand",
        ),
        resting_row(draws),
    ]


def resting_row(draws: int) -> Row:
    """At the greedy rate the mean of the one-step hyper-gradient g_{t+1} · d_t is zero: a z-score."""
    generator = torch.Generator().manual_seed(1)
    m = moment_step(torch.ones(MODES, dtype=F), 0.5)
    rate = greedy_rate(m)
    theta = torch.randn(draws, MODES, dtype=F, generator=generator) * m.sqrt()
    step = -rate * CURVATURES * (theta - NOISE * torch.randn(draws, MODES, dtype=F, generator=generator))
    later = theta + step - NOISE * torch.randn(draws, MODES, dtype=F, generator=generator)
    slopes = (CURVATURES * later * step).sum(1)
    z = float(slopes.mean() / slopes.std() * draws**0.5)
    return Row(
        "noisy quadratic: mean of g·d at the greedy rate, in standard errors",
        0.0,
        z,
        1.0,
        abs(z) < 4,
        "below 4",
    )


class Copies(nn.Module):
    """Many copies of the quadratic, each with noise of its own."""

    def __init__(self, chains: int, generator: torch.Generator) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(chains, MODES, dtype=F, generator=generator))

    def forward(self, centres: Tensor) -> Tensor:
        return self.theta - centres


def copies_loss(gap: Tensor, _: Any) -> Tensor:
    """½ Σ a (θ − c)², the mean over copies times their number: every copy takes its own step."""
    return (CURVATURES * gap.square()).sum() / 2


def online_quadratic(window: int, chains: int, lr: float = 1.0) -> tuple[list[float], list[float]]:
    """Rate and expected loss under the online rule, its gradient averaged over the copies."""
    generator = torch.Generator().manual_seed(2)
    net = Copies(chains, generator)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    still = [
        (torch.zeros(chains, MODES, dtype=F), torch.zeros(()))
    ]  # the Hessian does not depend on the noise
    controller = HyperGradient(optimizer, net, copies_loss, still, window=window, meta_lr=0.1, tolerance=None)
    rates, losses = [], []
    for _ in range(TIME):
        centres = NOISE * torch.randn(chains, MODES, dtype=F, generator=generator)
        optimizer.zero_grad()
        copies_loss(net(centres), None).backward()
        optimizer.step()
        controller.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        losses.append(float(expected_loss(net.theta.detach().square().mean(0))))
    return rates, losses


def online_rows(
    online: dict[int, tuple[list[float], list[float]]], plans: dict[int, tuple[Tensor, Tensor]]
) -> list[Row]:
    """The online rule beside the closed form."""
    short, long = (online[w][1][-1] for w in WINDOWS)
    return [
        Row(
            "online rule, window 1: loss at the end over that of the best rates",
            "> 1",
            short / float(plans[TIME][1][-1]),
            None,
            short > 1.05 * float(plans[TIME][1][-1]),
            "by 5 %: short-horizon bias",
        ),
        Row(
            f"online rule: loss at the end with window {WINDOWS[1]} over window 1",
            "< 1",
            long / short,
            None,
            long < 0.95 * short,
            "by 5 %: the window helps",
        ),
    ]


# ------------------------------------------------------------------------------------------ digits


def digits_table(budget: Budget, report: Callable[[float, str], None]) -> dict[str, Tensor]:
    """Test accuracy by method, ``(rates, seeds)``."""
    from bolza.data import digits

    data = digits()
    methods = [*METHODS] + (["window"] if budget.windowed else [])
    table = {name: torch.zeros(len(DECADES), budget.seeds, dtype=F) for name in methods}
    count = len(methods) * len(DECADES)
    for i, name in enumerate(methods):
        for j, rate in enumerate(DECADES):
            report((i * len(DECADES) + j) / count, f"digits, {name} from {rate:g}")
            for seed in range(budget.seeds):
                table[name][j, seed] = digits_run(data, name, rate, seed, budget.network_steps)
    return table


def digits_run(data: Any, name: str, rate: float, seed: int, steps: int) -> float:
    """Test accuracy of an MLP after a run at the cost of ``steps`` gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    loss, params = nn.functional.cross_entropy, net.parameters()
    optimizer: torch.optim.Optimizer = (torch.optim.Adam if name == "adam" else torch.optim.SGD)(
        params, lr=rate
    )
    controller: Any = None
    if name == "hyper":
        controller = HyperGradient(optimizer)
    elif name == "window":  # a Hessian product costs two gradients
        steps //= 3
        controller = HyperGradient(optimizer, net, loss, data, window=10, seed=seed)
    elif name == "cosine":
        controller = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    generator = torch.Generator().manual_seed(seed)
    order, at = torch.randperm(len(data.train_x), generator=generator), 0
    for _ in range(steps):
        if at + 32 > len(order):
            order, at = torch.randperm(len(data.train_x), generator=generator), 0
        rows, at = order[at : at + 32], at + 32
        optimizer.zero_grad()
        value = loss(net(data.train_x[rows]), data.train_y[rows])
        if not math.isfinite(value.item()):
            return 0.1
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if name in ("hyper", "window"):
            controller.step(loss=value)
        elif controller is not None:
            controller.step()
    with torch.no_grad():
        return float((net(data.test_x).argmax(1) == data.test_y).double().mean())


def digits_rows(table: dict[str, Tensor], budget: Budget) -> list[Row]:
    """Accuracy over the decades, and how many of them a method holds."""
    rows = []
    for name, label in [*METHODS.items()][:-1]:
        gain, error = mean_error((table["hyper"] - table[name]).mean(0).tolist())
        rows.append(
            Row(
                f"digits: mean accuracy over five decades of initial rates, above {label}",
                "> 0",
                gain,
                error,
                gain > 2 * error,
                "more than two errors over seeds, at equal gradients",
            )
        )
    top = max(float(values.mean(1).max()) for values in table.values())
    held = {name: float((values.mean(1) >= top - 0.02).sum()) for name, values in table.items()}
    rows.append(
        Row(
            f"digits: of {len(DECADES)} initial rates, one a decade, within 2 points of the best result",
            "≥ 4",
            held["hyper"],
            None,
            held["hyper"] >= 4,
            f"SGD: {held['sgd']:g}, Adam: {held['adam']:g}",
        )
    )
    return rows


# ------------------------------------------------------------------------------------------- the figure


def _figure(
    plans: dict[int, tuple[Tensor, Tensor]],
    online: dict[int, tuple[list[float], list[float]]],
    table: dict[str, Tensor],
) -> Figure:
    return Figure(
        "Rates that look ahead, and rates that start wrong",
        partial(_draw, plans=plans, online=online, table=table),
        caption=(
            "Left: rates on a noisy quadratic, planned one step ahead, some steps, and to the end; dots, the online "
            "rule with a window of 1. Middle: the loss they lead to. Right: test accuracy on digits over the initial "
            "rate, at equal gradients; bars are twice the standard error over seeds."
        ),
        alt="Rates over steps; loss over steps; accuracy over initial learning rate.",
        size=(9.6, 3.2),
        key="hypergradient",
    )


def _draw(
    canvas: Any,
    plans: dict[int, tuple[Tensor, Tensor]],
    online: dict[int, tuple[list[float], list[float]]],
    table: dict[str, Tensor],
) -> None:
    left, middle, right = canvas.subplots(1, 3)
    steps = torch.arange(1, TIME + 1)
    horizons = sorted(plans)
    for k in horizons:
        style: dict[str, Any] = {"color": role("muted"), "linewidth": 0.8, "alpha": 0.7}
        if k in (1, TIME):
            style = {"color": role("second" if k == 1 else "first"), "label": "greedy" if k == 1 else "best"}
        left.plot(steps, plans[k][0], **style)
        middle.plot(steps, plans[k][1], **style)
    for axes, values in ((left, online[1][0]), (middle, online[1][1])):
        axes.plot(steps[::8], values[::8], ".", markersize=3, color=role("third"), label="online, window 1")
    left.set(xlabel="step", ylabel="learning rate", xscale="log", yscale="log")
    middle.set(xlabel="step", ylabel="loss", xscale="log", yscale="log")
    left.legend(loc="lower left")
    colours = {"sgd": "muted", "cosine": "third", "adam": "second", "hyper": "first", "window": "first"}
    for name, scores in table.items():
        mean, error = scores.mean(1), 2 * scores.std(1, correction=1) / scores.shape[1] ** 0.5
        right.errorbar(
            DECADES,
            mean,
            error.nan_to_num(0.0),
            color=role(colours[name]),
            linestyle="--" if name == "window" else "-",
            marker=".",
            label=METHODS.get(name, "window 10"),
        )
    right.set(xlabel="initial rate", ylabel="test accuracy", xscale="log", ylim=(0, 1))
    right.legend(loc="lower center")
