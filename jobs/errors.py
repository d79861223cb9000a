"""What a job can refuse: each error is one line that names the value, the limit and the remedy."""

from __future__ import annotations


class JobError(Exception):
    """The job cannot go on, or went on and did not complete."""

    exit_code = 1


class UsageError(JobError):
    """The command, the job file or the manifest is at fault; nothing was written."""

    exit_code = 2


class OutputConflictError(JobError):
    """The output already belongs to another plan; nothing was written."""

    exit_code = 3
