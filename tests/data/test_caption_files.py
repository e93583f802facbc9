"""Columns, caption files, text tables and their encodings, in detail."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from captioner.data.columns import Columns, captions_in
from captioner.data.hub import HubId
from captioner.data.sources import load_captions, load_texts, stream_photos
from captioner.errors import DataError

Draw = Callable[..., bytes]
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, draw: Draw) -> Save:
    """``save(name, …)``: a folder with photos of these names, each of another scene."""

    def write(*names: str) -> Path:
        for number, name in enumerate(names):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(draw(number))
        return tmp_path

    return write


def _write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def _parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# Columns


@pytest.mark.parametrize(
    ("names", "image", "captions"),
    [
        (["text", "caption", "jpg", "IMAGE"], "IMAGE", ["caption"]),
        (["Alt_Text", "captions", "filename", "img"], "img", ["Alt_Text"]),
        (["__key__", "png", "txt"], "png", ["txt"]),
        (["image_path", "sentence", "comment"], "image_path", ["sentence"]),
        (
            ["image", "caption_10", "caption_0", "Caption_2"],
            "image",
            ["caption_0", "Caption_2", "caption_10"],
        ),
        (["images", "caption_text", "caption_"], None, []),
    ],
)
def test_columns_are_chosen_by_rule(
    names: list[str], image: str | None, captions: list[str]
) -> None:
    assert Columns().find_image(names, "x") == image
    assert Columns().find_captions(names, "x") == captions


def test_named_columns_replace_the_rule() -> None:
    names = ["image", "Photo of day", "caption", "en", "de"]
    columns = Columns("photo of day", ("de", "EN"))
    assert columns.find_image(names, "x") == "Photo of day"
    assert columns.find_captions(names, "x") == ["de", "en"]
    with pytest.raises(
        DataError, match=r"x has no column 'fr', only: image, .*, de; .* --caption-c"
    ):
        Columns(captions=("en", "fr")).find_captions(names, "x")
    with pytest.raises(
        DataError, match=r"x has no column 'img', only: image.* with --image-column"
    ):
        Columns("img").find_image(names, "x")


@pytest.mark.parametrize(
    ("cell", "column", "captions"),
    [
        (None, "caption", []),
        ("a dog\nruns", "caption", ["a dog\nruns"]),
        ("a dog\na cat\n", "txt", ["a dog", "a cat"]),
        (["a dog", None, "a cat"], "caption", ["a dog", "a cat"]),
        ([{"raw": "a dog", "tokens": ["a"]}, {"raw": "a cat"}], "sentences", ["a dog", "a cat"]),
        ([{"caption": "a dog", "id": 3}], "captions", ["a dog"]),
        ({"raw": ["a dog", "a cat"], "sentid": [1, 2]}, "sentences", ["a dog", "a cat"]),
    ],
)
def test_captions_in_cells_of_every_kind(cell: Any, column: str, captions: list[str]) -> None:
    assert captions_in(cell, column) == captions


@pytest.mark.parametrize("cell", [7, [7], {"en": "a dog"}, [["a"], {"tokens": ["a"]}]])
def test_cells_of_something_else_are_refused(cell: Any) -> None:
    with pytest.raises(TypeError, match="captions cannot be"):
        captions_in(cell, "caption")


def test_chosen_columns_are_reported(
    tmp_path: Path, draw: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "captioner")
    row = {"img": draw(0), "en": "a red circle", "de": "ein roter Kreis", "caption": "a thing"}
    source = str(_parquet(tmp_path / "a.parquet", [row]))
    assert load_captions(source).captions == [["a thing"]]
    assert "a.parquet train: photos from img, captions from caption" in caplog.text
    columns = Columns("IMG", ("en", "de"))
    assert load_captions(source, columns=columns).captions == [["a red circle", "ein roter kreis"]]
    assert "captions from en, de" in caplog.text
    assert load_texts(source, columns) == [["a red circle", "ein roter kreis"]]
    # The columns may be those of the photos' source only.
    assert load_texts(source, Columns("photo", ("fr",))) == [["a thing"]]
    with pytest.raises(
        DataError, match=r"a\.parquet has no column 'fr', only: img, en, de, caption"
    ):
        load_captions(source, columns=Columns(captions=("fr",)))
    with pytest.raises(DataError, match="has no column 'photo', only: img"):
        stream_photos(source, columns=Columns("photo"))


def test_columns_of_a_text_table_can_be_named(save: Save, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "captioner")
    folder = save("a.png", "b.png")
    text = "id,title,english,deutsch\na,one two three,a red circle,ein Kreis\nb,x y z,a dot,Punkt\n"
    source = str(_write(folder / "table.csv", text))
    columns = Columns("ID", ("deutsch", "english"))
    photos = load_captions(source, columns=columns)
    assert photos.captions == [["ein kreis", "a red circle"], ["punkt", "a dot"]]
    assert "photos from id, captions from deutsch, english of table.csv" in caplog.text
    with pytest.raises(DataError, match="no column 'fr', only: id, title, english, deutsch"):
        load_captions(source, columns=Columns(captions=("fr",)))


# Rows and splits


def test_rows_of_the_same_photo_become_one(tmp_path: Path, draw: Draw) -> None:
    def row(name: str, number: int, caption: str) -> dict[str, Any]:
        return {"image": {"bytes": draw(number), "path": name}, "caption": caption}

    rows = [row("a.png", 0, "one"), row("b.png", 1, "two"), row("a.png", 0, "three")]
    rows += [row("a.png", 2, "another photo of this name")]
    source = str(_parquet(tmp_path / "a.parquet", rows))
    for limit in (0, 3):
        photos = load_captions(source, limit=limit)
        assert photos.captions == [["one", "three"], ["two"], ["another photo of this name"]]
        assert photos.data(2) == draw(2)
    assert load_captions(source, limit=2).captions == [["one", "three"], ["two"]]


def test_restval_is_trained_on(tmp_path: Path, draw: Draw) -> None:
    rows = [{"image": draw(n), "caption": f"photo {n}"} for n in range(4)]
    names = ("train", "restval", "val", "test")
    splits = {
        name: datasets.Dataset.from_list([row]) for name, row in zip(names, rows, strict=True)
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = str(tmp_path / "saved")
    assert load_captions(source).captions == [["photo 0"], ["photo 1"]]
    assert load_captions(source, "valid").captions == [["photo 2"]]
    assert [row["data"] for row in stream_photos(source)] == [draw(0), draw(1)]
    with pytest.raises(DataError, match="no split 'dessert', only: train, validation, test"):
        load_captions(source, "dessert")


def _coco(names: Iterable[str]) -> str:
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    captions = [
        {"image_id": each["id"], "caption": f"photo {each['file_name']}"} for each in images
    ]
    return json.dumps({"images": images, "annotations": captions})


def test_coco_files_are_called_after_their_splits(save: Save) -> None:
    folder = save("train2017/1.png", "train2017/2.png", "val2017/3.png")
    _write(folder / "annotations/captions_train2017.json", _coco(["1.png", "2.png", "gone.png"]))
    _write(folder / "annotations/captions_val2017.json", _coco(["3.png"]))
    train = load_captions(str(folder))
    assert train.names() == ["1.png", "2.png"]
    assert train.skipped == 1
    assert load_captions(str(folder), "val").names() == ["3.png"]
    # A single file is what one asks for, whatever its name.
    file = folder / "annotations/captions_val2017.json"
    assert load_captions(str(file)).names() == ["3.png"]
    assert load_texts(str(file)) == [["photo 3png"]]
    _write(folder / "annotations/captions_train2014.json", _coco(["1.png"]))
    with pytest.raises(
        DataError, match=r"several files of captions: .*train2014.*--data .*2014\.json"
    ):
        load_captions(str(folder))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (_coco(["a.png"])[:-5], "no valid JSON .*: download it again"),
        (_coco(["a.png"]).replace("file_name", "name"), "an entry lacks 'file_name'; images need"),
        (_coco(["a.png"]).replace("image_id", "image"), "an entry lacks 'image_id'"),
        (
            _coco(["b.png"]),
            r"names 1 photos, but none of them is in .*'b\.png'.*put the photos there",
        ),
        ('{"images": [{"filename": "a.png", "sentences": [{"tokens": []}]}]}', "cannot be a dict"),
        ('{"images": [{"sentences": []}]}', "an entry lacks 'filename'"),
    ],
)
def test_damaged_annotations_are_refused(save: Save, text: str, says: str) -> None:
    source = str(_write(save("a.png") / "captions.json", text))
    with pytest.raises(DataError, match=says):
        load_captions(source)


def test_karpathy_splits_are_found(save: Save) -> None:
    names = [f"{number}.png" for number in range(4)]
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": f"photo {name}"}]}
        for name, split in zip(names, ("train", "restval", "val", "test"), strict=True)
    ]
    folder = str(_write(save(*names) / "dataset.json", json.dumps({"images": images})).parent)
    assert load_captions(folder).names() == ["0.png", "1.png"]
    assert load_captions(folder, "dev").names() == ["2.png"]
    assert load_captions(folder, "test").names() == ["3.png"]


def test_lists_divide_flickr8k(save: Save) -> None:
    folder = save("Flicker8k_Dataset/a.png", "Flicker8k_Dataset/b.png", "Flicker8k_Dataset/c.png")
    lines = "".join(f"{name}.png#{n}\tA {name} {n} .\n" for name in "abc" for n in range(2))
    token = _write(folder / "Flickr8k_text/Flickr8k.token.txt", lines)
    _write(folder / "Flickr8k_text/Flickr_8k.trainImages.txt", "a.png\n")
    _write(folder / "Flickr8k_text/Flickr_8k.devImages.txt", "c.png\n")
    for source in (str(folder), str(token)):
        assert load_captions(source).captions == [["a a 0", "a a 1"]]
        assert load_captions(source, "validation").names() == ["c.png"]
        with pytest.raises(DataError, match="no split 'test', only: train, validation"):
            load_captions(source, "test")


def test_tables_are_called_after_their_splits(save: Save) -> None:
    folder = save("photos/a.png", "photos/b.png")
    _write(folder / "train.csv", "image,caption\na.png,a dog runs\n")
    _write(folder / "my-test-photos.csv", "image,caption\nb.png,a cat sits\n")
    assert load_captions(str(folder)).names() == ["a.png"]
    assert load_captions(str(folder), "test").names() == ["b.png"]
    _write(folder / "more.csv", "image,caption\nb.png,a cat sits\n")
    _write(folder / "other.csv", "image,caption\nb.png,a cat sits\n")
    with pytest.raises(DataError, match=r"several files of captions: more\.csv, .*, as in --data"):
        load_captions(str(folder))


def test_folders_of_splits_may_have_the_same_names(save: Save, draw: Draw) -> None:
    folder = save("train/1.png", "val/images/1.png", "test/1.png")
    for split in ("train", "val", "test"):
        _write(folder / split / "captions.csv", f"image,caption\n1.png,a photo for {split}\n")
    for number, split in enumerate(("train", "val", "test")):
        photos = load_captions(str(folder), split)
        assert photos.captions == [[f"a photo for {split}"]]
        data = photos.data(0)
        assert isinstance(data, Path)
        assert data.read_bytes() == draw(number)


# Names


def test_names_find_photos_in_subfolders(save: Save, caplog: pytest.LogCaptureFixture) -> None:
    folder = save("x/1.png", "y/1.png", "y/Two.PNG", "x/two.words.png")
    lines = "/home/me/x/1.png,a dog\n/home/me/y/1.png,a cat\ntwo.png,a fish\ntwo.words,a bird\n"
    source = str(_write(folder / "table.csv", f"image,caption\n{lines}1.png,which\n"))
    photos = load_captions(source)
    assert [Path(photos.data(row)).relative_to(folder).as_posix() for row in range(4)] == [  # type: ignore[arg-type]
        *("x/1.png", "y/1.png", "y/Two.PNG", "x/two.words.png")
    ]
    assert photos.captions == [["a dog"], ["a cat"], ["a fish"], ["a bird"]]
    assert "1 of 5 photos are not in" in caplog.text


def test_photos_that_json_lines_name_may_be_missing(
    save: Save, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save("photos/a.png")
    lines = [json.dumps({"image": f"{name}.png", "text": "a dog"}) for name in "ab"]
    photos = load_captions(str(_write(folder / "lines.jsonl", "\n".join(lines))))
    assert (photos.names(), photos.skipped) == (["a.png"], 1)
    assert "1 of 2 photos are not in" in caplog.text
    with pytest.raises(DataError, match=r"names 1 photos, but none .*'b\.png'"):
        load_captions(str(_write(folder / "other.jsonl", lines[1])))


# Text tables


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        # Flickr30k's results.csv lacks a delimiter in one line.
        ("image_name| comment_number| comment\na.png| 0| A dog .\na.png| 1   A cat .\n", ["a dog"]),
        ("a.png\tA dog, \"here\n", ["a dog here"]),
        ("a.png,A dog, here\na.png,a cat\n", ["a dog here", "a cat"]),
        ("A dog here;a.png\n", ["a dog here"]),
        ("0,a.png,a dog runs,a small dog\n1,a.png,a cat sits,a big cat\n", ["a dog runs", "a small dog", "a cat sits", "a big cat"]),  # noqa: E501
        ("Bild;Autor;Beschreibung\na.png;Ada Byron;ein Hund läuft im Garten\n", ["ein hund läuft im garten"]),  # noqa: E501
        ("Bild;Titel 1;Titel_2\na.png;ein Hund;ein Hund läuft\n", ["ein hund", "ein hund läuft"]),
        ("train,a.png,a dog runs\n", ["a dog runs"]),
        ("a.png,dog\n", ["dog"]),
        ("IMAGE , Caption\na.png , a dog\n", ["a dog"]),
    ],
)  # fmt: skip
def test_tables_of_many_forms_are_read(save: Save, text: str, captions: list[str]) -> None:
    source = str(_write(save("a.png", "image.png") / "table.txt", text))
    photos = load_captions(source)
    assert photos.captions == [captions]
    assert photos.names() == ["a.png"]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"]
)
def test_encodings_are_recognized(
    save: Save, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = "image,caption\r\na.png,L'élève, garçon, mange à côté\r\n"
    caplog.set_level(logging.INFO, "captioner")
    folder = _write(save("a.png") / "captions.csv", text, encoding).parent
    assert load_captions(str(folder)).captions == [["l' élève garçon mange à côté"]]
    assert ("captions.csv, read as Latin-1" in caplog.text) == (encoding == "latin-1")


def test_text_files_of_photos_belong_to_the_splits_of_their_folders(save: Save) -> None:
    names = [*(f"train/{each}.png" for each in "abc"), "val/d.png", "val/train_e.png", "test/f.png"]
    folder = save(*names)
    for name in names:
        (folder / name).with_suffix(".txt").write_text(f"a photo of {name.partition('/')[0]}")
    for split, number in {"train": 3, "validation": 2, "test": 1}.items():
        captions = load_captions(str(folder), split).captions
        assert (
            captions == [[f"a photo of {split[: 3 if split == 'validation' else None]}"]] * number
        )


def test_table_whose_photos_are_elsewhere_is_named(save: Save, tmp_path: Path) -> None:
    table = tmp_path / "captions.tsv"
    rows = "".join(f"{number}\tphoto{number}.jpg\ta dog runs\n" for number in range(9))
    table.write_text("Nr.\tBilddatei\tBeschreibung\n" + rows)
    with pytest.raises(DataError, match=r"names 9 photos, but none .*the first is 'photo0.jpg'"):
        load_captions(str(table))
    with pytest.raises(DataError, match=r"no photo lies beside captions\.tsv"):
        load_captions(str(table.parent))
    save("other.png")
    with pytest.raises(DataError, match=r"captions\.tsv names no photo that is in "):
        load_captions(str(table.parent))


def test_damaged_utf_16_is_refused_by_name(save: Save) -> None:
    folder = save("a.png")
    (folder / "captions.csv").write_bytes("image,caption\na.png,un élève".encode("utf-16")[:-1])
    with pytest.raises(DataError, match=r"captions\.csv is no valid UTF-16 .*: save it as UTF-8"):
        load_captions(str(folder))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("texts.csv", "alt_text\na dog runs\na cat sits\n"),
        ("texts.txt", "a dog runs\na cat sits\n"),
        ("texts.jsonl", '{"caption": "a dog runs"}\n{"caption": "a cat sits"}\n'),
        ("texts.json", '[{"captions": ["a dog runs"]}, {"captions": ["a cat sits"]}]'),
    ],
)
def test_texts_need_no_photos(tmp_path: Path, name: str, text: str) -> None:
    path = _write(tmp_path / name, text)
    for source in (path, tmp_path):
        assert load_texts(str(source)) == [["a dog runs"], ["a cat sits"]]


# What cannot be opened


def test_many_columns_are_shortened(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.json", json.dumps({f"{n}.png": "a dog " * 50 for n in range(300)}))
    with pytest.raises(
        DataError, match=r"only: 0\.png, .*, 19\.png and 280 more; name it"
    ) as error:
        load_captions(str(path))
    assert len(str(error.value)) < 1000


def test_addresses_in_a_table_are_to_be_downloaded(save: Save) -> None:
    text = "a dog runs\thttp://example.com/1.jpg\na cat sits\thttp://example.com/2.jpg\n"
    source = str(_write(save("a.png") / "train.tsv", text))
    with pytest.raises(DataError, match=r"'http://example\.com/1\.jpg'\): download the photos"):
        load_captions(source)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("table.xlsx", r"is no file of captions: it can be \.parquet, .*\.csv"),
        ("photos.tar", "cannot read .*photos.tar: "),
        ("a.arrow", "cannot read .*a.arrow: "),
        ("a.jsonl", "cannot read .*a.jsonl: "),
        ("saved/state.json", "looks like a folder of save_to_disk: .*; save it again"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, says: str) -> None:
    path = _write(tmp_path / name, "this is something else")
    with pytest.raises(DataError, match=says):
        load_captions(str(path if path.parent == tmp_path else path.parent))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("some/data", ("some/data", None, None, None)),
        ("some/data:de", ("some/data", None, "de", None)),
        ("some/data@v1", ("some/data", "v1", None, None)),
        ("some/data:de@refs/convert/parquet", ("some/data", "refs/convert/parquet", "de", None)),
        ("some/data@v1:de", ("some/data", "v1", "de", None)),
        ("https://huggingface.co/datasets/some/data", ("some/data", None, None, None)),
        ("https://hf.co/datasets/some/data/", ("some/data", None, None, None)),
        ("https://huggingface.co/datasets/some/data/tree/v1/data", ("some/data", "v1", None, None)),
        ("https://huggingface.co/datasets/some/data/viewer/de/train?row=3", ("some/data", None, "de", None)),  # noqa: E501
        ("https://huggingface.co/datasets/some/data/viewer", ("some/data", None, None, None)),
        ("https://huggingface.co/datasets/some/data/resolve/main/a/b.parquet", ("some/data", "main", None, "a/b.parquet")),  # noqa: E501
        ("hf://datasets/some/data@v1", ("some/data", "v1", None, None)),
    ],
)  # fmt: skip
def test_hub_ids_are_parsed(text: str, parsed: tuple[str | None, ...]) -> None:
    assert HubId.parse(text) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "photos",
        "a/b/c",
        "some/data:de:fr",
        "some/data@",
        "https://www.kaggle.com/datasets/some/data",
    ],
)
def test_other_names_are_no_hub_ids(text: str) -> None:
    assert HubId.parse(text) is None
    with pytest.raises(
        DataError, match=r"not a Hub id|no address of a data set on the Hugging Face"
    ):
        load_captions(text)
