"""How long one call takes, judged by interleaved rounds so that the machine's drift hits all alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibration.compare import median_interval
from deploy.validation.remote import RemoteSession

ROUNDS = 31
ROUND_S = 0.01
WARM_UP_S = 0.2
WARM_UP_CALLS = 5
MAX_SECONDS = 60.0
MIN_ROUNDS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds of one call. `interval` is the 95% interval of the median over the rounds' medians."""

    median_ms: float
    p90_ms: float
    p99_ms: float
    interval: tuple[float, float]
    samples: int


def time_interleaved(sessions: Mapping[str, RemoteSession], *, rounds: int = ROUNDS) -> dict[str, Timing]:
    """Times prepared sessions in turn, round by round; the order turns too.

    A round is a burst of about 10 ms of calls, so that short calls get many samples. Medians over
    rounds are proof against outliers: a burst that another process disturbed counts as one round.
    At least 31 calls each; for calls of seconds fewer rounds, never below 7.
    """
    calls = {name: _warm_up(session) for name, session in sessions.items()}
    per_round_s = sum(max(ROUND_S, each.seconds) for each in calls.values())
    rounds = max(MIN_ROUNDS, min(rounds, int(MAX_SECONDS / per_round_s)))
    names = list(sessions)
    bursts: dict[str, list[list[int]]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            bursts[name].append(sessions[name].time(calls[name].count))
    return {name: summarise(bursts[name]) for name in names}


def summarise(bursts: Sequence[Sequence[int]]) -> Timing:
    """Percentiles over all calls (nanoseconds in), the interval over the bursts' medians."""
    everything: Any = np.concatenate([np.asarray(burst, np.float64) for burst in bursts]) / 1e6
    medians: Any = np.array([np.median(burst) for burst in bursts]) / 1e6
    p90, p99 = np.percentile(everything, [90, 99])
    low, high = median_interval(medians)
    return Timing(
        median_ms=float(np.median(medians)),
        p90_ms=float(p90),
        p99_ms=float(p99),
        interval=(float(low), float(high)),
        samples=len(everything),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Burst:
    count: int
    seconds: float


def _warm_up(session: RemoteSession) -> _Burst:
    """Calls until 0.2 s are over, at least 5; says how many calls make a round."""
    spent, recent = 0.0, 0.0
    done = 0
    while spent < WARM_UP_S or done < WARM_UP_CALLS:
        samples = session.time(WARM_UP_CALLS)
        recent = float(np.median(samples)) / 1e9
        spent += sum(samples) / 1e9
        done += WARM_UP_CALLS
    count = max(1, min(1000, int(ROUND_S / max(recent, 1e-9))))
    return _Burst(count=count, seconds=count * recent)
