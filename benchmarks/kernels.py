"""How fast and how right are the kernels of infinitely wide networks, beside the recursion one would write by hand?

    python benchmarks/kernels.py [--repeats 7] [--jax PYTHON] [--json FILE]

NNGP and tangent kernel together, weight_var 2, bias_var 0.01, scikit-learn's digits divided by 16. One thread, CPU
seconds of the process; the contenders take turns, and the medians of each and of their ratios are shown.

1. Depth-10 ReLU network, 1000 digits, in float64 and float32: `infinite_kernels` (reading the network included)
   against the arc-cosine recursion in plain torch. The bar: no slower.
2. The same depth with erf (closed form), GELU, tanh (tabulated) and 200 digits: against 20 × 20 Gauss–Hermite nodes.
3. Three 3 × 3 convolutions with ReLU on 8 × 8 digits, flattened and pooled: against the same recursion by
   `F.conv2d` over pairs of positions in plain torch.

With ``--jax PYTHON``, an interpreter that has neural-tangents 0.6.5 (it needs jax 0.4.23, which does not install
beside a current torch), the networks of 1 and 3 are computed there too, compiled, and its CPU seconds and the largest
difference stand beside ours. Compilation is not counted. JAX may use further threads: CPU seconds count them all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from _bench import emit, environment

W, B, DEPTH = 2.0, 0.01, 10
FLATTEN, POOL = 200, 40  # images for the convolutional networks


def cpu(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def in_turn(contenders: list[Callable[[], Any]], repeats: int) -> tuple[list[float], float, list[Any]]:
    """Median CPU seconds of each, median of the ratios first : second, and what each returned."""
    results = [f() for f in contenders]
    times = [[cpu(f)[0] for f in contenders] for _ in range(repeats)]
    return (
        [median(column) for column in zip(*times, strict=True)],
        median(t[0] / t[-1] for t in times),
        results,
    )


def ours(repeats: int, jax: dict[str, Any] | None) -> list[dict[str, Any]]:
    import torch
    from sklearn.datasets import load_digits
    from torch import nn
    from torch.nn import functional as F

    from bolza.meanfield.kernels import infinite_kernels

    torch.set_num_threads(1)
    images = torch.from_numpy(load_digits().images / 16)
    rows: list[dict[str, Any]] = []

    def show(name: str, **values: Any) -> None:
        rows.append({"name": name, **values})
        emit("kernels", name, **values)

    def compared(key: str, both: Any) -> dict[str, Any]:
        if jax is None:
            return {}
        gaps = {
            f"{kind}_gap": float(((k - torch.from_numpy(jax[f"{key}/{kind}"])) / k).abs().max())
            for kind, k in (("nngp", both.nngp), ("ntk", both.ntk))
        }
        return {"jax_cpu_s": float(jax[f"{key}/cpu_s"]), "jax_wall_s": float(jax[f"{key}/wall_s"])} | gaps

    def perceptron(act: Callable[[], nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 4), *[m for _ in range(DEPTH) for m in (act(), nn.Linear(4, 4))])

    def kernels(net: nn.Module, x: torch.Tensor) -> Any:
        return infinite_kernels(net, x, weight_var=W, bias_var=B)

    def by_hand(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = W * (x @ x.T) / x.shape[1] + B
        t = k.clone()
        for _ in range(DEPTH):
            k, slope = relu_step(k, *(k.diagonal().clone(),) * 2)
            k = W * k + B
            t = k + W * slope * t
        return k, t

    def relu_step(k: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.sqrt(a[..., :, None] * b[..., None, :])
        c = (k / scale).clamp_(-1.0, 1.0)
        angle = torch.arccos(c)
        first = scale * (torch.sqrt((1 - c * c).clamp_min_(0)) + (math.pi - angle) * c) / (2 * math.pi)
        return first, (math.pi - angle) / (2 * math.pi)

    for dtype in (torch.float64, torch.float32):
        x = images[:1000].flatten(1).to(dtype)
        net = perceptron(nn.ReLU)
        seconds, ratio, (a, b) = in_turn([partial(kernels, net, x), partial(by_hand, x)], repeats)
        gap = float(((a.ntk - b[1]) / b[1]).abs().max())
        beside = compared("relu", a) if dtype == torch.float64 else {}
        show(f"depth-10 ReLU, 1000 digits, {str(dtype)[6:]}", cpu_s=seconds[0], by_hand_cpu_s=seconds[1], ratio=ratio,
             gap_by_hand=gap, bar="met" if ratio <= 1 else "MISSED", **beside)  # fmt: skip

    class Erf(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.erf(x)

    def hermite(x: torch.Tensor, phi: Any, slope: Any, nodes: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
        import numpy as np

        z, w = np.polynomial.hermite_e.hermegauss(nodes)
        z, w = torch.tensor(z), torch.tensor(w / math.sqrt(2 * math.pi))
        k = W * (x @ x.T) / x.shape[1] + B
        t = k.clone()
        for _ in range(DEPTH):
            s = k.diagonal().sqrt()
            c = (k / (s[:, None] * s)).clamp(-1, 1)
            r = (1 - c * c).clamp_min(0).sqrt()
            first, second = torch.zeros_like(k), torch.zeros_like(k)
            for zi, wi in zip(z, w, strict=True):
                v = s[:, None, None] * (c.T[..., None] * zi + r[..., None] * z)
                first += wi * phi(s * zi) * (phi(v) @ w)
                second += wi * slope(s * zi) * (slope(v) @ w)
            k = W * first + B
            t = k + W * second * t
        return k, t

    root = 2 / math.sqrt(math.pi)
    functions = (
        ("erf", Erf, torch.erf, lambda h: root * torch.exp(-h * h)),
        ("tanh", nn.Tanh, torch.tanh, lambda h: 1 - torch.tanh(h) ** 2),
        (
            "GELU",
            nn.GELU,
            F.gelu,
            lambda h: torch.special.ndtr(h) + h * torch.exp(-h * h / 2) / math.sqrt(2 * math.pi),
        ),
    )
    x = images[:200].flatten(1)
    for name, act, phi, slope in functions:
        net = perceptron(act)
        pair = [partial(kernels, net, x), partial(hermite, x, phi, slope)]
        seconds, ratio, (a, b) = in_turn(pair, max(1, repeats // 3))
        show(f"depth-10 {name}, 200 digits, float64", cpu_s=seconds[0], gauss_hermite_cpu_s=seconds[1], ratio=ratio,
             gauss_hermite_error=float(((a.ntk - b[1]) / a.ntk).abs().max()), table_error=a.error)  # fmt: skip
    many = images[:1000].flatten(1)
    show("depth-10 tanh, 1000 digits, float64", cpu_s=cpu(lambda: kernels(perceptron(nn.Tanh), many))[0])

    def network(pool: bool) -> nn.Module:
        head = (
            [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)]
            if pool
            else [nn.Flatten(), nn.Linear(256, 1)]
        )
        convs = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
                 nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]  # fmt: skip
        return nn.Sequential(*convs, *head)

    def flat_by_hand(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(x)
        ones = torch.ones(1, 1, 3, 3, dtype=x.dtype) / 9

        def slide(k: torch.Tensor) -> torch.Tensor:  # (P, n, n)
            fields = k.permute(1, 2, 0).reshape(n * n, 1, 8, 8)
            return F.conv2d(fields, ones, padding=1).reshape(n, n, 64).permute(2, 0, 1)

        p = x.flatten(2).permute(2, 0, 1)
        k = p @ p.transpose(1, 2)
        t = torch.zeros_like(k)
        for _ in range(3):
            k, t = W * slide(k) + B, W * slide(t)
            t = t + k
            q = k.diagonal(dim1=1, dim2=2)
            k, slope = relu_step(k, q, q)
            t = slope * t
        k, t = k.mean(0), t.mean(0)
        return W * k + B, W * k + B + W * t

    def pooled_by_hand(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(x)
        tap = torch.eye(3, dtype=x.dtype)

        def slide(
            k: torch.Tensor,
        ) -> torch.Tensor:  # (n, 64, n, 64): taps along the diagonal, one dimension at a time
            f = k.reshape(n, 8, 8, n, 8, 8).permute(0, 3, 2, 5, 1, 4).reshape(-1, 1, 8, 8)
            f = F.conv2d(f, tap[None, None], padding=1).reshape(n, n, 8, 8, 8, 8).permute(0, 1, 4, 5, 2, 3)
            f = F.conv2d(f.reshape(-1, 1, 8, 8), tap[None, None], padding=1).reshape(n, n, 8, 8, 8, 8)
            return f.permute(0, 2, 4, 1, 3, 5).reshape(n, 64, n, 64) / 9

        p = x.reshape(n * 64, 1)
        k = (p @ p.T).reshape(n, 64, n, 64)
        t = torch.zeros_like(k)
        for _ in range(3):
            k, t = W * slide(k) + B, W * slide(t)
            t = t + k
            q = k.reshape(n * 64, n * 64).diagonal().clone()
            whole, slope = relu_step(k.reshape(n * 64, n * 64), q, q)
            k, t = whole.reshape(n, 64, n, 64), slope.reshape(n, 64, n, 64) * t
        k, t = k.mean((1, 3)), t.mean((1, 3))
        return W * k + B, W * k + B + W * t

    for key, count, by in (("flatten", FLATTEN, flat_by_hand), ("pool", POOL, pooled_by_hand)):
        x, net = images[:count, None], network(key == "pool")
        seconds, ratio, (a, b) = in_turn([partial(kernels, net, x), partial(by, x)], max(1, repeats // 3))
        gap = float(((a.ntk - b[1]) / b[1]).abs().max())
        show(f"three convolutions, {key}, {count} digits, float64", cpu_s=seconds[0], by_hand_cpu_s=seconds[1],
             ratio=ratio, gap_by_hand=gap, **compared(key, a))  # fmt: skip
    return rows


def theirs(path: str, repeats: int) -> None:
    """Under the interpreter with JAX: kernels and CPU seconds, into one file."""
    import jax
    import numpy as np
    from jax import numpy as jnp
    from neural_tangents import stax
    from sklearn.datasets import load_digits

    jax.config.update("jax_enable_x64", True)
    images = load_digits().images / 16
    scale = {"W_std": W**0.5, "b_std": B**0.5}
    fully = [stax.Dense(1, **scale)]
    for _ in range(DEPTH):
        fully += [stax.Relu(), stax.Dense(1, **scale)]
    convs = [
        layer for _ in range(3) for layer in (stax.Conv(1, (3, 3), padding="SAME", **scale), stax.Relu())
    ]
    cases = {
        "relu": (fully, images[:1000].reshape(1000, 64)),
        "flatten": ([*convs, stax.Flatten(), stax.Dense(1, **scale)], images[:FLATTEN, :, :, None]),
        "pool": ([*convs, stax.GlobalAvgPool(), stax.Dense(1, **scale)], images[:POOL, :, :, None]),
    }
    out = {}
    for key, (layers, x) in cases.items():
        kernel = jax.jit(stax.serial(*layers)[2], static_argnums=(2,))
        inputs = jnp.asarray(x)

        def call(kernel: Any = kernel, inputs: Any = inputs) -> Any:
            return jax.block_until_ready(tuple(kernel(inputs, None, ("nngp", "ntk"))))

        both = call()
        walls, cpus = [], []
        for _ in range(repeats):
            wall = time.perf_counter()
            cpus.append(cpu(call)[0])
            walls.append(time.perf_counter() - wall)
        out[f"{key}/nngp"], out[f"{key}/ntk"] = (np.asarray(k) for k in both)
        out[f"{key}/cpu_s"], out[f"{key}/wall_s"] = np.asarray(median(cpus)), np.asarray(median(walls))
    np.savez(path, **out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--jax", metavar="PYTHON", help="an interpreter that has neural-tangents")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--into", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.into:
        theirs(options.into, options.repeats)
        return
    recorded = None
    if options.jax:
        import numpy as np

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "jax.npz")
            one = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
            subprocess.run(
                [options.jax, __file__, "--into", path, "--repeats", str(options.repeats)], check=True,
                env={**os.environ, **one}, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            recorded = dict(np.load(path))
    about = environment("scikit-learn")
    rows = ours(options.repeats, recorded)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"benchmark": "kernels", "environment": about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
