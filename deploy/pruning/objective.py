"""The loss that gradient criteria look at: the task's own, on calibration data."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from calibration.dataset import Dataset
from calibration.spec import TensorSpec
from exporters.capture import call_module, flatten_outputs
from targets.errors import UsageError


def calibration_loss(
    data: Dataset, specs: Sequence[TensorSpec], *, batch: int
) -> Callable[[nn.Module], Iterator[Tensor]]:
    """A function that gives a module's cross-entropy, one scalar a batch of the calibration data.

    Raises UsageError when the data has no integer labels.
    """
    if data.labels is None or data.labels.dtype.kind not in "iu":
        raise UsageError(
            "the taylor criterion needs labels",
            found=f"no class numbers 'label' in {data.origin}",
            expected="calibration data with the array 'label'",
            fix="add labels, or rank by --criterion l2",
        )
    labels = torch.from_numpy(data.labels.astype("int64"))

    def losses(module: nn.Module) -> Iterator[Tensor]:
        for start in range(0, len(data), batch):
            stop = min(start + batch, len(data))
            arrays = {name: torch.from_numpy(array) for name, array in data.batch(start, stop).items()}
            logits = flatten_outputs(call_module(module, specs, arrays))[0]
            yield nn.functional.cross_entropy(logits, labels[start:stop])

    return losses
