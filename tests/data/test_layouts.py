"""Thirty layouts of the same photos: the same photos, captions and training from all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from captioner.config import TrainConfig
from captioner.data.sources import load_captions, load_texts, stream_photos
from captioner.model.vocabulary import Vocabulary, clean
from captioner.training.loop import train_one_epoch
from captioner.training.setup import prepare
from captioner.training.state import TrainingState
from tests.data.layouts import LAYOUTS, Photo

_PLAIN = "parquet_folder_of_the_hub"


@pytest.fixture(scope="module")
def photos(draw: Callable[..., bytes], captions_of: Callable[[int], list[str]]) -> list[Photo]:
    """Ten photos of different scenes."""
    return [
        Photo(
            f"photo_{number:02}",
            draw(3 * number),
            [
                f"{captions_of(3 * number)[0][:-1]}, near the café.",
                f'"One" {captions_of(3 * number)[4][4:-1]}; that is all',
            ],
        )
        for number in range(10)
    ]


@pytest.fixture(scope="module")
def train(
    timm_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], tuple[Vocabulary, list[list[str]], float]]:
    """``train(source)``: vocabulary, training captions, and the loss of one step."""
    cache = tmp_path_factory.mktemp("features")

    def run(source: Path) -> tuple[Vocabulary, list[list[str]], float]:
        config = TrainConfig(
            data=(str(source),),
            encoder="timm:test_resnet",
            encoder_weights=str(timm_weights),
            captions="all",
            min_count=1,
            word2vec=False,
            batch_size=16,
            bfloat16=False,
            device="cpu",
            model={"embedding_size": 8, "hidden_size": 8, "attention_size": 8},
        )
        data = prepare(config, cache)
        state = TrainingState(config, data, tmp_path_factory.mktemp("run"))
        return data.vocabulary, data.train_references, train_one_epoch(state)

    return run


@pytest.fixture(scope="module")
def plain_run(
    photos: list[Photo],
    train: Callable[[Path], tuple[Vocabulary, list[list[str]], float]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Vocabulary, list[list[str]], float]:
    """What ``train`` returns for the Hub's own layout."""
    return train(LAYOUTS[_PLAIN](tmp_path_factory.mktemp("plain"), photos))


def test_there_are_thirty_layouts() -> None:
    assert len(LAYOUTS) >= 30


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_same_photos_captions_and_training_step(
    layout: str,
    photos: list[Photo],
    train: Callable[[Path], tuple[Vocabulary, list[list[str]], float]],
    plain_run: tuple[Vocabulary, list[list[str]], float],
    tmp_path: Path,
) -> None:
    source = LAYOUTS[layout](tmp_path, photos)
    found = load_captions(str(source))
    assert found.captions == [list(map(clean, photo.captions)) for photo in photos]
    data = (found.data(row) for row in range(len(found)))
    assert [each.read_bytes() if isinstance(each, Path) else each for each in data] == [
        photo.data for photo in photos
    ]
    # The beginning, fetched row by row, is the same.
    some = load_captions(str(source), limit=4)
    assert some.captions == found.captions[:4]
    assert some.fingerprint == found.select(range(4)).fingerprint
    assert train(source) == plain_run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_captions_as_text_and_photos_to_caption(
    layout: str, photos: list[Photo], tmp_path: Path
) -> None:
    source = LAYOUTS[layout](tmp_path, photos)
    texts = [text for texts in load_texts(str(source)) for text in texts]
    assert texts == [clean(caption) for photo in photos for caption in photo.captions]
    streamed = {
        Path(row["path"].decode()).read_bytes() if row["path"] else row["data"]
        for row in stream_photos(str(source))
    }
    assert streamed == {photo.data for photo in photos}
