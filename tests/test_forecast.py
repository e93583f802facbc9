"""What a run says at its start about the time it will take."""

from __future__ import annotations

import re
from collections.abc import Callable

from captioner.config import TrainConfig
from captioner.encoders import Encoder
from captioner.forecast import Work, forecast

MakeEncoder = Callable[..., Encoder]
TINY = {"embedding_size": 8, "hidden_size": 8, "attention_size": 8}
WORK = Work(passes=50_000, photos=10_000, captions=5, texts=1_000, validation=100, words=30)


def say(encoder: Encoder, work: Work = WORK, **settings: object) -> str:
    config = TrainConfig.from_recipe("seed", epochs=3, model=TINY, **settings)
    return forecast(config, encoder, work)


def test_it_names_what_is_to_be_done_and_adds_it_up(tiny_encoder: MakeEncoder) -> None:
    text = say(tiny_encoder(), text="more", reward_epochs=2)
    times = [
        float(number) * (60 if unit == "min" else 1)
        for number, unit in re.findall(r"(\d+) (min|s)\b", text)
    ]
    assert text.startswith("the whole run takes about ")
    for part in (
        "features of 50,000 photos",
        "1 epoch of text",
        "3 epochs,",
        "2 epochs of rewards",
    ):
        assert f"for {part}" in text.replace("for the ", "for ") + ","
    assert len(times) == 5
    assert abs(times[0] - sum(times[1:])) <= 0.05 * times[0] + 120  # each was rounded


def test_what_is_not_to_be_done_is_not_named(tiny_encoder: MakeEncoder) -> None:
    work = Work(passes=0, photos=100, captions=1, texts=0, validation=2, words=30)
    assert re.fullmatch(
        r"the whole run takes about \d+ s: \d+ s for 3 epochs", say(tiny_encoder(), work)
    )
