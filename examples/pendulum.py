"""Push a pendulum upright by following the gradient of the Hamiltonian.

The same `rollout` and `adjoint` that serve networks serve a plant: t is time, x is (angle, speed), u is the
torque.
"""

import math

import torch

import bolza


class Pendulum:
    """Explicit Euler with step 0.2; the angle is measured from hanging down."""

    horizon = 25
    controls = tuple(torch.zeros(1) for _ in range(25))

    def step(self, t, x, u):
        angle, speed = x
        return angle + 0.2 * speed, speed + 0.2 * (u - torch.sin(angle))


system = Pendulum()
start = (torch.zeros(1), torch.zeros(1))
cost = bolza.CallableCost(
    terminal=lambda x: 10 * ((x[0] - math.pi) ** 2 + x[1] ** 2).sum(),
    running=lambda t, x, u: 0.01 * (u**2).sum(),
)

controls = list(system.controls)
for sweep in range(101):
    run = bolza.adjoint(system, cost, bolza.rollout(system, start, controls))
    if sweep % 25 == 0:
        angle, speed = (float(v.detach()) for v in run.states[-1])
        print(f"sweep {sweep:3d}: cost {float(run.value):8.3f}, final angle {angle:5.2f}, speed {speed:5.2f}")
    controls = [u - 0.014 * gradient for u, gradient in zip(controls, run.gradients, strict=True)]

gaps = bolza.hamiltonian_gap(system, cost, run)
print(f"largest Hamiltonian gap of a control: {max(gaps):.1e}, zero at an optimum")
