"""Every error that Shoal raises on purpose, with its exit code and the status that `--json` reports.

    ShoalError                     1  failed
    |- UserError                   2  failed   something the user wrote or pointed at
    |  |- ConfigError              2  failed   the run file, --set or the command line
    |  |- SourceError              2  failed   the source is missing or is not as described
    |  |- ModelError               2  failed   the model reference or its folder cannot be used
    |  `- DestinationError         2  failed   not a Shoal table, or it cannot be written
    |- RefusedError                3  refused  retrying is pointless until somebody decides
    |  |- LimitError               3  refused  a limit or a gate was hit
    |  `- EncoderChangedError      3  refused  the table belongs to another encoder
    |- BusyError                   4  busy     another run holds the table
    |- RunError                    1  failed   may be retried
    |  |- OvertakenError           1  failed   somebody published since the plan was made
    |  |- LeaseLostError           1  failed   another run took the lease over
    |  `- WorkerError              1  failed   an executor could not do its part
    `- InternalError               1  failed   our bug: a count that does not reconcile

A message has three parts: which setting or row, what was found, what to do.
"""

from typing import ClassVar


class ShoalError(Exception):
    """Root of the tree; `except ShoalError` catches everything that Shoal raises on purpose."""

    exit_code: ClassVar[int] = 1
    status: ClassVar[str] = "failed"


class UserError(ShoalError):
    """What the user wrote or pointed at cannot be used; running it again changes nothing."""

    exit_code = 2


class ConfigError(UserError):
    """The run file, a `--set` or the command line is wrong; the message has a paragraph for each problem."""


class SourceError(UserError):
    """The source is missing, unreadable, or not as the run file describes it."""


class ModelError(UserError):
    """The model reference leads nowhere, or the folder it leads to cannot be used."""


class DestinationError(UserError):
    """The destination is not a Shoal table, or it cannot be written."""


class RefusedError(ShoalError):
    """Shoal could go on but will not until somebody decides; retrying is pointless."""

    exit_code = 3
    status = "refused"


class LimitError(RefusedError):
    """A limit of the run file or a gate of the audit was hit; the published table is as it was."""


class EncoderChangedError(RefusedError):
    """The published table holds another encoder's vectors; mixing the two would make search meaningless."""


class BusyError(ShoalError):
    """Another run holds the lease of the destination."""

    exit_code = 4
    status = "busy"


class RunError(ShoalError):
    """The run failed for a reason that may have passed by the next try."""


class OvertakenError(RunError):
    """Somebody published to the destination after this run made its plan."""


class LeaseLostError(RunError):
    """Another run took over the lease while this one was still working."""


class WorkerError(RunError):
    """An executor could not do its part: canaries moved, out of memory at start, no usable device."""


class InternalError(ShoalError):
    """A bug of Shoal's own: a count that does not reconcile, or a state the protocol excludes."""
