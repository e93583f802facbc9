"""The settings of the search, as controls of the page."""

from __future__ import annotations

import reprlib
from typing import Any

import gradio as gr

from captioner.config import DecodingOptions
from captioner.errors import ConfigError
from captioner.viewer.problems import told

_BANS = {
    "the same word twice running": "ban_repeats",
    "the same three words twice": "ban_trigrams",
    "words that it does not know": "ban_unknown",
    "an end on “a”, “of”, “the” …": "ban_bad_endings",
}
_MAX_BEAMS = 5


# The stock components answer a program that sends another value with a trace, or with nothing.


class _Slider(gr.Slider):
    is_template = True  # the browser draws it as the stock component

    @told
    def preprocess(self, payload: Any) -> float:
        """Return a number of the slider's range."""
        if type(payload) not in (int, float) or not self.minimum <= payload <= self.maximum:
            raise ConfigError(
                f"{self.label} is {reprlib.repr(payload)}; it must be a number from "
                f"{self.minimum} to {self.maximum}"
            )
        return payload


class _Number(gr.Number):
    is_template = True

    def preprocess(self, payload: Any) -> Any:
        """Return what came: ``DecodingOptions`` says what is wrong with it."""
        return payload


class _CheckboxGroup(gr.CheckboxGroup):
    is_template = True

    @told
    def preprocess(self, payload: Any) -> list[Any]:
        """Return some of the choices."""
        choices = [value for _, value in self.choices]
        if not isinstance(payload, list) or not all(value in choices for value in payload):
            raise ConfigError(f"{self.label} is none of: {', '.join(map(str, choices))}")
        return payload


def controls() -> list[Any]:
    """Make the controls, in the order in which ``decoding_options`` reads them."""
    beam_size, length_penalty, words, temperature, seed, bans = setting_values(DecodingOptions())
    return [
        _Slider(
            1,
            _MAX_BEAMS,
            beam_size,
            step=1,
            label="Captions",
            info="kept by the search at each step (beam size), or drawn; 1 is greedy",
        ),
        _Slider(
            0,
            2,
            length_penalty,
            step=0.1,
            label="Length normalisation",
            info="0 favours short captions; 1 ranks by the mean log-probability of a word",
        ),
        _Slider(3, 30, words, step=1, label="Longest caption", info="in words"),
        _Slider(
            0,
            2,
            temperature,
            step=0.1,
            label="Sampling temperature",
            info="0 searches; above it words are drawn, the wilder the higher",
        ),
        _Number(seed, label="Seed", info="of the drawing", precision=0, minimum=0),
        _CheckboxGroup(list(_BANS), value=bans, label="Never write"),
    ]


def setting_values(options: DecodingOptions) -> list[Any]:
    """Return what the controls show for ``options``."""
    return [
        options.beam_size,
        options.length_penalty,
        options.max_length - 2,  # <bos> and <eos> are no words
        options.temperature,
        options.seed,
        [label for label, field in _BANS.items() if getattr(options, field)],
    ]


def decoding_options(
    beam_size: int,
    length_penalty: float,
    words: int,
    temperature: float,
    seed: int | None,
    bans: list[str],
) -> DecodingOptions:
    """Return the options that the controls show.

    Raises:
        ConfigError: one is out of its range.
    """
    return DecodingOptions.from_dict(
        {
            "beam_size": beam_size,
            "samples": beam_size,
            "length_penalty": length_penalty,
            "max_length": words + 2,
            "temperature": temperature,
            "seed": 0 if seed is None else seed,
            **{field: label in bans for label, field in _BANS.items()},
        }
    )
