"""Learning the initial condition of the training system, so that a new task needs little."""

__all__: list[str] = []
