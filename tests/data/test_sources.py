"""Photos with captions from Parquet, captions files and the Hub."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import datasets
import numpy as np
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
from PIL import Image

from captioner.data.dataset import (
    CaptionDataset,
    PhotoDataset,
    augment,
    is_mirrored,
    mirror_text,
    swapped_words,
)
from captioner.data.shares import parse_sources
from captioner.data.sources import Box, load_captions, stream_photos
from captioner.errors import CaptionerError, ConfigError, DataError, ImageError
from captioner.model.encoder import Transform
from captioner.model.vocabulary import Vocabulary, clean
from captioner.training.setup import check_lengths

Draw = Callable[..., bytes]
MakeRow = Callable[..., dict[str, Any]]
Write = Callable[[Path, dict[str, list[dict[str, Any]]]], Path]


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _photos_with(folder: Path, file_name: str, text: str, names: list[str], draw: Draw) -> Path:
    """Make a folder of photos with a captions file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file_name).write_text(text, encoding="utf-8")
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(draw(number))
    return folder


# Parquet


@pytest.mark.parametrize(
    ("split", "first", "count"), [("train", 0, 24), ("validation", 32, 8), ("test", 64, 4)]
)
def test_parquet_splits_hold_captions_and_photos(
    parquet_folder: Path,
    draw: Draw,
    captions_of: Callable[[int], list[str]],
    split: str,
    first: int,
    count: int,
) -> None:
    photos = load_captions(str(parquet_folder), split)
    assert len(photos) == count
    assert photos.skipped == 0
    assert photos.captions == [list(map(clean, captions_of(first + row))) for row in range(count)]
    assert photos.names() == [f"{1000 + first + row}.png" for row in range(count)]
    for row in (0, count - 1):
        assert np.array_equal(np.asarray(photos.photo(row)), _pixels(draw(first + row)))


@pytest.mark.parametrize("limit", [0, 2])
def test_photos_keep_their_boxes(
    tmp_path: Path, hub_row: MakeRow, write_parquet: Write, limit: int
) -> None:
    box = {"category": "kite", "box": [0.25, 0, 0.5, 1]}
    rows = [hub_row(number) | {"boxes": [box] * number} for number in range(3)]
    photos = load_captions(str(write_parquet(tmp_path, {"train": rows})), limit=limit)
    boxes = [[Box("kite", 0.25, 0, 0.5, 1)] * number for number in range(3)]
    assert photos.boxes() == boxes[: limit or None]


@pytest.mark.parametrize("alias", ["val", "valid", "dev", "Validation"])
def test_validation_split_has_short_names(parquet_folder: Path, alias: str) -> None:
    short = load_captions(str(parquet_folder), alias)
    assert short.split == "validation"
    assert short.names() == load_captions(str(parquet_folder), "validation").names()
    streamed = [row["filename"] for row in stream_photos(str(parquet_folder), alias)]
    assert streamed == short.names()


@pytest.mark.parametrize("stored", ["train", "test"])
def test_split_column_divides_single_parquet_table(
    tmp_path: Path, hub_row: MakeRow, write_parquet: Write, stored: str
) -> None:
    names = ["train", "val", "Test", None]  # of no split: training
    rows = [hub_row(number, names[number % 4]) for number in range(8)]
    folder = str(write_parquet(tmp_path, {stored: rows}))
    for split, numbers in (
        ("train", [0, 3, 4, 7]),
        ("val", [1, 5]),
        ("validation", [1, 5]),
        ("test", [2, 6]),
    ):
        wanted = [rows[number]["filename"] for number in numbers]
        assert load_captions(folder, split).names() == wanted
        streamed = list(stream_photos(folder, split))
        assert [row["filename"] for row in streamed] == wanted
        assert [row["photo"] for row in streamed] == [str(row) for row in range(len(wanted))]
        assert [row["data"] for row in streamed] == [rows[n]["image"]["bytes"] for n in numbers]
    for load in (load_captions, stream_photos):
        with pytest.raises(DataError, match="no split 'other', only: train, validation, test"):
            load(folder, "other")


def test_only_image_and_alt_text_are_needed(
    tmp_path: Path, hub_row: MakeRow, write_parquet: Write
) -> None:
    rows = [{name: hub_row(n)[name] for name in ("image", "alt_text")} for n in range(3)]
    photos = load_captions(str(write_parquet(tmp_path, {"train": rows})))
    assert len(photos) == 3
    assert photos.photo(2).size == (64, 48)
    assert photos.names() == ["1000.png", "1001.png", "1002.png"]


@pytest.mark.parametrize(
    ("columns", "path", "name"),
    [
        ({"filename": "a.png", "img_id": "7"}, "b.png", "a.png"),
        ({"file_name": "cats/a.png"}, "b.png", "cats/a.png"),
        ({"filename": None, "image_id": 7}, "b.png", "b.png"),
        ({"image_id": 7}, "cats/b.png", "cats/b.png"),
        ({"image_id": 7}, "/tmp/cache/downloads/b.png", "b.png"),
        ({"image_id": 7}, None, "7"),
        ({}, None, None),
    ],
)
def test_photo_names_come_from_file_names_or_ids(
    tmp_path: Path,
    hub_row: MakeRow,
    write_parquet: Write,
    columns: dict[str, Any],
    path: str | None,
    name: str | None,
) -> None:
    row = {"image": hub_row(0)["image"] | {"path": path}, "alt_text": ["a dog"], **columns}
    folder = str(write_parquet(tmp_path, {"train": [row]}))
    assert [photo["filename"] for photo in stream_photos(folder)] == [name]
    assert load_captions(folder).names() == ["0" if name is None else name]


def test_metadata_file_gives_captions_and_names(tmp_path: Path, draw: Draw) -> None:
    folder = tmp_path / "photos"
    names = ["a.png", "cats/a.png"]
    lines = "".join(f"{name},a dog {number}\n" for number, name in enumerate(names))
    _photos_with(folder, "metadata.csv", f"file_name,alt_text\n{lines}", names, draw)
    photos = load_captions(str(folder))
    assert photos.names() == names
    assert photos.captions == [["a dog 0"], ["a dog 1"]]
    assert np.array_equal(np.asarray(photos.photo(1)), _pixels(draw(1)))
    streamed = list(stream_photos(str(folder)))
    assert [row["filename"] for row in streamed] == names
    assert [Path(row["path"].decode()) for row in streamed] == [folder / name for name in names]
    # The same inside an archive.
    archive = tmp_path / "archive"
    archive.mkdir()
    with zipfile.ZipFile(archive / "photos.zip", "w") as file:
        for name in names:
            file.write(folder / name, name)
    packed = list(stream_photos(str(archive)))
    assert [row["filename"] for row in packed] == names
    assert [row["data"] for row in packed] == [draw(0), draw(1)]


def test_stream_photos_reads_captions_file(tmp_path: Path, draw: Draw) -> None:
    text = "image,caption,split\na.png,a dog,train\na.png,dog,train\nb/a.png,a cat,val\n"
    names = ["Images/a.png", "Images/b/a.png"]
    folder = _photos_with(tmp_path, "captions.txt", text, names, draw)
    for source in (folder, folder / "captions.txt"):
        (row,) = stream_photos(str(source), "dev")
        assert row["filename"] == "b/a.png"
        assert Path(row["path"].decode()).read_bytes() == draw(1)


def test_check_lengths_warns_about_long_captions(caplog: pytest.LogCaptureFixture) -> None:
    captions = [
        clean(text) for text in ("一只黑色的狗在绿色的草地上快速地奔跑着", "一只狗", "一只猫")
    ]
    vocabulary = Vocabulary.build(captions, min_count=1)
    check_lengths(captions, vocabulary, 20)
    assert not caplog.text
    check_lengths(captions[:2], vocabulary, 20)
    assert "1 of 2 captions are cut after 18 words" in caplog.text
    assert "--max-length" in caplog.text


def test_bare_string_is_one_caption(tmp_path: Path, hub_row: MakeRow, write_parquet: Write) -> None:
    rows = [hub_row(0) | {"alt_text": "A red circle."}, hub_row(1) | {"alt_text": "a square"}]
    photos = load_captions(str(write_parquet(tmp_path, {"train": rows})))
    assert photos.captions == [["a red circle"], ["a square"]]


def test_rows_without_a_caption_are_skipped_and_counted(
    tmp_path: Path, hub_row: MakeRow, write_parquet: Write, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [hub_row(number) for number in range(6)]
    rows[1]["alt_text"] = []
    rows[2]["alt_text"] = None
    rows[4]["alt_text"] = ["", " .!", None]
    rows[5]["alt_text"] = ["", "a green circle"]
    photos = load_captions(str(write_parquet(tmp_path, {"train": rows})))
    assert photos.names() == ["1000.png", "1003.png", "1005.png"]
    assert photos.skipped == 3
    assert "skipped 3 rows" in caplog.text
    assert photos.captions[2] == ["a green circle"]
    # The photos still stand by their own captions.
    assert np.array_equal(np.asarray(photos.photo(1)), _pixels(rows[3]["image"]["bytes"]))


def test_broken_photo_raises_only_when_opened(
    tmp_path: Path, hub_row: MakeRow, write_parquet: Write
) -> None:
    rows = [hub_row(number) for number in range(4)]
    rows[1]["image"]["bytes"] = b"this is no photo"
    rows[2]["image"] = None
    photos = load_captions(str(write_parquet(tmp_path, {"train": rows})))
    assert len(photos) == 4
    assert len(photos.captions) == 4
    for row in (1, 2):
        with pytest.raises(ImageError):
            photos.photo(row)
    assert photos.photo(0).size == photos.photo(3).size == (64, 48)


def test_impossible_file_name_is_missing_photo(
    tmp_path: Path, hub_row: MakeRow, write_parquet: Write
) -> None:
    names = ["a\0b.png", "a" * 5000]
    rows = [hub_row(0) | {"image": {"bytes": None, "path": name}} for name in names]
    photos = load_captions(str(write_parquet(tmp_path, {"train": rows})))
    assert len(photos.fingerprint) == 64
    for row in (0, 1):
        with pytest.raises(ImageError):
            photos.photo(row)


@pytest.mark.parametrize("kind", ["parquet_folder", "csv_folder"])
def test_loading_decodes_no_photo(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    really_open = Image.open

    def watch(*arguments: Any, **options: Any) -> Image.Image:
        opened.append(arguments)
        return really_open(*arguments, **options)

    monkeypatch.setattr(Image, "open", watch)
    photos = load_captions(str(request.getfixturevalue(kind)), "train", limit=5)
    assert len(photos.captions) == len(photos.names()) == 5
    assert len(photos.fingerprint) == 64
    assert not opened
    photos.photo(0)
    assert len(opened) == 1


def test_limit_takes_first_photos(parquet_folder: Path) -> None:
    everything = load_captions(str(parquet_folder), "train")
    some = load_captions(str(parquet_folder), "train", limit=5)
    assert some.names() == everything.names()[:5]
    assert len(load_captions(str(parquet_folder), "test", limit=1000)) == 4


def test_limit_counts_photos_with_captions(
    tmp_path: Path, hub_row: MakeRow, write_parquet: Write
) -> None:
    rows = [hub_row(0) | {"alt_text": []}, hub_row(1), hub_row(2)]
    photos = load_captions(str(write_parquet(tmp_path, {"train": rows})), limit=2)
    assert photos.names() == ["1001.png", "1002.png"]


# Captions files


def test_captions_csv_groups_lines_by_photo(
    csv_folder: Path, draw: Draw, captions_of: Callable[[int], list[str]]
) -> None:
    photos = load_captions(str(csv_folder))
    assert photos.names() == [f"{number}.png" for number in range(20)]
    assert photos.captions == [list(map(clean, captions_of(number))) for number in range(20)]
    assert np.array_equal(np.asarray(photos.photo(7)), _pixels(draw(7)))
    assert load_captions(str(csv_folder / "captions.csv")).names() == photos.names()


def test_captions_txt_of_flickr8k_is_read(tmp_path: Path, draw: Draw) -> None:
    text = (
        "image,caption\n"
        "1000_a.jpg,A child in a pink dress is climbing up a set of stairs .\n"
        '1000_a.jpg,"A girl , in pink , goes into a wooden ""house"" ."\n'
        "1001_b.jpg,A black dog\n"
        "1000_a.jpg,A little girl\n"
    )
    folder = _photos_with(
        tmp_path, "captions.txt", text, ["Images/1000_a.jpg", "Images/1001_b.jpg"], draw
    )
    photos = load_captions(str(folder))
    assert photos.names() == ["1000_a.jpg", "1001_b.jpg"]
    first, second = photos.captions
    assert first == [
        "a child in a pink dress is climbing up a set of stairs",
        "a girl in pink goes into a wooden house",
        "a little girl",
    ]
    assert second == ["a black dog"]
    assert photos.photo(1).size == (64, 48)


@pytest.mark.parametrize("comma", [",", ", ", " , "])
def test_unquoted_comma_keeps_caption_whole(tmp_path: Path, draw: Draw, comma: str) -> None:
    text = f"image,caption\na.png,a red circle{comma}on the left{comma}alone\n"
    photos = load_captions(str(_photos_with(tmp_path, "captions.txt", text, ["a.png"], draw)))
    ((caption,),) = photos.captions
    assert caption == "a red circle on the left alone"


def test_split_column_divides_captions_file(tmp_path: Path, draw: Draw) -> None:
    text = (
        "image,caption,split\n"
        "a.png,a circle,train\na.png,a red circle,train\n"
        'b.png,"a square, red",val\n'
        "c.png,a green circle,test\n"
    )
    folder = str(_photos_with(tmp_path, "captions.csv", text, ["a.png", "b.png", "c.png"], draw))
    assert load_captions(folder, "train").names() == ["a.png"]
    assert load_captions(folder, "validation").names() == ["b.png"]
    assert load_captions(folder, "validation").captions == [["a square red"]]
    assert load_captions(folder, "test").names() == ["c.png"]
    for split in ("train", "validation", "test"):
        assert len(load_captions(folder, split)) > 0


def test_unquoted_comma_does_not_shift_split(tmp_path: Path, draw: Draw) -> None:
    text = "image,caption,split\na.png,a circle, red,train\nb.png,a square,validation\n"
    folder = str(_photos_with(tmp_path, "captions.csv", text, ["a.png", "b.png"], draw))
    photos = load_captions(folder, "train")
    assert photos.names() == ["a.png"]
    ((caption,),) = photos.captions
    assert caption == "a circle red"


def test_split_column_with_one_name_is_respected(tmp_path: Path, draw: Draw) -> None:
    text = "image,caption,split\na.png,a circle,test\nb.png,a square,test\n"
    folder = str(_photos_with(tmp_path, "captions.csv", text, ["a.png", "b.png"], draw))
    assert load_captions(folder, "test").names() == ["a.png", "b.png"]
    with pytest.raises(DataError, match="no split 'train', only: test"):
        load_captions(folder, "train")


def test_missing_files_are_skipped_and_counted(
    tmp_path: Path, draw: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    text = "image,caption\na.png,a circle\ngone.png,a square\nb.png,a dot\nlost.png,a line\n"
    folder = str(_photos_with(tmp_path, "captions.csv", text, ["a.png", "b.png"], draw))
    photos = load_captions(folder)
    assert photos.names() == ["a.png", "b.png"]
    assert "2 of 4 photos are not in" in caplog.text
    assert photos.skipped == 2


def test_photo_without_captions_is_skipped_and_counted(tmp_path: Path, draw: Draw) -> None:
    text = "image,caption\na.png,\nb.png,a dot\nc.png\n\n"
    names = ["a.png", "b.png", "c.png"]
    photos = load_captions(str(_photos_with(tmp_path, "captions.csv", text, names, draw)))
    assert photos.names() == ["b.png"]
    assert photos.skipped == 2


def test_captions_file_of_spreadsheet_is_read(tmp_path: Path, draw: Draw) -> None:
    text = "\ufeffcomment,image,caption\r\n1,ä b.png,Zwei Häuser\r\n2, ä b.png ,a cat\r\n"
    photos = load_captions(str(_photos_with(tmp_path, "captions.csv", text, ["ä b.png"], draw)))
    assert photos.captions == [["zwei häuser", "a cat"]]


# Errors: always DataError with a remedy


def _nothing(folder: Path, *_: Any) -> Path:
    return folder


def _photos_without_captions(folder: Path, draw: Draw, *_: Any) -> Path:
    (folder / "a.png").write_bytes(draw(0))
    return folder


def _no_folder(folder: Path, *_: Any) -> Path:
    return folder / "not here"


def _no_captions_column(folder: Path, _: Draw, row: MakeRow, write: Write) -> Path:
    kept = [{"image": row(0)["image"], "description": "a dog"}]
    return write(folder, {"train": kept})


def _no_image_column(folder: Path, _: Draw, row: MakeRow, write: Write) -> Path:
    return write(folder, {"train": [{"picture": row(0)["image"], "alt_text": ["a dog"]}]})


def _no_captions(folder: Path, _: Draw, row: MakeRow, write: Write) -> Path:
    return write(folder, {"train": [row(0) | {"alt_text": [""]}, row(1) | {"alt_text": []}]})


def _captions_of_numbers(folder: Path, _: Draw, row: MakeRow, write: Write) -> Path:
    return write(folder, {"train": [row(0) | {"alt_text": 7}]})


def _captions_by_language(folder: Path, _: Draw, row: MakeRow, write: Write) -> Path:
    return write(folder, {"train": [row(0) | {"alt_text": {"en": "a dog"}}]})


def _photos_of_numbers(folder: Path, _: Draw, row: MakeRow, write: Write) -> Path:
    return write(folder, {"train": [row(0) | {"image": 7}]})


def _broken_parquet(folder: Path, _: Draw, row: MakeRow, write: Write) -> Path:
    write(folder, {"train": [row(0)]})
    file = folder / "data/train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def _csv(text: str, encoding: str = "utf-8") -> Callable[..., Path]:
    def make(folder: Path, draw: Draw, *_: Any) -> Path:
        (folder / "captions.csv").write_bytes(text.encode(encoding))
        (folder / "a.png").write_bytes(draw(0))
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_no_folder, "there is no folder"),
        (_nothing, r"no captions that can be read, only: nothing\. It can hold Parquet, .*csv"),
        (_photos_without_captions, r"only: 1 \.png\. It can hold .* captions\.csv \(image,caption"),
        (
            _no_captions_column,
            r"no column with captions \(alt_text, .*\), only: image, description; name it with "
            "--caption-column",
        ),
        (
            _no_image_column,
            r"no column with photos \(image, .*\), only: picture, alt_text; name it with "
            "--image-column",
        ),
        (_no_captions, "no photo with a caption"),
        (_captions_of_numbers, "alt_text"),
        (_captions_by_language, "captions cannot be a dict"),
        (_photos_of_numbers, "image"),
        (_broken_parquet, r"cannot read .*\.parquet is damaged \(.*replace or remove it"),
        (_csv(""), "is empty: write lines of image,caption into it"),
        (_csv("a.png,3\na.png,4\n"), r"no column with captions, only: a\.png, 3; name the column"),
        (_csv("image,rating\na.png,3\n"), r"only: image, rating; .*--caption-column"),
        (_csv("a.png\n"), r"no column with captions, only: a\.png"),
        (_csv("image,caption\nb.png,a dog\n"), "none of them is in .*the first is 'b.png'"),
        (_csv("image,caption\n"), "names 0 photos"),
        (
            _csv('image,caption\n"a\nb.png",a dog\n'),
            "name or a caption spans several lines up to line 3",
        ),
        (_csv('image,caption\n"a\rb.png",a dog\n'), "name or a caption spans several lines"),
        (_csv(f"image,caption\n{'b' * 5000},a dog\n"), "none of them is in"),
        (_csv("image,caption\nb\0.png,a dog\n"), "none of them is in"),
        (
            _csv("image,caption\na.png,собака бежит по траве\n", "cp1251"),
            "neither UTF-8 nor .*Latin",
        ),
        (_csv("image,caption\na.png,żółty pies goni piłkę\n", "cp1250"), "save it as UTF-8"),
        (_csv("image,caption\na.png,一只狗在草地上跑\n", "gb18030"), "save it as UTF-8"),
        (_csv("image,caption\na.png,犬が走っている\n", "shift-jis"), "save it as UTF-8"),
    ],
)
def test_bad_data_raises_data_error_with_reason(
    tmp_path: Path,
    draw: Draw,
    hub_row: MakeRow,
    write_parquet: Write,
    make: Callable[..., Path],
    says: str,
) -> None:
    with pytest.raises(DataError, match=says):
        load_captions(str(make(tmp_path, draw, hub_row, write_parquet)))


def test_unknown_split_error_lists_splits(parquet_folder: Path, csv_folder: Path) -> None:
    with pytest.raises(DataError, match="no split 'testing', only: train, validation, test"):
        load_captions(str(parquet_folder), "testing")
    with pytest.raises(DataError, match="no split 'validation', only: train"):
        load_captions(str(csv_folder), "validation")


def test_empty_split_raises_data_error(
    tmp_path: Path, hub_row: MakeRow, write_parquet: Write
) -> None:
    folder = str(write_parquet(tmp_path, {"train": [hub_row(0)], "validation": []}))
    with pytest.raises(DataError, match=r"validation.* (empty|no photo)"):
        load_captions(folder, "validation")


def test_hub_offline_error_suggests_local_data() -> None:
    # HF_HUB_OFFLINE is set for all tests.
    with pytest.raises(DataError, match=r"AnyModal/flickr30k.*internet.*--data.*captions\.csv"):
        load_captions()


@pytest.mark.parametrize("source", ["~no-such-user/photos", "a" * 5000, "a\0b", "データ/写真"])
def test_impossible_source_raises_data_error(source: str) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        load_captions(source)
    with pytest.raises(DataError, match=r"cannot read the split 'test'.*there is no folder"):
        stream_photos(source, "test")


def _hub_error(kind: type[Exception]) -> Exception:
    """Return an error as datasets raises it, its cause as huggingface_hub does."""
    if issubclass(kind, RepositoryNotFoundError):
        error: Exception = DatasetNotFoundError("Dataset 'some/data' cannot be accessed.")
        error.__cause__ = kind("401", response=MagicMock(status_code=401))
        return error
    if kind is DatasetNotFoundError:  # without its cause, as where nothing is cached
        return kind("Dataset 'some/data' is a gated dataset on the Hub.")
    if kind is OfflineModeIsEnabled:
        return ConnectionError("Couldn't reach 'some/data' on the Hub (OfflineModeIsEnabled)")
    if kind is ValueError:
        return kind(
            "Config name is missing.\nPlease pick one among the available configs: ['en', 'de']"
            "\nExample of usage:\n\t`load_dataset('some/data', 'en')`"
        )
    return kind("[Errno -2] Name or service not known")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (GatedRepoError, "accept its terms on .*/datasets/some/data, then .*`hf auth login`"),
        (DatasetNotFoundError, "accept its terms on .*/datasets/some/data, then .*`hf auth login`"),
        (RepositoryNotFoundError, "no repository of this name, or a private one: check the name"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
        (ValueError, "choose a configuration, as in some/data:NAME, from en, de"),
        (ConnectionError, "check the name and your internet connection"),
    ],
)
def test_hub_errors_name_cause_and_remedy(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], says: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise _hub_error(kind)

    monkeypatch.setattr("datasets.load_dataset_builder", fail)
    for load in (load_captions, stream_photos):
        with pytest.raises(DataError, match=says):
            load("some/data")


def test_configuration_follows_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def record(*arguments: Any, **_: Any) -> None:
        calls.append(arguments)
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset_builder", record)
    for source in ("some/data:de", "some/data"):
        with pytest.raises(DataError):
            load_captions(source)
    assert calls == [("some/data", "de"), ("some/data", None)]


def test_local_configurations_are_listed(tmp_path: Path) -> None:
    names = ("en", "de")
    configs = "".join(f"- config_name: {n}\n  data_files: {n}.csv\n" for n in names)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in names:
        (tmp_path / f"{name}.csv").write_text("image,text\na.png,a dog\n")
    with pytest.raises(DataError, match=r"several configurations.* en, de"):
        stream_photos(str(tmp_path))


def test_unsegmented_captions_warn_or_raise(
    tmp_path: Path, draw: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    def load(text: str) -> None:
        load_captions(str(_photos_with(tmp_path, "captions.csv", text, ["a.png", "b.png"], draw)))

    load("image,caption\na.png,一只狗在跑\nb.png,猫がいる\n")
    assert not caplog.text
    load("image,caption\na.png,dog\nb.png,a_cat_sits\n")
    assert "captions have 1.0 words on average" in caplog.text
    with pytest.raises(DataError, match="no spaces between words"):
        load("image,caption\na.png,แมวนั่งอยู่บนโซฟา\nb.png,หมาวิ่งในสนาม\n")


def test_error_without_text_becomes_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset_builder", fail)
    with pytest.raises(DataError, match="ConnectionError"):
        load_captions("some/dataset")


# Torch datasets


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("a dog on the left a cat on the right", "a dog on the right a cat on the left"),
        ("he left the leftmost house", "he right the leftmost house"),
        ("nothing turns here", "nothing turns here"),
    ],
)
def test_mirror_text_swaps_left_and_right(text: str, mirrored: str) -> None:
    swaps = swapped_words("en-GB")
    assert mirror_text(text, swaps) == mirrored
    assert mirror_text(mirrored, swaps) == text


@pytest.mark.parametrize(
    ("language", "text", "mirrored"),
    [
        ("fr", "un chat sur le côté droit", "un chat sur le côté gauche"),
        ("fr", "la main gauche", "la main droite"),
        ("de-AT", "links im linken Bild", "rechts im rechten Bild"),
        ("ar", "قطة على اليسار", "قطة على اليمين"),
        ("hi", "बाईं ओर एक बिल्ली", "दाईं ओर एक बिल्ली"),
        ("zh-Hant", "左邊的貓", "右邊的貓"),
        ("ja", "右の猫", "左の猫"),
        ("de", "left is no German word", "left is no german word"),
    ],
)
def test_mirror_text_swaps_the_words_of_the_language(
    language: str, text: str, mirrored: str
) -> None:
    assert mirror_text(clean(text), swapped_words(language)) == clean(mirrored)


def test_mirror_words_name_the_sides_of_any_language() -> None:
    swaps = swapped_words("fi", ["Vasen=oikea", "vasemmalla=oikealla"])
    assert mirror_text("kissa vasemmalla koira oikealla", swaps) == (
        "kissa oikealla koira vasemmalla"
    )
    with pytest.raises(ConfigError, match=r"language fi: add them with --mirror-words .*--views 1"):
        swapped_words("fi")
    for pair in ("vasen", "vasen=", "a=b=c", "to the left=right"):
        with pytest.raises(ConfigError, match="must be two words, such as left=right"):
            swapped_words("fi", [pair])


def test_photo_dataset_returns_pixels_or_none(
    tmp_path: Path, hub_row: MakeRow, write_parquet: Write
) -> None:
    rows = [hub_row(number) for number in range(3)]
    rows[1]["image"]["bytes"] = b"broken"
    photos = load_captions(str(write_parquet(tmp_path, {"train": rows})))
    transform = Transform(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    dataset, mirrored = PhotoDataset(photos, transform), PhotoDataset(photos, transform, view=1)
    assert len(dataset) == 3
    assert dataset[1] == (1, None)
    row, pixels = dataset[2]
    assert row == 2
    assert pixels is not None
    assert pixels.shape == (3, 224, 224)
    flipped = mirrored[2][1]
    assert flipped is not None
    assert np.array_equal(flipped.numpy(), pixels.numpy()[:, :, ::-1])
    assert not np.array_equal(flipped.numpy(), pixels.numpy())


def test_augment_mirrors_and_crops() -> None:
    # Red tells the column, green the row of every pixel.
    ramp = np.zeros((200, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200), np.arange(200)[:, None]
    photo = Image.fromarray(ramp)

    assert augment(photo, 0, 7) is photo
    assert np.array_equal(np.asarray(augment(photo, 1, 7)), ramp[:, ::-1])
    mirrored = 0
    for row in range(100):
        part = np.asarray(augment(photo, 2, row)).astype(int)
        assert np.array_equal(part, np.asarray(augment(photo, 2, row)))
        assert not np.array_equal(part, np.asarray(augment(photo, 3, row)))
        height, width, _ = part.shape
        assert 0.54 < width * height / 200**2 < 0.96
        assert 0.74 < width / height < 1.35
        step = -1 if is_mirrored(2, row) else 1
        mirrored += step == -1
        # A piece of the photo, not scaled and not turned.
        assert (np.diff(part[..., 0], axis=1) == step).all()
        assert (np.diff(part[..., 1], axis=0) == 1).all()
    assert 35 < mirrored < 65
    assert is_mirrored(1, 3)
    assert not is_mirrored(0, 3)


def test_caption_dataset_pairs_features_with_padded_captions() -> None:
    features = np.arange(4 * 49 * 2, dtype=np.float16).reshape(4, 49, 2)
    captions = [["a dog"], ["a dog runs", "dog", "runs"]]
    vocabulary = Vocabulary(["<pad>", "<bos>", "<eos>", "<unk>", "a", "dog", "runs"])
    dataset = CaptionDataset(features, [3, 1], captions, vocabulary, max_length=6)
    assert len(dataset) == 2
    grid, tokens = dataset[0]
    assert np.array_equal(grid.numpy(), features[3])
    assert tokens.tolist() == [[1, 4, 5, 2, 0, 0], [0] * 6, [0] * 6]
    grid, tokens = dataset[1]
    assert np.array_equal(grid.numpy(), features[1])
    assert tokens.tolist() == [[1, 4, 5, 6, 2, 0], [1, 5, 2, 0, 0, 0], [1, 6, 2, 0, 0, 0]]


def test_captions_file_may_quote_all_cells(tmp_path: Path, draw: Draw) -> None:
    (tmp_path / "a.png").write_bytes(draw(0))
    for quoting in (csv.QUOTE_ALL, csv.QUOTE_MINIMAL):
        with (tmp_path / "captions.csv").open("w", newline="") as file:
            writer = csv.writer(file, quoting=quoting, lineterminator="\r\n")
            writer.writerows([["image", "caption"], ["a.png", 'a "big", red dog']])
        assert load_captions(str(tmp_path)).captions == [["a big red dog"]]


def test_open_quotation_mark_raises_data_error(tmp_path: Path, draw: Callable[..., bytes]) -> None:
    lines = ["image,caption"]
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(draw(number))
        lines += [f"{number}.png,a circle"] * 2
    lines[3] = '1.png,"hello said the square'
    lines[6] = '2.png,it said "hello"'
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match="quotation mark"):
        load_captions(str(tmp_path))


def test_negative_limit_is_refused(parquet_folder: Path) -> None:
    with pytest.raises(ConfigError, match="limit"):
        load_captions(str(parquet_folder), limit=-1)


def test_single_table_of_test_rows_has_no_train_split(
    tmp_path: Path,
    hub_row: Callable[..., dict[str, Any]],
    write_parquet: Callable[[Path, dict[str, list[dict[str, Any]]]], Path],
) -> None:
    folder = write_parquet(tmp_path, {"train": [hub_row(number, "test") for number in range(3)]})
    assert len(load_captions(str(folder), "test")) == 3
    with pytest.raises(DataError, match="no split 'train', only: test"):
        load_captions(str(folder), "train")


def test_relative_paths_start_at_data_folder(
    tmp_path: Path,
    hub_row: Callable[..., dict[str, Any]],
    draw: Callable[..., bytes],
    write_parquet: Callable[[Path, dict[str, list[dict[str, Any]]]], Path],
) -> None:
    rows = [{**hub_row(0), "image": {"bytes": None, "path": "p0.png"}}]
    folder = write_parquet(tmp_path, {"train": rows})
    (folder / "p0.png").write_bytes(draw(0))
    assert load_captions(str(folder)).photo(0).size == (64, 48)


def test_stream_photos_decodes_nothing(hub_row: MakeRow, tmp_path: Path) -> None:
    rows = [hub_row(number, split) for number, split in enumerate(["train", "val", "val"])]
    # As the Hub's own files: the column is declared as photos.
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    streamed = list(stream_photos(str(tmp_path), "validation"))
    assert [row["data"] for row in streamed] == [row["image"]["bytes"] for row in rows[1:]]
    assert [row["filename"] for row in streamed] == [row["filename"] for row in rows[1:]]


# Sources of a training run


def test_sources_have_shares_and_short_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data", "more/data", "a=0.5"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (source,) = parse_sources(["."])
    assert (source.source, source.name, source.share) == (".", tmp_path.name, None)
    sources = parse_sources(["owner/photos:small=.25", "a=0.5"])
    assert [source.name for source in sources] == ["photos:small", "a=0.5"]
    assert [source.share for source in sources] == [0.25, None]
    assert [source.portable for source in sources] == ["owner/photos:small=0.25", "a=0.5"]
    (source,) = parse_sources(["https://huggingface.co/datasets/owner/photos/tree/v2"])
    assert source.portable == "owner/photos@v2"
    sources = parse_sources(["data=0.3", str(tmp_path / "more" / "data")])
    assert [source.name for source in sources] == [f"{tmp_path.name}/data", "more/data"]
    assert sources[0].portable == f"{tmp_path.name}/data=0.3"


def test_captions_file_is_named_after_its_folder(csv_folder: Path) -> None:
    (source,) = parse_sources([str(csv_folder / "captions.csv")])
    assert source.name == csv_folder.name
    with pytest.raises(ConfigError, match="given twice"):
        parse_sources([str(csv_folder / "captions.csv"), str(csv_folder)])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a/b=0.6", "c/d=0.6"], r"add up to 1\.2; they can be 1 at most"),
        (["a/b=0.6", "c/d=0.6", "e/f"], r"add up to 1\.2"),
        (["a/b=0.2", "c/d=0.6"], r"add up to 0\.8: raise them to 1, or leave one source"),
        (["a/b=0.5"], r"add up to 0\.5"),
        (["a/b=0.4", "c/d=0.6", "e/f"], "leave nothing for e/f"),
        (["a/b", "c/d", "a/b=0.5"], "a/b is given twice: give each source once"),
        (["a/b=0"], "share of a/b is 0; it must be a number above 0 and at most 1"),
        (["a/b=-1"], "share of a/b is -1"),
        (["a/b=nan"], "share of a/b is nan"),
        (["a/b=1.5", "c/d"], r"share of a/b is 1\.5"),
        (["a/b=half", "c/d"], "there is no a/b=half, and 'half' is not a share.* a/b=0.5"),
    ],
)
def test_impossible_shares_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(CaptionerError, match=message):
        parse_sources(texts)


def test_shares_may_fill_the_epoch() -> None:
    assert [source.share for source in parse_sources(["a/b=0.1", "c/d=0.2", "e/f=0.7"])] == [
        *(0.1, 0.2, 0.7)
    ]
