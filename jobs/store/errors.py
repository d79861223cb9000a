"""What errors of disks and object stores mean: try again, a refused create, or a final error of one line."""

from __future__ import annotations

import errno
import re

from latentmill.jobs.errors import JobError


class StorageError(JobError):
    """A disk or an object store that still fails after all retries.

    `transient`: it was unreachable for the whole wait; otherwise the user must act.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class ForeignObjectError(StorageError):
    """An object that no job writes: a name that leads out of the output, a link, a pipe, a device, too large a file."""


FOREIGN_REMEDY = "no job puts that there: remove it, or restore the output from a copy"


class NotShownError(ConnectionError):
    """A store does not show an object yet that it has just accepted; worth another try."""


def is_inside(path: str) -> bool:
    """Whether a path stays below the root that it is joined to, and is normalised."""
    return not {"", ".", ".."} & set(path.split("/")) and "\0" not in path


_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)
_TRANSIENT_ERRNOS = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENETRESET}
)
_CREDENTIAL_CODES = frozenset(
    {"401", "AuthenticationFailed", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
)
_FULL_CODES = frozenset({"507", "EntityTooLarge", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"})
_NO_CREATE_CODES = frozenset({"501", "NotImplemented"})
_CUT_SHORT = frozenset({"ClientPayloadError", "IncompleteRead", "IncompleteReadError"})
_CLIENT_LIBRARIES = ("aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "http", "requests", "urllib3")
_PERMANENT_NAMES = re.compile(
    r"Credential|ParamValidation|Profile|InvalidURL|InvalidRegion|UnknownService|Unauthor|RefreshError"
)
_URL_SECRETS = re.compile(r"(?<=://)[^/@\s]*@|\?\S*")


def store_code(error: BaseException) -> str:
    """The store's code for an error (`AccessDenied`), its HTTP status otherwise, or an empty string."""
    if type(error).__name__ in _CUT_SHORT:
        return ""  # its cause has a code of aiohttp's, which is not the store's
    for link in (error, error.__cause__, error.__context__):
        response = getattr(link, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code", ""))
        for name in ("code", "status", "status_code"):
            status = getattr(link, name, None)
            if isinstance(status, int):
                return str(status)
    return ""


def _http_status(error: BaseException) -> int:
    """The HTTP status of a store's error code; 0 if unknown."""
    for link in (error, error.__cause__, error.__context__):
        response = getattr(link, "response", None)
        if isinstance(response, dict) and "HTTPStatusCode" in response.get("ResponseMetadata", {}):
            return int(response["ResponseMetadata"]["HTTPStatusCode"])
    code = store_code(error)
    return int(code) if code.isdecimal() else 0


def is_refused_create(error: BaseException) -> bool:
    """Whether a create-only write failed because the key exists."""
    return isinstance(error, FileExistsError) or store_code(error) in {"PreconditionFailed", "412"}


def knows_no_create(error: BaseException) -> bool:
    """Whether the store does not support create-only writes."""
    return store_code(error) in _NO_CREATE_CODES


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed soon."""
    code = "" if isinstance(error, NotShownError) else store_code(error)  # else it would be its cause's code
    if code in _FULL_CODES | _NO_CREATE_CODES:
        return False
    if code:
        return code in _TRANSIENT_CODES or code in {"408", "409", "429"} or _http_status(error) >= 500
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | NotADirectoryError):
        return False
    kind = type(error)
    if kind.__module__.split(".")[0] in _CLIENT_LIBRARIES:
        return _PERMANENT_NAMES.search(kind.__name__) is None
    return isinstance(error, ConnectionError | TimeoutError)  # includes fsspec's timeout


def describe(error: BaseException) -> str:
    """One line about an error, without userinfo or query of any URL in it."""
    code = store_code(error)
    strerror = error.strerror if isinstance(error, OSError) and error.__cause__ is None else None
    text = _URL_SECRETS.sub("", strerror or str(error) or type(error).__name__)
    text = "".join(letter if letter.isprintable() else " " for letter in text)  # a server's text may reach a terminal
    text = " ".join(text.split())[:300]
    return f"{code}: {text}" if code and code not in text else text


def remedy(error: BaseException) -> str:
    """The remedy for a lasting error."""
    code, number = store_code(error), error.errno if isinstance(error, OSError) else None
    resume = "then run the same command again: it resumes"
    answers = (
        (
            isinstance(error, NotShownError),
            "use a store whose reads and listings are consistent: a local disk, S3, GCS, Azure, SeaweedFS, MinIO",
        ),
        (
            code in {"NoSuchBucket", "404"} or isinstance(error, FileNotFoundError),
            "create the bucket or correct its name in --out",
        ),
        (code == "RequestTimeTooSkewed", f"set this machine's clock, {resume}"),
        (
            code in _CREDENTIAL_CODES or "Credential" in type(error).__name__,
            "check the credentials in the environment or the profile (for S3: AWS_PROFILE, or AWS_ACCESS_KEY_ID), "
            + resume,
        ),
        (
            isinstance(error, PermissionError) or code in {"AccessDenied", "403"} or str(error).startswith("Forbidden"),
            "grant read, write and list on it to this user, or choose another --out",
        ),
        (
            isinstance(error, NotADirectoryError | FileExistsError),
            "a part of the path is a file: choose another --out",
        ),
        (number in {errno.ENOSPC, errno.EDQUOT} or code in _FULL_CODES, f"free some space, {resume}"),
        (number == errno.EROFS, f"the file system is read-only: make it writable, {resume}; or choose another --out"),
        (number == errno.EIO, f"the disk fails (see the system's log): repair it, {resume}"),
        (number == errno.EFBIG, f"files may not grow so large here: raise the limit (ulimit -f), {resume}"),
        (
            is_transient(error),
            f"check the network and the endpoint (for S3: AWS_ENDPOINT_URL), {resume}",
        ),
    )
    return next((text for fits, text in answers if fits), "correct --out, or the store's settings in the environment")
