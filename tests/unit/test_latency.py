"""Interleaved timing: rounds in turn, medians that outliers do not move."""

from collections.abc import Iterator

import numpy as np

from deploy.validation.latency import MIN_ROUNDS, MOST_ROUNDS, ROUNDS, summarise, time_interleaved


class Clockwork:
    """A session whose calls take what an iterator says, in nanoseconds; it writes down who was asked."""

    def __init__(self, name: str, nanoseconds: Iterator[int], asked: list[str]) -> None:
        self.name, self.nanoseconds, self.asked = name, nanoseconds, asked

    def time(self, calls: int) -> list[int]:
        self.asked.append(self.name)
        return [next(self.nanoseconds) for _ in range(calls)]


def steady(mean: int, seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    while True:
        yield int(mean * (1 + 0.02 * generator.standard_normal()))


def test_the_sessions_are_timed_in_turn_and_the_order_turns_too() -> None:
    asked: list[str] = []
    sessions = {name: Clockwork(name, steady(1_000_000, 0), asked) for name in ("a", "b")}
    time_interleaved(sessions)  # type: ignore[arg-type]
    rounds = asked[-2 * (len(asked) // 4) :]
    pairs = [tuple(rounds[i : i + 2]) for i in range(0, len(rounds), 2)]
    assert set(pairs) == {("a", "b"), ("b", "a")}


def test_every_session_gets_at_least_thirty_samples_and_its_own_median() -> None:
    asked: list[str] = []
    sessions = {
        "fast": Clockwork("fast", steady(1_000_000, 0), asked),
        "slow": Clockwork("slow", steady(2_000_000, 1), asked),
    }
    timings = time_interleaved(sessions)  # type: ignore[arg-type]
    assert all(timing.samples >= 30 for timing in timings.values())
    assert abs(timings["slow"].median_ms / timings["fast"].median_ms - 2) < 0.05


def test_rounds_go_to_those_that_may_be_the_fastest() -> None:
    asked: list[str] = []
    means = {"fast": 1_000_000, "level": 1_001_000, "near": 1_100_000, "slow": 3_000_000}
    sessions = {name: Clockwork(name, steady(mean, len(name)), asked) for name, mean in means.items()}
    timings = time_interleaved(sessions)  # type: ignore[arg-type]
    assert timings["slow"].samples >= 30
    assert timings["slow"].samples < 9 * ROUNDS
    assert 9 * MIN_ROUNDS <= timings["near"].samples < timings["level"].samples / 2
    assert timings["level"].samples >= 9 * MOST_ROUNDS


def test_a_race_that_is_won_ends() -> None:
    asked: list[str] = []
    sessions = {n: Clockwork(n, steady(m, 0), asked) for n, m in (("a", 1_000_000), ("b", 2_000_000))}
    timings = time_interleaved(sessions)  # type: ignore[arg-type]
    assert timings["a"].samples == 10 * ROUNDS


def test_calls_of_seconds_get_fewer_rounds_but_never_below_the_minimum() -> None:
    asked: list[str] = []
    timings = time_interleaved({"a": Clockwork("a", steady(9_000_000_000, 0), asked)})  # type: ignore[arg-type]
    assert timings["a"].samples == MIN_ROUNDS


def test_a_burst_that_another_process_disturbed_moves_neither_median_nor_interval_much() -> None:
    bursts = [[1_000_000 + i for i in range(10)] for _ in range(31)]
    calm = summarise(bursts)
    bursts[7] = [90_000_000] * 10
    disturbed = summarise(bursts)
    assert abs(disturbed.median_ms - calm.median_ms) < 1e-3
    assert disturbed.interval[1] < 1.001


def test_the_interval_holds_the_median() -> None:
    generator = np.random.default_rng(0)
    timing = summarise([list((1e6 * generator.lognormal(0, 0.2, 5)).astype(int)) for _ in range(31)])
    assert timing.interval[0] <= timing.median_ms <= timing.interval[1]
    assert timing.median_ms <= timing.p90_ms <= timing.p99_ms
