"""Games against an adversary, correction of hidden states in closed loop, and tilted losses."""

__all__: list[str] = []
