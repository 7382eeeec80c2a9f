"""Whether zeros are skipped: a graph timed with its masked weights and with dense ones, in turn."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from calibration.compare import median_interval
from deploy.manifest import SparseExecution
from deploy.validation.latency import Race
from exporters.remote import RemoteSession

ROUNDS = (15, 45, 135)
"""After each the interval is looked at: it ends where 1 lies outside."""
ERROR = 0.05
"""Of all looks together, shared out among them (Bonferroni)."""


def time_zeros(
    sparse: RemoteSession, dense: RemoteSession, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> SparseExecution:
    """The ratio of the dense twin's time to the sparse graph's, round by round, on these inputs."""
    sessions = {"sparse": sparse, "dense": dense}
    for session in sessions.values():
        session.prepare(inputs)
    race = Race(sessions)
    for rounds in ROUNDS:
        race.run(list(sessions), until=rounds)
        medians = {name: np.array([np.median(b) for b in bursts]) for name, bursts in race.bursts.items()}
        ratios = medians["dense"] / medians["sparse"]
        low, high = median_interval(ratios, level=1 - ERROR / len(ROUNDS))
        if not low <= 1 <= high:
            break
    return SparseExecution(
        gain=float(np.median(ratios)),
        ci95=[float(low), float(high)],
        batch=len(next(iter(inputs.values()))),
    )
