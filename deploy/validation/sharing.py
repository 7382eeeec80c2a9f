"""Whether requests may share a call: only where rows do not depend on each other, and where it pays."""

from typing import Any

import msgspec
import numpy as np

from calibration.compare import snr_db
from calibration.dataset import Dataset
from deploy.validation.remote import RemoteSession

SIZES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 7
ROUND_S = 0.01
LONGEST_CALL_S = 0.25
INDEPENDENT_DB = 60.0
"""Kernels may sum in another order in another batch; a scale that the batch decides shows far below this."""
PAYS = 1.2
CLOSE = 0.95


class Sharing(msgspec.Struct, frozen=True, kw_only=True):
    """`rows` that share a call best, 1 where none should; milliseconds of a call by its rows."""

    independent: bool
    rows: int
    median_ms: dict[str, float]


def measure_sharing(session: RemoteSession, data: Dataset) -> Sharing:
    """Tries a session at batches of 1 to 64 rows, as far as its inputs allow. `data` gives the rows."""
    first = data.specs[0]
    if not first.batched:
        return Sharing(independent=False, rows=1, median_ms={})
    low, high = first.bounds["batch"]
    sizes = [size for size in SIZES if low <= size <= high]
    if low > 1 or len(sizes) < 2 or not _independent(session, data, sizes[-1]):
        return Sharing(independent=False, rows=1, median_ms={})
    medians = _medians(session, data, sizes)
    rates = {size: size / median for size, median in medians.items()}
    best = max(rates.values())
    rows = next(size for size in rates if rates[size] >= CLOSE * best)
    if rates[rows] < PAYS * rates[1]:
        rows = 1
    shown = {str(size): round(median, 6) for size, median in medians.items()}
    return Sharing(independent=True, rows=rows, median_ms=shown)


def _independent(session: RemoteSession, data: Dataset, most: int) -> bool:
    """Whether rows answer alone what they answer together."""
    count = min(len(data), most, 8)
    if count < 2:
        return False
    together = session.run(data.batch(0, count))
    alone = [session.run(data.batch(index, index + 1)) for index in range(count)]
    return all(
        array.shape[:1] == (count,)
        and snr_db(array, np.concatenate([answer[name] for answer in alone])) >= INDEPENDENT_DB
        for name, array in together.items()
    )


def _medians(session: RemoteSession, data: Dataset, sizes: list[int]) -> dict[int, float]:
    """Milliseconds of one call at each size, the sizes in turn; none beyond one that takes long."""
    batches: dict[int, dict[str, Any]] = {size: _filled(data, size) for size in sizes}
    seconds: dict[int, float] = {}
    for size in sizes:
        session.prepare(batches[size])
        seconds[size] = session.time(2)[-1] / 1e9
        if seconds[size] > LONGEST_CALL_S:
            break
    medians: dict[int, list[float]] = {size: [] for size in seconds}
    for turn in range(ROUNDS):
        for size in list(seconds)[:: 1 if turn % 2 else -1]:
            session.prepare(batches[size])
            samples = session.time(max(1, min(500, int(ROUND_S / max(seconds[size], 1e-9)))))
            medians[size].append(float(np.median(samples)) / 1e6)
    return {size: float(np.median(values)) for size, values in medians.items()}


def _filled(data: Dataset, size: int) -> dict[str, Any]:
    """So many rows; the samples repeat where there are too few."""
    return data.select(np.arange(size) % len(data)).batch(0, size)
