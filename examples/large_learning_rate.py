"""A learning rate that is far too large, with and without feedback between layers.

    python examples/large_learning_rate.py

The two runs differ in one argument. Without feedback the step is that of gradient descent.
"""

import torch
from torch.nn import functional as F

import bolza

data = bolza.data.digits()
accuracy = {}
for feedback in (False, True):
    torch.manual_seed(0)
    model = bolza.models.mlp(depth=5, width=32)
    optimizer = bolza.optim.DDPNOpt(model, lr=1.5, feedback=feedback)
    for _ in range(250):
        rows = torch.randint(len(data.train_x), (16,))
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_x[rows]), data.train_y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy[feedback] = (model(data.test_x).argmax(1) == data.test_y).float().mean().item()

print(f"gradient descent at a rate of 1.5: test accuracy {accuracy[False]:.2f}")
print(f"with feedback from layer to layer: test accuracy {accuracy[True]:.2f}")
