"""The most samples a second: the best batch and number of threads of each artifact, found by measurement."""

import os
from collections.abc import Mapping

import msgspec
import numpy as np

from calibration.compare import median_interval
from calibration.dataset import Dataset
from deploy.validation.batches import sizes_of, time_sizes
from exporters.remote import RemoteSession

CLOSE = 0.97


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """Samples a second with its 95% interval over rounds, at the batch and threads that gave it."""

    samples_per_s: float
    interval: tuple[float, float]
    batch: int
    threads: int


def measure_rates(sessions: Mapping[str, RemoteSession], data: Dataset, *, threads: int) -> dict[str, Rate]:
    """Each session's best rate. It is left with the threads that it had.

    Of batches that are within 3% of the best the smallest is taken: it waits the least.
    """
    rates: dict[str, Rate] = {}
    for name, session in sessions.items():
        found: list[Rate] = []
        for count in sorted({1, threads, os.cpu_count() or 1}):
            session.set_threads(count)
            for size, rounds in time_sizes(session, data, sizes_of(data)).items():
                found.append(_rate(size, count, rounds))
        session.set_threads(threads)
        best = max(rate.samples_per_s for rate in found)
        near = [rate for rate in found if rate.samples_per_s >= CLOSE * best]
        rates[name] = min(near, key=lambda rate: (rate.batch, rate.threads))
    return rates


def _rate(size: int, threads: int, rounds: list[float]) -> Rate:
    per_second = 1000 * size / np.asarray(rounds)
    low, high = median_interval(per_second)
    return Rate(
        samples_per_s=round(float(np.median(per_second)), 2),
        interval=(round(low, 2), round(high, 2)),
        batch=size,
        threads=threads,
    )
