"""Whether requests may share a call: only where rows do not depend on each other, and where it pays."""

import msgspec
import numpy as np

from calibration.compare import snr_db
from calibration.dataset import Dataset
from deploy.validation.batches import sizes_of, time_sizes
from exporters.remote import RemoteSession

ROWS = 8
INDEPENDENT_DB = 100.0
"""The same kernels on the same row: what differs comes from the rows beside it."""
PAYS = 1.2
CLOSE = 0.95


class Sharing(msgspec.Struct, frozen=True, kw_only=True):
    """`rows` that share a call best, 1 where none should; milliseconds of a call by its rows."""

    independent: bool
    rows: int
    median_ms: dict[str, float]


def measure_sharing(session: RemoteSession, data: Dataset) -> Sharing:
    """Tries a session at batches of 1 to 64 rows, as far as its inputs allow. `data` gives the rows."""
    sizes = sizes_of(data)
    if not data.specs[0].batched or sizes[0] > 1 or len(sizes) < 2 or not _independent(session, data, sizes):
        return Sharing(independent=False, rows=1, median_ms={})
    medians = {size: float(np.median(rounds)) for size, rounds in time_sizes(session, data, sizes).items()}
    rates = {size: size / median for size, median in medians.items()}
    best = max(rates.values())
    rows = next(size for size in rates if rates[size] >= CLOSE * best)
    if rates[rows] < PAYS * rates[1]:
        rows = 1
    shown = {str(size): round(median, 6) for size, median in medians.items()}
    return Sharing(independent=True, rows=rows, median_ms=shown)


def _independent(session: RemoteSession, data: Dataset, sizes: list[int]) -> bool:
    """Whether a row's answer is the same whatever rows stand beside it, in calls of one size."""
    size = min(ROWS, sizes[-1], len(data) // 2)
    if size < 2:
        return False
    for row in range(size):
        companions = [[each for each in range(start, start + size) if each != row] for start in (0, size)]
        pairs = [np.array([row, *others[: size - 1]]) for others in companions]
        first, second = (session.run(data.select(pair).batch(0, size)) for pair in pairs)
        for name, array in first.items():
            if array.shape[:1] != (size,) or snr_db(array[:1], second[name][:1]) < INDEPENDENT_DB:
                return False
    return True
