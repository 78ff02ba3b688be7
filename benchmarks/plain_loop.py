"""The training loop that one writes first, and made-up images in the formats that it and the project read."""

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
    """Epochs of a DataLoader with worker processes, the model and the optimizer in fp32, one per item."""
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
    """torchvision's MNIST, or what its CIFAR10 does (which checks its files), with the usual transforms."""
    from torchvision import datasets, transforms

    normalize = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.25,))]
    if name == "mnist":
        found: torch.utils.data.Dataset[Any] = datasets.MNIST(root, transform=transforms.Compose(normalize))
        return found
    changes = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    return Images(images, labels, transforms.Compose([*changes, *normalize]))


class Images(torch.utils.data.Dataset[Any]):
    """As torchvision's CIFAR10: one array in memory, a PIL image per item, then the transform."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Any], Any]) -> None:
        """Images (N, C, H, W) uint8 and labels (N,)."""
        self._images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = labels.tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


def write_images(name: str, root: Path, shape: tuple[int, int, int], count: int) -> tuple[Tensor, Tensor]:
    """Training images (N, C, H, W) uint8 and labels (N,), also written below `root`.

    Each class is a random pattern in noise, one label in ten is wrong: something to learn, so that masks do
    not close altogether, and not all too easily, so that gradients do not vanish. The format is the one of
    `data.name`: MNIST's own, or parquet. The first ten are the test images, too.
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
    """MNIST's files (IDX), where torchvision looks for them."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    part = "train" if train else "t10k"
    for name, values in (("images-idx3", images.squeeze(1)), ("labels-idx1", labels.to(torch.uint8))):
        header = struct.pack(f">I{values.dim()}I", 0x800 + values.dim(), *values.shape)
        (folder / f"{part}-{name}-ubyte").write_bytes(header + values.contiguous().numpy().tobytes())


def _write_parquet(root: Path, train: bool, images: Tensor, labels: Tensor) -> None:
    """Hugging Face's image layout."""
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
