"""A plain PyTorch training loop, for comparison, and random images in formats that both programs read."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def plain_epochs(
    source: torch.utils.data.Dataset[Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    batch_size: int,
    device: str,
) -> Iterator[None]:
    """Train in fp32 with a DataLoader with worker processes; each item of the iterator is one epoch."""
    gpu = device == "cuda"
    loader = torch.utils.data.DataLoader(
        source,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=8 if gpu else 2,
        pin_memory=gpu,
        persistent_workers=True,  # else a short epoch would mostly start processes
    )
    while True:
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        if gpu:
            torch.cuda.synchronize()
        yield


def plain_source(name: str, root: str, images: Tensor, labels: Tensor) -> torch.utils.data.Dataset[Any]:
    """Return torchvision's MNIST, or `Images` in place of its CIFAR10, with the usual transforms.

    torchvision's CIFAR10 checks the checksums of its files, so random images cannot replace them.
    """
    from torchvision import datasets, transforms

    normalize = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.25,))]
    if name == "mnist":
        found: torch.utils.data.Dataset[Any] = datasets.MNIST(root, transform=transforms.Compose(normalize))
        return found
    changes = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    return Images(images, labels, transforms.Compose([*changes, *normalize]))


class Images(torch.utils.data.Dataset[Any]):
    """A data set like torchvision's CIFAR10: an array in memory, whose items are transformed PIL images."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Any], Any]) -> None:
        """`images` are (N, C, H, W) uint8, `labels` (N,)."""
        self._images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = labels.tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


def write_images(name: str, root: Path, shape: tuple[int, int, int], count: int) -> tuple[Tensor, Tensor]:
    """Make training images (N, C, H, W) uint8 and labels (N,), and write them below `root`.

    Each class is a random pattern with noise, so that there is something to learn and masks do not close
    completely; one label in ten is random, so that it is not learnt too easily and gradients do not vanish.
    The format is that of the data source `name`: MNIST's files, or parquet. The first ten images are also the
    test images.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (count,), generator=generator)
    patterns = 128 * torch.randint(0, 2, (10, *shape), dtype=torch.uint8, generator=generator)
    noise = torch.randint(0, 128, (count, *shape), dtype=torch.uint8, generator=generator)
    images = patterns[labels] + noise
    labels[::10] = torch.randint(0, 10, labels[::10].shape, generator=generator)
    write = {"mnist": _write_mnist, "parquet": _write_parquet}[name]
    write(root, True, images, labels)
    write(root, False, images[:10], labels[:10])
    return images, labels


def _write_mnist(root: Path, train: bool, images: Tensor, labels: Tensor) -> None:
    """Write MNIST's files (IDX) to the folder where torchvision looks for them."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    part = "train" if train else "t10k"
    for name, values in (("images-idx3", images.squeeze(1)), ("labels-idx1", labels.to(torch.uint8))):
        header = struct.pack(f">I{values.dim()}I", 0x800 + values.dim(), *values.shape)
        (folder / f"{part}-{name}-ubyte").write_bytes(header + values.contiguous().numpy().tobytes())


def _write_parquet(root: Path, train: bool, images: Tensor, labels: Tensor) -> None:
    """Write a parquet file in Hugging Face's image layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    encoded = []
    for pixels in images.permute(0, 2, 3, 1).contiguous().numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="bmp")
        encoded.append({"bytes": buffer.getvalue()})
    root.mkdir(parents=True, exist_ok=True)
    path = root / ("train.parquet" if train else "test.parquet")
    pq.write_table(pa.table({"image": encoded, "label": labels.tolist()}), path)
