"""What sessions have in common: inputs checked before a runtime sees them."""

from collections.abc import Mapping
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
    if not _fits(spec, array.shape):
        raise ModelError(
            f"input {spec.name} has the wrong shape",
            found=array.shape,
            expected=f"{list(spec.shape)}{_within(spec)}",
        )
    return np.ascontiguousarray(array)


def _fits(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    if len(shape) != len(spec.shape):
        return False
    for size, wanted in zip(shape, spec.shape, strict=True):
        low, high = (wanted, wanted) if isinstance(wanted, int) else spec.bounds[wanted]
        if not low <= size <= high:
            return False
    return True


def _within(spec: TensorSpec) -> str:
    bounds = ", ".join(f"{name} from {low} to {high}" for name, (low, high) in spec.bounds.items())
    return f" with {bounds}" if bounds else ""
