"""Is projected gradient ascent as fast as the attack libraries at equal steps, and as strong?

PGD of k steps on an MLP and a small convolutional network, trained for a few epochs against PGD-3, on digits as images;
pixels in [0, 1], ball in the largest entry. Contenders: foolbox, torchattacks where installed, and the loop one would
write by hand. One round runs each once; figures are medians of processor seconds and of ratios within a round.
``accuracy`` under attack says whether the result is equal; ours keeps the best step of each sample unless said
otherwise, which costs one more forward pass.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import statistics
import time
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from bolza.data import digits_images
from bolza.robust import pgd, pgd_training

BENCH = "attacks"
EPS, ALPHA = 0.15, 0.02


def problem(kind: str, epochs: int = 4):
    """A network trained against PGD-3, and test samples."""
    torch.manual_seed(0)
    data = digits_images()
    low, high = data.train_x.min(), data.train_x.max()
    x, test = (((part - low) / (high - low)).clamp(0, 1) for part in (data.train_x, data.test_x))
    if kind == "mlp":
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )
    else:
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            pgd_training(net, F.cross_entropy, x[rows], data.train_y[rows], EPS, 3)
            optimizer.step()
    return net.eval(), test[:256], data.test_y[:256]


def by_hand(net, x, y, steps):
    """The loop of every tutorial."""
    delta = torch.empty_like(x).uniform_(-EPS, EPS)
    for _ in range(steps):
        delta.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(net(x + delta), y), delta)
        delta = ((delta.detach() + ALPHA * slope.sign()).clamp(-EPS, EPS) + x).clamp(0, 1) - x
    return x + delta


def contenders(net, x, y, steps):
    """Name to a call that returns adversarial inputs."""
    calls = {
        "bolza": lambda: pgd(net, F.cross_entropy, x, y, EPS, steps, step_size=ALPHA),
        "bolza, last step": lambda: pgd(net, F.cross_entropy, x, y, EPS, steps, step_size=ALPHA, best=False),
        "by hand": lambda: by_hand(net, x, y, steps),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import foolbox

        wrapped = foolbox.PyTorchModel(net, bounds=(0, 1))
        attack = foolbox.attacks.LinfPGD(steps=steps, abs_stepsize=ALPHA)
        calls["foolbox"] = lambda: attack(wrapped, x, y, epsilons=EPS)[1]
    except ImportError as error:
        emit(BENCH, "foolbox", missing=str(error))
    try:
        import torchattacks

        other = torchattacks.PGD(net, eps=EPS, alpha=ALPHA, steps=steps)
        calls["torchattacks"] = lambda: other(x, y)
    except ImportError as error:
        emit(BENCH, "torchattacks", missing=str(error))
    return calls


def main() -> None:
    """Time them round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--nets", nargs="+", default=["mlp", "conv"])
    options = parser.parse_args()
    emit(BENCH, "environment", **environment("foolbox", "torchattacks"))
    for kind in options.nets:
        net, x, y = problem(kind)
        calls = contenders(net, x, y, options.steps)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        accuracy: dict[str, list[float]] = {name: [] for name in calls}
        for round_ in range(options.rounds + 1):
            order = list(calls)
            for name in order[round_ % len(order) :] + order[: round_ % len(order)]:
                start = time.process_time()
                found = calls[name]()
                spent = time.process_time() - start
                with torch.no_grad():
                    right = float((net(found).argmax(1) == y).double().mean())
                if round_:  # the first round warms up
                    seconds[name].append(spent)
                    accuracy[name].append(right)
        for name in calls:
            ratios = [a / b for a, b in zip(seconds[name], seconds["bolza"], strict=True)]
            emit(
                BENCH,
                f"{kind}, {name}",
                cpu_s=statistics.median(seconds[name]),
                over_bolza=statistics.median(ratios),
                accuracy=statistics.mean(accuracy[name]),
            )


if __name__ == "__main__":
    main()
