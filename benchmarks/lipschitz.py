"""How tight and how quick is a certified Lipschitz bound beside a semidefinite solver and other programmes?

    python benchmarks/lipschitz.py                 # MLP 64-48-48-10 on digits
    python benchmarks/lipschitz.py --width 512     # and a random network of width 512 and depth 5

The contenders for the same optimum are the solvers that a user would call, Clarabel directly and through cvxpy. Where a
network is too large for them, their time is extrapolated from the largest ones that they finish, and said to be.
CPU seconds; a call of lipschitz includes reading the graph and the sampled lower bound; the optimiser is timed apart.
"""

from _bench import emit, environment, timed  # isort: skip  (sets the threads before torch loads)

import argparse
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.stability import lipschitz
from bolza.stability.sectors import SectorNetwork, closed_form, newton, semidefinite


def digits_network() -> tuple[nn.Sequential, Tensor]:
    """The network of the published comparison: 64-48-48-10 on digits in [0, 1]."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3, weight_decay=1e-4)
        for _ in range(300):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net, x


def random_network(width: int, depth: int, inputs: int, outputs: int) -> SectorNetwork:
    draw = torch.Generator().manual_seed(0)
    sizes = [inputs, *[width] * (depth - 1), outputs]
    return SectorNetwork.from_weights(
        [
            torch.randn(m, n, generator=draw, dtype=torch.float64) / math.sqrt(n)
            for n, m in zip(sizes, sizes[1:], strict=False)
        ]
    )


def once(function: Any) -> tuple[Any, float]:
    start = time.process_time()
    value = function()
    return value, time.process_time() - start


def cvxpy_bound(net: SectorNetwork) -> float:
    """The same programme, as one would write it for cvxpy."""
    import cvxpy as cp
    import numpy as np

    n0, n = net.sizes[0], net.units
    at = net.offsets()
    e, y = np.zeros((n - n0, n)), np.zeros((n - n0, n))
    e[:, n0:] = np.eye(n - n0)
    for (k, j), block in net.Y.items():
        y[at[k] - n0 : at[k + 1] - n0, at[j] : at[j + 1]] = block.numpy()
    c = net.dense_output().numpy()
    first = np.zeros((n, n))
    first[:n0, :n0] = np.eye(n0)
    lam, rho = cp.Variable(n - n0, nonneg=True), cp.Variable(nonneg=True)
    half = e.T @ cp.diag(lam) @ (e - y) / 2
    problem = cp.Problem(cp.Minimize(rho), [rho * first + half + half.T - c.T @ c >> 0])
    problem.solve(solver=cp.CLARABEL)
    return math.sqrt(float(rho.value))


def digits(solver: bool, cvxpy: bool) -> None:
    net, x = digits_network()
    for method in ("product", "closed", "recursive"):
        found = lipschitz(net, x, method)
        cost = timed(lambda method=method: lipschitz(net, x, method), repeat=5)
        emit("lipschitz", f"digits, {method}", value=found.bound, lower=found.lower, **cost)
    weights = [layer.weight for layer in net if isinstance(layer, nn.Linear)]
    matrices = SectorNetwork.from_weights(weights)
    for name, call in (
        ("closed form", lambda: closed_form(matrices, "norm")),
        ("optimised", lambda: newton(matrices)),
    ):
        cost = timed(call, repeat=7)
        emit("lipschitz", f"digits, {name}, matrices in hand", value=call()[0], **cost)
    if solver:
        found_, seconds = once(lambda: semidefinite(matrices))
        emit("lipschitz", "digits, Clarabel directly", value=found_[0], optimum=found_[2], cpu_s=seconds)
    if cvxpy:
        try:
            value, seconds = once(lambda: cvxpy_bound(matrices))
        except ImportError:
            emit("lipschitz", "cvxpy is not installed")
        else:
            emit("lipschitz", "digits, cvxpy + Clarabel (unchecked)", value=value, cpu_s=seconds)


def scaling(width: int, depth: int) -> None:
    times, units = [], []
    for small in (8, 12, 16, 24):
        net = random_network(small, depth, small, 10)
        (bound, _, floor), own = once(lambda net=net: newton(net))
        try:
            (solved, _, _), seconds = once(lambda net=net: semidefinite(net))
        except Exception as error:  # noqa: BLE001  the solver is an extra
            emit("lipschitz", f"the solver cannot run: {error}")
            return
        times.append(seconds)
        units.append(net.units)
        emit(
            "lipschitz", f"width {small}, depth {depth}", over_solver=bound / solved, over_optimum=bound / floor,
            cpu_s=own, solver_cpu_s=seconds, ratio=seconds / own,
        )  # fmt: skip
    net = random_network(width, depth, width, 10)
    (closed, _), closed_s = once(lambda: closed_form(net, "norm"))
    (bound, _, floor), own = once(lambda: newton(net, 5e-3))
    order = math.log(times[-1] / times[-2]) / math.log(units[-1] / units[-2])
    guess = times[-1] * (net.units / units[-1]) ** order
    emit(
        "lipschitz", f"width {width}, depth {depth}", closed=closed, closed_cpu_s=closed_s, value=bound,
        over_optimum=bound / floor, cpu_s=own, solver_order=order, solver_extrapolated_s=guess, ratio=guess / own,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128, help="width of the large random network")
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument(
        "--solver", action="store_true", help="run Clarabel on the digits network too (minutes)"
    )
    parser.add_argument("--cvxpy", action="store_true", help="and through cvxpy (more minutes)")
    options = parser.parse_args()
    emit("lipschitz", "environment", **environment("clarabel", "cvxpy"))
    digits(options.solver, options.cvxpy)
    scaling(options.width, options.depth)


if __name__ == "__main__":
    main()
