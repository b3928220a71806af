"""What does the tangent kernel of a finite network cost, beside a script written for it and beside torch.func?

The script goes through the layers of an MLP by hand: (A Aᵀ + 1) ∘ (B Bᵀ) from one forward and one backward pass. It is
the least one can do without using that the kernel is symmetric. ``torch.func`` contracts the Jacobians of single
samples. Contenders take turns, so that other work on the machine meets all of them; ratios are of medians of CPU time.
Beside the times stands the largest difference from the contraction, over the largest entry.

    python benchmarks/empirical_ntk.py [--repeat 60]
"""

from __future__ import annotations

from _bench import emit, environment, memory, peak_memory  # isort: skip  (sets the threads before torch loads)

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from bolza.data import digits
from bolza.meanfield.kernels import empirical_ntk

BENCH = "empirical_ntk"


def mlp(width: int = 256, outputs: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(64, width)]
    for _ in range(3):
        layers += [nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, outputs))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
        ),
        *(nn.Flatten(), nn.Linear(1024, 1)),
    )


def layer_by_layer(net: nn.Sequential, x: Tensor) -> Tensor:
    """By hand: layers of nn.Linear, a scalar output."""
    h, inputs, outputs = x, [], []
    for layer in net:
        if isinstance(layer, nn.Linear):
            inputs.append(h.detach())
            h = layer(h)
            h.retain_grad()
            outputs.append(h)
        else:
            h = layer(h)
    slopes = torch.autograd.grad(h.sum(), outputs)
    return sum((a @ a.T + 1) * (b @ b.T) for a, b in zip(inputs, slopes, strict=True))


def by_contraction(net: nn.Module, x: Tensor, chunk: int = 0) -> Tensor:
    """Jacobians of single samples by torch.func, summed over outputs."""
    params = {name: p.detach() for name, p in net.named_parameters()}

    def jacobian(part: Tensor) -> list[Tensor]:
        found = vmap(jacrev(lambda p, one: functional_call(net, p, (one[None],))[0]), (None, 0))(params, part)
        return [j.flatten(2) for j in found.values()]

    step = chunk or len(x)
    pieces = [jacobian(x[i : i + step]) for i in range(0, len(x), step)]
    whole = [torch.cat(column) for column in zip(*pieces, strict=True)]
    return sum(j.flatten(1) @ j.flatten(1).T for j in whole)


def compare(name: str, repeat: int, truth: Tensor, slow: int = 1, **contenders: Callable[[], Tensor]) -> None:
    """Time contenders in turns; the first is what the ratios refer to. ``slow`` divides the turns of torch.func."""
    times: dict[str, list[float]] = {key: [] for key in contenders}
    found = {key: function() for key, function in contenders.items()}
    for turn in range(repeat):
        for key, function in contenders.items():
            if key == "torch_func" and turn % slow:
                continue
            start = time.process_time()
            function()
            times[key].append(time.process_time() - start)
    median = {key: statistics.median(values) for key, values in times.items()}
    scale = truth.abs().max()
    emit(
        BENCH,
        name,
        **{f"{key}_cpu_s": value for key, value in median.items()},
        **{f"bolza_over_{key}": median["bolza"] / value for key, value in median.items() if key != "bolza"},
        **{f"{key}_error": float((value - truth).abs().max() / scale) for key, value in found.items()},
    )


def large(pixels: Tensor) -> None:
    """Memory, first of all, while no other contender has raised the peak."""
    wide = mlp(width=1024)
    empirical_ntk(wide, pixels[:10])
    before = memory()
    start = time.process_time()
    empirical_ntk(wide, pixels[:1000])
    emit(
        BENCH,
        "MLP 64-1024x4-1, 1000 points: 3.2 million parameters, a Jacobian of 12.9 GB",
        bolza_cpu_s=time.process_time() - start,
        memory_above_mib=peak_memory() - before,
    )


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=60, help="turns of the quick contenders")
    repeat = parser.parse_args().repeat
    emit(BENCH, "environment", **environment())
    pixels = digits().train_x
    torch.manual_seed(0)
    large(pixels)
    net = mlp()
    for n in (200, 1000):
        x = pixels[:n]
        truth = by_contraction(net, x, 100)
        contenders: dict[str, Callable[[], Tensor]] = {
            "by_hand": lambda x=x: layer_by_layer(net, x),
            "bolza": lambda x=x: empirical_ntk(net, x),
        }
        if n == 200:
            contenders["torch_func"] = lambda x=x: by_contraction(net, x)
        turns = repeat if n == 200 else max(3, repeat // 6)
        compare(f"MLP 64-256x4-1, {n} points", turns, truth, 10, **contenders)
    x = pixels[:100]
    many = mlp(outputs=10)
    for name, model, turns in (
        ("MLP with 10 outputs", many, repeat // 4),
        ("CNN 32-32-64", cnn(), repeat // 6),
    ):
        compare(
            f"{name}, 100 points",
            max(3, turns),
            by_contraction(model, x),
            3,
            bolza=lambda model=model: empirical_ntk(model, x, outputs="trace"),
            torch_func=lambda model=model: by_contraction(model, x),
        )


if __name__ == "__main__":
    main()
