"""The one place where exceptions become errnos.

A CachefsError is somebody's answer: its errno goes to the kernel, one line to the log. Any other Exception is a bug of ours:
EIO for that one request, the traceback to the log, `internal_errors` counts it; the mount and all else go on. Never
ENOSYS: one ENOSYS to an FSYNC makes the kernel stop sending any, for the whole mount and for good.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import pyfuse3

from cachefs.errors import CachefsError

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class Boundary:
    """Turns exceptions into errnos, and counts."""

    def __init__(self) -> None:
        self.request_errors = 0
        self.internal_errors = 0

    def errno_of(self, exc: Exception, request: str) -> int:
        """The errno that answers *request* ("WRITE 4096+512 of vm1"), after logging *exc*."""
        if isinstance(exc, CachefsError):
            self.request_errors += 1
            log.error("%s failed: %s", request, exc)
            return errno.EIO if exc.errno == errno.ENOSYS else exc.errno
        self.internal_errors += 1
        log.error("%s failed on a bug in cachefs; it was answered EIO. Please report this:", request, exc_info=exc)
        return errno.EIO


class HasBoundary(Protocol):
    boundary: Boundary


S = TypeVar("S", bound=HasBoundary)


def guarded(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """For pyfuse3's handlers: anything but a FUSEError that leaves one would end the whole mount."""

    @wraps(handler)
    async def inside(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as exc:
            raise pyfuse3.FUSEError(self.boundary.errno_of(exc, handler.__name__)) from exc

    return cast("Callable[Concatenate[S, P], Coroutine[Any, Any, R]]", inside)
