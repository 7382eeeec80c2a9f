"""Which units go: a greedy search for the asked cost, in steps that keep the channel multiple.

No tensors here: a group of like units is its scores and what one unit takes away from each shape.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

TOLERANCE = 0.02
NEIGHBOURS = 20_000  # states tried, at most, where the greedy search ends too far away


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Like units: their scores (low goes first), and what one takes by (tensor, dimension) and by layer."""

    scores: tuple[float, ...]
    rates: Mapping[tuple[str, int], int]
    outputs: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """How many units go from each group of candidates, and the fraction of the cost that goes with them.

    `reachable` is the most that the constraints allow.
    """

    counts: tuple[int, ...]
    achieved: float
    reachable: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    group: int
    count: int  # units gone after the step
    priority: float


def select(
    groups: Sequence[Candidates],
    *,
    widths: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, float],
    asked: float,
    ranking: str,
    min_channels: int,
    channel_multiple: int,
) -> Selection:
    """The removal whose saving is nearest to `asked`, lowest scores first.

    `widths` are the layers' output channels, `shapes` all tensors', and the cost is the sum over
    tensors of elements times `weights`. Steps are taken in order of their
    mean score; one that would overshoot by more than 2 points is left out with its whole group.
    """
    sharing = Counter(layer for group in groups for layer in group.outputs)
    ladders = [
        removal_counts(
            len(group.scores),
            group.outputs,
            widths={layer: widths[layer] for layer in group.outputs if sharing[layer] == 1},
            min_channels=min_channels,
            channel_multiple=channel_multiple,
        )
        for group in groups
    ]
    state = _State(groups, shapes, weights)
    reachable = state.saved_by([ladder[-1] if ladder else 0 for ladder in ladders])
    _descend(state, _ordered_steps(groups, ladders, ranking), asked)
    if abs(state.saved - asked) > TOLERANCE:
        state.move_to(_neighbour(state, groups, ladders, asked))
    return Selection(counts=tuple(state.counts), achieved=state.saved, reachable=reachable)


def removal_counts(
    units: int,
    outputs: Mapping[str, int],
    *,
    widths: Mapping[str, int],
    min_channels: int,
    channel_multiple: int,
) -> list[int]:
    """How many units may go: what stays of each layer is a multiple and no fewer than the minimum.

    `outputs` says what one unit takes from a layer. `widths` holds a layer's whole width where these
    units are all of it that may go; a layer that several groups share keeps its multiple by parts.
    """

    def fits(gone: int, layer: str, size: int) -> bool:
        kept = widths.get(layer, units * size) - gone * size
        return kept % channel_multiple == 0 and kept >= min_channels

    return [
        gone for gone in range(1, units) if all(fits(gone, layer, size) for layer, size in outputs.items())
    ]


class _State:
    """Units gone by group, and the cost they save. Mutable."""

    def __init__(
        self,
        groups: Sequence[Candidates],
        shapes: Mapping[str, tuple[int, ...]],
        weights: Mapping[str, float],
    ) -> None:
        self._groups = groups
        self._shapes = {name: list(shapes[name]) for name in shapes}
        self._weights = weights
        self._total = sum(math.prod(shapes[name]) * weight for name, weight in weights.items())
        self._gone = 0.0
        self.counts = [0] * len(groups)

    @property
    def saved(self) -> float:
        """The fraction of the cost that is gone."""
        return self._gone / self._total

    def move(self, index: int, count: int) -> None:
        """Sets how many units of a group are gone."""
        rates = self._groups[index].rates
        touched = {name for name, _ in rates}
        before = self._cost(touched)
        for (name, dim), rate in rates.items():
            self._shapes[name][dim] -= rate * (count - self.counts[index])
        self.counts[index] = count
        self._gone += before - self._cost(touched)

    def move_to(self, counts: Sequence[int]) -> None:
        """Sets all groups."""
        for index, count in enumerate(counts):
            if count != self.counts[index]:
                self.move(index, count)

    def saved_by(self, counts: Sequence[int]) -> float:
        """What these counts would save; the state stays as it is."""
        here = list(self.counts)
        self.move_to(counts)
        saved = self.saved
        self.move_to(here)
        return saved

    def _cost(self, names: set[str]) -> float:
        return sum(math.prod(self._shapes[name]) * self._weights.get(name, 0.0) for name in names)


def _ordered_steps(
    groups: Sequence[Candidates], ladders: Sequence[Sequence[int]], ranking: str
) -> list[_Step]:
    steps: list[_Step] = []
    for index, (group, ladder) in enumerate(zip(groups, ladders, strict=True)):
        ordered = sorted(group.scores)
        for done, count in itertools.pairwise((0, *ladder)):
            mean = sum(ordered[done:count]) / (count - done)
            priority = mean if ranking == "global" else count / len(ordered)
            steps.append(_Step(group=index, count=count, priority=priority))
    return sorted(steps, key=lambda step: (step.priority, step.group, step.count))


def _descend(state: _State, steps: Sequence[_Step], asked: float) -> None:
    """Takes steps while they fit; one that overshoots too far closes its group."""
    closed: set[int] = set()
    for step in steps:
        if step.group in closed:
            continue
        before, undo = state.saved, state.counts[step.group]
        state.move(step.group, step.count)
        if state.saved <= asked:
            continue
        short, over = asked - before, state.saved - asked
        if short <= TOLERANCE or over <= TOLERANCE:
            if short < over:
                state.move(step.group, undo)
            return
        closed.add(step.group)
        state.move(step.group, undo)


def _neighbour(
    state: _State, groups: Sequence[Candidates], ladders: Sequence[Sequence[int]], asked: float
) -> list[int]:
    """The state nearest to `asked` that differs in at most two groups; of those close enough, the one
    that loses the lowest scores."""
    sums = [list(itertools.accumulate(sorted(group.scores), initial=0.0)) for group in groups]
    best = list(state.counts)
    best_rank = (1, abs(state.saved - asked))
    for counts in _changed_twice(state.counts, ladders):
        miss = abs(state.saved_by(counts) - asked)
        lost = sum(total[count] for total, count in zip(sums, counts, strict=True))
        rank = (0, lost) if miss <= TOLERANCE else (1, miss)
        if rank < best_rank:
            best, best_rank = counts, rank
    return best


def _changed_twice(counts: Sequence[int], ladders: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    options = [(index, count) for index, ladder in enumerate(ladders) for count in (0, *ladder)]
    pairs = itertools.combinations_with_replacement(options, 2)
    for (first, one), (second, other) in itertools.islice(pairs, NEIGHBOURS):
        changed = list(counts)
        changed[first], changed[second] = one, other
        yield changed
