"""Captioner: photo in, ``Caption`` out. Translates between words and ids around the search.

Knows nothing of files to write, of the page, or of how the search works.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from captioner.config import DEFAULT_LANGUAGE, EOS, UNK, DecodingOptions
from captioner.environment import torch_defaults
from captioner.errors import ConfigError, ImageError
from captioner.images import Photo, full_size, open_photo
from captioner.inference import hub
from captioner.inference.caption import Beam, Caption, Word
from captioner.inference.cover import CoverTest, check_cells, encode_covered
from captioner.model import checkpoint as checkpoints
from captioner.model.confidence import confidence_features, confidence_of
from captioner.model.cover import word_probabilities
from captioner.model.decoder import Memory
from captioner.model.encoder import GRID, Encoder, choose_device, load_encoder
from captioner.model.fast import pack
from captioner.model.maps import CaptionMaps, caption_maps, mattered
from captioner.model.search import Hypothesis, beam_search, decode
from captioner.model.steps import WordSteps, word_steps
from captioner.model.verdicts import verdicts
from captioner.model.vocabulary import SPECIALS, clean

_PACKAGE = Path(__file__).resolve().parents[1]
# pip installs the checkpoint inside the package; in a clone it is among the assets.
SHIPPED_CHECKPOINT = _PACKAGE / "shipped"
if not SHIPPED_CHECKPOINT.is_dir():
    SHIPPED_CHECKPOINT = _PACKAGE.parent / "assets" / "checkpoint"
# The beams of each photo, their maps (or None), and the confidence in the best one (or None).
_Found: TypeAlias = Iterable[tuple[list[Hypothesis], list[CaptionMaps] | None, float | None]]
_MAX_SCORED_LENGTH = 200  # words, with <bos> and <eos>
# Words that are seen in a cell: the likeliest, down to a probability.
_MOST_SEEN, _LEAST_SEEN = 5, 0.02


def near_misses(word: str, vocabulary: Sequence[str]) -> list[str]:
    """Return up to three words of ``vocabulary`` that ``word`` probably misspells, best first.

    They are one typing error away (a letter missing, added or wrong, or two neighbors swapped), or
    start with the same letter and share nearly all letters. In words of up to three letters only
    swaps count: any other change makes a different word.
    """

    def common_prefix(one: str, other: str) -> int:
        return sum(itertools.takewhile(bool, map(operator.eq, one, other)))

    def is_typo(other: str) -> bool:
        start = common_prefix(word, other)
        end = common_prefix(word[start:][::-1], other[start:][::-1])
        ours, theirs = word[start : len(word) - end], other[start : len(other) - end]
        is_swap = len(ours) == 2 and ours == theirs[::-1]
        return is_swap or (len(word) > 3 and max(len(ours), len(theirs)) <= 1)

    def closeness(other: str) -> tuple[bool, float]:
        return sorted(other) == sorted(word), difflib.SequenceMatcher(None, word, other).ratio()

    near = [other for other in vocabulary if is_typo(other)]
    if len(word) > 3:
        same_initial = [other for other in vocabulary if other[0] == word[0]]
        near += difflib.get_close_matches(word, same_initial, cutoff=0.83)
    return sorted(dict.fromkeys(near), key=closeness, reverse=True)[:3]


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPhoto:
    """A photo's cells, so that several captions of it cost one pass of the encoder.

    Attributes:
        cells: (P, C).
        size: (width, height) of the upright photo in pixels.
    """

    cells: Tensor
    size: tuple[int, int]


class Captioner:
    """An encoder and the decoder that was trained on its cells.

    Attributes:
        checkpoint: model, vocabulary, recipe and metrics.
        encoder: the frozen backbone.
    """

    def __init__(self, checkpoint: checkpoints.Checkpoint, encoder: Encoder) -> None:
        """Combine the two; ``CheckpointError`` if the decoder was trained on another encoder."""
        checkpoint.check_encoder(encoder.spec())
        self.checkpoint = checkpoint
        self.encoder = encoder
        self._decoder = pack(checkpoint.model.to(encoder.device))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the packed decoder: it is a second copy of the checkpoint's weights."""
        return {**self.__dict__, "_decoder": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the decoder again, for this machine's processor."""
        self.__dict__.update(state)
        self._decoder = pack(self.checkpoint.model)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        *,
        revision: str | None = None,
        encoder_weights: str | Path | None = None,
        device: str = "cpu",
    ) -> Captioner:
        """Load a checkpoint and its encoder.

        Args:
            path_or_hub_id: a checkpoint's folder or Hub id; None for the shipped one.
            revision: branch, tag or commit on the Hub; None is the main branch.
            encoder_weights: file with the encoder's weights; None downloads or finds them.
            device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the fastest one available.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, or for other encoder weights.
            EncoderError: the encoder's weights cannot be downloaded or read.
            ConfigError: the device is unknown or missing.
        """
        torch_device = choose_device(device)
        name = path_or_hub_id or SHIPPED_CHECKPOINT
        checkpoint = checkpoints.load(name if revision is None else f"{name}@{revision}")
        encoder = load_encoder(str(checkpoint.encoder["name"]), encoder_weights)
        return cls(checkpoint, encoder.to(torch_device))

    def push_to_hub(self, name: str, *, private: bool = False) -> str:
        """Upload the checkpoint, from which ``from_pretrained`` can load it; see ``hub``."""
        return hub.push_to_hub(self.checkpoint, name, private=private)

    @property
    def card(self) -> str:
        """The model card in Markdown: training data, scores, limits, terms."""
        _, _, text = self.checkpoint.card.split("---\n", 2)  # the front matter
        return text.strip()

    @property
    def language(self) -> str:
        """The BCP 47 tag of the captions' language."""
        return str(self.checkpoint.recipe.get("language", DEFAULT_LANGUAGE))

    def __call__(
        self,
        photos: Photo | list[Any] | tuple[Any, ...],
        options: DecodingOptions | None = None,
    ) -> list[Any]:
        """Caption one photo or a list of them, as the pipelines of transformers return it.

        So a captioner can take the place of ``pipeline("image-to-text")``.

        Returns:
            ``[{"generated_text": ...}]`` for one photo; a list of these for a list of photos.

        Raises:
            ImageError: a photo cannot be opened.
            ConfigError: see ``caption``.
        """
        if isinstance(photos, list | tuple):
            captions = self.caption_batch(photos, options)
            return [[{"generated_text": caption.text}] for caption in captions]
        return [{"generated_text": self.caption(photos, options).text}]

    def encode(self, photo: Photo) -> EncodedPhoto:
        """Encode a photo, to caption it several times.

        Raises:
            ImageError: the photo cannot be opened.
        """
        with torch.autocast(self.encoder.device.type, enabled=False):
            (encoded,) = self._encode([photo])
        if isinstance(encoded, ImageError):
            raise encoded
        return encoded

    def caption(
        self, photo: Photo | EncodedPhoto, options: DecodingOptions | None = None
    ) -> Caption:
        """Caption one photo: anything that ``open_photo`` takes, or the result of ``encode``.

        Raises:
            ImageError: the photo cannot be opened.
            ConfigError: ``options.prefix`` has an unknown word, or too many words.
        """
        return self.caption_batch([photo], options)[0]

    def caption_batch(
        self, photos: Sequence[Photo | EncodedPhoto], options: DecodingOptions | None = None
    ) -> list[Caption]:
        """Caption several photos at once; beam search gives each the caption that it gets alone.

        Raises:
            ImageError: a photo cannot be opened.
            ConfigError: see ``caption``.
        """
        captions = self.caption_each(photos, options)
        for caption in captions:
            if isinstance(caption, ImageError):
                raise caption
        return [caption for caption in captions if isinstance(caption, Caption)]

    def caption_each(
        self,
        photos: Sequence[Photo | EncodedPhoto],
        options: DecodingOptions | None = None,
        *,
        with_evidence: bool = True,
    ) -> list[Caption | ImageError]:
        """Caption several photos at once; an unreadable photo gets its error instead.

        Without evidence words have no map but the attention, and captions are written faster.
        """
        options = options or DecodingOptions()
        prefix = self._prefix_ids(options)
        vocabulary = self.checkpoint.vocabulary
        bad_endings = vocabulary.bad_endings(self.language)
        may_double = vocabulary.characters()
        given, sampled = tuple(range(len(prefix))), options.temperature > 0

        def search(features: Tensor) -> _Found:
            state, memory = self._decoder.start(features)
            found = decode(
                self._decoder.step,
                state,
                memory,
                options,
                prefix=prefix,
                bad_endings=bad_endings,
                may_double=may_double,
            )
            maps: Iterable[list[CaptionMaps] | None] = itertools.repeat(None)
            if with_evidence:
                maps = self._maps(memory, found)
            weights = self.checkpoint.confidence
            if weights is None or given or sampled:
                return zip(found, maps, itertools.repeat(None), strict=False)
            best = [beams[0] for beams in found]
            inputs = confidence_features(self._decoder, memory, best)
            return zip(found, maps, confidence_of(inputs, weights).tolist(), strict=False)

        return [
            result
            if isinstance(result, ImageError)
            else dataclasses.replace(result, given=given, sampled=sampled)
            for result in self._run(photos, search)
        ]

    @staticmethod
    def words_of(text: str) -> list[str]:
        """Split a text into words as the model reads them."""
        return clean(text).split()

    def score(self, photo: Photo | EncodedPhoto, text: str) -> Caption:
        """Score a given caption: the probability and the map of each word.

        A word outside the vocabulary is scored as ``<unk>``: it keeps its text, is marked as not
        ``known``, and its probability is that of any unknown word.

        Raises:
            ImageError: the photo cannot be opened.
            ConfigError: the text is empty or too long.
        """
        ids = self._ids(text, _MAX_SCORED_LENGTH, "the caption")
        if not ids:
            raise ConfigError("the caption has no words: write at least one")

        def search(features: Tensor) -> _Found:
            state, memory = self._decoder.start(features)
            forced = [*ids, EOS]
            found = beam_search(
                self._decoder.step, state, memory, beam_size=1, max_steps=len(forced), prefix=forced
            )
            return zip(found, self._maps(memory, found), [None], strict=True)

        (caption,) = self._run([photo], search)
        if isinstance(caption, ImageError):
            raise caption
        (beam,) = caption.beams
        words = tuple(
            dataclasses.replace(word, text=written, known=word.text != SPECIALS[UNK])
            for word, written in zip(beam.words, clean(text).split(), strict=True)
        )
        return dataclasses.replace(
            caption,
            beams=(dataclasses.replace(beam, words=words),),
            given=tuple(range(len(words) + 1)),
        )

    def _prefix_ids(self, options: DecodingOptions) -> list[int]:
        """Translate the prefix, which must not have unknown words."""
        prefix = self._ids(options.prefix, options.max_length, "the prefix")
        if UNK not in prefix:
            return prefix
        word = clean(options.prefix).split()[prefix.index(UNK)]
        near = near_misses(word, self.checkpoint.vocabulary.idx2word[len(SPECIALS) :])
        raise ConfigError(
            f"\"{word}\" isn't in the model's vocabulary"
            + (f". Did you mean {', '.join(near)}?" if near else "; use another word")
        )

    def _ids(self, text: str, max_length: int, name: str) -> list[int]:
        """Translate ``text``, which has to leave room for ``<bos>`` and ``<eos>``."""
        ids = self.checkpoint.vocabulary.encode(text)
        if len(ids) > max_length - 2:
            raise ConfigError(f"{name} has {len(ids)} words; the limit is {max_length - 2}")
        return ids

    def _run(
        self,
        photos: Sequence[Photo | EncodedPhoto],
        search: Callable[[Tensor], _Found],
    ) -> list[Caption | ImageError]:
        """Open, encode, search, translate: one photo on all cores, several in a batch per core."""
        if len(photos) == 1:
            # Autocast is off in the encoder's own threads anyway.
            with torch.autocast(self.encoder.device.type, enabled=False):
                return self._caption_in_thread(photos, search)
        batch_size = 64
        if self.encoder.device.type == "cpu":
            batch_size = min(16, math.ceil(len(photos) / torch.get_num_threads()) or 1)
        caption = functools.partial(self._caption_in_thread, search=search)
        batches = self.encoder.map(caption, photos, batch_size)
        return list(itertools.chain.from_iterable(batches))

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
                image = open_photo(photo)  # one at a time: a large one takes memory
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
    def _caption_in_thread(
        self,
        photos: Sequence[Photo | EncodedPhoto],
        search: Callable[[Tensor], _Found],
    ) -> list[Caption | ImageError]:
        """Encode, search and translate photos in this thread."""
        encoded = self._encode(photos)
        cells = [each.cells for each in encoded if isinstance(each, EncodedPhoto)]
        found = iter(search(torch.stack(cells)) if cells else ())
        results: list[Caption | ImageError] = []
        for each in encoded:
            if isinstance(each, ImageError):
                results.append(each)
                continue
            hypotheses, maps, confidence = next(found)
            results.append(
                Caption(
                    tuple(map(self._beam, hypotheses, maps or itertools.repeat(None))),
                    each.size,
                    language=self.language,
                    confidence=confidence,
                )
            )
        return results

    def _maps(
        self, memory: Memory, found: Sequence[Sequence[Hypothesis]]
    ) -> Iterator[list[CaptionMaps]]:
        """Yield the maps of each photo's beams."""
        for row, beams in enumerate(found):
            own = Memory(*(part[row : row + 1] for part in memory))
            yield caption_maps(self._decoder, own, [beam.ids for beam in beams])

    def _beam(self, hypothesis: Hypothesis, maps: CaptionMaps | None) -> Beam:
        """Translate one hypothesis, whose last id is ``<eos>``."""
        idx2word = self.checkpoint.vocabulary.idx2word
        *words, end = [
            Word(
                idx2word[index],
                float(log_probability.exp()),
                tuple(
                    (idx2word[other], float(probability))
                    for other, probability in zip(others.tolist(), probabilities, strict=True)
                ),
                {"attended": _grid(attention)} | ({} if maps is None else _evidence(maps, place)),
            )
            for place, (index, log_probability, others, probabilities, attention) in enumerate(
                zip(
                    hypothesis.ids,
                    hypothesis.log_probabilities,
                    hypothesis.alternatives,
                    hypothesis.alternative_log_probabilities.exp(),
                    hypothesis.attention,
                    strict=True,
                )
            )
        ]
        return Beam(tuple(words), end, hypothesis.log_probability, hypothesis.score)

    @torch_defaults()
    @torch.inference_mode()
    def explain(self, photo: Photo | EncodedPhoto, caption: Caption, beam: int = 0) -> Caption:
        """Return a caption of the photo with all that explains the words of one of its beams.

        The words get the map "mattered", ``fall`` and ``verdict``, and the caption gets ``seen``.

        Args:
            photo: which the caption is of.
            caption: written or scored by this captioner.
            beam: whose words to explain.

        Raises:
            ImageError: the photo cannot be opened.
            ConfigError: there is no such beam.
        """
        if not 0 <= beam < len(caption.beams):
            raise ConfigError(f"there is no beam {beam}; there are {len(caption.beams)}")
        cells = (photo if isinstance(photo, EncodedPhoto) else self.encode(photo)).cells
        chosen = caption.beams[beam]
        words = [*chosen.words, chosen.end]
        word2idx = self.checkpoint.vocabulary.word2idx
        ids = [word2idx.get(word.text, UNK) for word in words]
        memory = self._decoder.remember(cells[None])
        (maps,) = caption_maps(self._decoder, memory, [ids])
        occlusion = mattered(self._decoder, cells, ids)
        *explained, end = [
            dataclasses.replace(
                word,
                maps={
                    "attended": word.attention,
                    **_evidence(maps, place),
                    "mattered": _grid(occlusion.cells[place]),
                },
                fall=float(occlusion.photo[place]),
                verdict=verdict,
            )
            for place, (word, verdict) in enumerate(
                zip(words, verdicts(maps, occlusion), strict=True)
            )
        ]
        beams = list(caption.beams)
        beams[beam] = dataclasses.replace(chosen, words=tuple(explained), end=end)
        return dataclasses.replace(caption, beams=tuple(beams), seen=self._seen(memory))

    @torch_defaults()
    def steps(
        self, photo: Photo | EncodedPhoto, words: str | Sequence[str], index: int
    ) -> WordSteps:
        """Return how one word of a caption was chosen, step by step.

        Args:
            photo: as for ``caption``.
            words: the caption; as a text, it is split as ``score`` splits it.
            index: of the word; the number of words stands for the caption's end.

        Raises:
            ImageError: the photo cannot be opened.
            ConfigError: there is no such word, or there are too many.
        """
        words = self.words_of(words) if isinstance(words, str) else words
        if len(words) > _MAX_SCORED_LENGTH - 2:
            raise ConfigError(
                f"the caption has {len(words)} words; the limit is {_MAX_SCORED_LENGTH - 2}"
            )
        if not 0 <= index <= len(words):
            raise ConfigError(f"there is no word {index}; there are {len(words)}, and the end")
        vocabulary = self.checkpoint.vocabulary
        ids = [*(vocabulary.word2idx.get(word, UNK) for word in words), EOS]
        encoded = photo if isinstance(photo, EncodedPhoto) else self.encode(photo)
        return word_steps(
            self.checkpoint.model, encoded.cells, ids[: index + 1], vocabulary.idx2word
        )

    @torch_defaults()
    def cover(
        self,
        photo: Photo,
        text: str,
        word: int,
        cells: Sequence[int],
        *,
        seed: int = 0,
        options: DecodingOptions | None = None,
    ) -> CoverTest:
        """Cover cells of a photo, caption it anew, and see what becomes of a word of ``text``.

        Args:
            photo: not encoded yet.
            text: a caption, as in ``score``.
            word: index of one of its words; their number stands for the end.
            cells: row * 7 + column, at least one and not all.
            seed: of the random covers.
            options: of the new caption.

        Raises:
            ImageError: the photo cannot be opened.
            ConfigError: the text is too long, or there is no such word or cell.
        """
        ids = [*self._ids(text, _MAX_SCORED_LENGTH, "the caption"), EOS]
        if not 0 <= word < len(ids):
            raise ConfigError(f"there is no word {word}; there are {len(ids) - 1}, and the end")
        cells = check_cells(cells)
        image = open_photo(photo)
        encoded = encode_covered(self.encoder, image, cells, seed)
        before, after, *random = word_probabilities(self._decoder, encoded, ids, word).tolist()
        caption = self.caption(EncodedPhoto(encoded[1], full_size(image)), options)
        return CoverTest(cells, caption, before, after, tuple(random))

    def _seen(self, memory: Memory) -> tuple[tuple[tuple[str, float], ...], ...] | None:
        """Return the words that detectors see in each cell of a photo; None without evidence."""
        if not self._decoder.has_evidence:
            return None
        logits = memory.evidence[0].float() + self._decoder.detectors.mean_logits
        probabilities, columns = logits.sigmoid().topk(min(_MOST_SEEN, logits.shape[1]))
        idx2word = self.checkpoint.vocabulary.idx2word
        return tuple(
            tuple(
                (idx2word[UNK + 1 + column], probability)
                for probability, column in zip(*cell, strict=True)
                if probability >= _LEAST_SEEN
            )
            for cell in zip(probabilities.tolist(), columns.tolist(), strict=True)
        )


def _evidence(maps: CaptionMaps, place: int) -> dict[str, np.ndarray]:
    """Return the maps "evidence" and "shown" of a word, if it has them."""
    found = {}
    if maps.has_evidence[place]:
        found["evidence"] = _grid(maps.evidence[place])
    if maps.has_detector[place]:
        found["shown"] = _grid(maps.shown[place])
    return found


def _grid(cells: Tensor) -> np.ndarray:
    grid: np.ndarray = cells.view(GRID, GRID).cpu().numpy()
    return grid
