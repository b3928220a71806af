"""Information plane with its estimators and noise in the open, and the Gaussian bottleneck."""

__all__: list[str] = []
