"""Settings are validated when they are made, and survive JSON unchanged."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import pytest

from captioner.config import (
    BAD_ENDINGS,
    RECIPES,
    Appearance,
    DecodingOptions,
    ModelConfig,
    TrainConfig,
)
from captioner.errors import CaptionerError, ConfigError


def model_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"vocabulary_size": 100, "encoder_channels": 8, **changes})


@pytest.mark.parametrize(
    "config",
    [
        model_config(),
        model_config(deep_output=True, tied_embedding=True, dropout=0.5),
        DecodingOptions(),
        DecodingOptions(beam_size=5, prefix="a dog", temperature=0.7),
        TrainConfig(),
        TrainConfig.from_recipe("best", data=("photos", "more=0.3"), limit=7),
    ],
    ids=lambda config: type(config).__name__,
)
def test_json_round_trip(config: ModelConfig | DecodingOptions | TrainConfig) -> None:
    values = json.loads(json.dumps(config.to_dict()))

    assert type(config).from_dict(values) == config


@pytest.mark.parametrize("config", [model_config(), DecodingOptions(), TrainConfig()])
def test_settings_are_frozen(config: object) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [ModelConfig, DecodingOptions, TrainConfig])
def test_unknown_fields_are_named(
    kind: type[ModelConfig] | type[DecodingOptions] | type[TrainConfig],
) -> None:
    with pytest.raises(ConfigError, match=rf"{kind.__name__} has no field beams, colour"):
        kind.from_dict({"colour": 1, "beams": 2})


def test_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="ModelConfig needs a value for encoder_channels"):
        ModelConfig.from_dict({"vocabulary_size": 100})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beam_size", 0),
        ("beam_size", 101),
        ("beam_size", 2.5),
        ("beam_size", "3"),
        ("beam_size", None),
        ("beam_size", True),
        ("length_penalty", -0.1),
        ("max_length", 2),
        ("max_length", 201),
        ("max_length", 20.0),
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", "0"),
        ("prefix", None),
        ("prefix", ["a"]),
        ("ban_repeats", 1),
        ("ban_unknown", "no"),
        ("temperature", math.inf),
        ("temperature", True),
        ("length_penalty", 10**400),
        ("top_p", 0),
        ("top_p", 1.01),
        ("samples", 0),
        ("seed", -1),
    ],
)
def test_decoding_options_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is .*; it must be "):
        DecodingOptions(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocabulary_size", 4),
        ("encoder_channels", 0),
        ("embedding_size", 0),
        ("hidden_size", -1),
        ("attention_size", 1.5),
        ("mean_start", 1),
        ("deep_output", None),
        ("dropout", 1.0),
        ("feature_dropout", -0.1),
    ],
)
def test_model_fields_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is .*; it must be "):
        model_config(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("limit", -1),
        ("max_length", 2),
        ("min_count", 0),
        ("batch_size", 0),
        ("learning_rate", 0),
        ("learning_rate", math.nan),
        ("label_smoothing", 1),
        ("ema_decay", 1),
        ("seed", -1),
        ("seed", 2**32),
        ("batch_size", 0.5),
        ("captions", "second"),
        ("validation", "none"),
        ("select_by", "bleu"),
        ("schedule", "step"),
        ("device", "tpu"),
        ("device", None),
        ("recipe", "worst"),
        ("data", 5),
        ("data", "photos"),
        ("data", []),
        ("data", ["photos", 5]),
        ("encoder", None),
        ("encoder_weights", 5),
        ("text", ["a"]),
        ("word2vec", "yes"),
        ("bfloat16", 2),
        ("gradient_clip", math.inf),
        ("language", None),
        ("language", ""),
        ("language", "English language"),
        ("language", "en_US"),
        ("model", [1]),
        ("model", {1: 2}),
    ],
)
def test_training_fields_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is .*; it must be "):
        TrainConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("colors", "red"),
        ("colors", None),
        ("shape", "round"),
        ("scale", "photo"),
        ("scale", 1),
        ("strength", 1.01),
        ("strength", math.nan),
        ("strength", "0.5"),
    ],
)
def test_appearance_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is .*; it must be "):
        Appearance(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("language", ["en", "de-AT", "zh-Hant-TW", "x-dothraki"])
def test_language_tag_is_accepted(language: str) -> None:
    assert TrainConfig(language=language).language == language


def test_errors_list_the_allowed_values() -> None:
    with pytest.raises(ConfigError, match="auto, cpu, cuda, mps"):
        TrainConfig(device="gpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="from 3 to 200"):
        DecodingOptions(max_length=1)
    with pytest.raises(ConfigError, match="at least 1"):
        TrainConfig(min_count=0)


def test_every_field_is_described() -> None:
    for cls in (ModelConfig, DecodingOptions, Appearance, TrainConfig):
        for name, field in cls.__pydantic_fields__.items():  # type: ignore[union-attr]
            assert field.description, f"{cls.__name__}.{name}"


def test_settings_survive_pickling() -> None:
    config = TrainConfig.from_recipe("best")
    assert pickle.loads(pickle.dumps(config)) == config


def test_ends_of_a_range_are_accepted() -> None:
    DecodingOptions(beam_size=1, max_length=3, length_penalty=0, top_p=1, temperature=0)
    DecodingOptions(beam_size=100, max_length=200, length_penalty=5, temperature=10)
    model_config(vocabulary_size=5, encoder_channels=1, dropout=0.95)


def test_tied_embedding_needs_deep_output() -> None:
    with pytest.raises(ConfigError, match=r"tied_embedding needs deep_output"):
        model_config(tied_embedding=True)


def test_train_config_validates_its_model_fields() -> None:
    with pytest.raises(ConfigError, match="ModelConfig has no field attention_heads"):
        TrainConfig(model={"attention_heads": 8})
    with pytest.raises(ConfigError, match="tied_embedding"):
        TrainConfig(model={"tied_embedding": True})


def test_model_sizes_that_follow_from_the_data_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocabulary_size follows from data"):
        TrainConfig(model={"vocabulary_size": 7})


def test_long_values_are_shortened_in_errors() -> None:
    with pytest.raises(ConfigError) as refused:
        TrainConfig(captions="x" * 10**6)  # type: ignore[arg-type]
    assert len(str(refused.value)) < 200


def test_seed_recipe_matches_the_report() -> None:
    config = TrainConfig.from_recipe("seed")

    assert config.recipe == "seed"
    assert config.encoder == "resnet50"
    assert (config.captions, config.validation, config.select_by) == ("first", "random", "loss")
    assert (config.batch_size, config.patience, config.max_length) == (32, 3, 20)
    assert (config.min_count, config.weight_decay, config.label_smoothing) == (5, 0, 0)
    model = config.model_config(vocabulary_size=3881, encoder_channels=2048)
    assert (model.embedding_size, model.hidden_size, model.attention_size) == (256, 512, 256)
    # Every option is off.
    assert not any(value is True for value in model.to_dict().values())
    assert (model.dropout, model.feature_dropout, config.attention_gain) == (0, 0, 1)


def test_best_recipe_uses_every_caption_and_takes_changes() -> None:
    config = TrainConfig.from_recipe("best", epochs=2, encoder="efficientnet_lite2")

    assert (config.recipe, config.captions, config.epochs) == ("best", "all", 2)
    assert config.encoder == "efficientnet_lite2"
    assert config.model_config(vocabulary_size=50, encoder_channels=8).vocabulary_size == 50


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'worst'.* seed, best"):
        TrainConfig.from_recipe("worst")


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_round_trips_and_fits_its_model(name: str) -> None:
    config = TrainConfig.from_recipe(name)

    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.model_config(vocabulary_size=9, encoder_channels=3).encoder_channels == 3


def test_plain_greedy_decoding_has_no_bans() -> None:
    options = DecodingOptions.plain_greedy()

    assert (options.beam_size, options.temperature, options.max_length) == (1, 0, 20)
    assert not options.ban_repeats
    assert not options.ban_trigrams
    assert not options.ban_unknown
    assert not options.ban_bad_endings


def test_default_decoding_is_beam_three_with_bans() -> None:
    options = DecodingOptions()

    assert (options.beam_size, options.temperature) == (3, 0)
    assert options.ban_repeats
    assert options.ban_trigrams
    assert options.ban_unknown
    assert options.ban_bad_endings
    assert {"a", "the", "of"} <= set(BAD_ENDINGS)


def test_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="beam_size"):
        DecodingOptions(beam_size=0)
    assert issubclass(ConfigError, CaptionerError)
