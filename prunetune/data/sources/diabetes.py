"""The diabetes data set, which scikit-learn includes."""

from __future__ import annotations

import numpy as np
import torch

from prunetune.data.dataset import Source, Split


def diabetes(root: str) -> Source:
    """Load the diabetes data: ten columns for 442 patients; the target is the disease's progress (25 to 346).

    The progress was measured a year later (Efron et al. 2004, "Least Angle Regression"). A fixed random fifth
    of the patients is the test split.
    """
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    inputs = torch.from_numpy(bunch.data.astype(np.float32))
    targets = torch.from_numpy(bunch.target.astype(np.float32))[:, None]
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    whole = Split(inputs, targets)
    return Source(whole.take(order[88:]), whole.take(order[:88]))
