"""Samplers of a posterior over the weights, and what a network knows of what it does not know."""

__all__: list[str] = []
