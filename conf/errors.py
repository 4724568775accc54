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

A message has three parts: which setting or row, what was found, what to do. Its code is for scripts and for RUNBOOK.md,
which has a paragraph for each: codes stay as they are, messages may change.
"""

import types
from collections import abc
from typing import ClassVar, Final

CODES: Final[abc.Mapping[str, str]] = types.MappingProxyType(
    {
        # What stops a run, and every other verb.
        "CONFIG_INVALID": "the run file, a --set or the command line is wrong",
        "PATH_OUTSIDE_ROOTS": "a path leads out of the places that this machine declares",
        "SOURCE_UNREADABLE": "the source is not there, or cannot be read to its end",
        "SOURCE_MISMATCH": "the source has other columns, keys or types than the run file says",
        "KEY_NULL": "rows of the source have NULL in their key",
        "KEY_DUPLICATE": "rows of the source share their key",
        "KEY_CHANGED": "the run file has another key than the table",
        "MODEL_NOT_FOUND": "the model reference leads nowhere from this machine",
        "MODEL_UNUSABLE": "the model was found, and is damaged, incomplete or of a kind that Shoal does not run",
        "MODEL_CHANGED": "the table's encoder is found under its name, with other files",
        "HUB_UNREACHABLE": "the Hub did not answer and the model is not in the cache",
        "TABLE_NOT_FOUND": "there is no such table",
        "TABLE_NOT_OURS": "something is there that Shoal did not make",
        "TABLE_UNREADABLE": "the table is there and its log cannot be read",
        "TABLE_FORMAT_NEWER": "a newer Shoal made the table",
        "TABLE_ELSEWHERE": "the catalog has the table in another folder than the run file says",
        "TABLE_NOT_REGISTERED": "the table in the folder is not known to the catalog by its name",
        "DESTINATION_UNWRITABLE": "the destination cannot be written, or its schema is not there",
        "STORE_UNREACHABLE": "Spark has no way to an address, or the store refused",
        "ENCODER_CHANGED": "the run file asks for another encoder than the table has",
        "ENCODER_COLLAPSED": "most texts got one and the same vector",
        "TERMS_CHANGED": "the table's terms were cut by another stemmer than the one here",
        "INDEX_DAMAGED": "the index does not fit the table's rows, or its centroids are gone",
        "ENCODERS_DIFFER": "two tables to be joined have vectors of different encoders",
        "LIMIT_MIN_ROWS": "the source has fewer rows than limits.min_rows",
        "LIMIT_MAX_DELETED": "more published rows would go than limits.max_deleted",
        "LIMIT_MAX_ERRORS": "more chunks have no vector than limits.max_errors",
        "LIMIT_MAX_COST": "the run would cost more than limits.max_cost",
        "GATE_FAILED": "the table to come finds less of the judged queries than the gate asks for",
        "CUTOVER_NOT_READY": "the next encoder still lacks vectors",
        "QUERY_INVALID": "a query in SQL has no text, a k below 1, or a vector, key or table that there is not",
        "SERVER_FAILED": "the SQL server did not start, or Spark under it is gone",
        "REFUSED": "Shoal will not go on until somebody decides",
        "TABLE_BUSY": "another run is alive on the table",
        "RUN_FAILED": "the run failed for a reason that may have passed",
        "INTERRUPTED": "the run was stopped by a signal",
        "SPARK_UNAVAILABLE": "Spark did not start, or no server of Spark Connect answers",
        "NOT_BY_CONNECT": "what is asked for does not work through Spark Connect, or on Databricks",
        "DISK_FULL": "there is no room left to write",
        "PUBLISH_FAILED": "the one commit that publishes did not go through",
        "PURGE_INCOMPLETE": "a purge stopped before everything was erased",
        "VERSION_GONE": "the version to restore is no longer in the log, or its files are gone",
        "VERSION_PURGED": "rows were purged since the version to restore",
        "VERSION_FOREIGN": "the version to restore was not written by Shoal",
        "OVERTAKEN": "somebody wrote to the table since the run planned",
        "LEASE_LOST": "another run took the table over while this one stood still",
        "WORKER_FAILED": "an executor could not do its part",
        "WORKER_DIES": "the Python worker is killed whatever it encodes",
        "WORKERS_UNFIT": "the Python of the workers cannot run Shoal: another version, or a package is missing",
        "CANARIES_MOVED": "the encoder gives other vectors here than when the table was made",
        "BACKEND_DISAGREES": "no back end on this machine agrees with float32 torch",
        "DEVICE_MEMORY": "the encoder does not fit into the memory of the device",
        "DEVICE_FAILED": "the device failed in a forward pass",
        "INTERNAL": "a bug of Shoal's own: a count that does not reconcile",
        "UNEXPECTED": "an error that Shoal did not foresee",
        # What `shoal audit` finds.
        "FOREIGN_COMMITS": "others changed the table since Shoal did",
        "FILES_MISSING": "data files of the table are gone, or have another size",
        "FILES_DAMAGED": "a file of the table cannot be read",
        "PROPERTIES_DAMAGED": "the table's properties are gone, or do not fit together",
        "CONSTRAINTS_MISSING": "the constraints that keep foreign vectors out are gone",
        "STATE_UNREADABLE": "no commit in the table's log says what the last run did",
        "ROWS_WITHOUT_HASH": "rows have no hash of their text, chunk or metadata",
        "ROWS_UNACCOUNTED": "rows have neither a vector nor a reason, or both",
        "CHUNKS_DOUBLED": "a chunk is there more than once",
        "CHUNKS_MISSING": "chunks of a row are gone, or belong to another text",
        "TEXT_CHANGED": "a stored text is not the one that was encoded",
        "METADATA_CHANGED": "metadata columns are not what their hash says",
        "VECTORS_WRONG_DIM": "vectors have another number of elements than the encoder makes",
        "VECTORS_NOT_FINITE": "vectors have elements that are NULL, NaN or infinite",
        "VECTORS_NOT_UNIT": "vectors are not of length 1 although the encoder normalises",
        "VECTORS_DIFFER": "vectors are not those of their text",
        "STAGING_DAMAGED": "staging cannot be read, or holds vectors that no run could publish",
    }
)
"""Every code with what it means in one line; stable, and each has its paragraph in RUNBOOK.md."""

CODE_NOTE: Final = "shoal code: "
"""How the note of an error begins that carries its code through a worker's stack trace."""


def first_line(error: BaseException) -> str:
    """What an error says before its stack trace, which Spark puts into the message; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ShoalError(Exception):
    """Root of the tree; `except ShoalError` catches everything that Shoal raises on purpose.

    `code`: a key of CODES; what the class has when the place that raises says nothing finer.
    """

    exit_code: ClassVar[int] = 1
    status: ClassVar[str] = "failed"
    default_code: ClassVar[str] = "RUN_FAILED"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.add_note(f"{CODE_NOTE}{self.code}")


class UserError(ShoalError):
    """What the user wrote or pointed at cannot be used; running it again changes nothing."""

    exit_code = 2
    default_code = "CONFIG_INVALID"


class ConfigError(UserError):
    """The run file, a `--set` or the command line is wrong; the message has a paragraph for each problem."""

    default_code = "CONFIG_INVALID"


class SourceError(UserError):
    """The source is missing, unreadable, or not as the run file describes it."""

    default_code = "SOURCE_UNREADABLE"


class ModelError(UserError):
    """The model reference leads nowhere, or the folder it leads to cannot be used."""

    default_code = "MODEL_UNUSABLE"


class DestinationError(UserError):
    """The destination is not a Shoal table, or it cannot be written."""

    default_code = "DESTINATION_UNWRITABLE"


class RefusedError(ShoalError):
    """Shoal could go on but will not until somebody decides; retrying is pointless."""

    exit_code = 3
    status = "refused"
    default_code = "REFUSED"


class LimitError(RefusedError):
    """A limit of the run file or a gate of the audit was hit; the published table is as it was."""

    default_code = "REFUSED"


class EncoderChangedError(RefusedError):
    """The published table holds another encoder's vectors; mixing the two would make search meaningless."""

    default_code = "ENCODER_CHANGED"


class BusyError(ShoalError):
    """Another run holds the lease of the destination."""

    exit_code = 4
    status = "busy"
    default_code = "TABLE_BUSY"


class RunError(ShoalError):
    """The run failed for a reason that may have passed by the next try."""

    default_code = "RUN_FAILED"


class OvertakenError(RunError):
    """Somebody published to the destination after this run made its plan."""

    default_code = "OVERTAKEN"


class LeaseLostError(RunError):
    """Another run took over the lease while this one was still working."""

    default_code = "LEASE_LOST"


class WorkerError(RunError):
    """An executor could not do its part: canaries moved, out of memory at start, no usable device."""

    default_code = "WORKER_FAILED"


class InternalError(ShoalError):
    """A bug of Shoal's own: a count that does not reconcile, or a state the protocol excludes."""

    default_code = "INTERNAL"


def code_of(error: BaseException) -> str:
    """The code of any error: UNEXPECTED for one that Shoal did not raise."""
    return error.code if isinstance(error, ShoalError) else "UNEXPECTED"
