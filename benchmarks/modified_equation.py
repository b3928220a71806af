"""What do drift and noise of the modified equation of a network cost, beside a loop over paths?

MLP on digits, several paths at once. The unit is one gradient of the whole data at one point, by autograd, for each
path in a loop. Beside the noise: per-sample gradients by ``torch.func.vmap``, for each path, times a normal draw.
CPU seconds, interleaved, medians.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import statistics
import time

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from bolza.data import digits
from bolza.sde import modified_equation

BENCH = "modified_equation"


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", type=int, default=32)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    emit(BENCH, "environment", **environment())
    torch.manual_seed(0)
    data = digits()
    x, y = data.train_x[: args.samples].flatten(1), data.train_y[: args.samples]
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    loss = nn.functional.cross_entropy
    first, second, frozen = (
        modified_equation(net, loss, (x, y), lr=0.1, order=order, noise=noise)
        for order, noise in ((1, "local"), (2, "local"), (1, "frozen"))
    )
    theta = first.initial(paths=args.paths) + 0.01 * torch.randn(args.paths, first.start.numel())
    xi = torch.randn(first.noise_shape(theta))
    shapes = {name: p.shape for name, p in net.named_parameters()}

    def named(point):
        parts = point.split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def value(point, x, y):
        return loss(functional_call(net, named(point), (x,)), y)

    def loop():
        out = []
        for point in theta:
            point = point.detach().requires_grad_()
            out.append(torch.autograd.grad(value(point, x, y), point)[0])
        return torch.stack(out)

    each = vmap(grad(lambda point, x, y: value(point, x[None], y[None])), in_dims=(None, 0, 0))

    def explicit():
        out = []
        for point, draw in zip(theta, xi, strict=True):
            g = each(point, x, y)
            out.append((draw - draw.mean()) @ (g - g.mean(0)) / len(x) ** 0.5)
        return torch.stack(out)

    runs = {
        "loop": loop,
        "drift, order 1": lambda: first.drift(0.0, theta),
        "drift, order 2": lambda: second.drift(0.0, theta),
        "noise, local": lambda: first.factor(0.0, theta, xi),
        "noise, frozen": lambda: frozen.factor(0.0, theta, xi),
        "noise, per-sample gradients": explicit,
    }
    torch.testing.assert_close(loop(), -runs["drift, order 1"](), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(explicit() * 0.1**0.5, runs["noise, local"](), rtol=1e-3, atol=1e-5)
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeat):
        for name, work in runs.items():
            start = time.process_time()
            work()
            spent[name].append(time.process_time() - start)
    unit = statistics.median(spent["loop"])
    for name, cpu in spent.items():
        emit(BENCH, name, gradients=statistics.median(cpu) / unit, paths=args.paths, samples=args.samples)


if __name__ == "__main__":
    main()
