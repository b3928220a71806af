"""Training as a stochastic dynamical system: the noise of its gradients, and what the noise does."""

from bolza.sde.drift_diffusion import DriftDiffusion, phase_transition
from bolza.sde.gradient_noise import GradientNoise, gradient_noise

__all__ = ["DriftDiffusion", "GradientNoise", "gradient_noise", "phase_transition"]
