"""The same ten photos with two captions each, in the layouts that people have."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

# A function that writes the photos into a folder and returns what to type after --data.
Write = Callable[[Path, "Sequence[Photo]"], Path]


class Photo(NamedTuple):
    """A photo of the fixture.

    Attributes:
        stem: the file name without ".png".
        data: the file.
        captions: two, with accents, commas, quotation marks and semicolons.
    """

    stem: str
    data: bytes
    captions: list[str]

    @property
    def name(self) -> str:
        """The file name."""
        return f"{self.stem}.png"


LAYOUTS: dict[str, Write] = {}


def _layout(write: Write) -> Write:
    LAYOUTS[write.__name__.strip("_")] = write
    return write


def _save(folder: Path, photos: Iterable[Photo], suffix: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for photo in photos:
        (folder / f"{photo.stem}{suffix}").write_bytes(photo.data)
    return folder


def _table(path: Path, rows: Iterable[Sequence[str]], encoding: str = "utf-8", **form: Any) -> Path:
    """Write a table as Python's csv does, cells quoted where needed."""
    file = io.StringIO()
    csv.writer(file, **form).writerows(rows)
    path.write_bytes(file.getvalue().encode(encoding))
    return path


def _lines(path: Path, lines: Iterable[str]) -> Path:
    """Write a table without quotation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _pairs(photos: Sequence[Photo]) -> list[tuple[str, str]]:
    """Return file name and caption of each caption."""
    return [(photo.name, caption) for photo in photos for caption in photo.captions]


def _embedded(photo: Photo) -> dict[str, Any]:
    return {"bytes": photo.data, "path": photo.name}


def _parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# Parquet, Arrow, save_to_disk


@_layout
def _parquet_folder_of_the_hub(folder: Path, photos: Sequence[Photo]) -> Path:
    rows = [{"image": _embedded(photo), "alt_text": photo.captions} for photo in photos]
    _parquet(folder / "data/train-00000-of-00002.parquet", rows[:6])
    _parquet(folder / "data/train-00001-of-00002.parquet", rows[6:])
    return folder


@_layout
def _parquet_file_with_numbered_captions(folder: Path, photos: Sequence[Photo]) -> Path:
    rows = [
        {"image": _embedded(photo), "caption_1": photo.captions[1], "caption_0": photo.captions[0]}
        for photo in photos
    ]
    return _parquet(folder / "flickr8k.parquet", rows)


@_layout
def _parquet_file_with_a_row_per_caption(folder: Path, photos: Sequence[Photo]) -> Path:
    rows = [
        {"img": _embedded(photo), "Text": caption} for photo in photos for caption in photo.captions
    ]
    return _parquet(folder / "pairs.parquet", rows)


@_layout
def _parquet_with_sentences_as_dictionaries(folder: Path, photos: Sequence[Photo]) -> Path:
    rows = [
        {
            "photo": photo.data,
            "filename": photo.name,
            "sentences": [{"raw": text, "tokens": text.split()} for text in photo.captions],
        }
        for photo in photos
    ]
    return _parquet(folder / "karpathy.parquet", rows).parent


@_layout
def _parquet_beside_photos(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "images", photos)
    rows = [{"image_path": f"images/{photo.name}", "captions": photo.captions} for photo in photos]
    return _parquet(folder / "captions.parquet", rows).parent


@_layout
def _arrow_file(folder: Path, photos: Sequence[Photo]) -> Path:
    table = pyarrow.Table.from_pylist(
        [{"image": _embedded(photo), "caption": photo.captions} for photo in photos]
    )
    with pyarrow.ipc.new_stream(folder / "photos.arrow", table.schema) as writer:
        writer.write_table(table)
    return folder / "photos.arrow"


def _dataset(photos: Sequence[Photo]) -> datasets.Dataset:
    rows = [{"image": _embedded(photo), "caption": photo.captions} for photo in photos]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


@_layout
def _saved_dataset(folder: Path, photos: Sequence[Photo]) -> Path:
    _dataset(photos).save_to_disk(folder / "saved")
    return folder / "saved"


@_layout
def _saved_dataset_with_splits(folder: Path, photos: Sequence[Photo]) -> Path:
    table = _dataset(photos)
    splits = datasets.DatasetDict({"train": table, "test": table.select([0])})
    splits.save_to_disk(folder / "saved")
    return folder / "saved"


# imagefolder, JSON, WebDataset


@_layout
def _metadata_csv(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder, photos)
    return _table(folder / "metadata.csv", [("file_name", "text"), *_pairs(photos)]).parent


@_layout
def _metadata_jsonl(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "train", photos)
    rows = ({"file_name": photo.name, "captions": photo.captions} for photo in photos)
    return _lines(folder / "train/metadata.jsonl", map(json.dumps, rows)).parent.parent


@_layout
def _metadata_parquet(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder, photos)
    rows = [{"file_name": photo.name, "captions": photo.captions} for photo in photos]
    return _parquet(folder / "metadata.parquet", rows).parent


@_layout
def _json_lines_file(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "photos", photos)
    rows = ({"image": photo.name, "caption": photo.captions} for photo in photos)
    return _lines(folder / "captions.jsonl", map(json.dumps, rows))


@_layout
def _json_lines_beside_photos(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder, photos)
    rows = ({"filename": name, "caption": caption} for name, caption in _pairs(photos))
    return _lines(folder / "train.jsonl", map(json.dumps, rows)).parent


@_layout
def _json_list(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "photos", photos)
    rows = [{"image": f"photos/{photo.name}", "caption": photo.captions} for photo in photos]
    (folder / "captions.json").write_text(json.dumps(rows, indent=1))
    return folder / "captions.json"


def _tar(path: Path, photos: Sequence[Photo], captions: str, text: Callable[[Photo], str]) -> None:
    with tarfile.open(path, "w") as archive:
        for photo in photos:
            for name, data in ((photo.name, photo.data), (f"{photo.stem}.{captions}", text(photo))):
                content = data if isinstance(data, bytes) else data.encode()
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


@_layout
def _webdataset_file(folder: Path, photos: Sequence[Photo]) -> Path:
    _tar(folder / "photos.tar", photos, "txt", lambda photo: "\n".join(photo.captions))
    return folder / "photos.tar"


@_layout
def _webdataset_shards(folder: Path, photos: Sequence[Photo]) -> Path:
    for shard, part in enumerate((photos[:5], photos[5:])):
        _tar(folder / f"{shard:05}.tar", part, "txt", lambda photo: "\n".join(photo.captions))
    return folder


# COCO and Karpathy


def _coco(photos: Sequence[Photo]) -> str:
    captions = [(number, text) for number, photo in enumerate(photos) for text in photo.captions]
    return json.dumps(
        {
            "info": {"year": 2017},
            "images": [{"id": n, "file_name": photo.name} for n, photo in enumerate(photos)],
            "annotations": [
                {"id": 7 + key, "image_id": number, "caption": text}
                for key, (number, text) in enumerate(captions)
            ],
        }
    )


@_layout
def _coco_folder(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "train2017", photos)
    instances = {"images": [], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}
    _lines(folder / "annotations/instances_train2017.json", [json.dumps(instances)])
    return _lines(folder / "annotations/captions_train2017.json", [_coco(photos)]).parent.parent


@_layout
def _coco_file_beside_its_photos(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "val2017", photos)
    return _lines(folder / "annotations/captions_val2017.json", [_coco(photos)])


def _karpathy(photos: Sequence[Photo], **more: str) -> str:
    images = [
        {
            "filename": photo.name,
            "sentences": [{"raw": text, "tokens": text.split()} for text in photo.captions],
            "split": "restval" if number >= 5 else "train",
            **more,
        }
        for number, photo in enumerate(photos)
    ]
    return json.dumps({"images": images, "dataset": "flickr30k"})


@_layout
def _karpathy_folder(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "flickr30k-images", photos)
    return _lines(folder / "dataset_flickr30k.json", [_karpathy(photos)]).parent


@_layout
def _karpathy_file_of_coco(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "val2014", photos)
    _save(folder / "thumbnails", photos)
    return _lines(folder / "dataset_coco.json", [_karpathy(photos, filepath="val2014")])


# Text tables


@_layout
def _captions_csv(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder, photos)
    return _table(folder / "captions.csv", [("image", "caption"), *_pairs(photos)]).parent


@_layout
def _captions_txt_of_kaggle_flickr8k(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "Images", photos)
    return _table(folder / "captions.txt", [("image", "caption"), *_pairs(photos)]).parent


@_layout
def _results_csv_of_flickr30k(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "flickr30k_images", photos)
    lines = [
        f"{photo.name}| {number}| {caption}"
        for photo in photos
        for number, caption in enumerate(photo.captions)
    ]
    return _lines(folder / "results.csv", ["image_name| comment_number| comment", *lines]).parent


@_layout
def _flickr8k_as_published(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "Flicker8k_Dataset", photos)
    text = folder / "Flickr8k_text"
    lines = [
        f"{photo.name}#{number}\t{caption}"
        for photo in photos
        for number, caption in enumerate(photo.captions)
    ]
    _lines(text / "Flickr8k.token.txt", [*lines, "photo_of_no_split.png#0\tA photo ."])
    _lines(text / "Flickr8k.lemma.token.txt", [line.replace("is", "be") for line in lines])
    _lines(
        text / "ExpertAnnotations.txt", [f"{p.name}\t{photos[0].name}#2\t1\t1\t2" for p in photos]
    )
    _lines(text / "Flickr_8k.trainImages.txt", [photo.name for photo in photos])
    _lines(text / "Flickr_8k.testImages.txt", ["photo_of_the_test.png"])
    _lines(text / "readme.txt", ["Photos with five captions each.", "", "Have fun!"])
    return folder


@_layout
def _token_file_of_flickr30k(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "flickr30k-images", photos)
    lines = [
        f"{photo.name}#{number}\t{caption}"
        for photo in photos
        for number, caption in enumerate(photo.captions)
    ]
    return _lines(folder / "results_20130124.token", lines)


@_layout
def _tsv_with_headings_in_capitals(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder, photos)
    rows = [("ID", "IMAGE", "CAPTION"), *((str(n), *pair) for n, pair in enumerate(_pairs(photos)))]
    return _table(folder / "train.tsv", rows, delimiter="\t").parent


@_layout
def _semicolons_without_headings(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "photos", photos)
    return _table(folder / "table.csv", _pairs(photos), "latin-1", delimiter=";").parent


@_layout
def _unicode_text_of_a_spreadsheet(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "photos", photos)
    rows = [("Photo", "Sentence"), *_pairs(photos)]
    return _table(folder / "sheet.txt", rows, "utf-16", delimiter="\t").parent


@_layout
def _csv_with_several_caption_columns(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder, photos)
    rows = [("name", "caption_0", "caption_1"), *((p.name, *p.captions) for p in photos)]
    return _table(folder / "table.csv", rows, quoting=csv.QUOTE_ALL)


@_layout
def _csv_with_several_captions_without_headings(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder, photos)
    rows = [(str(n), *p.captions, p.name) for n, p in enumerate(photos)]
    return _table(folder / "table.csv", rows).parent


@_layout
def _names_with_folders_of_another_machine(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "photos", photos)
    rows = [("image", "caption"), *((f"C:\\data\\{name}", text) for name, text in _pairs(photos))]
    return _table(folder / "table.csv", rows).parent


@_layout
def _names_without_suffix(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "photos", photos)
    rows = [("image_id", "caption"), *((p.stem, text) for p in photos for text in p.captions)]
    return _table(folder / "table.csv", rows).parent


@_layout
def _json_lists_in_a_csv(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "photos", photos)
    rows = [("captions", "split", "filename")]
    rows += [(json.dumps(p.captions), "train", p.name) for p in photos]
    return _table(folder / "flickr_annotations_30k.csv", rows).parent


@_layout
def _text_file_per_photo(folder: Path, photos: Sequence[Photo]) -> Path:
    _save(folder / "photos", photos)
    for photo in photos:
        _lines(folder / f"photos/{photo.stem}.txt", photo.captions)
    _lines(folder / "readme.txt", ["Photos with a caption in each file."])
    return folder
