"""How long one call takes, judged by interleaved rounds so that the machine's drift hits all alike."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibration.compare import median_interval
from exporters.remote import RemoteSession

ROUNDS = 31
MOST_ROUNDS = 93
LEAST_SAMPLES = 31
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

    By successive halving (Jamieson and Talwalkar 2016): all get rounds enough for 31 calls; those that may
    be the fastest by their intervals go on to `rounds`, and the last few until their intervals part or
    three times as many are done. For calls of seconds fewer rounds, never below 7.
    """
    race = Race(sessions)
    race.run(list(sessions), until=max(MIN_ROUNDS, *(race.rounds_for(LEAST_SAMPLES, n) for n in sessions)))
    for until in range(rounds, max(rounds, MOST_ROUNDS) + 1, rounds):
        finalists = race.finalists()
        if len(finalists) < 2 and until > rounds:
            break
        race.run(finalists, until=until)
    return {name: summarise(bursts) for name, bursts in race.bursts.items()}


class Race:
    """Sessions, their bursts so far, and the time that is left."""

    def __init__(self, sessions: Mapping[str, RemoteSession]) -> None:
        self._sessions = sessions
        self._calls = {name: _warm_up(session) for name, session in sessions.items()}
        self._seconds_left = MAX_SECONDS
        self._turn = 0
        self.bursts: dict[str, list[list[int]]] = {name: [] for name in sessions}

    def rounds_for(self, samples: int, name: str) -> int:
        """How many rounds give so many calls."""
        return math.ceil(samples / self._calls[name].count)

    def run(self, names: Sequence[str], *, until: int) -> None:
        """Rounds over these sessions until each has so many, or the time is over; never below 7."""
        cost = sum(max(ROUND_S, self._calls[name].seconds) for name in names)
        done = min(len(self.bursts[name]) for name in names)
        for count in range(done, until):
            if self._seconds_left < cost and count >= MIN_ROUNDS:
                return
            self._seconds_left -= cost
            shift = self._turn % len(names)
            self._turn += 1
            for name in (*names[shift:], *names[:shift]):
                self.bursts[name].append(self._sessions[name].time(self._calls[name].count))

    def finalists(self) -> list[str]:
        """Those whose interval reaches that of the fastest."""
        timings = {name: summarise(bursts) for name, bursts in self.bursts.items()}
        fastest = min(timings.values(), key=lambda timing: timing.median_ms)
        return [name for name, timing in timings.items() if timing.interval[0] <= fastest.interval[1]]


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
