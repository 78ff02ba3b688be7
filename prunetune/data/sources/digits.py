"""The handwritten digits, which scikit-learn includes."""

from __future__ import annotations

import numpy as np
import torch

from prunetune.data.dataset import Source, Split


def digits(root: str) -> Source:
    """Load scikit-learn's 1,797 handwritten digits, 1×8×8; a fixed random fifth is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * 255 / 16).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    whole = Split(images, labels)
    return Source(whole.take(order[360:]), whole.take(order[:360]), 10)


digits.known = (1, 8, 8), 10  # type: ignore[attr-defined]
