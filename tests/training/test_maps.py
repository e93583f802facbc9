"""Tests of maps: their figures on maps made by hand, boxes, mosaics, and a whole run."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from captioner.config import DEFAULT_SOURCE, VERDICTS
from captioner.data.features import Features, cache_features
from captioner.data.sources import Box, CaptionedPhotos, load_captions
from captioner.errors import DataError
from captioner.model.checkpoint import Checkpoint
from captioner.model.decoder import CaptionModel
from captioner.model.encoder import Encoder
from captioner.model.vocabulary import SPECIALS, Vocabulary
from captioner.training.map_scores import (
    MapScore,
    WordMaps,
    WordValues,
    bootstrap,
    effective_cells,
    hottest,
    likeness,
    plot,
    point,
    shares,
    summarize,
    table,
)
from captioner.training.maps import blurrings, mean_between, mosaic, quarter, score_maps
from captioner.training.word_kinds import category_words, kind_of
from tests.model.tiny import make_model

VISUAL = ["dog", "cat", "red", "man", "skis"]  # as many as the tiny model has detectors


def word(photo: int, cells: list[float], target: list[float] | None = None, **other: Any) -> Any:
    values: dict[str, Any] = {"caption": photo, "kind": "object", **other}
    target_array = None if target is None else np.array(target)
    return WordMaps(photo, maps={"attended": np.array(cells)}, target=target_array, **values)


# Words


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *(("dog", "object"), ("benches", "object"), ("building", "object"), ("zebra", "object")),
        *(("women", "person"), ("skiers", "person"), ("jumping", "action"), ("runs", "action")),
        *(("wearing", "action"), ("red", "color"), ("of", "function"), ("young", "other")),
    ],
)
def test_kinds_of_words(text: str, kind: str) -> None:
    assert kind_of(text) == kind


def test_categories_have_their_words_in_singular_and_plural() -> None:
    assert {"man", "men", "people", "children"} <= category_words("person")
    assert {"bike", "bikes"} <= category_words("motorcycle") & category_words("bicycle")
    assert {"zebra", "zebras"} <= category_words("zebra")
    assert "dog" not in category_words("hot dog")


# Figures


def test_pointing_counts_the_hottest_cell_beside_center_chance_and_other_photos_maps() -> None:
    words = [
        word(0, [0.1, 0.2, 0.7], [0, 0, 1]),
        word(0, [0.6, 0.2, 0.2], [0, 1, 1]),
        word(1, [0.2, 0.5, 0.3], [0, 1, 0]),
    ]
    values = point(words, "attended", hottest)
    assert values.values.tolist() == [100, 0, 100]
    assert values.center is not None
    assert values.center.tolist() == [0, 100, 100]
    assert values.chance == pytest.approx([100 / 3, 200 / 3, 100 / 3])
    # Photo 1's map is hottest in the second cell; those of photo 0 in the third and first.
    assert values.shuffled == pytest.approx([0, 100, 0])


def test_focus_is_the_share_of_the_positive_part() -> None:
    words = [word(0, [3.0, 1.0, -5.0], [0.5, 1, 1]), word(1, [-1.0, -2.0, 0.0], [1, 0, 0])]
    values = point(words, "attended", shares).values
    # A map without a positive part points nowhere: it is even.
    assert values == pytest.approx([100 * (0.75 * 0.5 + 0.25), 100 / 3])


def test_likeness_compares_the_maps_of_one_caption() -> None:
    words = [
        word(0, [1.0, 0.0]),
        word(0, [2.0, 0.0]),
        word(0, [0.0, 1.0]),
        word(1, [1.0, 1.0]),  # alone in its caption
    ]
    values = likeness(words, "attended")
    assert values is not None
    assert values.values == pytest.approx([50, 50, 0])
    assert values.shuffled == pytest.approx([100 / 2**0.5] * 3)
    assert likeness(words[3:], "attended") is None


def test_effective_cells() -> None:
    words = [word(0, [1.0, 0, 0, 0]), word(1, [1.0, 1, 0, -9]), word(2, [0.0, 0, 0, 0])]
    assert effective_cells(words, "attended").values == pytest.approx([1, 2, 4])


def test_interval_resamples_whole_photos() -> None:
    rng = np.random.default_rng(0)
    of_photos = rng.random(100)
    photos = np.repeat(np.arange(100), 20)
    values = of_photos[photos]
    low, high = bootstrap(values, photos, seed=0)
    error = of_photos.std() / 10  # as if there were one word per photo
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert low < values.mean() < high
    assert bootstrap(values, photos, seed=0) == (low, high)
    assert bootstrap(values, photos, seed=1) != (low, high)


def test_scores_are_of_all_words_and_of_each_kind() -> None:
    values = WordValues(np.array([0, 1, 1]), ["object", "person", "object"], np.array([0.0, 6, 3]))
    scores = list(summarize("cells", "model", "attended", values, seed=0))
    rows = [(score.kind, score.words, score.photos, score.value) for score in scores]
    assert rows == [("all", 3, 2, 3.0), ("object", 2, 2, 1.5), ("person", 1, 1, 6.0)]
    assert scores[0].center is None


def test_table_and_plot_show_every_score() -> None:
    score = MapScore("pointing", "people", "shown", "all", 12, 3, 61.25, (50.0, 70.0), 40.0, 30.0)
    other = dataclasses.replace(score, test="cells", map="attended", center=None, chance=None)
    text = table([score, other])
    assert (
        "shown             all           12       3    61.2   50.0 - 70.0    40.0    30.0" in text
    )
    assert "people's captions: effective number of cells" in text
    with Image.open(io.BytesIO(plot([score, other]))) as image:
        assert image.size == (1080, 624)


# Mosaics


def test_quarters_share_the_middle_and_cover_the_grid() -> None:
    quarters = [quarter(place).reshape(7, 7) for place in range(4)]
    assert (np.sum(quarters, axis=0) == 1).all()
    assert [each.argmax() for each in quarters] == [0, 4, 28, 32]
    assert all(each.mean() == 0.25 for each in quarters)
    assert quarters[1][0, 3] == 0.5


def test_photos_of_a_mosaic_lie_in_their_quarters() -> None:
    colors = ("red", "lime", "blue", "white")
    image = mosaic([Image.new("RGB", (9, 5), color) for color in colors], 10)
    middles = [image.getpixel(point) for point in ((5, 5), (15, 5), (5, 15), (15, 15))]
    assert middles == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


# Blurring


def test_hottest_cells_are_blurred_or_all_others() -> None:
    sharp, blurred = torch.zeros(3, 14, 14), torch.ones(3, 14, 14)
    order = np.roll(np.arange(49), -7)  # the second row first
    deletion, insertion = torch.split(blurrings(sharp, blurred, order), 4)
    assert (deletion.mean(dim=(1, 2, 3)) * 49).round().tolist() == [3, 6, 12, 24]
    assert (deletion[0, :, 2:4, :6] == 1).all()
    assert torch.equal(insertion, 1 - deletion)


def test_mean_probability_weighs_steps_by_their_cells() -> None:
    assert mean_between(np.full(6, 0.3)) == pytest.approx(0.3)
    assert mean_between(np.array([1.0, 0, 0, 0, 0, 0])) == pytest.approx(1.5 / 49)


# Whole runs


def make_checkpoint(encoder: Encoder, model: CaptionModel) -> Checkpoint:
    """Return a tiny model with words; "a", "on" and "the" have no detector."""
    others = ["a", "on", "the", "square", "circle", "left", "right", "is", "blue", "green"]
    filling = [f"word{number}" for number in range(23 - 4 - 5 - len(others))]
    vocabulary = Vocabulary([*SPECIALS, *VISUAL, *others, *filling])
    return Checkpoint(model, vocabulary, 12, encoder.spec(), {}, {})


def boxed_photos(boxes: list[list[Box]]) -> CaptionedPhotos:
    """Return photos of which a person wrote "a dog skis on the left"."""
    rows = [
        [{"category": box.category, "box": list(box[1:])} for box in of_photo] for of_photo in boxes
    ]
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "gray").save(file, "PNG")
    table_ = datasets.Dataset.from_dict({"image": [file.getvalue()] * len(boxes), "boxes": rows})
    captions = [["a dog skis on the left", "nothing"]] * len(boxes)
    return CaptionedPhotos(DEFAULT_SOURCE, "validation", table_, captions, root="")


@pytest.mark.parametrize(("swapped", "expected"), [(False, 100.0), (True, 0.0)])
@torch.no_grad()
def test_detector_points_at_its_photos_boxes(
    tiny_encoder: Callable[..., Encoder], tmp_path: Path, swapped: bool, expected: float
) -> None:
    encoder = tiny_encoder()
    model = make_model(words=True, encoder_channels=encoder.channels)
    model.detectors.linear.weight[0] = torch.eye(encoder.channels)[2]
    cells = np.random.default_rng(0).random((2, 49, encoder.channels)).astype(np.float16)
    cells[0, 0, 2] = cells[1, 48, 2] = 40  # the dog's cells: top left, bottom right
    boxes = [[Box("dog", 0, 0, 0.2, 0.2)], [Box("dog", 0.8, 0.8, 1, 1), Box("cup", 0, 0, 1, 1)]]
    photos = boxed_photos(boxes[::-1] if swapped else boxes)
    checkpoint, features = make_checkpoint(encoder, model), Features(cells, [0, 1], tmp_path)
    scores = score_maps(checkpoint, encoder, photos, features, ["a dog", "a cat"])
    found = {(score.captions, score.map): score for score in scores if score.test == "pointing"}
    shown = found["people", "shown"]
    assert shown.value == expected
    assert (shown.words, shown.photos, shown.kind) == (2, 2, "object")
    assert shown.shuffled == 100 - expected
    assert shown.chance == pytest.approx(100 / 49)
    assert found["model", "shown"].words == 1  # "cat" has no box
    assert {name for _, name in found} == {"attended", "evidence", "mattered", "shown"}


@torch.no_grad()
def test_seen_there_is_right_where_a_box_of_the_word_touches_the_cell(
    tiny_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoder = tiny_encoder()
    model = make_model(words=True, encoder_channels=encoder.channels)
    model.detectors.linear.weight.zero_()
    model.detectors.linear.weight[0] = 5 * torch.eye(encoder.channels)[2]
    model.detectors.mean_logits.copy_(model.detectors.linear.bias)
    model.attn.v.weight.zero_()  # it attends to all cells alike
    model.evidence_gain.bias.fill_(9.0)
    cells = np.ones((3, 49, encoder.channels), np.float16)  # they show nothing
    cells[:, 0, 2] = 40  # but for a dog at the top left of all photos
    small = Box("dog", 0.01, 0.01, 0.02, 0.02)  # in a corner of that cell, far from its middle
    photos = boxed_photos([[small], [Box("dog", 0.5, 0.5, 1, 1)], [Box("cat", 0, 0, 1, 1)]])
    checkpoint, features = make_checkpoint(encoder, model), Features(cells, [0, 1, 2], tmp_path)
    scores = score_maps(checkpoint, encoder, photos, features, ["a dog"] * 3)
    (found,) = (
        score
        for score in scores
        if (score.test, score.captions, score.kind) == ("seen there", "model", "all")
    )
    assert found.words == found.photos == 3
    assert found.value == pytest.approx(100 / 3)  # the third photo has no dog at all
    verdict = {(score.map, score.kind): score for score in scores if score.test == "verdicts"}
    assert verdict["seen there", "object"].value == 100
    assert sum(verdict[name, "all"].value for name in VERDICTS) == pytest.approx(100)


def test_word_that_names_a_box_is_an_object(
    tiny_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoder = tiny_encoder()
    checkpoint = make_checkpoint(encoder, make_model(encoder_channels=encoder.channels))
    photos = boxed_photos([[Box("skis", 0, 0, 0.5, 1)]] * 2)
    features = Features(np.ones((2, 49, encoder.channels), np.float16), [0, 1], tmp_path)
    assert kind_of("skis") == "action"
    scores = score_maps(checkpoint, encoder, photos, features, ["a dog", "a dog"])
    pointing = [score for score in scores if score.test == "pointing"]
    assert {(score.kind, score.words) for score in pointing} == {("all", 2), ("object", 2)}


def test_any_data_has_mosaics_likeness_cells_and_blurring(
    tiny_encoder: Callable[..., Encoder], parquet_folder: Path, tmp_path: Path
) -> None:
    encoder = tiny_encoder()
    model = make_model(encoder_channels=encoder.channels)
    photos = load_captions(str(parquet_folder), "validation")
    features = cache_features(encoder, photos, tmp_path)
    checkpoint = make_checkpoint(encoder, model)
    captions = ["a red square on the left"] * len(photos)
    scores = score_maps(checkpoint, encoder, photos, features, captions)
    assert {score.test for score in scores} == {
        *("focus", "hottest", "likeness", "cells", "deletion", "insertion", "verdicts"),
    }
    blurred = [score for score in scores if score.test == "deletion" and score.kind == "all"]
    assert [score.photos for score in blurred] == [len(photos)] * 2
    # Without detectors there are only two maps.
    maps = {score.map for score in scores if score.test != "verdicts"}
    assert maps == {"attended", "mattered"}
    judged = {score.map: score.value for score in scores if score.test == "verdicts"}
    assert judged["seen there"] == judged["guessed"] == 0
    focus = [score for score in scores if score.test == "focus"]
    assert {score.photos for score in focus if score.kind in ("all", "function")} == {2}
    assert all((score.center, score.chance) == (25, 25) for score in focus)
    assert "function" in {score.kind for score in focus}
    again = score_maps(checkpoint, encoder, photos, features, captions)
    assert [dataclasses.astuple(score) for score in again] == [
        dataclasses.astuple(score) for score in scores
    ]


def test_boxes_of_another_form_are_an_error() -> None:
    table_ = datasets.Dataset.from_dict({"image": [b""], "boxes": [[{"category": "dog"}]]})
    with pytest.raises(DataError, match="lists of category and box"):
        CaptionedPhotos("here", "train", table_, [["a dog"]], root="").boxes()
