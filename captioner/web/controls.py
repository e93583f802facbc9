"""The settings of the search, as the page shows and sends them; and how the model works."""

from __future__ import annotations

from typing import Any

from captioner.config import DecodingOptions, ModelConfig
from captioner.errors import ConfigError

_BANS = ("ban_repeats", "ban_trigrams", "ban_unknown", "ban_bad_endings")
# Limits for a visitor; larger requests would delay the others.
_MAX_BEAMS, _MAX_WORDS = 5, 30
_MAX_CHARACTERS = 2000


def setting_values(options: DecodingOptions) -> dict[str, Any]:
    """Return the values of the page's form for ``options``."""
    return {
        "beam_size": options.beam_size,
        "length_penalty": options.length_penalty,
        "max_words": options.max_length - 2,  # <bos> and <eos> are not words
        "temperature": options.temperature,
        "seed": options.seed,
        **{name: getattr(options, name) for name in _BANS},
    }


def decoding_options(values: dict[str, Any]) -> DecodingOptions:
    """Return the options for the values of the page's form.

    Raises:
        ConfigError: a value is missing, unknown or out of range.
    """
    values = dict(values)
    if set(values) != set(setting_values(DecodingOptions())):
        raise ConfigError("the settings do not match the page's form: reload the page")
    limits = {"beam_size": (1, _MAX_BEAMS), "max_words": (1, _MAX_WORDS)}
    for name, (low, high) in limits.items():
        number = values.get(name)
        if type(number) is not int or not low <= number <= high:
            raise ConfigError(f"{name} must be a whole number from {low} to {high}")
    values["samples"] = values["beam_size"]
    values["max_length"] = values.pop("max_words") + 2
    return DecodingOptions.from_dict(values)


def api_options(values: Any) -> DecodingOptions:
    """Return the options of a program's request: fields of ``DecodingOptions`` by name.

    Raises:
        ConfigError: a field is unknown, or its value out of range.
    """
    if not isinstance(values, dict):
        raise ConfigError('the options must be an object such as {"beam_size": 5, "prefix": "a"}')
    options = DecodingOptions.from_dict(values)
    limits = {"beam_size": _MAX_BEAMS, "samples": _MAX_BEAMS, "max_length": _MAX_WORDS + 2}
    for name, limit in limits.items():
        if getattr(options, name) > limit:
            raise ConfigError(f"{name} is {getattr(options, name)}; the limit here is {limit}")
    check_text(options.prefix)
    return options


def check_text(text: str) -> None:
    """Raise ``ConfigError`` if a visitor's text is too long."""
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(f"the text has {len(text)} characters; the limit is {_MAX_CHARACTERS}")


def how_it_works(
    config: ModelConfig, encoder: dict[str, Any], *, has_confidence: bool = False
) -> str:
    """Explain the model in a few sentences of Markdown, with its real sizes.

    Args:
        config: the decoder's shape.
        encoder: the encoder's ``spec()``.
        has_confidence: whether the page shows one with the caption.
    """
    rows, columns = encoder["grid"]
    size = encoder["transform"]["size"]
    query = "the LSTM's hidden state"
    if config.word_query:
        query += " and the previous word"
    start = "the mean of the grid" if config.mean_start else "zeros"
    output = "the LSTM's state"
    if config.deep_output:
        output += ", the previous word and that mean"
    evidence = (
        " What word detectors and the backbone's own classes recognize in the attended cells is "
        "added to the scores of the words that name it; the map *Evidence* shows each cell's part."
        if config.evidence and config.num_detectors
        else ""
    )
    steps = [
        f"**See.** `{encoder['name']}`, trained on ImageNet and frozen, turns the whole photo, "
        f"resized to {size} x {size}, into a grid of {rows} x {columns} vectors of "
        f"{config.encoder_channels:,} numbers.",
        f"**Look.** Before each word, additive attention (width {config.attention_size}) compares "
        f"{query} with each of the {rows * columns} vectors and gives each cell a share. The "
        "shares sum to 1; the map *Attended* shows them.",
        "**Write.** The mean of the vectors, weighted by those shares, goes into an LSTM of "
        f"{config.hidden_size} units (started from {start}) with the previous word, as "
        f"{config.embedding_size} numbers. From {output} comes a probability for each of "
        f"{config.vocabulary_size:,} words.{evidence}",
        "**Search.** Beam search keeps the few most likely captions at every step; greedy decoding "
        "(beam size 1) keeps one. The bans prevent repetition. Turn them off under *Search "
        "settings* to see what the model does without them.",
        f"**Explain.** For the map *Mattered* the caption is read {rows * columns} times more, "
        "each time with another cell replaced by the mean of many photos' cells, and once with all "
        "of them. Verdicts compare these readings with the evidence.",
    ]
    if has_confidence:
        steps.append(
            "**Doubt.** The line under the caption estimates how likely it is right, from the "
            "probabilities of its words and what the photo shows of them. A caption is right if "
            "people who described the photo used at least two thirds of its words for things, "
            "looks and actions."
        )
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, start=1))
