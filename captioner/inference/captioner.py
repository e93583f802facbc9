"""Captioner: a photo in, a Caption out. Translates between words and ids for the search."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioner.config import BAD_ENDINGS, DEFAULT_LANGUAGE, EOS, UNK, DecodingOptions
from captioner.errors import ConfigError, ImageError
from captioner.images import Photo, full_size, open_photo
from captioner.inference.caption import Beam, Caption, Word
from captioner.model import checkpoint as checkpoints
from captioner.model.card import model_card
from captioner.model.encoder import GRID, Encoder, choose_device, load_encoder
from captioner.model.fast import pack
from captioner.model.search import Hypothesis, beam_search, decode
from captioner.model.vocabulary import SPECIALS, clean

_PACKAGE = Path(__file__).resolve().parents[1]
# A package that pip installed has it inside, a clone among its assets.
SHIPPED_CHECKPOINT = _PACKAGE / "shipped"
if not SHIPPED_CHECKPOINT.is_dir():
    SHIPPED_CHECKPOINT = _PACKAGE.parent / "assets" / "checkpoint"


def near_misses(word: str, known: Sequence[str]) -> list[str]:
    """Return up to three ``known`` words that ``word`` is probably a misspelling of, best first.

    They are one typing error away (a letter missing, added or wrong, or two letters swapped), or
    start alike and share nearly all letters. In words of up to three letters only swaps count: any
    other change makes a different word.
    """

    def shared(one: str, other: str) -> int:
        return sum(itertools.takewhile(bool, map(operator.eq, one, other)))

    def is_typo(other: str) -> bool:
        start = shared(word, other)
        end = shared(word[start:][::-1], other[start:][::-1])
        ours, theirs = word[start : len(word) - end], other[start : len(other) - end]
        if len(ours) == 2 and ours == theirs[::-1]:
            return True
        return len(word) > 3 and max(len(ours), len(theirs)) <= 1

    def closeness(other: str) -> tuple[bool, float]:
        return sorted(other) == sorted(word), difflib.SequenceMatcher(None, word, other).ratio()

    near = [other for other in known if is_typo(other)]
    if len(word) > 3:
        alike = [other for other in known if other[0] == word[0]]
        near += difflib.get_close_matches(word, alike, cutoff=0.83)
    return sorted(dict.fromkeys(near), key=closeness, reverse=True)[:3]


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPhoto:
    """A photo as the decoder reads it, so that many captions of it cost one pass of the encoder.

    Attributes:
        cells: (P, C).
        size: (width, height) of the upright photo in pixels.
    """

    cells: Tensor
    size: tuple[int, int]


class Captioner:
    """An encoder and a decoder that were trained together.

    Attributes:
        checkpoint: model, vocabulary, recipe and metrics.
        encoder: the frozen backbone.
    """

    def __init__(self, checkpoint: checkpoints.Checkpoint, encoder: Encoder) -> None:
        """Join the two; ``CheckpointError`` where the encoder is another than in training."""
        checkpoint.check_encoder(encoder.spec())
        self.checkpoint = checkpoint
        self.encoder = encoder
        self._decoder = pack(checkpoint.model.to(encoder.device))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the packed decoder, which holds the weights of the checkpoint once more."""
        return {**self.__dict__, "_decoder": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the decoder for the machine that this is now."""
        self.__dict__.update(state)
        self._decoder = pack(self.checkpoint.model)

    @classmethod
    def load(
        cls,
        path_or_hub_id: str | Path | None = None,
        encoder_weights: str | Path | None = None,
        *,
        device: str = "cpu",
    ) -> Captioner:
        """Load a checkpoint and its encoder.

        Args:
            path_or_hub_id: a checkpoint's folder or Hub id; None is the one that is shipped.
            encoder_weights: file with the encoder's weights, where they cannot be downloaded.
            device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the fastest that is there.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, or of other encoder weights.
            EncoderError: the encoder's weights cannot be had.
            ConfigError: there is no such device.
        """
        place = choose_device(device)
        checkpoint = checkpoints.load(path_or_hub_id or SHIPPED_CHECKPOINT)
        encoder = load_encoder(str(checkpoint.encoder["name"]), encoder_weights)
        return cls(checkpoint, encoder.to(place))

    @property
    def card(self) -> str:
        """The checkpoint's model card, Markdown: training data, scores, limits, terms."""
        _, _, text = model_card(self.checkpoint).split("---\n", 2)  # the front matter
        return text.strip()

    def encode(self, photo: Photo) -> EncodedPhoto:
        """Encode a photo that will be captioned several times.

        Raises:
            ImageError: the photo cannot be opened.
        """
        with torch.autocast(self.encoder.device.type, enabled=False):
            (found,) = self._encode([photo])
        if isinstance(found, ImageError):
            raise found
        return found

    def caption(
        self, photo: Photo | EncodedPhoto, options: DecodingOptions | None = None
    ) -> Caption:
        """Caption one photo: a path, bytes, PIL image, array, or what ``encode`` returned.

        Raises:
            ImageError: the photo cannot be opened.
            ConfigError: ``options.prefix`` holds a word that the model does not know, or too many.
        """
        return self.caption_batch([photo], options)[0]

    def caption_batch(
        self, photos: Sequence[Photo | EncodedPhoto], options: DecodingOptions | None = None
    ) -> list[Caption]:
        """Caption several photos at once; a search finds for each what it would find alone."""
        captions = self.caption_each(photos, options)
        for caption in captions:
            if isinstance(caption, ImageError):
                raise caption
        return [caption for caption in captions if isinstance(caption, Caption)]

    def caption_each(
        self, photos: Sequence[Photo | EncodedPhoto], options: DecodingOptions | None = None
    ) -> list[Caption | ImageError]:
        """Caption several photos at once; where one cannot be opened, its error stands for it."""
        options = options or DecodingOptions()
        prefix = self._ids(options.prefix, options.max_length, "the prefix")
        if UNK in prefix:
            word = clean(options.prefix).split()[prefix.index(UNK)]
            near = near_misses(word, self.checkpoint.vocabulary.idx2word[len(SPECIALS) :])
            raise ConfigError(
                f"\"{word}\" isn't in the model's vocabulary"
                + (f". Did you mean {', '.join(near)}?" if near else "; use another word")
            )
        bad_endings = self.checkpoint.vocabulary.known_ids(BAD_ENDINGS)

        def search(features: Tensor) -> list[list[Hypothesis]]:
            state, memory = self._decoder.start(features)
            return decode(
                self._decoder.step,
                state,
                memory,
                options,
                prefix=prefix,
                bad_endings=bad_endings,
            )

        given, sampled = tuple(range(len(prefix))), options.temperature > 0
        return [
            found
            if isinstance(found, ImageError)
            else dataclasses.replace(found, given=given, sampled=sampled)
            for found in self._run(photos, search)
        ]

    @staticmethod
    def words_of(text: str) -> list[str]:
        """Split a text into words as the model reads them."""
        return clean(text).split()

    def score(self, photo: Photo | EncodedPhoto, text: str) -> Caption:
        """Read a caption that somebody else wrote: its maps, and how likely each word was.

        A word that the model does not know goes through it as ``<unk>``: it is shown as written
        and marked as not ``known``, and its probability is that of any unknown word.

        Raises:
            ImageError: the photo cannot be opened.
            ConfigError: the text is empty or too long.
        """
        # As long as it needs to be, <bos> and <eos> included.
        ids = self._ids(text, 200, "the caption")
        if not ids:
            raise ConfigError("the caption holds no word: write at least one")

        def search(features: Tensor) -> list[list[Hypothesis]]:
            state, memory = self._decoder.start(features)
            step, steps = self._decoder.step, len(ids) + 1
            return beam_search(
                step, state, memory, beam_size=1, max_steps=steps, prefix=[*ids, EOS]
            )

        (caption,) = self._run([photo], search)
        if isinstance(caption, ImageError):
            raise caption
        words = clean(text).split()
        (beam,) = caption.beams
        shown = tuple(
            dataclasses.replace(word, text=written, known=word.text != SPECIALS[UNK])
            for word, written in zip(beam.words, words, strict=True)
        )
        return dataclasses.replace(
            caption,
            beams=(dataclasses.replace(beam, words=shown),),
            given=tuple(range(len(shown) + 1)),
        )

    def _ids(self, text: str, max_length: int, what: str) -> list[int]:
        """Translate ``text``, which has to leave room for ``<bos>`` and ``<eos>``."""
        ids = self.checkpoint.vocabulary.encode(text)
        if len(ids) > max_length - 2:
            raise ConfigError(f"{what} has {len(ids)} words; the limit is {max_length - 2}")
        return ids

    def _run(
        self,
        photos: Sequence[Photo | EncodedPhoto],
        search: Callable[[Tensor], list[list[Hypothesis]]],
    ) -> list[Caption | ImageError]:
        """Open, encode, search, translate: a single photo on all cores, many a batch on each."""
        if len(photos) == 1:
            # Other threads begin without the caller's autocast.
            with torch.autocast(self.encoder.device.type, enabled=False):
                return self._write(photos, search)
        batch = 64
        if self.encoder.device.type == "cpu":
            batch = min(16, math.ceil(len(photos) / torch.get_num_threads()) or 1)
        write = functools.partial(self._write, search=search)
        return [caption for some in self.encoder.map(write, photos, batch) for caption in some]

    @torch.inference_mode()
    def _encode(self, photos: Sequence[Photo | EncodedPhoto]) -> list[EncodedPhoto | ImageError]:
        """Open and encode the photos that are not encoded yet."""
        results: list[EncodedPhoto | ImageError | tuple[int, int]] = []
        pixels = []
        for photo in photos:
            if isinstance(photo, EncodedPhoto):
                results.append(photo)
                continue
            try:
                image = open_photo(photo)  # only one is held at its full size
            except ImageError as error:
                results.append(error)
            else:
                results.append(full_size(image))
                pixels.append(torch.from_numpy(self.encoder.transform(image)))
        batches = (
            self.encoder(torch.stack(pixels[at : at + self.encoder.batch_size]))
            for at in range(0, len(pixels), self.encoder.batch_size)
        )
        cells = (each for batch in batches for each in batch)  # (P, C)
        return [
            EncodedPhoto(next(cells), each) if isinstance(each, tuple) else each for each in results
        ]

    @torch.inference_mode()
    def _write(
        self,
        photos: Sequence[Photo | EncodedPhoto],
        search: Callable[[Tensor], list[list[Hypothesis]]],
    ) -> list[Caption | ImageError]:
        """Encode, search and translate photos in this thread."""
        encoded = self._encode(photos)
        cells = [each.cells for each in encoded if isinstance(each, EncodedPhoto)]
        found = iter(search(torch.stack(cells)) if cells else ())
        return [
            each
            if isinstance(each, ImageError)
            else Caption(
                tuple(self._beam(beam, (GRID, GRID)) for beam in next(found)),
                each.size,
                language=self.checkpoint.recipe.get("language", DEFAULT_LANGUAGE),
            )
            for each in encoded
        ]

    def _beam(self, hypothesis: Hypothesis, shape: Sequence[int]) -> Beam:
        """Translate one hypothesis; it ends in ``<eos>``."""
        idx2word = self.checkpoint.vocabulary.idx2word
        words = [
            Word(
                idx2word[index],
                float(log_probability.exp()),
                tuple(
                    (idx2word[other], float(probability))
                    for other, probability in zip(others.tolist(), probabilities, strict=True)
                ),
                attention.view(*shape).numpy(),
            )
            for index, log_probability, others, probabilities, attention in zip(
                hypothesis.ids,
                hypothesis.log_probabilities,
                hypothesis.alternatives,
                hypothesis.alternative_log_probabilities.exp(),
                hypothesis.attention,
                strict=True,
            )
        ]
        *words, end = words
        return Beam(tuple(words), end, hypothesis.log_probability, hypothesis.score)
