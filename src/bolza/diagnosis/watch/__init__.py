"""What a training run does, told while it runs: steady, unstable, heavy-tailed or in loops."""

from __future__ import annotations

from bolza.diagnosis.watch._watch import Watch
from bolza.diagnosis.watch.record import Event, WatchRecord

__all__ = ["Event", "Watch", "WatchRecord"]
