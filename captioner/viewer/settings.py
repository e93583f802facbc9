"""The settings of the search, as controls of the page."""

from __future__ import annotations

from typing import Any

import gradio as gr

from captioner.config import DecodingOptions

_BANS = {
    "the same word twice running": "ban_repeats",
    "the same three words twice": "ban_trigrams",
    "words that it does not know": "ban_unknown",
    "an end on “a”, “of”, “the” …": "ban_bad_endings",
}
_MAX_BEAMS = 5


def controls() -> list[Any]:
    """Make the controls, in the order in which ``decoding_options`` reads them."""
    beam_size, length_penalty, words, temperature, seed, bans = setting_values(DecodingOptions())
    return [
        gr.Slider(
            1,
            _MAX_BEAMS,
            beam_size,
            step=1,
            label="Captions",
            info="kept by the search at each step (beam size), or drawn; 1 is greedy",
        ),
        gr.Slider(
            0,
            2,
            length_penalty,
            step=0.1,
            label="Length normalisation",
            info="0 favours short captions; 1 ranks by the mean log-probability of a word",
        ),
        gr.Slider(3, 30, words, step=1, label="Longest caption", info="in words"),
        gr.Slider(
            0,
            2,
            temperature,
            step=0.1,
            label="Sampling temperature",
            info="0 searches; above it words are drawn, the wilder the higher",
        ),
        gr.Number(seed, label="Seed", info="of the drawing", precision=0, minimum=0),
        gr.CheckboxGroup(list(_BANS), value=bans, label="Never write"),
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
            "seed": seed or 0,
            **{field: label in bans for label, field in _BANS.items()},
        }
    )
