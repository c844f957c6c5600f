"""The nightly job: lock, tracking and registry, exit codes, and a check-up of the machine.

Importing the package stays light; MLflow and torch are loaded by the functions that need them.
"""

from pipeline.doctor import Check, run_checks
from pipeline.errors import ExitCode, LockedError, PipelineError, TrackingUnavailable, exit_code_for
from pipeline.lock import WorkdirLock
from pipeline.tracking import RunRecord, Tracker, VersionRecord

__all__ = [
    "Check",
    "ExitCode",
    "LockedError",
    "PipelineError",
    "RunRecord",
    "Tracker",
    "TrackingUnavailable",
    "VersionRecord",
    "WorkdirLock",
    "exit_code_for",
    "run_checks",
]
