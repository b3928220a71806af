"""The four questions asked of one network: facts → findings → prescription, with a trial as proof."""

from __future__ import annotations

from bolza.diagnosis._diagnose import Progress, diagnose
from bolza.diagnosis.record import SCHEMA_VERSION, Diagnosis, Finding, Prescription, Remedy, Trial

__all__ = [
    "SCHEMA_VERSION",
    "Diagnosis",
    "Finding",
    "Prescription",
    "Progress",
    "Remedy",
    "Trial",
    "diagnose",
]
