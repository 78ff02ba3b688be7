"""scikit-learn's diabetes data, which come with it."""

from __future__ import annotations

import numpy as np
import torch

from prunetune.data.dataset import Source, Split


def diabetes(root: str) -> Source:
    """442 patients, ten columns, and how far the disease had come a year later (25 to 346).

    Efron et al. 2004, "Least Angle Regression". A fixed random fifth is the test split.
    """
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    inputs = torch.from_numpy(bunch.data.astype(np.float32))
    targets = torch.from_numpy(bunch.target.astype(np.float32))[:, None]
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    whole = Split(inputs, targets)
    return Source(whole.take(order[88:]), whole.take(order[:88]))
