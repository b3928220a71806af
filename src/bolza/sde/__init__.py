"""Training as a stochastic dynamical system: the noise of its gradients, and what the noise does."""

from bolza.sde.gradient_noise import GradientNoise, gradient_noise

__all__ = ["GradientNoise", "gradient_noise"]
