"""The four questions asked of one network: facts → findings → prescription, with a trial as proof."""

from __future__ import annotations

from bolza.diagnosis._diagnose import Progress, diagnose
from bolza.diagnosis.record import SCHEMA_VERSION, Diagnosis, Finding, Prescription, Remedy, Trial
from bolza.diagnosis.watch import Event, Watch, WatchRecord

__all__ = [
    "SCHEMA_VERSION",
    "Diagnosis",
    "Event",
    "Finding",
    "Prescription",
    "Progress",
    "Remedy",
    "Trial",
    "Watch",
    "WatchRecord",
    "diagnose",
]
