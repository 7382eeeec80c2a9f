"""The search for a cost, on made-up groups of units."""

import itertools

import pytest

from deploy.pruning.selection import TOLERANCE, Candidates, removal_counts, select

# Two layers in a row: a makes 32 channels from 4, b makes 64 from a's, c reads b's.
SHAPES = {"a.weight": (32, 4), "b.weight": (64, 32), "c.weight": (10, 64)}
WEIGHTS = {"a.weight": 100.0, "b.weight": 25.0, "c.weight": 1.0}
WIDTHS = {"a": 32, "b": 64}


def group(layer: str, following: str, scores: tuple[float, ...]) -> Candidates:
    rates = {(f"{layer}.weight", 0): 1, (f"{following}.weight", 1): 1}
    return Candidates(scores=scores, rates=rates, outputs={layer: 1})


def two_groups(a: float = 1.0, b: float = 1.0) -> list[Candidates]:
    return [
        group("a", "b", tuple(a * (1 + i / 100) for i in range(32))),
        group("b", "c", tuple(b * (1 + i / 100) for i in range(64))),
    ]


def saved(counts: tuple[int, ...]) -> float:
    a, b = 32 - counts[0], 64 - counts[1]
    total = 32 * 4 * 100 + 64 * 32 * 25 + 10 * 64
    return 1 - (a * 4 * 100 + a * b * 25 + 10 * b) / total


def run(asked: float, *, multiple: int = 1, minimum: int = 1, ranking: str = "global", a: float = 1.0):
    return select(
        two_groups(a),
        widths=WIDTHS,
        shapes=SHAPES,
        weights=WEIGHTS,
        asked=asked,
        ranking=ranking,
        min_channels=minimum,
        channel_multiple=multiple,
    )


@pytest.mark.parametrize("asked", [0.05, 0.2, 0.4, 0.63, 0.9])
@pytest.mark.parametrize("ranking", ["global", "local"])
def test_achieved_is_within_two_points_and_is_what_the_counts_save(asked: float, ranking: str) -> None:
    found = run(asked, ranking=ranking)
    assert found.achieved == pytest.approx(saved(found.counts), abs=1e-12)
    assert abs(found.achieved - asked) <= TOLERANCE


@pytest.mark.parametrize("multiple", [4, 8, 16])
def test_what_stays_is_a_multiple_and_no_combination_within_reach_is_missed(multiple: int) -> None:
    for asked in (0.1, 0.25, 0.5, 0.7):
        found = run(asked, multiple=multiple)
        assert all((width - gone) % multiple == 0 for width, gone in zip((32, 64), found.counts, strict=True))
        grid = itertools.product(range(0, 32, multiple), range(0, 64, multiple))
        nearest = min(abs(saved(counts) - asked) for counts in grid)
        assert abs(found.achieved - asked) <= max(TOLERANCE, nearest + 1e-9)


def test_low_scores_go_first_across_groups() -> None:
    assert run(0.1, a=0.1).counts[1] == 0
    assert run(0.1, a=10.0).counts[0] == 0


def test_local_ranking_takes_the_same_fraction_from_each_group() -> None:
    a, b = run(0.5, ranking="local", a=100.0).counts
    assert abs(a / 32 - b / 64) <= 1 / 32


def test_the_minimum_holds_and_reachable_says_what_it_allows() -> None:
    found = run(0.99, minimum=16)
    assert found.counts == (16, 48)
    assert found.reachable == pytest.approx(saved((16, 48)))


def test_a_layer_with_frozen_channels_keeps_its_whole_width_a_multiple() -> None:
    # 12 of 20 channels may go: 16 or 8 are left.
    counts = removal_counts(12, {"a": 1}, widths={"a": 20}, min_channels=1, channel_multiple=8)
    assert counts == [4]


def test_a_layer_narrower_than_the_multiple_is_left_alone() -> None:
    assert removal_counts(8, {"a": 1}, widths={"a": 8}, min_channels=1, channel_multiple=16) == []


def test_units_of_several_channels_are_counted_in_channels() -> None:
    # Grouped convolution: one unit takes four channels.
    counts = removal_counts(8, {"a": 4}, widths={"a": 32}, min_channels=8, channel_multiple=8)
    assert counts == [2, 4, 6]
