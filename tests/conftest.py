"""Fixtures: small real data (coloured shapes with captions), the shipped model, the served page.

No test needs the network or writes outside pytest's temporary folders.
"""

from __future__ import annotations

import atexit
import csv
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

# `datasets` and `gradio` read these once, when they are imported.
_HOME = tempfile.mkdtemp(prefix="captioner-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ["HF_HOME"] = _HOME
os.environ["HF_DATASETS_CACHE"] = str(Path(_HOME, "datasets"))
os.environ["HF_HUB_CACHE"] = str(Path(_HOME, "hub"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_TEMP_DIR"] = str(Path(_HOME, "gradio"))
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py and captioner, from whatever folder pytest is called

import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from captioner import Captioner  # noqa: E402
from captioner.model.encoder import Encoder, Transform, load_encoder  # noqa: E402

Row: TypeAlias = dict[str, Any]

_SCENES = [
    (colour, kind, side)
    for side in ("left", "right", "top", "bottom")
    for colour in ("red", "green", "blue", "yellow")
    for kind in ("circle", "square")
]
_CORNERS = {"left": (4, 16), "right": (40, 16), "top": (22, 2), "bottom": (22, 30)}


def _draw(number: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """Return photo ``number`` as PNG; from 32 on the scenes repeat on a darker background."""
    colour, kind, side = _SCENES[number % len(_SCENES)]
    background = 255 - number // len(_SCENES)
    image = Image.new("RGB", (64, 48), (background,) * 3)
    x, y = _CORNERS[side]
    draw = ImageDraw.Draw(image)
    shape = draw.ellipse if kind == "circle" else draw.rectangle
    shape((x, y, x + 18, y + 16), fill=colour)
    file = io.BytesIO()
    image.resize(size).save(file, "PNG")
    return file.getvalue()


def _captions(number: int) -> list[str]:
    """Return the five captions of photo ``number``."""
    colour, kind, side = _SCENES[number % len(_SCENES)]
    return [
        f"A {colour} {kind} on the {side}.",
        f"There is a {colour} {kind} at the {side} side",
        f"one {kind}, and it is {colour}",
        f"on the {side} is a {kind} of {colour} colour",
        f"The {kind} on the {side} is {colour}!",
    ]


def _hub_row(number: int, split: str = "train") -> Row:
    """Return a row with the columns of the Hub's AnyModal/flickr30k."""
    name = f"{1000 + number}.png"
    return {
        "image": {"bytes": _draw(number), "path": name},
        "alt_text": _captions(number),
        "sentids": [str(5 * number + k) for k in range(5)],
        "split": split,
        "img_id": str(number),
        "filename": name,
        "original_alt_text": _captions(number),
    }


def _write_parquet(folder: Path, splits: dict[str, list[Row]]) -> Path:
    """Write each split to ``data/SPLIT-00000-of-00001.parquet``, as the Hub names its files."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    schema = None
    for split, rows in splits.items():
        table = pyarrow.Table.from_pylist(rows, schema=None if rows else schema)
        schema = table.schema
        pyarrow.parquet.write_table(table, folder / f"data/{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def draw() -> Callable[..., bytes]:
    """``draw(number, size)``: a photo as PNG."""
    return _draw


@pytest.fixture(scope="session")
def captions_of() -> Callable[[int], list[str]]:
    """``captions_of(number)``: the five captions of a photo."""
    return _captions


@pytest.fixture(scope="session")
def hub_row() -> Callable[..., Row]:
    """``hub_row(number, split)``: a row in the layout of the Hub's Flickr30k."""
    return _hub_row


@pytest.fixture(scope="session")
def write_parquet() -> Callable[[Path, dict[str, list[Row]]], Path]:
    """``write_parquet(folder, {split: rows})``: the folder of a data set."""
    return _write_parquet


@pytest.fixture(scope="session")
def parquet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training, 8 validation and 4 test photos in the Hub's layout."""
    splits = {
        "train": [_hub_row(number) for number in range(24)],
        "validation": [_hub_row(number, "validation") for number in range(32, 40)],
        "test": [_hub_row(number, "test") for number in range(64, 68)],
    }
    return _write_parquet(tmp_path_factory.mktemp("parquet"), splits)


@pytest.fixture(scope="session")
def csv_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 photos beside a captions.csv with five lines per photo and no splits."""
    folder = tmp_path_factory.mktemp("csv")
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number in range(20):
            (folder / f"{number}.png").write_bytes(_draw(number))
            writer.writerows([f"{number}.png", text] for text in _captions(number))
    return folder


@pytest.fixture(scope="session")
def tiny_encoder() -> Callable[..., Encoder]:
    """``tiny_encoder(seed)``: a real ``Encoder`` of one convolution with 8 channels."""

    def build(
        seed: int = 0, mean: float = 0.5, interpolation: str = "bilinear", name: str = "tiny"
    ) -> Encoder:
        torch.manual_seed(seed)
        transform = Transform(mean=(mean,) * 3, std=(0.25,) * 3, interpolation=interpolation)
        return Encoder(name, nn.Conv2d(3, 8, 32, stride=32), transform)

    return build


@pytest.fixture(scope="session")
def lite2() -> Encoder:
    """EfficientNet-Lite2 with its real weights."""
    return load_encoder("efficientnet_lite2")


@pytest.fixture(scope="session")
def timm_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights for ``timm:test_resnet``, a very small model."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.fixture(scope="session")
def captioner() -> Captioner:
    """The shipped checkpoint."""
    return Captioner.from_pretrained()


@pytest.fixture(scope="session")
def example_photos() -> list[Path]:
    """The page's example photos, which come with its packages."""
    from captioner.web import example_photos

    return [example.path for example in example_photos().values()]


@pytest.fixture(scope="session")
def served_page(captioner: Captioner) -> Iterator[str]:
    """The address of the real page, served as ``app.main`` serves it."""
    import app  # gradio takes seconds, which most tests need not wait for
    from captioner.web.middleware import RequestFilter
    from captioner.web.server import MAX_QUEUE, launch_options

    demo = app.build_demo(captioner).queue(max_size=MAX_QUEUE)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options(RequestFilter()))
    yield url
    demo.close()


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip curves.png, which takes longer than an epoch of a tiny run."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
