"""Every exception that cachefs raises on purpose.

    CachefsError(errno, where, detail)       message: "vm1/cow: pread 65536+4096: <detail>"
      ConfigError                            start-up only: exit 2, one line per problem, no traceback
      StoreError                             start-up only: a store cannot be opened: exit 3
        FormatError                          bad magic, version or checksum: never repaired silently
          VersionError                       good, and made by another version: never deleted either
        LayoutError                          survivor memory of another version: the store must wait for that
        LockedError                          somebody else holds the store
        BaseChangedError                     the base is not the one the overlay was made over
      RequestError      EINVAL               the caller broke the contract: a bug above; raised by `checked` only
      ReadOnlyError     EROFS
      NoSpaceError      ENOSPC               overlay full, or its limit reached
      BackendError      EIO                  below us
        TransientError  EIO                  may be retried; the only class that is
          BackendTimeout  EIO                  not within its deadline
        PermanentError  EIO                  never retried: missing, range beyond the end, denied
      CorruptionError   EIO                  data disagrees with its checksum

Foreign exceptions (OSError and the like) become one of these in the module that called the foreign API. Numbers reach
the kernel in `cachefs.fuse.boundary` alone.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable


class CachefsError(Exception):
    """An error with an errno for the kernel and a sentence for a person.

    *where* names the layer or file ("vm1/cow"), *detail* says what happened and, where somebody can act, what to do.
    """

    default_errno = errno.EIO

    def __init__(self, where: str, detail: str, code: int | None = None) -> None:
        super().__init__(where, detail)
        self.where = where
        self.detail = detail
        self.errno = self.default_errno if code is None else code

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}"


class ConfigError(CachefsError):
    """The configuration cannot be used. *problems* are complete lines, one per mistake, in the order of the file."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("configuration", "\n".join(self.problems), errno.EINVAL)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class StoreError(CachefsError):
    """A store cannot be opened; the message says what to do."""


class FormatError(StoreError):
    """Bad magic, unknown version or wrong checksum in a store's header or map."""


class VersionError(FormatError):
    """It is whole, and of a format that this version does not know."""


class LayoutError(StoreError):
    """There is survivor memory of the store, in a layout that this version does not know."""


class LockedError(StoreError):
    """The store is held by another process."""

    default_errno = errno.EBUSY


class BaseChangedError(StoreError):
    """The base below an overlay is not the one that the overlay was made over."""


class RequestError(CachefsError):
    """The caller broke the layer contract (bounds, alignment, capability): a bug above."""

    default_errno = errno.EINVAL


class ReadOnlyError(CachefsError):
    default_errno = errno.EROFS


class NoSpaceError(CachefsError):
    default_errno = errno.ENOSPC


class BackendError(CachefsError):
    """Whatever went wrong in the thing below us."""


class TransientError(BackendError):
    """May go away by itself; the only class that is retried."""


class BackendTimeout(TransientError):
    """The time that a request may take is over. EIO: a guest's disk knows no time limits."""


class PermanentError(BackendError):
    """Stays as it is however often one asks."""


class CorruptionError(CachefsError):
    """Bytes disagree with their checksum."""


def from_os_error(exc: OSError, where: str, action: str) -> CachefsError:
    """The CachefsError for *exc*, raised by the system call that *action* describes ("pwrite 4096+512")."""
    code = exc.errno or errno.EIO
    detail = f"{action}: {os.strerror(code)}"
    if code in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(where, detail)
    if code == errno.EROFS:
        return ReadOnlyError(where, detail)
    return PermanentError(where, detail)


def unwrap(exc: BaseException) -> BaseException:
    """The one exception in nested groups of nurseries, preferring a CachefsError."""
    found = exc
    while isinstance(found, BaseExceptionGroup):
        ours = [inner for inner in found.exceptions if isinstance(unwrap(inner), CachefsError)]
        found = (ours or list(found.exceptions))[0]
    return found
