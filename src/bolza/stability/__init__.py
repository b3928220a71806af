"""Lyapunov exponents of networks over layers, time and training steps; synchronisation; contraction."""

__all__: list[str] = []
