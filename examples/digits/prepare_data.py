"""Writes the four disjoint parts of scikit-learn's digits: 1,797 real 8 x 8 pictures with grey values 0..16.

    python prepare_data.py

The split is a seeded permutation: 1,077 train, 120 calibration, 360 evaluation, 240 report.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

HERE = Path(__file__).parent
PARTS = {"train": 1077, "calibration": 120, "evaluation": 360, "report": 240}


def parts() -> dict[str, dict[str, np.ndarray]]:
    """Each part's arrays: image uint8 (n, 1, 8, 8) and label int64 (n,)."""
    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    ends = np.cumsum(list(PARTS.values()))
    return {
        name: {
            "image": pictures[index].reshape(-1, 1, 8, 8).astype(np.uint8),
            "label": labels[index].astype(np.int64),
        }
        for name, index in zip(PARTS, np.split(order, ends[:-1]), strict=True)
    }


if __name__ == "__main__":
    for name, arrays in parts().items():
        np.savez_compressed(HERE / f"{name}.npz", **arrays)
        print(f"{name}.npz: {len(arrays['label'])} pictures")
