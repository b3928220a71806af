"""Data sets that need no download, and loaders for those a user brings."""

from bolza.data.adjustable import AdjustableBatchSampler
from bolza.data.dataset import Dataset, batches, hold_out
from bolza.data.loading import NAMES, load, validate
from bolza.data.sets import diabetes, digits, digits_images, mnist5k, text
from bolza.data.tasks import FewShot, Sinusoids, TaskBatch, digit_tasks
from bolza.data.weighted import WeightedBatches, WeightedBatchSampler, systematic_counts

__all__ = [
    "NAMES",
    "AdjustableBatchSampler",
    "Dataset",
    "FewShot",
    "Sinusoids",
    "TaskBatch",
    "WeightedBatchSampler",
    "WeightedBatches",
    "batches",
    "diabetes",
    "digit_tasks",
    "digits",
    "digits_images",
    "hold_out",
    "load",
    "mnist5k",
    "systematic_counts",
    "text",
    "validate",
]
