"""What every backend across a network shares: how long it is waited for, and what happens when that is over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from cachefs.insistence import Insistence
from cachefs.layers.base import Options
from cachefs.units import Duration, format_duration

_KERNEL_LIMITS = Path("/proc/sys/fs/fuse")
_KERNEL_MARGIN_S = 10.0


class RemoteConfig(Options):
    """The options of every backend across a network."""

    connect_timeout: Annotated[Duration, pydantic.Field(ge=0.05, le=600)] = 5.0
    """How long one try to connect may take."""
    timeout: Annotated[Duration, pydantic.Field(ge=0.05, le=600)] = 5.0
    """How long the server may be silent while requests wait; then the connection is made anew."""
    deadline: Annotated[Duration, pydantic.Field(ge=0.05, le=3600)] = 60.0
    """How long a request may take, tries and reconnections included, before it fails or, with hold, is called held."""
    on_failure: Literal["error", "hold"] = "error"
    """What happens at the deadline: the guest gets an error, or it waits until the store is back."""

    @pydantic.model_validator(mode="after")
    def _check_kernel(self) -> RemoteConfig:
        limit = kernel_timeout_s()
        if limit and (self.holds or limit <= self.deadline + _KERNEL_MARGIN_S):
            raise ValueError(
                f"this kernel aborts a whole mount when one request takes {format_duration(limit)}: set "
                f"fs.fuse.default_request_timeout and fs.fuse.max_request_timeout to 0 (sysctl)"
                + (
                    ", or on_failure to error"
                    if self.holds
                    else f", or deadline to less than {format_duration(max(0.0, limit - _KERNEL_MARGIN_S))}"
                )
            )
        return self

    @property
    def holds(self) -> bool:
        return self.on_failure == "hold"

    def insistence(self, name: str, trouble: Callable[[], str]) -> Insistence:
        return Insistence(name, self.deadline, holds=self.holds, trouble=trouble)


def kernel_timeout_s() -> float:
    """Seconds after which Linux (6.14 on) takes a request for lost and aborts its mount; 0: never.

    Source: linux/fs/fuse/inode.c, fuse_init_server_timeout.
    """
    default, most = (_read_number(_KERNEL_LIMITS / name) for name in ("default_request_timeout", "max_request_timeout"))
    return min(default, most) if default and most else default or most


def _read_number(path: Path) -> float:
    try:
        return float(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0.0
