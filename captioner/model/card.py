"""The model card of a checkpoint: Markdown for its README.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from captioner.config import DEFAULT_LANGUAGE, split_share

_TITLE = "Image captions with attention"
_TASK = "image-to-text"  # of the Hub
# The Hub's names of the metrics.
_METRIC_TYPES = {
    **{f"BLEU-{n}": "bleu" for n in range(1, 5)},
    "CIDEr": "cider",
    "ROUGE-L": "rouge",
}
# What the data sets that shipped checkpoints learned from show, by a part of their names.
_SCENES = {
    "flickr": "snapshots, many of people and dogs outdoors",
    "everyday": "photos of rooms, food, things, vehicles, animals and buildings",
}
_OTHER_SCENES = "It knows scenes like those of its training photos. "
_EVERYDAY_CAPTIONS = (
    "The captions of `everyday` were written by a language model that saw each photo, not by "
    "people. "
)
_NAMES = (
    "It can also name what its backbone recognizes, which knows ImageNet's 1,000 classes and "
    "confuses similar ones. "
)
_CONFIDENCE = "Its confidence was calibrated on the validation photos and may mislead on others. "
_FLICKR_TERMS = (
    "The photos of Flickr8k and Flickr30k belong to their owners on Flickr; the data sets are "
    "released for research and education. Use this checkpoint under the same terms. "
)
_OTHER_TERMS = "The terms of the photos and captions that it was trained on apply. "


def model_card(
    *,
    encoder_name: str,
    hidden_size: int,
    vocabulary_size: int,
    max_length: int,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, float],
    has_names: bool,
    has_confidence: bool,
) -> str:
    """Return the model card of a checkpoint; see ``Checkpoint`` for most arguments.

    ``has_names`` says whether a caption can name what the backbone recognizes, ``has_confidence``
    whether the checkpoint has a calibrated confidence.
    """
    language = recipe.get("language", DEFAULT_LANGUAGE)
    kind = "an English caption" if language == "en" else f"a caption (language: {language})"
    names = [split_share(source)[0].lower() for source in recipe["data"]]
    is_flickr = ["flickr" in name for name in names]
    knows = _knowledge(names) + _NAMES * has_names
    doubt = _CONFIDENCE * has_confidence
    terms = _FLICKR_TERMS * any(is_flickr) + _OTHER_TERMS * (not all(is_flickr))
    means = " The first ones are means over the sources." if len(is_flickr) > 1 else ""
    numbers = [f"| {_score_name(name)} | {value:.4g} |" for name, value in metrics.items()]
    return "\n".join(
        [
            "---",
            _front_matter(language, recipe, metrics),
            "---",
            "",
            f"# {_TITLE}",
            "",
            f"A frozen `{encoder_name}` turns a photo into 7 x 7 vectors; an LSTM of "
            f"{hidden_size} units writes {kind} of at most "
            f"{max_length - 2} words and attends to the photo anew for each word.",
            "",
            f"Vocabulary: {vocabulary_size:,} entries. Recipe: `{recipe['recipe']}`, "
            f"seed {recipe.get('seed', 'unknown')}. Trained on: "
            + ", ".join(map(_source_name, recipe["data"]))
            + (
                f", after reading the captions of `{recipe['text']}`."
                if recipe.get("text")
                else "."
            ),
            "",
            "## Limits",
            "",
            f"{knows}It describes anything else as the most similar thing that it knows. {doubt}"
            "It miscounts, mixes up colors, guesses people's sex and age from looks, "
            "and repeats the assumptions of its training captions. Don't use it to identify or "
            "judge people, or where a wrong caption does harm. A map shows what a cell gave "
            "to a word, or where the decoder attended; it doesn't prove what caused the word.",
            "",
            "## Scores on the validation photos",
            "",
            "BLEU, CIDEr (CIDEr-D) and ROUGE-L, times 100, of generated captions against all "
            "references; cross-entropy in nats per word, unsmoothed. The epoch was chosen on these "
            f"photos.{means}",
            "",
            "| score | value |",
            "| --- | ---: |",
            *numbers,
            "",
            "## Terms",
            "",
            f"{terms}The encoder's weights come under their own license and are not part of this "
            "folder.",
            "",
        ]
    )


def _front_matter(language: str, recipe: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """Return the YAML by which the Hub lists and searches a model."""
    from huggingface_hub import EvalResult, ModelCardData

    sources = [split_share(source)[0] for source in recipe["data"]]
    texts = [str(recipe["text"])] if recipe.get("text") else []
    results = []
    for metric, value in metrics.items():
        name, _, suffix = metric.partition(" ")
        # With several sources, a metric is followed by the short name of its own, or it is a mean.
        measured = [each for each in sources if f"/{each}".endswith(f"/{suffix}")]
        measured = sources if len(sources) == 1 else measured
        if measured and name in _METRIC_TYPES:
            results.append(
                EvalResult(
                    task_type=_TASK,
                    dataset_type=_dataset_id(measured[0]),
                    dataset_name=measured[0],
                    dataset_split="validation",
                    metric_type=_METRIC_TYPES[name],
                    metric_name=name,
                    metric_value=round(value, 2),
                )
            )
    data = ModelCardData(
        model_name=_TITLE,
        language=language,
        library_name="captioner",
        pipeline_tag=_TASK,
        license="other",
        license_name="terms-of-the-training-data",
        tags=["image-captioning", "attention", "pytorch"],
        datasets=list(dict.fromkeys(map(_dataset_id, [*sources, *texts]))),
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _dataset_id(source: str) -> str:
    """Return owner and name of a source on the Hub, without configuration, revision or file."""
    return "/".join(re.split("[:@]", source)[0].split("/")[:2])


def _knowledge(names: Sequence[str]) -> str:
    """Return what the sources of these lower-case names taught."""
    known = [next((scene for part, scene in _SCENES.items() if part in name), "") for name in names]
    if not all(known):
        return _OTHER_SCENES
    text = f"It was trained on {', and on '.join(dict.fromkeys(known))}. "
    return text + _EVERYDAY_CAPTIONS * ("everyday" in names)


def _source_name(source: str) -> str:
    """Return a source of the recipe with its share in words."""
    name, share = split_share(source)
    return f"`{name}` ({share} of each epoch)" if share else f"`{name}`"


def _score_name(metric: str) -> str:
    """Return the words for a metric; what follows a space is the name of its source."""
    name, *source = metric.split(" ", 1)
    words = {"epoch": "epoch chosen", "val_loss": "cross-entropy"}.get(name, name.replace("_", " "))
    return " ".join([words, *source])
