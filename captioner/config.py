"""All settings, as frozen dataclasses that are checked once, when they are made."""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
from pathlib import Path
from typing import Any, Self

from captioner.errors import ConfigError

DEFAULT_SOURCE = "AnyModal/flickr30k"
FEATURES_FOLDER = Path("runs/features")
# What ``captioner.overlay`` can export a caption as.
FORMATS = ("png", "gif", "json", "html")
DEFAULT_LANGUAGE = "en"
# The ids of <pad>, <bos>, <eos> and <unk>, in every vocabulary.
PAD, BOS, EOS, UNK = range(4)
# fmt: off
BAD_ENDINGS = (
    "a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "the", "to", "with",
)
# fmt: on
# Han, kana and Bopomofo, for a regular expression: each of these characters counts as a word.
CHARACTER_WORDS = (
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U0001aff0-\U0001b16f\U00020000-\U0003fffd"
)
# What is removed from such a text to display it.
INNER_SPACE = re.compile(rf"(?<=[{CHARACTER_WORDS}]) (?=[{CHARACTER_WORDS}])")


def is_language(value: object) -> bool:
    """Return whether ``value`` has the form of a BCP 47 tag, such as "de" or "zh-Hant"."""
    tag = r"[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8}){0,5}"
    return isinstance(value, str) and re.fullmatch(tag, value) is not None


# What a field's annotation allows, and how to say so.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "bool | str": ((bool, str), "true, false or auto"),
    "str": ((str,), "text"),
    "str | None": ((str, type(None)), "text or nothing"),
    "dict[str, Any]": ((dict,), "names with values"),
}


def _check(config: object, **ranges: tuple[float, float]) -> None:
    """Refuse any field that is not of its type, and any named one outside its closed range."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        kinds, wanted = _TYPES[str(field.type)]
        # A bool is an int to Python; NaN fails both comparisons.
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if field.name in ranges:
            low, high = ranges[field.name]
            fits = fits and low <= value <= high
            wanted += f" of at least {low:g}" if high == math.inf else f" from {low:g} to {high:g}"
        if not fits:
            raise ConfigError(f"{field.name} is {reprlib.repr(value)}; it must be {wanted}")


def _choose(config: object, **choices: tuple[str | bool, ...]) -> None:
    """Refuse any named field that is not one of its allowed values."""
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(
                f"{name} is {reprlib.repr(getattr(config, name))}; it must be one of "
                f"{', '.join(map(str, allowed)).replace('True, False', 'true, false')}"
            )


class _Config:
    """Plain dictionaries in and out, for JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from named fields; a missing or unknown one raises ``ConfigError``."""
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(map(str, set(values) - known)):
            raise ConfigError(f"{cls.__name__} does not know: {', '.join(unknown)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(_Config):
    """The decoder's shape. With every option off it is the report's model.

    Attributes:
        vocabulary_size: V, specials included.
        encoder_channels: C, the length of one grid cell's vector.
        embedding_size: E.
        hidden_size: H, of the LSTM.
        attention_size: width of the additive attention.
        feature_size: length of each cell's vector after a learned projection (linear, ReLU) that
            attention, LSTM and output read it through; 0 is none.
        feature_norm: bring each cell's vector to mean 0 and deviation 1 (Ba et al. 2016).
        word_query: the attention also asks with the word before, which the hidden state has not
            seen yet when it looks.
        mean_start: h0 and c0 from the mean of the cells (Xu et al. 2015, 3.1.2), else zeros.
        context_gate: a scalar gate on the context (Xu et al. 2015, section 4.2.1).
        deep_output: logits from hidden state, previous word and context (Xu et al. 2015, eq. 7).
        tied_embedding: the output layer shares the embedding's matrix; needs ``deep_output``.
        dropout: share of zeroed units before the LSTM's word input and before the output layer.
        feature_dropout: share of zeroed channels of the encoder's features.
    """

    vocabulary_size: int
    encoder_channels: int
    embedding_size: int = 256
    hidden_size: int = 512
    attention_size: int = 256
    feature_size: int = 0
    feature_norm: bool = False
    word_query: bool = False
    mean_start: bool = False
    context_gate: bool = False
    deep_output: bool = False
    tied_embedding: bool = False
    dropout: float = 0.0
    feature_dropout: float = 0.0

    def __post_init__(self) -> None:
        _check(
            self,
            vocabulary_size=(5, 10**7),
            encoder_channels=(1, 10**5),
            embedding_size=(1, 10**5),
            hidden_size=(1, 10**5),
            attention_size=(1, 10**5),
            feature_size=(0, 10**5),
            dropout=(0, 0.95),
            feature_dropout=(0, 0.95),
        )
        if self.tied_embedding and not self.deep_output:
            raise ConfigError(
                "tied_embedding needs deep_output, which brings the hidden state to the size of "
                "the embedding: set both or neither"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingOptions(_Config):
    """How a caption is searched for. The defaults are what the app uses.

    Attributes:
        beam_size: hypotheses kept at each step; 1 is greedy; unused when ``temperature`` draws.
        length_penalty: hypotheses are ranked by log-probability / length ** length_penalty;
            0 ranks by the bare sum, 1 by the mean.
        max_length: ids a caption may have, ``<bos>`` and ``<eos>`` included.
        temperature: 0 searches; above 0 each word is drawn, the likelier the lower it is.
        top_p: when drawing, only the likeliest words that together reach this probability.
        samples: captions drawn when ``temperature`` is above 0.
        seed: of the drawing.
        prefix: words the caption has to begin with.
        ban_repeats: never the same word twice in a row.
        ban_trigrams: never the same three words twice.
        ban_unknown: never ``<unk>``.
        ban_bad_endings: never end on "a", "the", "of" and their like.
    """

    beam_size: int = 3
    length_penalty: float = 0.5
    max_length: int = 20
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    prefix: str = ""
    ban_repeats: bool = True
    ban_trigrams: bool = True
    ban_unknown: bool = True
    ban_bad_endings: bool = True

    def __post_init__(self) -> None:
        _check(
            self,
            beam_size=(1, 100),
            length_penalty=(0, 5),
            max_length=(3, 200),
            temperature=(0, 10),
            top_p=(1e-6, 1),
            samples=(1, 100),
            seed=(0, 2**63 - 1),
        )
        if 0 < self.temperature < 0.01:
            raise ConfigError(
                f"temperature is {self.temperature!r}; it must be 0 (a search) or at least 0.01"
            )

    @classmethod
    def plain_greedy(cls) -> Self:
        """Return what the original report does: greedy, no bans."""
        return cls(
            beam_size=1,
            ban_repeats=False,
            ban_trigrams=False,
            ban_unknown=False,
            ban_bad_endings=False,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Appearance(_Config):
    """How attention maps are drawn, in the page and in exports.

    Attributes:
        colors: a colormap, "inferno", "viridis" or "cividis", which is laid over the photo, or
            "light", which only darkens the photo where the model did not look.
        shape: "smooth" interpolates between the grid's cells, "cells" shows them as they are.
        scale: a map runs from the weakest to the strongest cell of its "word", or of all words of
            the "caption", so that maps can be compared.
        strength: 0 shows the photo alone, 1 the strongest map.
    """

    colors: str = "inferno"
    shape: str = "smooth"
    scale: str = "word"
    strength: float = 0.75

    def __post_init__(self) -> None:
        _check(self, strength=(0, 1))
        _choose(
            self,
            colors=("inferno", "viridis", "cividis", "light"),
            shape=("smooth", "cells"),
            scale=("word", "caption"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(_Config):
    """What a training run does; ``TrainConfig.from_recipe`` gives the two meant to be used.

    Attributes:
        data: Hub id, folder of Parquet, or folder of photos with a captions file.
        encoder: name of the frozen backbone, see ``captioner.encoders``.
        encoder_weights: file with its weights, or None for the encoder's own source.
        recipe: the name under which the other settings go.
        captions: "first" trains on each photo's first caption, "all" on all of them.
        language: BCP 47 tag of the captions, such as "en", "de" or "zh-Hant". It changes nothing
            in training; browsers, screen readers and exports need it to show captions right.
        validation: "random" holds 10 % of the training photos back, "split" takes the data's own
            validation split (and falls back to "random" where there is none).
        select_by: what chooses the best epoch: "loss" or "cider" of freely decoded captions.
        limit: at most so many photos of each split; 0 takes all.
        max_length: ids of a caption, ``<bos>`` and ``<eos>`` included.
        min_count: a word seen less often becomes ``<unk>``.
        word2vec: start the embedding from gensim's Word2Vec of the training captions.
        attention_gain: times which the attention's ``Wh`` and ``v`` start larger. At 1 the maps of
            a short training stay nearly even and alike for all words.
        views: how many views of each photo there are, of which an epoch shows one: 1 the photo as
            it is; 2 also mirrored, "left" and "right" swapped in its captions; each further one a
            random part of it, half of them mirrored.
        text: folder of Parquet with more captions (``alt_text``), without photos, or None.
            Word2Vec reads them too; the vocabulary stays that of the training captions.
        text_epochs: the decoder first reads them and the training captions so many times, with
            the mean cell of all photos in place of a photo. Without ``text`` none.
        batch_size: photos a step.
        epochs: at most so many.
        patience: epochs without a better score before training stops.
        learning_rate: the highest that the schedule reaches.
        schedule: "plateau" divides it by 10 after 2 epochs without a lower validation loss;
            "cosine" warms up over ``warmup`` of the steps and then falls to zero.
        warmup: share of all steps.
        weight_decay: decoupled (AdamW); 0 is Adam.
        gradient_clip: largest gradient norm; 0 is none.
        label_smoothing: of the training loss; validation loss is never smoothed.
        ema_decay: of the averaged weights that are scored and saved; 0 is none.
        bfloat16: whether training multiplies matrices in bfloat16 (the weights stay float32);
            "auto" does where this machine is faster with it.
        reward_epochs: at most so many of self-critical training on CIDEr-D, from the best epoch
            of cross-entropy on (Rennie et al. 2017).
        reward_batch_size: photos a step of it.
        reward_samples: captions drawn of each photo.
        reward_temperature: of the drawing, and of what is learned.
        reward_learning_rate: at its first step; it falls to zero as a half cosine.
        seed: of everything random.
        device: "auto", "cpu", "cuda" or "mps".
        model: the fields of ``ModelConfig`` that the recipe sets.
    """

    data: str = DEFAULT_SOURCE
    encoder: str = "resnet50"
    encoder_weights: str | None = None
    recipe: str = "seed"
    captions: str = "first"
    language: str = DEFAULT_LANGUAGE
    validation: str = "random"
    select_by: str = "loss"
    limit: int = 0
    max_length: int = 20
    min_count: int = 5
    word2vec: bool = True
    attention_gain: float = 1.0
    views: int = 1
    text: str | None = None
    text_epochs: int = 1
    batch_size: int = 32
    epochs: int = 30
    patience: int = 3
    learning_rate: float = 1e-3
    schedule: str = "plateau"
    warmup: float = 0.0
    weight_decay: float = 0.0
    gradient_clip: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    bfloat16: bool | str = "auto"
    reward_epochs: int = 0
    reward_batch_size: int = 64
    reward_samples: int = 5
    reward_temperature: float = 0.5
    reward_learning_rate: float = 5e-5
    seed: int = 0
    device: str = "auto"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(
            self,
            limit=(0, math.inf),
            max_length=(3, 200),
            min_count=(1, math.inf),
            attention_gain=(0.01, 100),
            views=(1, 100),
            text_epochs=(0, 10**6),
            batch_size=(1, 10**6),
            epochs=(1, 10**6),
            patience=(1, 10**6),
            learning_rate=(1e-12, 10),
            warmup=(0, 1),
            weight_decay=(0, 10),
            gradient_clip=(0, math.inf),
            label_smoothing=(0, 0.9),
            ema_decay=(0, 0.999999),
            reward_epochs=(0, 10**6),
            reward_batch_size=(1, 10**6),
            reward_samples=(2, 1000),
            reward_temperature=(0.05, 10),
            reward_learning_rate=(1e-12, 10),
            seed=(0, 2**32 - 1),
        )
        _choose(
            self,
            captions=("first", "all"),
            validation=("random", "split"),
            select_by=("loss", "cider"),
            schedule=("plateau", "cosine"),
            device=("auto", "cpu", "cuda", "mps"),
            recipe=tuple(RECIPES),
            bfloat16=(True, False, "auto"),
        )
        if not is_language(self.language):
            raise ConfigError(
                f"language is {reprlib.repr(self.language)}; it must be a BCP 47 tag, such as en, "
                "de or zh-Hant"
            )
        self.model_config(vocabulary_size=5, encoder_channels=1)

    def model_config(self, *, vocabulary_size: int, encoder_channels: int) -> ModelConfig:
        """Return the decoder's shape for a vocabulary and an encoder."""
        sizes = {"vocabulary_size": vocabulary_size, "encoder_channels": encoder_channels}
        if taken := sorted(sizes.keys() & self.model.keys()):
            raise ConfigError(f"model.{taken[0]} follows from data and encoder: leave it away")
        return ModelConfig.from_dict({**sizes, **self.model})

    @classmethod
    def from_recipe(cls, name: str, /, **changes: Any) -> Self:
        """Return the recipe ``name`` ("seed" or "best") with some fields changed."""
        if name not in RECIPES:
            raise ConfigError(f"no recipe is called {name!r}; there are: {', '.join(RECIPES)}")
        return cls.from_dict({"recipe": name, **RECIPES[name], **changes})


# "seed" is the report's own recipe: every field's default. "best" is what paid here.
RECIPES: dict[str, dict[str, Any]] = {
    "seed": {},
    "best": {
        "captions": "all",
        "validation": "split",
        "select_by": "cider",
        "attention_gain": 4.0,
        "views": 3,
        "text_epochs": 2,
        "batch_size": 32,
        "epochs": 8,
        "patience": 3,
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup": 0.05,
        "weight_decay": 0.01,
        "gradient_clip": 5.0,
        "label_smoothing": 0.1,
        "ema_decay": 0.997,
        "reward_epochs": 6,
        "reward_learning_rate": 1e-4,
        "model": {
            "feature_size": 512,
            "feature_norm": True,
            "word_query": True,
            "context_gate": True,
            "deep_output": True,
            "tied_embedding": True,
            "dropout": 0.4,
            "feature_dropout": 0.2,
        },
    },
}
