"""What a model's input looks like."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DTYPES = (
    "float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """An input's name, shape and dtype.

    `shape` holds numbers and names; a name is a dynamic dimension and `bounds` gives its
    (smallest, largest) size. The first dimension is the batch where it is named "batch".
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def sizes(self, **dimensions: int) -> tuple[int, ...]:
        """The shape in numbers; a named dimension that is not given takes its largest size."""
        return tuple(
            size if isinstance(size, int) else dimensions.get(size, self.bounds[size][1])
            for size in self.shape
        )

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The smallest and largest size along each axis."""
        return tuple((size, size) if isinstance(size, int) else self.bounds[size] for size in self.shape)

    def admits(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape fits."""
        return len(shape) == len(self.shape) and all(
            low <= size <= high for size, (low, high) in zip(shape, self.ranges, strict=True)
        )

    @property
    def batched(self) -> bool:
        """Whether the first dimension counts samples."""
        return bool(self.shape) and self.shape[0] == "batch"


def usable_batch(specs: Sequence[TensorSpec], wanted: int = 64) -> int:
    """The batch to work in: the wanted one within the bounds, or the fixed one."""
    first = specs[0]
    if isinstance(first.shape[0], int):
        return first.shape[0]
    low, high = first.bounds[first.shape[0]]
    return max(low, min(high, wanted))
