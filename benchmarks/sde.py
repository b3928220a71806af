"""What do 100,000 paths of a two-dimensional double well cost, beside other ways to simulate them?

    python benchmarks/sde.py [--steps 1000 100] [--repeat 5] [--only torchsde loop] [--quick]

dx = (x − x³) dt + ½ dW in each of two dimensions, float32, Euler–Maruyama, one thread, end states only. Contenders:
a plain PyTorch loop (all paths at once; in blocks, in place), torchsde, a plain JAX scan, diffrax (with the cheapest
and with its default Brownian motion), NumPy, those of them that can be imported; and the bare time of drawing the same
number of normals in the same blocks. Every repetition runs every contender once, in turn; ``ratio`` is the median over
repetitions of the CPU time divided by that of `bolza.core.simulate` in the same repetition, so above 1 is slower than
bolza. Slow contenders run fewer steps, and their time is scaled; the line says so.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import torch  # noqa: E402

from bolza.core import Diffusion, Isotropic, simulate  # noqa: E402
from bolza.core.simulate import Scheme  # noqa: E402

BENCH = "sde"
PATHS, DIM, SIGMA, DT = 100_000, 2, 0.5, 0.01
BLOCK = 50_000  # paths at once in the loops by hand, which is the library's own choice for this state
Factor = Callable[[float, torch.Tensor, torch.Tensor], torch.Tensor]
Run = Callable[[int], Any]
"""steps → end states, of which only the variance is looked at."""


def run_bolza(factor: Factor, scheme: Scheme = "euler") -> Run:
    """The library, with its default block."""
    well = Diffusion(lambda t, x: x - x * x * x, factor, diagonal=True)
    x0 = torch.zeros(PATHS, DIM)
    return lambda steps: simulate(well, x0, dt=DT, steps=steps, scheme=scheme)[0]


def plain_loop(steps: int) -> torch.Tensor:
    """What a person writes first."""
    x = torch.zeros(PATHS, DIM)
    for _ in range(steps):
        x = x + DT * (x - x * x * x) + SIGMA * DT**0.5 * torch.randn_like(x)
    return x


def tuned_loop(steps: int, block: int = BLOCK) -> torch.Tensor:
    """The same in blocks, in place."""
    parts = []
    for _ in range(0, PATHS, block):
        x, noise = torch.zeros(block, DIM), torch.empty(block, DIM)
        for _ in range(steps):
            noise.normal_()
            x.add_(x - x * x * x, alpha=DT).add_(noise, alpha=SIGMA * DT**0.5)
        parts.append(x)
    return torch.cat(parts)


def draw(steps: int, block: int = BLOCK) -> torch.Tensor:
    """The normals alone."""
    noise = torch.empty(block, DIM)
    for _ in range(0, PATHS, block):
        for _ in range(steps):
            noise.normal_()
    return noise


def numpy_loop(steps: int) -> torch.Tensor:
    """NumPy, all paths at once."""
    import numpy as np

    generator = np.random.default_rng(0)
    x = np.zeros((PATHS, DIM), dtype=np.float32)
    scale = np.float32(SIGMA * DT**0.5)
    for _ in range(steps):
        x = (
            x
            + np.float32(DT) * (x - x * x * x)
            + scale * generator.standard_normal(x.shape, dtype=np.float32)
        )
    return torch.from_numpy(x)


def torchsde_run(tuned: bool) -> Run:
    """The library torchsde, with its default Brownian motion or with one told the step and without a cache limit."""
    import torchsde

    class Well(torch.nn.Module):
        noise_type = "diagonal"
        sde_type = "ito"

        def f(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return y - y * y * y

        def g(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.full_like(y, SIGMA)

    well, x0 = Well(), torch.zeros(PATHS, DIM)

    def run(steps: int) -> torch.Tensor:
        times = torch.tensor([0.0, DT * steps])
        options = {}
        if tuned:
            options["bm"] = torchsde.BrownianInterval(
                0.0, float(times[-1]), size=(PATHS, DIM), dt=DT, cache_size=None
            )
        with torch.no_grad():
            return torchsde.sdeint(well, x0, times, dt=DT, method="euler", **options)[-1]

    return run


def jax_scan() -> Run:
    """A plain scan, compiled."""
    import jax
    import jax.numpy as jnp

    def body(x: Any, key: Any) -> Any:
        return x + DT * (x - x * x * x) + SIGMA * DT**0.5 * jax.random.normal(key, (PATHS, DIM)), None

    compiled = jax.jit(
        lambda key, steps: jax.lax.scan(body, jnp.zeros((PATHS, DIM)), jax.random.split(key, steps))[0],
        static_argnums=1,
    )
    return lambda steps: compiled(jax.random.PRNGKey(0), steps).block_until_ready()


def diffrax_run(tree: bool) -> Run:
    """The library diffrax, with the unsafe Brownian path (the cheapest) or the virtual Brownian tree (the default)."""
    import diffrax
    import jax
    import jax.numpy as jnp
    import lineax

    shape = (PATHS, DIM)

    def solve(key: Any, steps: int) -> Any:
        end = DT * steps
        motion = (
            diffrax.VirtualBrownianTree(0.0, end, DT / 2, shape, key)
            if tree
            else diffrax.UnsafeBrownianPath(shape, key)
        )
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, a: y - y * y * y),
            diffrax.ControlTerm(
                lambda t, y, a: lineax.DiagonalLinearOperator(SIGMA * jnp.ones(shape)), motion
            ),
        )
        return diffrax.diffeqsolve(
            terms,
            diffrax.Euler(),
            0.0,
            end,
            DT,
            jnp.zeros(shape),
            saveat=diffrax.SaveAt(t1=True),
            max_steps=steps + 8,
            adjoint=diffrax.ForwardMode(),
        ).ys[-1]

    compiled = jax.jit(solve, static_argnums=1)
    return lambda steps: compiled(jax.random.PRNGKey(0), steps).block_until_ready()


def contenders(only: list[str]) -> dict[str, tuple[Run, float]]:
    """Name → run, and the share of the steps that it runs; of those whose name holds one of the words."""
    found: dict[str, tuple[Run, float]] = {
        "bolza": (run_bolza(Isotropic(SIGMA)), 1.0),
        "bolza, the factor a function": (run_bolza(lambda t, x, noise: SIGMA * noise), 0.5),
        "bolza, heun": (run_bolza(Isotropic(SIGMA), "heun"), 0.1),
        "bolza, srk": (run_bolza(Isotropic(SIGMA), "srk"), 0.1),
        "the normals alone": (draw, 1.0),
        "plain torch loop in blocks, in place": (tuned_loop, 1.0),
        "plain torch loop": (plain_loop, 0.1),
        "numpy": (numpy_loop, 0.1),
    }
    makers: dict[str, tuple[Callable[[], Run], float]] = {
        "torchsde, tuned": (lambda: torchsde_run(True), 0.1),
        "torchsde": (lambda: torchsde_run(False), 0.05),
        "jax scan": (jax_scan, 0.3),
        "diffrax, unsafe path": (lambda: diffrax_run(False), 0.3),
        "diffrax, Brownian tree": (lambda: diffrax_run(True), 0.02),
    }
    for name, (make, share) in makers.items():
        if only and not any(word in name for word in only):
            continue
        try:
            found[name] = make(), share
        except ImportError as error:
            emit(BENCH, name, left_out=f"cannot import {error.name}")
    return {k: v for k, v in found.items() if k == "bolza" or not only or any(word in k for word in only)}


def race(steps: int, repeat: int, only: list[str]) -> None:
    """Every contender in turn, ``repeat`` times."""
    runs = {name: (run, max(10, round(share * steps))) for name, (run, share) in contenders(only).items()}
    spread = {name: float(run(n).var()) for name, (run, n) in runs.items()}  # compiles too
    seen: dict[str, list[float]] = {name: [] for name in runs}
    walls: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, (run, n) in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run(n)
            seen[name].append((time.process_time() - cpu) * steps / n)
            walls[name].append((time.perf_counter() - wall) * steps / n)
    for name, (_, n) in runs.items():
        ratios = [a / b for a, b in zip(seen[name], seen["bolza"], strict=True)]  # above 1: slower than bolza
        emit(
            BENCH,
            f"{name}, {steps} steps",
            cpu_s=statistics.median(seen[name]),
            s=statistics.median(walls[name]),
            ratio=statistics.median(ratios),
            ratio_low=min(ratios),
            ratio_high=max(ratios),
            steps_run=n,
            variance=spread[name],
        )


def main() -> None:
    """Race at each number of steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 100])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", default=[], help="contenders whose name holds one of these words"
    )
    parser.add_argument("--quick", action="store_true", help="20 steps, twice")
    args = parser.parse_args()
    emit(BENCH, "environment", **environment("torchsde", "jax", "diffrax"), paths=PATHS, dim=DIM, block=BLOCK)
    torch.manual_seed(0)
    for steps in [20] if args.quick else args.steps:
        race(steps, 2 if args.quick else args.repeat, args.only)


if __name__ == "__main__":
    main()
