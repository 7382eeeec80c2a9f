"""What sessions have in common: inputs checked before a runtime sees them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calibration.spec import TensorSpec
from targets.errors import ModelError

Arrays = Mapping[str, np.ndarray[Any, Any]]


def checked(spec: TensorSpec, inputs: Arrays) -> np.ndarray[Any, Any]:
    """The input's array, contiguous.

    Raises ModelError where it is missing, or of another dtype or shape: ExecuTorch takes fewer channels than
    it was made for, and answers them with nonsense.
    """
    if spec.name not in inputs:
        raise ModelError("an input is missing", found=", ".join(inputs), expected=spec.name)
    array = inputs[spec.name]
    if str(array.dtype) != spec.dtype:
        raise ModelError(f"input {spec.name} has the wrong dtype", found=array.dtype, expected=spec.dtype)
    if not spec.admits(array.shape):
        raise ModelError(
            f"input {spec.name} has the wrong shape",
            found=array.shape,
            expected=f"{list(spec.shape)}{_within(spec)}",
        )
    return np.ascontiguousarray(array)


def refusal(
    what: str, shapes: Mapping[str, Sequence[int]], specs: Sequence[TensorSpec], said: str
) -> ModelError:
    """What is told when a runtime refuses inputs that were checked."""
    return ModelError(
        f"the {what} refused its inputs",
        found=", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items()),
        expected=", ".join(f"{spec.name} {list(spec.shape)}{_within(spec)}" for spec in specs),
        fix=f"the runtime said: {said}",
    )


def _within(spec: TensorSpec) -> str:
    bounds = ", ".join(f"{name} from {low} to {high}" for name, (low, high) in spec.bounds.items())
    return f" with {bounds}" if bounds else ""
