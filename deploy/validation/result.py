"""What validation found out about one rung. Light: reading a cached result loads no torch."""

import msgspec

from deploy.manifest import Parity
from deploy.validation.metrics import Drop


class Validated(msgspec.Struct, frozen=True, kw_only=True):
    """What validation found. `drop` is None without evaluation data; `wrong` says what is not right."""

    parity: Parity
    drop: Drop | None
    peak_memory_bytes: int
    wrong: str | None = None
    warning: str | None = None
