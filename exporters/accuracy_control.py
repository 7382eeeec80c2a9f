"""OpenVINO's int8 under NNCF's accuracy control: operators go back to float, the most harmful first, until
the outputs agree well enough with the float model's.

https://docs.openvino.ai/2025/openvino-workflow/model-optimization-guide/quantizing-models-post-training/quantizing-with-accuracy-control.html
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from calibration.compare import snr_db
from exporters.arrays import Arrays
from exporters.base import GAIN_DB
from targets.errors import ModelError

Batch = Mapping[str, Any]

HELD_BACK = 4
"""One batch of so many is held back: ranges are learned from the others, agreement is judged on it."""


def quantize_controlled(
    model: Any, batches: Sequence[Arrays], *, least_snr_db: float, plain: Callable[[Sequence[Arrays]], Any],
    settings: Mapping[str, Any],
) -> Any:  # fmt: skip
    """The model in int8, but for the operators whose quantization costs most.

    The control looks at calibration data alone. What it asks for is half the amplitude of the noise that
    `plain` quantization makes, and GAIN_DB more than `least_snr_db` in any case. Raises ModelError for fewer
    than two batches.
    """
    import nncf
    import openvino

    if len(batches) < 2:
        raise ModelError(
            "accuracy control cannot hold back calibration samples",
            found=f"{len(batches)} batch of them",
            expected="two batches or more",
            fix="give more [calibration] samples",
        )
    learned = [batch for index, batch in enumerate(batches) if index % HELD_BACK != 1]
    held = [batch for index, batch in enumerate(batches) if index % HELD_BACK == 1]
    core = openvino.Core()

    def compiled(which: Any) -> Any:
        return core.compile_model(which, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    wanted = _answers(compiled(model), held)
    reached = _agreement(wanted, _answers(compiled(plain(learned)), held))
    goal = max(reached, least_snr_db) + GAIN_DB
    positions = {id(batch): index for index, batch in enumerate(held)}

    def agreement(candidate: Any, items: Iterable[Batch]) -> tuple[float, None]:
        """Of the batches that are asked for: all of them, or single ones in any order."""
        chosen = list(items)
        right = [[arrays[positions[id(item)]] for item in chosen] for arrays in wanted]
        return min(goal, _agreement(right, _answers(candidate, chosen))), None

    return nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(learned),
        nncf.Dataset(held),
        agreement,
        max_drop=0.0,
        subset_size=len(learned),
        **settings,
    )


def _answers(compiled: Any, items: Iterable[Batch]) -> list[list[Any]]:
    """Each floating-point output's arrays, one a batch."""
    answers = [[np.array(value) for value in compiled(item).values()] for item in items]
    return [list(arrays) for arrays in zip(*answers, strict=True) if arrays[0].dtype.kind == "f"]


def _agreement(wanted: list[list[Any]], given: list[list[Any]]) -> float:
    """The SNR of the worst output, in dB, over all batches."""
    return min(
        snr_db(np.concatenate([a.ravel() for a in one]), np.concatenate([b.ravel() for b in other]))
        for one, other in zip(wanted, given, strict=True)
    )
