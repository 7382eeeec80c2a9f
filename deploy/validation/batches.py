"""How long calls of several sizes take: the sizes in turn, so that a busy moment hits all alike."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from calibration.dataset import Dataset
from exporters.remote import RemoteSession

SIZES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 7
ROUND_S = 0.01
LONGEST_CALL_S = 0.25


def sizes_of(data: Dataset) -> list[int]:
    """The batches worth trying: powers of two that the inputs allow; a fixed batch alone."""
    first = data.specs[0]
    if not first.batched:
        return [first.shape[0]] if first.shape and isinstance(first.shape[0], int) else [1]
    low, high = first.bounds["batch"]
    return [size for size in SIZES if low <= size <= high] or [low]


def time_sizes(session: RemoteSession, data: Dataset, sizes: Sequence[int]) -> dict[int, list[float]]:
    """Milliseconds of one call at each size, a median a round; none beyond a size whose call takes long."""
    batches = {size: filled(data, size) for size in sizes}
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
    return medians


def filled(data: Dataset, size: int) -> dict[str, Any]:
    """So many rows; the samples repeat where there are too few."""
    return data.select(np.arange(size) % len(data)).batch(0, size)
