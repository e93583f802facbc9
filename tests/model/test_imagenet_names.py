"""The everyday names of ImageNet's 1,000 classes."""

from __future__ import annotations

from importlib.resources import files

import pytest

from captioner.model.vocabulary import clean

PATH = files("captioner.model") / "imagenet_names.txt"
NAMES = PATH.read_text(encoding="utf-8").splitlines()


def test_every_class_has_a_name() -> None:
    assert len(NAMES) == 1000


def test_a_name_is_one_or_two_clean_words() -> None:
    assert [name for name in NAMES if name != clean(name) or len(name.split()) not in (1, 2)] == []


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (0, "fish"),
        (1, "goldfish"),
        (151, "dog"),
        (268, "dog"),
        (285, "cat"),
        (291, "lion"),
        (296, "polar bear"),
        (340, "zebra"),
        (404, "airplane"),
        (531, "watch"),
        (555, "fire truck"),
        (779, "school bus"),
        (850, "teddy bear"),
        (920, "traffic light"),
        (963, "pizza"),
        (980, "volcano"),
        (999, "toilet paper"),
    ],
)
def test_names_are_in_the_order_of_imagenet(index: int, name: str) -> None:
    assert NAMES[index] == name
