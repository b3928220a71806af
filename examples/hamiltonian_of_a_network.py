"""States, costates and Hamiltonians of a network that knows nothing of control.

The costate of a layer is the gradient of the loss in its input; the Hamiltonian gap says which layer is
furthest from minimising its own Hamiltonian; the linearised layer gives products with its Jacobian.
"""

import torch
from torch import nn

import bolza

torch.manual_seed(0)
data = bolza.data.digits()
x, y = data.train_x[:64], data.train_y[:64]
model = bolza.models.mlp(depth=6, width=32)

system = bolza.as_system(model, x)
cost = bolza.TerminalCost(nn.functional.cross_entropy, y)
run = bolza.adjoint(system, cost, bolza.rollout(system, x))
gaps = bolza.hamiltonian_gap(system, cost, run)

print(f"loss {float(run.value):.4f}")
for t, name in enumerate(system.stage_names):
    gain = bolza.linearize(system, t, run.states[t]).jvp(torch.randn_like(run.states[t]), None)
    print(
        f"stage {t} {name:12s}  |p| {float(run.costates[t].norm()):.2e}  "
        f"gap {gaps[t]:.2e}  |A v| {float(gain.norm()):.2e}"
    )

# One gradient step on every Hamiltonian is one step of SGD.
loss = nn.functional.cross_entropy(model(x), y)
loss.backward()
found = run.gradient_by_name()
difference = max(float((p.grad - found[name]).abs().max()) for name, p in model.named_parameters())
print(f"largest difference between the gradients of the Hamiltonians and loss.backward(): {difference:.1e}")
