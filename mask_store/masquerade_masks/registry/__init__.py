"""Where personas, versions, jobs and events are kept."""

from masquerade_masks.registry.base import Registry
from masquerade_masks.registry.records import (
    FINAL_STATUSES,
    Event,
    Job,
    JobStatus,
    Persona,
    Source,
    Version,
    utc_now,
)
from masquerade_masks.registry.sqlite import SQLiteRegistry

__all__ = [
    "FINAL_STATUSES",
    "Event",
    "Job",
    "JobStatus",
    "Persona",
    "Registry",
    "SQLiteRegistry",
    "Source",
    "Version",
    "utc_now",
]
