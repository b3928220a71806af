"""An LSTM that does not learn what it read 60 steps ago: why, and what to change before training.

The first of 60 inputs says which class it is; 59 of noise follow. Mean-field theory says after how many steps the
cell forgets, the measured gradient agrees, and the remedy is a bias of the forget gate: σ(b) = e^(−1/60) keeps a
state for 60 steps, which is b = log 60 nearly.
"""

import math

import torch
from torch import nn

import bolza

STEPS, CLASSES, UNITS = 60, 4, 64
draw = torch.Generator().manual_seed(0)


def sequences(count):
    """Noise, with the class shown at the first step alone."""
    y = torch.randint(CLASSES, (count,), generator=draw)
    x = 0.3 * torch.randn(count, STEPS, CLASSES, generator=draw)
    x[:, 0] += 2 * nn.functional.one_hot(y, CLASSES)
    return x, y


class Reader(nn.Module):
    """An LSTM whose last state is read."""

    def __init__(self, forget_bias=None):
        super().__init__()
        self.lstm, self.head = nn.LSTM(CLASSES, UNITS, batch_first=True), nn.Linear(UNITS, CLASSES)
        if forget_bias is not None:
            with torch.no_grad():
                for bias in (self.lstm.bias_ih_l0, self.lstm.bias_hh_l0):
                    bias[UNITS : 2 * UNITS] = forget_bias / 2  # gates are stored as i, f, g, o

    def forward(self, x):
        return self.head(self.lstm(x)[1][0][-1])


def accuracy_after_training(model, steps=150):
    """Adam on fresh sequences; the share of new ones that is read right."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(steps):
        x, y = sequences(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    x, y = sequences(1000)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


# PyTorch draws weights of variance 1/(3 units), so σ_w² = 1/3; the input's share is CLASSES/(3 UNITS).
memory = bolza.meanfield.recurrent_fixed_point("lstm", 1 / 3, CLASSES / (3 * UNITS), gate_bias=0.0).xi
print(f"theory: as PyTorch draws it, the cell forgets by a factor e every {float(memory):.1f} steps")

for bias in (None, math.log(STEPS)):
    print("as PyTorch draws it" if bias is None else f"forget bias {bias:.1f}")
    torch.manual_seed(0)
    model = Reader(bias)
    diagnosis = bolza.diagnose(model, sequences(64), samples=64)
    ratio = diagnosis["propagation.time_ratio"]
    print(f"  gradient at step 1 over step {STEPS}: {ratio.value:.1e} ({ratio.verdict})")
    print(f"  accuracy after training, chance {1 / CLASSES}: {accuracy_after_training(model):.2f}")
