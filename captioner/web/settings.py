"""The settings of the search, as the page sends and shows them."""

from __future__ import annotations

from typing import Any

from captioner.config import DecodingOptions
from captioner.errors import ConfigError

_BANS = ("ban_repeats", "ban_trigrams", "ban_unknown", "ban_bad_endings")
# What a visitor may ask for; more would keep others waiting.
_MAX_BEAMS, _MAX_WORDS = 5, 30


def setting_values(options: DecodingOptions) -> dict[str, Any]:
    """Return what the page's form shows for ``options``."""
    return {
        "beam_size": options.beam_size,
        "length_penalty": options.length_penalty,
        "max_words": options.max_length - 2,  # <bos> and <eos> are no words
        "temperature": options.temperature,
        "seed": options.seed,
        **{name: getattr(options, name) for name in _BANS},
    }


def decoding_options(values: dict[str, Any]) -> DecodingOptions:
    """Return the options that the page's form stands for.

    Raises:
        ConfigError: one is missing, unknown, or out of its range.
    """
    values = dict(values)
    if set(values) != set(setting_values(DecodingOptions())):
        raise ConfigError("the page sent other settings than its form has: reload the page")
    limits = {"beam_size": (1, _MAX_BEAMS), "max_words": (1, _MAX_WORDS)}
    for name, (low, high) in limits.items():
        number = values.get(name)
        if type(number) is not int or not low <= number <= high:
            raise ConfigError(f"{name} must be a whole number from {low} to {high}")
    values["samples"] = values["beam_size"]
    values["max_length"] = values.pop("max_words") + 2
    return DecodingOptions.from_dict(values)
