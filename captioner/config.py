"""All settings, as frozen dataclasses whose values pydantic validates.

A field's type is its validation; the text below it is its documentation and its ``--help``.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, dataclass_transform, get_args

import pydantic.dataclasses
from annotated_types import Ge, Le, MinLen
from pydantic import ConfigDict, Field, ValidationError

from captioner.errors import ConfigError

DEFAULT_SOURCE = "AnyModal/flickr30k"
FEATURES_FOLDER = Path("runs/features")
# The formats that ``captioner.inference.render`` can export a caption as.
FORMATS = ("png", "gif", "json", "html")
# The maps of a word (``model/maps.py``) and where a word comes from (``model/verdicts.py``).
MAPS = ("attended", "evidence", "mattered", "shown")
VERDICTS = ("seen there", "from the scene", "from the sentence", "guessed")
DEFAULT_LANGUAGE = "en"
# The ids of <pad>, <bos>, <eos> and <unk>, in every vocabulary.
PAD, BOS, EOS, UNK = range(4)
# The fields of ``ModelConfig`` that follow from the data and the encoder.
# fmt: off
DATA_FIELDS = frozenset((
    "vocabulary_size", "encoder_channels", "num_detectors", "class_names", "classifier_channels",
    "kinds",
))
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
BETWEEN_CHARACTERS = re.compile(rf"(?<=[{CHARACTER_WORDS}])(?=[{CHARACTER_WORDS}])")
# The spaces between them and after "l'", which are removed for display.
INNER_SPACE = re.compile(rf"(?<=[{CHARACTER_WORDS}]) (?=[{CHARACTER_WORDS}])|(?<=') (?=\w)")


def is_language(value: object) -> bool:
    """Return whether ``value`` has the form of a BCP 47 tag, such as "de" or "zh-Hant"."""
    tag = r"[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8}){0,5}"
    return isinstance(value, str) and re.fullmatch(tag, value) is not None


def is_english(language: str) -> bool:
    """Return whether a BCP 47 tag is of a kind of English."""
    return language.lower().partition("-")[0] == "en"


def split_share(source: str) -> tuple[str, str]:
    """Split "photos=0.3" into a source and its share of each epoch, empty if it has none."""
    name, equals, share = source.rpartition("=")
    return (name, share) if equals else (source, "")


_T = TypeVar("_T", bound=type)
_Probability = Annotated[float, Field(ge=0, le=1)]
_Dropout = Annotated[float, Field(ge=0, le=0.95)]
_Size = Annotated[int, Field(ge=1, le=100_000)]
_Count = Annotated[int, Field(ge=1, le=1_000_000)]
_CountOrZero = Annotated[int, Field(ge=0, le=1_000_000)]
_MaxLength = Annotated[int, Field(ge=3, le=200)]
_LearningRate = Annotated[float, Field(ge=1e-12, le=10)]
# Not strict: JSON and the command line have lists, not tuples.
# The title stands for the value in --help.
_Columns = Annotated[tuple[str, ...], Field(strict=False, title="NAME")]
_Pairs = Annotated[tuple[str, ...], Field(strict=False, title="LEFT=RIGHT")]
_Column = Annotated[str | None, Field(title="NAME")]
_Sources = Annotated[tuple[str, ...], Field(strict=False, min_length=1, title="SOURCE")]
_DESCRIPTIONS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple[str, ...]: "a list of at least one text",
    str | None: "text or nothing",
    bool | Literal["auto"]: "true, false or auto",
    dict[str, Any]: "names with values",
}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _settings(cls: _T) -> _T:
    """Make a frozen dataclass whose arguments are validated, with ``ConfigError`` if one fails."""
    config = ConfigDict(
        strict=True, allow_inf_nan=False, extra="forbid", use_attribute_docstrings=True
    )
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    validate = made.__init__

    def __init__(self: object, /, **values: Any) -> None:
        try:
            validate(self, **values)
        except ValidationError as error:
            raise ConfigError(_message(made, values, error)) from None

    made.__init__ = __init__
    return made


def _message(cls: Any, values: dict[str, Any], error: ValidationError) -> str:
    """Return one sentence for the most helpful of the errors that pydantic found."""
    errors = error.errors(include_url=False, include_input=False)
    if unknown := sorted(values.keys() - cls.__pydantic_fields__.keys()):
        return f"{cls.__name__} has no field {', '.join(unknown)}"
    if errors[0]["type"] == "value_error":
        return str(errors[0]["ctx"]["error"])
    name = str(errors[0]["loc"][0])
    if name not in values:
        return f"{cls.__name__} needs a value for {name}"
    field = cls.__pydantic_fields__[name]
    return f"{name} is {reprlib.repr(values[name])}; it must be {_allowed(field)}"


def _allowed(field: Any) -> str:
    """Return the values that a field allows, as in "a whole number from 1 to 100"."""
    if field.annotation not in _DESCRIPTIONS:
        return f"one of {', '.join(get_args(field.annotation))}"
    text = _DESCRIPTIONS[field.annotation]
    if field.annotation == tuple[str, ...] and not any(
        isinstance(limit, MinLen) for limit in field.metadata
    ):
        return "a list of texts"
    match field.metadata:
        case [Ge(low), Le(high)]:
            return f"{text} from {low} to {high}"
        case [Ge(low)]:
            return f"{text} of at least {low}"
    return text


class _Config:
    """Plain dictionaries in and out, for JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from named fields; a missing or unknown one raises ``ConfigError``."""
        return cls(**values)


@_settings
class ModelConfig(_Config):
    """The decoder's shape. The defaults give the original report's model."""

    vocabulary_size: Annotated[int, Field(ge=5, le=10_000_000)]
    """Number of words (V), the four special tokens included."""
    encoder_channels: _Size
    """Length of each grid cell's feature vector (C)."""
    embedding_size: _Size = 256
    """Size of the word embedding (E)."""
    hidden_size: _Size = 512
    """Size of the LSTM's hidden state (H)."""
    attention_size: _Size = 256
    """Width of the additive attention."""
    feature_size: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Size to which a learned projection (linear, ReLU) brings each cell's vector before
    attention, LSTM and output read it. 0 = no projection."""
    feature_norm: bool = False
    """Normalize each cell's vector to mean 0 and standard deviation 1 (Ba et al. 2016)."""
    word_query: bool = False
    """Let the attention's query include the previous word, which the hidden state has not seen yet
    when it attends."""
    mean_start: bool = False
    """Compute h0 and c0 from the mean of the cells (Xu et al. 2015, 3.1.2) instead of zeros."""
    context_gate: bool = False
    """Scale the context by a learned scalar gate (Xu et al. 2015, 4.2.1)."""
    deep_output: bool = False
    """Compute logits from hidden state, previous word and context (Xu et al. 2015, eq. 7)."""
    tied_embedding: bool = False
    """Share the embedding's matrix with the output layer; needs deep_output."""
    evidence: bool = False
    """Add to each word's logit what its detector sees in the attended cells; needs
    --detector-epochs."""
    num_detectors: Annotated[int, Field(ge=0)] = 0
    """Number of words with a detector (D); in the vocabulary they follow the special tokens."""
    class_names: list[list[int]] = Field(default_factory=list)
    """For each class that the backbone's classifier knows, the ids of its name's one or two words;
    empty without a pointer."""
    classifier_channels: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Number of channels, from the first on, that this classifier reads."""
    kinds: list[int] = Field(default_factory=list)
    """For each word at the end of the vocabulary that no training caption holds, and that can only
    be pointed at: the id of a word for something that looks alike, whose embedding it shares."""
    name_dropout: _Dropout = 0.0
    """Share of the names that the output layer may not write in training while the pointer can
    supply them, so that it learns to."""
    dropout: _Dropout = 0.0
    """Dropout on the word embedding and on the output layer's input."""
    feature_dropout: _Dropout = 0.0
    """Dropout of whole channels of the encoder's features."""

    def __post_init__(self) -> None:
        if self.tied_embedding and not self.deep_output:
            raise ConfigError(
                "tied_embedding needs deep_output, which brings the hidden state to the size of "
                "the embedding: set both or neither"
            )
        words = range(UNK + 1, self.vocabulary_size)
        if self.num_detectors + len(self.kinds) > len(words):
            raise ConfigError(
                f"{self.num_detectors} words with a detector and {len(self.kinds)} that are never "
                f"written do not fit into a vocabulary of {self.vocabulary_size}"
            )
        if any(
            len(ids) not in (1, 2) or not all(word_id in words for word_id in ids)
            for ids in self.class_names
        ) or not all(0 <= word_id < self.vocabulary_size for word_id in self.kinds):
            raise ConfigError("class_names and kinds must hold ids of words in the vocabulary")
        if self.class_names and not 0 < self.classifier_channels <= self.encoder_channels:
            raise ConfigError(
                f"classifier_channels is {self.classifier_channels}; it must be from 1 to "
                f"encoder_channels, {self.encoder_channels}"
            )


@_settings
class DecodingOptions(_Config):
    """How captions are decoded. The defaults are those of the app."""

    beam_size: Annotated[int, Field(ge=1, le=100)] = 3
    """Number of hypotheses kept at each step. 1 = greedy. Unused with a temperature above 0."""
    length_penalty: Annotated[float, Field(ge=0, le=5)] = 0.5
    """Hypotheses are ranked by log-probability / length ** length_penalty: 0 ranks by the sum, 1 by
    the mean, and higher values favor longer captions."""
    max_length: _MaxLength = 20
    """Maximum number of tokens, <bos> and <eos> included."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """0 = beam search; above 0 samples words, more randomly as it rises."""
    top_p: Annotated[float, Field(ge=1e-6, le=1)] = 1.0
    """When sampling, choose among the most likely words that together reach this probability."""
    samples: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of captions to sample; needs a temperature above 0."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Random seed for sampling."""
    prefix: str = ""
    """Words with which the caption begins."""
    ban_repeats: bool = True
    """Never write the same word twice in a row, nor a Chinese or Japanese character three times."""
    ban_trigrams: bool = True
    """Never write the same three words twice."""
    ban_unknown: bool = True
    """Never write <unk>."""
    ban_bad_endings: bool = True
    """Never end on "a", "the", "of" and the like; English only."""

    def __post_init__(self) -> None:
        if 0 < self.temperature < 0.01:
            raise ConfigError(
                f"temperature is {self.temperature!r}; it must be 0 (beam search) or at least 0.01"
            )

    @classmethod
    def plain_greedy(cls) -> Self:
        """Return the original report's decoding: greedy, no bans."""
        return cls(
            beam_size=1,
            ban_repeats=False,
            ban_trigrams=False,
            ban_unknown=False,
            ban_bad_endings=False,
        )


@_settings
class Appearance(_Config):
    """How maps are drawn, in the page and in exports."""

    map: Literal["attended", "evidence", "mattered", "shown"] = "evidence"
    """Which of a word's maps (``MAPS``); words without it show the attention instead."""
    special: bool = False
    """Draw what is special to the word: the difference from the mean of the caption's maps."""
    colors: Literal["inferno", "viridis", "cividis", "light"] = "inferno"
    """Colormap laid over the photo; "light" only darkens the photo where the map is low."""
    shape: Literal["smooth", "cells"] = "smooth"
    """"smooth" interpolates between the grid's cells, "cells" shows them as they are."""
    scale: Literal["word", "caption"] = "word"
    """Range of the color scale: from the weakest to the strongest cell of each "word", or of the
    whole "caption", which makes its maps comparable."""
    strength: _Probability = 0.75
    """Opacity of the maps: 0 shows the photo alone, 1 the strongest map."""


@_settings
class TrainConfig(_Config):
    """The settings of a training run. ``TrainConfig.from_recipe`` returns one of the two recipes.

    ``recipe`` only names the recipe that the other settings come from.
    """

    data: _Sources = (DEFAULT_SOURCE,)
    """Photos with captions: a Hub id (owner/name, owner/name:configuration, owner/name@revision) or
    its web address, a folder, or a file (.parquet .arrow .json .jsonl .csv .tsv .tar); README.md
    lists the layouts. Repeat the option to train on several sources: SOURCE=0.3 gives one of them
    30% of each epoch, and those without a share divide the rest by their sizes."""
    image_column: _Column = None
    """Column with the photos or their file names. Without it, the first of image, img, jpg, jpeg,
    png, webp, photo, image_path, file_name and filename."""
    caption_column: _Columns = ()
    """Column with captions; repeat the option to take several. Without it, the first of alt_text,
    caption, captions, text, txt, sentences, sentence and comment, else caption_0, caption_1, ..."""
    encoder: str = "resnet50"
    """Frozen backbone: resnet50, efficientnet_lite2 or timm:<name>."""
    encoder_weights: str | None = None
    """File with the encoder's weights, used instead of a download."""
    recipe: Literal["seed", "best"] = "seed"
    """Defaults of all settings. seed = as in the original report; best = with everything that
    helped."""
    captions: Literal["first", "all"] = "first"
    """Train on each photo's first caption, or on all of them."""
    language: str = DEFAULT_LANGUAGE
    """BCP 47 tag of the captions' language, such as en, de or zh-Hant. It decides which
    words mirrored photos swap; browsers, screen readers and exports use it. English only:
    --pointer, banned endings, the function words that get no detector, plurals in the confidence,
    and in captioner evaluate the count of people and the kinds of words."""
    validation: Literal["random", "split"] = "random"
    """random = hold back 10% of the training photos; split = use the data's own validation split,
    or random if it has none."""
    select_by: Literal["loss", "cider"] = "loss"
    """How the best epoch is chosen: by validation loss, or by CIDEr-D of generated captions."""
    limit: Annotated[int, Field(ge=0)] = 0
    """Maximum number of photos per source and split. 0 = all."""
    max_length: _MaxLength = 20
    """Maximum number of tokens per caption, <bos> and <eos> included."""
    min_count: Annotated[int, Field(ge=1)] = 5
    """Words that occur fewer times than this become <unk>."""
    word2vec: bool = True
    """Initialize the embedding with Word2Vec vectors of the training captions."""
    detector_epochs: _CountOrZero = 0
    """Epochs of learning word detectors from the captions before everything else: what each cell
    shows (Fang et al. 2015). 0 = no detectors."""
    detector_photos: Annotated[int, Field(ge=1)] = 15
    """Words in the captions of fewer photos get no detector."""
    attention_weight: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weight of a loss that draws each word's attention to the cells where its detector sees it
    (Liu et al. 2017); needs detectors."""
    pointer: bool = False
    """Let captions name what the backbone's own ImageNet classifier recognizes (Li et al. 2019).
    Other languages than English, and encoders without such a classifier, do without."""
    attention_gain: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Factor on the initial weights Wh and v of the attention. At 1, maps stay nearly uniform
    after a short training run and look alike for all words."""
    views: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of views of each photo; each epoch uses one. 1 = the photo itself; 2 = also mirrored,
    with left and right swapped in its captions; each further view is a random crop."""
    mirror_words: _Pairs = ()
    """Two words that mirrored photos swap in their captions, such as vasen=oikea; repeat the option
    for each form. Needed with several views, except in English, French, German, Arabic, Hindi,
    Chinese and Japanese, whose words for left and right are known."""
    text: str | None = None
    """More captions without photos, to be learned first: a source as for --data.
    Word2Vec uses them too; the vocabulary remains that of the training captions."""
    text_epochs: _CountOrZero = 1
    """Epochs on the captions of --text together with the training captions, with the mean cell of
    all photos in place of a photo."""
    batch_size: _Count = 32
    """Photos per step."""
    epochs: _Count = 30
    """Maximum number of epochs."""
    patience: _Count = 3
    """Epochs without improvement before training stops."""
    learning_rate: _LearningRate = 1e-3
    """Peak learning rate."""
    schedule: Literal["plateau", "cosine"] = "plateau"
    """plateau = divide the learning rate by 10 after 2 epochs without a lower validation loss;
    cosine = linear warmup, then cosine decay to zero."""
    warmup: _Probability = 0.0
    """Share of all steps used for warmup by the cosine schedule."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Decoupled weight decay (AdamW). 0 = Adam."""
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0
    """Maximum gradient norm. 0 = no clipping."""
    label_smoothing: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Label smoothing of the training loss; the validation loss has none."""
    ema_decay: Annotated[float, Field(ge=0, le=0.999999)] = 0.0
    """Decay of the averaged weights, which are evaluated and saved. 0 = no averaging."""
    bfloat16: bool | Literal["auto"] = "auto"
    """Multiply matrices in bfloat16 while training (weights stay float32); auto = only if that
    is faster on this machine."""
    reward_epochs: _CountOrZero = 0
    """Maximum number of epochs of self-critical training on CIDEr-D (Rennie et al. 2017) after
    cross-entropy, starting from its best epoch."""
    reward_batch_size: _Count = 64
    """Photos per step of self-critical training."""
    reward_samples: Annotated[int, Field(ge=2, le=1000)] = 5
    """Captions sampled per photo in self-critical training."""
    reward_temperature: Annotated[float, Field(ge=0.05, le=10)] = 0.5
    """Temperature of the sampling and of the learned distribution in self-critical training."""
    reward_learning_rate: _LearningRate = 5e-5
    """Initial learning rate of self-critical training, which a half cosine brings to zero."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Random seed for everything."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on; auto = the fastest available."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Fields of ModelConfig that differ from its defaults."""

    def __post_init__(self) -> None:
        if not is_language(self.language):
            raise ConfigError(
                f"language is {reprlib.repr(self.language)}; it must be a BCP 47 tag, such as en, "
                "de or zh-Hant"
            )
        model = self.model_config(vocabulary_size=5, encoder_channels=1)
        if not self.detector_epochs and (self.attention_weight or model.evidence):
            raise ConfigError(
                "attention_weight and model.evidence need word detectors: set detector_epochs, 5 "
                "for example"
            )

    def model_config(
        self, *, vocabulary_size: int, encoder_channels: int, **words: Any
    ) -> ModelConfig:
        """Return the decoder's shape for a vocabulary and an encoder.

        Args:
            vocabulary_size: V.
            encoder_channels: C.
            words: the other fields of ``ModelConfig`` that follow from the data.
        """
        sizes = {
            "vocabulary_size": vocabulary_size,
            "encoder_channels": encoder_channels,
            **words,
        }
        if fixed := sorted(DATA_FIELDS & self.model.keys()):
            raise ConfigError(f"model.{fixed[0]} follows from data and encoder: leave it out")
        return ModelConfig.from_dict({**sizes, **self.model})

    @classmethod
    def from_recipe(cls, name: str, /, **changes: Any) -> Self:
        """Return the recipe ``name`` ("seed" or "best") with some fields changed."""
        if name not in RECIPES:
            raise ConfigError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
        return cls.from_dict({"recipe": name, **RECIPES[name], **changes})


# "seed" is the original report's recipe: all defaults. "best" adds everything that helped.
RECIPES: dict[str, dict[str, Any]] = {
    "seed": {},
    "best": {
        "captions": "all",
        "validation": "split",
        "select_by": "cider",
        "min_count": 3,
        "detector_epochs": 3,
        "attention_weight": 2.0,
        "pointer": True,
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
            "evidence": True,
            "name_dropout": 0.5,
            "dropout": 0.4,
            "feature_dropout": 0.2,
        },
    },
}
