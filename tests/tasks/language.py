"""A language model in little, as a user would bring it: a source, a task and a network, and nothing else."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetune.data import Source, Split
from prunetune.tasks import Classification, Metric

VOCABULARY, LENGTH = 5, 6


def counting(root: str, *, step: int = 1) -> Source:
    """Sequences that count on; to be learnt is the next one at each place."""
    first = torch.randint(0, VOCABULARY, (240, 1), generator=torch.Generator().manual_seed(0))
    tokens = (first + step * torch.arange(LENGTH + 1)) % VOCABULARY
    whole = Split(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return Source(whole.take(torch.arange(200)), whole.take(torch.arange(200, 240)), VOCABULARY)


class NextToken(Classification):
    metric = Metric("perplexity", "perplexity", maximize=False)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (*self.form.shape, self.outputs)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(outputs, -1).gather(-1, targets[..., None]).sum().double()
        return torch.stack([-log_p, torch.full_like(log_p, targets.numel())])

    def score(self, sums: Tensor) -> float:
        loss, count = sums.tolist()
        return math.exp(loss / count)

    def chance(self, targets: Tensor) -> float:
        share = targets.flatten().bincount(minlength=self.outputs).double() / targets.numel()
        return math.exp(-float(torch.special.xlogy(share, share).sum()))


class Network(nn.Module):
    def __init__(self, num_classes: int, *, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.layers(self.embedding(tokens))
        return out
