"""Loading, splitting, normalizing and augmenting; every way in which a user's files can be wrong."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from prunetune import data
from prunetune.config.schema import AugmentationConfig, DataConfig
from prunetune.data import Dataset, Split, augment, batches, evaluation_batches
from prunetune.data.batches import steps_per_epoch
from prunetune.data.dataset import channel_statistics, split_off_validation
from prunetune.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits(**keys: Any) -> Dataset:
    return data.load(DataConfig.model_validate({"name": "digits", **keys}))


def described(config: DataConfig) -> tuple[tuple[int, ...], int | None]:
    form = data.form_of(config)
    return form.shape, form.classes


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def toy(n: int = 10) -> Dataset:
    """Training images whose first pixel is their index."""
    images = torch.zeros(n + 2, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n + 2)
    split = Split(images, torch.arange(n + 2) % 3)
    return split_off_validation(split, split, 3, fraction=2 / (n + 2), seed=0)


# --- digits, and what all sources share


def test_digits_are_split_into_disjoint_parts() -> None:
    found = digits(validation_fraction=0.1)
    assert (len(found.train), len(found.validation), len(found.test)) == (1293, 144, 360)
    assert found.shape == (1, 8, 8)
    assert found.classes == 10
    assert found.train.inputs.dtype == torch.uint8
    # No image is twice in this data set, so equal bytes would be the same image.
    parts = [rows(split.inputs) for split in (found.train, found.validation, found.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_the_validation_split_follows_its_seed_alone() -> None:
    one = digits()
    assert digits(batch_size=7, augmentation={"flip": True}) is one  # trials share the tensors
    data.loading._loaded.clear()
    again = digits(batch_size=32)
    assert again is not one
    assert torch.equal(again.validation.inputs, one.validation.inputs)
    assert torch.equal(again.train.targets, one.train.targets)
    assert again.digest == one.digest
    other = digits(split_seed=1)
    assert other.digest != one.digest
    assert rows(other.validation.inputs) != rows(one.validation.inputs)
    assert torch.equal(other.test.inputs, one.test.inputs)


def test_what_is_provided_is_not_read_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = digits()
    nowhere = DataConfig(name="mnist", root=str(tmp_path / "nowhere"))
    received = Dataset.from_arrays(found.arrays())
    data.provide(nowhere, received)
    assert data.load(nowhere.model_copy(update={"batch_size": 3})) is received
    monkeypatch.chdir(tmp_path)
    assert data.load(nowhere.model_copy(update={"root": "nowhere"})) is received
    assert (received.digest, received.classes, received.shape) == (found.digest, found.classes, found.shape)
    assert torch.equal(received.train.inputs, found.train.inputs)
    assert torch.equal(received.test.targets, found.test.targets)
    assert received.test.targets.data_ptr() == found.test.targets.data_ptr()  # not copied
    images = found.validation.inputs
    assert torch.equal(received.normalize(images), found.normalize(images))


def test_the_data_used_last_stay() -> None:
    one = digits()
    other = digits(split_seed=1)
    assert digits() is one
    digits(split_seed=2)
    assert digits() is one
    assert digits(split_seed=1) is not other


def test_read_only_arrays_are_received_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    arrays = digits().arrays()
    locked = {
        name: value.view() if isinstance(value, np.ndarray) else value for name, value in arrays.items()
    }
    for value in locked.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    assert Dataset.from_arrays(locked).classes == 10
    assert not recwarn.list


def test_a_limit_takes_a_fixed_mixture_of_the_images() -> None:
    found = digits(limit=100, validation_fraction=0.2)
    assert (len(found.train), len(found.validation), len(found.test)) == (80, 20, 100)
    assert len(found.test.targets.unique()) == 10
    assert rows(found.test.inputs) < rows(digits().test.inputs)


@pytest.mark.parametrize("limit", [1, 2])
def test_the_smallest_limit_leaves_an_image_to_validate_on_or_is_a_users_error(limit: int) -> None:
    try:
        found = digits(limit=limit)
    except (UserError, ValueError) as error:  # said by the loader or by the schema
        assert "limit" in str(error)  # noqa: PT017
        return
    assert len(found.train) >= 1
    assert len(found.validation) >= 1


def test_the_digest_follows_images_labels_and_classes() -> None:
    images = torch.arange(48, dtype=torch.uint8).view(12, 1, 2, 2)
    labels = torch.arange(12) % 3

    def digest(images: Tensor, labels: Tensor, classes: int = 3) -> str:
        split = Split(images, labels)
        return split_off_validation(split, split, classes, fraction=0.2, seed=0).digest

    base = digest(images, labels)
    assert digest(images.clone(), labels.clone()) == base
    changed = images.clone()
    changed[3, 0, 0, 0] += 1
    assert digest(changed, labels) != base
    assert digest(images, labels.flip(0)) != base
    assert digest(images.view(12, 1, 1, 4), labels) != base
    assert digest(images, labels, classes=4) != base  # another output layer, so another network


def test_statistics_are_those_of_torch_over_the_training_images() -> None:
    g = generator()
    images = torch.randint(0, 256, (50, 3, 5, 4), generator=g, dtype=torch.uint8)
    images[:, 1] //= 7
    mean, std = channel_statistics(images)
    flat = images.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, flat.mean(1).float())
    torch.testing.assert_close(std, flat.std(1, correction=0).float())


def test_a_constant_channel_has_deviation_one() -> None:
    mean, std = channel_statistics(torch.full((4, 1, 2, 2), 9, dtype=torch.uint8))
    assert mean.tolist() == [9.0]
    assert std.tolist() == [1.0]


def test_normalized_training_images_have_mean_zero_and_deviation_one() -> None:
    found = digits()
    normalized = found.normalize(found.train.inputs)
    assert float(normalized.mean()) == pytest.approx(0, abs=1e-4)
    assert float(normalized.std()) == pytest.approx(1, abs=1e-3)
    by_hand = (found.test.inputs[:3].float() - found.mean.view(1, 1, 1, 1)) / found.std.view(1, 1, 1, 1)
    torch.testing.assert_close(found.normalize(found.test.inputs[:3]), by_hand)


def test_shape_of_knows_the_named_sets_without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.loading, "_load", None)
    assert described(DataConfig(name="digits")) == ((1, 8, 8), 10)
    assert described(DataConfig(name="cifar100", root="/nowhere")) == ((3, 32, 32), 100)


# --- batches


def drawn_labels(found: Dataset, size: int, seed: int) -> list[list[int]]:
    loader = batches(found, size, None, order=generator(seed), drawn=generator())
    return [(x[:, 0, 0, 0] * found.std + found.mean).round().int().tolist() for x, _ in loader]


def test_an_epoch_sees_each_image_at_most_once_and_leaves_out_the_last_smaller_batch() -> None:
    found = toy(10)
    epoch = drawn_labels(found, 4, seed=0)
    assert [len(batch) for batch in epoch] == [4, 4]
    assert steps_per_epoch(found, 4) == 2
    assert len({index for batch in epoch for index in batch}) == 8
    assert drawn_labels(found, 4, seed=0) == epoch
    assert drawn_labels(found, 4, seed=1) != epoch
    seen = {frozenset(i for batch in drawn_labels(found, 4, seed=s) for i in batch) for s in range(5)}
    assert len(seen) > 1  # another two are left out each time


def test_a_batch_larger_than_the_data_is_all_of_it() -> None:
    found = toy(10)
    (batch,) = drawn_labels(found, 99, seed=0)
    assert sorted(batch) == sorted(found.train.inputs[:, 0, 0, 0].tolist())
    assert steps_per_epoch(found, 99) == 1
    assert len(drawn_labels(found, 5, seed=0)) == steps_per_epoch(found, 5) == 2


def test_labels_stay_with_their_images() -> None:
    found = toy(10)
    for x, y in batches(
        found, 3, AugmentationConfig(crop_padding=0, flip=False), order=generator(), drawn=generator()
    ):
        indices = (x[:, 0, 0, 0] * found.std + found.mean).round().long()
        assert torch.equal(y, indices % 3)


def test_evaluation_sees_everything_in_order_without_augmentation() -> None:
    found = toy(10)
    pieces = list(evaluation_batches(found, found.test, size=5))
    assert [len(y) for _, y in pieces] == [5, 5, 2]
    assert torch.equal(torch.cat([y for _, y in pieces]), found.test.targets)
    torch.testing.assert_close(torch.cat([x for x, _ in pieces]), found.normalize(found.test.inputs))


# --- augmentation


def possible(image: Tensor, pad: int, flip: bool) -> set[bytes]:
    """Every crop and mirror image of one image (C, H, W), worked out slowly."""
    _, height, width = image.shape
    padded = torch.zeros(image.shape[0], height + 2 * pad, width + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + height, pad : pad + width] = image
    found = set()
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + height, left : left + width]
            found.add(crop.contiguous().numpy().tobytes())
            if flip:
                found.add(crop.flip(2).contiguous().numpy().tobytes())
    return found


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    channels=st.integers(1, 3),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    pad=st.integers(0, 2),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_output_is_a_possible_crop_or_mirror_image_of_its_input(
    channels: int, height: int, width: int, pad: int, flip: bool, seed: int
) -> None:
    images = torch.randint(1, 256, (6, channels, height, width), generator=generator(seed), dtype=torch.uint8)
    before = images.clone()
    out = augment(images, AugmentationConfig(crop_padding=pad, flip=flip), generator=generator(seed + 1))
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    assert torch.equal(images, before)  # the shared data stay as they are
    for image, result in zip(images, out, strict=True):
        assert result.numpy().tobytes() in possible(image, pad, flip)


def test_every_crop_and_mirror_image_comes_up() -> None:
    image = torch.arange(1, 7, dtype=torch.uint8).view(1, 1, 2, 3)
    out = augment(
        image.expand(500, 1, 2, 3), AugmentationConfig(crop_padding=1, flip=True), generator=generator()
    )
    assert rows(out) == possible(image[0], 1, True)


def test_augmentation_draws_per_image_and_follows_its_generator() -> None:
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(32, 1, 8, 8)
    config = AugmentationConfig(crop_padding=2)
    out = augment(images, config, generator=generator())
    assert len(rows(out)) > 10
    assert torch.equal(out, augment(images, config, generator=generator()))
    assert not torch.equal(out, augment(images, config, generator=generator(1)))


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.tensor([1, 2], dtype=torch.uint8).expand(1000, 1, 1, 2)
    out = augment(images, AugmentationConfig(crop_padding=0, flip=True), generator=generator())
    assert 450 <= int((out[:, 0, 0, 0] == 2).sum()) <= 550
    plain = augment(images, AugmentationConfig(crop_padding=0, flip=False), generator=generator())
    assert torch.equal(plain, images)


# --- parquet


def encoded(pixels: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def picture(index: int, size: tuple[int, int] = (4, 5), channels: int = 3) -> np.ndarray:
    shape = (*size, 3) if channels == 3 else size
    return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


def write_parquet(
    path: Path,
    images: list[bytes | None],
    labels: list[Any],
    *,
    image: str = "img",
    label: str = "label",
    names: list[str] | None = None,
) -> None:
    table = pa.table(
        {
            image: pa.array(
                [{"bytes": raw, "path": None} for raw in images],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            label: labels,
        }
    )
    if names is not None:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def parquet(root: Path, **keys: Any) -> Dataset:
    data.loading._loaded.clear()
    return data.load(DataConfig.model_validate({"name": "parquet", "root": str(root), **keys}))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a good parquet data set: 10 training and 4 test images of 3 classes."""
    write_parquet(
        tmp_path / "train-0.parquet", [encoded(picture(i)) for i in range(6)], [i % 3 for i in range(6)]
    )
    write_parquet(
        tmp_path / "train-1.parquet",
        [encoded(picture(i)) for i in range(6, 10)],
        [i % 3 for i in range(6, 10)],
    )
    write_parquet(
        tmp_path / "test-0.parquet",
        [encoded(picture(i)) for i in range(10, 14)],
        [i % 3 for i in range(10, 14)],
    )
    return tmp_path


def test_parquet_files_are_read_in_order(pictures: Path) -> None:
    found = parquet(pictures, validation_fraction=0.2)
    assert found.shape == (3, 4, 5)
    assert found.classes == 3
    assert (len(found.train), len(found.validation), len(found.test)) == (8, 2, 4)
    expected = torch.stack([torch.from_numpy(picture(i)).permute(2, 0, 1) for i in range(10, 14)])
    assert torch.equal(found.test.inputs, expected)
    assert found.test.targets.tolist() == [1, 2, 0, 1]
    everything = {picture(i).transpose(2, 0, 1).tobytes(): i % 3 for i in range(10)}
    for split in (found.train, found.validation):
        for image, label in zip(split.inputs, split.targets, strict=True):
            assert everything.pop(image.numpy().tobytes()) == label
    assert everything == {}


def test_parquet_files_may_lie_deeper_and_be_named_valid(pictures: Path) -> None:
    (pictures / "deep").mkdir()
    (pictures / "test-0.parquet").rename(pictures / "deep" / "validation-0.parquet")
    assert len(parquet(pictures).test) == 4


def test_the_classes_are_those_the_metadata_names(pictures: Path) -> None:
    write_parquet(
        pictures / "train-0.parquet",
        [encoded(picture(i)) for i in range(6)],
        [0] * 6,
        names=["a", "b", "c", "d", "e"],
    )
    assert parquet(pictures).classes == 5
    write_parquet(
        pictures / "train-0.parquet", [encoded(picture(i)) for i in range(6)], [0] * 6, names=["a", "b"]
    )
    with pytest.raises(UserError, match="has label 2, but its metadata names 2 classes"):
        parquet(pictures)


def test_grey_images_have_one_channel_and_a_size_may_be_given(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "train.parquet", [encoded(picture(i, channels=1)) for i in range(4)], [0, 1, 0, 1]
    )
    write_parquet(tmp_path / "test.parquet", [encoded(picture(i, (9, 9))) for i in range(2)], [0, 1])
    assert parquet(tmp_path, image_size=3).shape == (1, 3, 3)


@pytest.mark.parametrize("column", ["labels", "fine_label"])
def test_other_names_of_the_columns(tmp_path: Path, column: str) -> None:
    for part in ("train", "test"):
        write_parquet(
            tmp_path / f"{part}.parquet",
            [encoded(picture(i)) for i in range(3)],
            [0, 1, 2],
            image="image",
            label=column,
        )
    assert parquet(tmp_path).classes == 3


def spoil_folder(root: Path) -> None:
    for path in root.iterdir():
        path.unlink()
    root.rmdir()


def spoil_test(root: Path) -> None:
    (root / "test-0.parquet").unlink()


def spoil_train(root: Path) -> None:
    for path in root.glob("train*"):
        path.unlink()


def spoil_bytes(root: Path) -> None:
    (root / "train-1.parquet").write_bytes(b"PAR1 but not really")


def spoil_truncated(root: Path) -> None:
    path = root / "train-1.parquet"
    path.write_bytes(path.read_bytes()[:-40])


def spoil_image(root: Path) -> None:
    write_parquet(root / "train-0.parquet", [encoded(picture(0)), b"no image"], [0, 1])


def spoil_truncated_image(root: Path) -> None:
    write_parquet(root / "train-0.parquet", [encoded(picture(0)), encoded(picture(1))[:-30]], [0, 1])


def spoil_chunk_of_an_image(root: Path) -> None:
    raw = encoded(picture(0, (200, 200)))
    second = raw.index(b"IDAT", raw.index(b"IDAT") + 4)
    broken = raw[:second] + struct.pack(">I", 0x01020304) + raw[second + 4 :]
    write_parquet(root / "train-0.parquet", [encoded(picture(1, (200, 200))), broken], [0, 1])


def spoil_missing_bytes(root: Path) -> None:
    write_parquet(root / "train-0.parquet", [encoded(picture(0)), None], [0, 1])


def spoil_size(root: Path) -> None:
    write_parquet(root / "train-1.parquet", [encoded(picture(0, (5, 4)))], [0])


def spoil_negative_label(root: Path) -> None:
    write_parquet(root / "train-0.parquet", [encoded(picture(0))] * 2, [0, -1])


def spoil_missing_label(root: Path) -> None:
    write_parquet(root / "train-0.parquet", [encoded(picture(0))] * 2, [0, None])


def spoil_text_label(root: Path) -> None:
    write_parquet(root / "train-0.parquet", [encoded(picture(0))] * 2, ["cat", "dog"])


def spoil_label_column(root: Path) -> None:
    write_parquet(root / "train-0.parquet", [encoded(picture(0))], [0], label="class")


def spoil_image_column(root: Path) -> None:
    pq.write_table(pa.table({"img": [encoded(picture(0))], "label": [0]}), root / "train-0.parquet")


def spoil_rows(root: Path) -> None:
    (root / "train-1.parquet").unlink()
    write_parquet(root / "train-0.parquet", [encoded(picture(0))], [0])


def spoil_all_rows(root: Path) -> None:
    (root / "train-1.parquet").unlink()
    write_parquet(root / "train-0.parquet", [], pa.array([], pa.int64()))  # type: ignore[arg-type]


def spoil_all_test_rows(root: Path) -> None:
    write_parquet(root / "test-0.parquet", [], pa.array([], pa.int64()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_folder, "no such folder"),
        (
            spoil_test,
            r"needs train\*\.parquet and test\*\.parquet .*found \['train-0\.parquet', 'train-1\.parquet'\]",
        ),
        (spoil_train, r"needs train\*\.parquet .*found \['test-0\.parquet'\]"),
        (spoil_bytes, r"train-1\.parquet is not a readable parquet file"),
        (spoil_truncated, r"train-1\.parquet is not a readable parquet file"),
        (spoil_image, "cannot be decoded"),
        (spoil_truncated_image, "cannot be decoded"),
        (spoil_chunk_of_an_image, "cannot be decoded"),
        (spoil_missing_bytes, r"train-0\.parquet: row 1 of column 'img' has no image bytes"),
        (spoil_size, r"image 6 is 5×4, the first one 4×5; give data\.image_size"),
        (spoil_negative_label, r"label -1 of row 1: must be 0 or more"),
        (spoil_missing_label, r"label None of row 1: must be 0 or more"),
        (spoil_text_label, r"label 'cat' of row 0"),
        (
            spoil_label_column,
            r"needs a column of structs with 'bytes' and a column 'label'; has \['img', 'class'\]",
        ),
        (spoil_image_column, r"needs a column of structs with 'bytes'"),
        (spoil_rows, r"has 1 training examples; at least 2 are needed"),
        (spoil_all_rows, r"has 0 training examples|no images|no rows"),
        (spoil_all_test_rows, r"has 0 test examples|no images|no rows"),
    ],
)
def test_what_can_be_wrong_with_parquet_files_is_named(pictures: Path, spoil: Any, words: str) -> None:
    spoil(pictures)
    with pytest.raises(UserError, match=f"data.root.*{words}"):
        parquet(pictures)


# --- image folders


def write_folder(root: Path, part: str, name: str, indices: range, size: tuple[int, int] = (4, 5)) -> None:
    folder = root / part / name
    folder.mkdir(parents=True, exist_ok=True)
    for index in indices:
        Image.fromarray(picture(index, size)).save(folder / f"{index:03}.png")


def image_folder(root: Path, **keys: Any) -> Dataset:
    data.loading._loaded.clear()
    return data.load(DataConfig.model_validate({"name": "image_folder", "root": str(root), **keys}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path, "train", "cat", range(5))
    write_folder(tmp_path, "train", "dog", range(5, 9))
    write_folder(tmp_path, "test", "dog", range(9, 11))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def test_the_folders_names_are_the_classes(folder: Path) -> None:
    found = image_folder(folder)
    assert found.classes == 2
    assert found.shape == (3, 4, 5)
    assert len(found.train) + len(found.validation) == 9
    assert found.test.targets.tolist() == [1, 1]
    assert torch.equal(found.test.inputs[0], torch.from_numpy(picture(9)).permute(2, 0, 1))
    assert torch.cat([found.train.targets, found.validation.targets]).bincount().tolist() == [5, 4]


@pytest.mark.parametrize("name", ["val", "valid"])
def test_the_test_folder_may_be_named_val_or_valid(folder: Path, name: str) -> None:
    (folder / "test").rename(folder / name)
    assert len(image_folder(folder).test) == 2


def test_images_of_differing_sizes_are_resized_where_a_size_is_given(folder: Path) -> None:
    write_folder(folder, "train", "cat", range(20, 22), size=(7, 7))
    with pytest.raises(UserError, match=r"020\.png is 7×7, the first one 4×5; give data\.image_size"):
        image_folder(folder)
    assert image_folder(folder, image_size=6).shape == (3, 6, 6)


def test_a_limit_does_not_take_the_first_class_only(folder: Path) -> None:
    found = image_folder(folder, limit=4)  # of 5 cats, then 4 dogs
    assert len(found.train) + len(found.validation) == 4
    assert len(torch.cat([found.train.targets, found.validation.targets]).unique()) == 2


def remove_train(root: Path) -> None:
    (root / "train").rename(root / "training")


def remove_test(root: Path) -> None:
    (root / "test").rename(root / "eval")


def one_class(root: Path) -> None:
    (root / "train" / "dog").rename(root / "elsewhere")


def unknown_class(root: Path) -> None:
    write_folder(root, "test", "bird", range(2))


def no_test_images(root: Path) -> None:
    for path in (root / "test" / "dog").iterdir():
        path.unlink()


def text_for_an_image(root: Path) -> None:
    (root / "train" / "cat" / "003.png").write_text("hello")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove_train, r"needs the folders train/<class>/ and test/<class>/ .*found \['test', 'training'\]"),
        (remove_test, r"needs the folders train/<class>/ and test/<class>/ .*found \['eval', 'train'\]"),
        (one_class, r"train has 1 class folders; 2 are needed"),
        (unknown_class, r"class 'bird' is in .*test but not in .*train"),
        (no_test_images, r"no images below .*test"),
        (text_for_an_image, r"003\.png cannot be decoded"),
    ],
)
def test_what_can_be_wrong_with_an_image_folder_is_named(folder: Path, spoil: Any, words: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=f"data.root.*{words}"):
        image_folder(folder)


def test_a_missing_image_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root = '.*nowhere': no such folder"):
        image_folder(tmp_path / "nowhere")


# --- torchvision's sets


def test_a_missing_set_that_cannot_be_downloaded_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    def no_network(self: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
    with pytest.raises(UserError, match=r"mnist is not there, and downloading it failed \(OSError: no route"):
        data.load(DataConfig(name="mnist", root=str(tmp_path)))


def test_a_damaged_file_of_mnist_is_a_users_error(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x05ab")
    with pytest.raises(UserError, match=r"data\.root = .*(cannot be read|downloading it failed)"):
        data.load(DataConfig(name="mnist", root=str(tmp_path)))


def test_mnist_is_read_as_published(mnist_root: str) -> None:
    found = data.load(DataConfig(name="mnist", root=mnist_root))
    assert (len(found.train), len(found.validation), len(found.test)) == (54_000, 6_000, 10_000)
    assert described(DataConfig(name="mnist")) == (found.shape, found.classes)
    assert found.test.targets[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert float(found.mean) / 255 == pytest.approx(0.1307, abs=5e-4)
    assert float(found.std) / 255 == pytest.approx(0.3081, abs=5e-4)
    data.loading._loaded.clear()


def test_cifar_10_as_parquet(cifar_root: str, tmp_path: Path) -> None:
    # The first rows of the real files: decoding all 60,000 takes longer than it teaches.
    for file in Path(cifar_root).glob("*.parquet"):
        head = next(pq.ParquetFile(file).iter_batches(batch_size=300))
        pq.write_table(pa.Table.from_batches([head]), tmp_path / file.name)
    found = parquet(tmp_path)
    assert (len(found.train), len(found.validation), len(found.test)) == (270, 30, 300)
    assert described(DataConfig(name="cifar10")) == (found.shape, found.classes)
    assert float(found.mean.mean()) / 255 == pytest.approx(0.473, abs=0.03)
    assert len(found.train.targets.unique()) == 10
