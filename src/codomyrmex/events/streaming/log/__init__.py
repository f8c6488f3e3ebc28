"""Logs: ordered, replayable, bounded records of events."""

from .base import (
    EARLIEST,
    LATEST,
    Batch,
    Capabilities,
    Gap,
    Location,
    Log,
    LogStatistics,
    Retention,
    open_log,
)
from .consumer import Consumer, Lag
from .memory import MemoryLog
from .record import Record
from .run import Run, RunStatus
from .sqlite import SQLiteLog
from .stream import LogStream

__all__ = [
    "EARLIEST",
    "LATEST",
    "Batch",
    "Capabilities",
    "Consumer",
    "Gap",
    "Lag",
    "Location",
    "Log",
    "LogStatistics",
    "LogStream",
    "MemoryLog",
    "Record",
    "Retention",
    "Run",
    "RunStatus",
    "SQLiteLog",
    "open_log",
]
