"""The shipped checkpoint, from a photo to a caption with its maps."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioner import Caption, Captioner, DecodingOptions
from captioner.config import VERDICTS
from captioner.errors import CheckpointError, ConfigError, ImageError
from captioner.inference.captioner import SHIPPED_CHECKPOINT, near_misses
from captioner.model import checkpoint
from captioner.model.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def photos(example_photos: list[Path]) -> list[Path]:
    return example_photos[:3]


def test_words_have_map_probability_and_alternatives(
    captioner: Captioner, photos: list[Path]
) -> None:
    caption = captioner.caption(photos[0])
    assert caption.text == " ".join(word.text for word in caption.words)
    assert 3 <= len(caption.words) <= 18
    assert caption.attention.shape == (len(caption.words), 7, 7)
    assert np.allclose(caption.attention.sum(axis=(1, 2)), 1, atol=1e-4)
    with Image.open(photos[0]) as image:
        assert caption.size == image.size
    (best, *_) = caption.beams
    assert sum(np.log(word.probability) for word in (*best.words, best.end)) == pytest.approx(
        caption.log_probability, abs=1e-4
    )
    for word in caption.words:
        assert 0 < word.probability <= 1
        assert len(word.alternatives) == 5
        probabilities = [probability for _, probability in word.alternatives]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 <= word.entropy <= np.log(49) + 1e-5
        assert caption.words[0].attention.shape == (7, 7)


def test_beams_differ_and_are_sorted_by_score(captioner: Captioner, photos: list[Path]) -> None:
    beams = captioner.caption(photos[0], DecodingOptions(beam_size=5)).beams
    assert len(beams) == 5
    assert len({beam.text for beam in beams}) == 5
    scores = [beam.score for beam in beams]
    assert scores == sorted(scores, reverse=True)


def test_batch_equals_single_captions(captioner: Captioner, photos: list[Path]) -> None:
    together = captioner.caption_batch(photos)
    for photo, caption in zip(photos, together, strict=True):
        alone = captioner.caption(photo)
        assert caption.text == alone.text
        assert caption.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
        assert np.allclose(caption.attention, alone.attention, atol=1e-4)


def test_score_of_own_caption_equals_the_caption(captioner: Captioner, photos: list[Path]) -> None:
    caption = captioner.caption(photos[1])
    read = captioner.score(photos[1], caption.text)
    assert read.text == caption.text
    assert read.log_probability == pytest.approx(caption.log_probability, abs=1e-3)
    assert np.allclose(read.attention, caption.attention, atol=1e-4)


def test_score_ranks_shuffled_caption_lower(captioner: Captioner, photos: list[Path]) -> None:
    own = captioner.caption(photos[1]).text
    shuffled = " ".join(reversed(own.split()))
    fits, does_not = (captioner.score(photos[1], text) for text in (own, shuffled))
    assert fits.log_probability > does_not.log_probability + 5


def test_score_keeps_unknown_words_as_written(captioner: Captioner, photos: list[Path]) -> None:
    assert captioner.score(photos[0], "a Zyzzyva runs").text == "a zyzzyva runs"


@pytest.mark.parametrize("text", ["", "  ", "!?"])
def test_score_refuses_empty_text(captioner: Captioner, photos: list[Path], text: str) -> None:
    with pytest.raises(ConfigError, match="no words"):
        captioner.score(photos[0], text)


def test_caption_starts_with_the_prefix(captioner: Captioner, photos: list[Path]) -> None:
    caption = captioner.caption(photos[0], DecodingOptions(prefix="Two women"))
    assert caption.text.startswith("two women ")


def test_given_indexes_the_prefix(captioner: Captioner, photos: list[Path]) -> None:
    assert captioner.caption(photos[0]).given == ()
    for prefix, given in (("Two women", (0, 1)), ("a", (0,)), ("Two, women!  and", (0, 1, 2))):
        caption = captioner.caption(photos[0], DecodingOptions(prefix=prefix))
        assert caption.given == given
        assert len(caption.words) > len(given)


def test_given_is_set_for_every_photo_of_a_batch(captioner: Captioner, photos: list[Path]) -> None:
    captions = captioner.caption_batch(photos, DecodingOptions(prefix="a"))
    assert [caption.given for caption in captions] == [(0,)] * len(photos)


def test_score_marks_all_words_and_the_end_as_given(
    captioner: Captioner, photos: list[Path]
) -> None:
    assert captioner.score(photos[0], "A zyzzyva runs.").given == (0, 1, 2, 3)
    assert captioner.score(photos[0], "dog").given == (0, 1)


@pytest.mark.parametrize(
    ("word", "ending"),
    [
        ("okapi", "; use another word"),
        ("q", "; use another word"),
        ("womann", ". Did you mean woman, womans?"),
        ("zither", ". Did you mean either?"),
        ("motorcyle", ". Did you mean motorcycle, motorcycles?"),
        ("dgo", ". Did you mean dog?"),
        ("chidl", ". Did you mean child?"),
        ("photograf", ". Did you mean photograph?"),
    ],
)
def test_unknown_prefix_error_suggests_only_near_misses(
    captioner: Captioner, photos: list[Path], word: str, ending: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        captioner.caption(photos[0], DecodingOptions(prefix=f"a {word}"))
    assert str(refused.value) == f"\"{word}\" isn't in the model's vocabulary{ending}"


def test_near_misses_of_a_very_long_word_are_fast() -> None:
    known = [f"word{number}" for number in range(2500)]
    started = time.process_time()
    assert near_misses("word" * 2000, known) == []
    assert time.process_time() - started < 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
def test_beams_rank_by_log_probability_over_length(
    captioner: Captioner, photos: list[Path], temperature: float, length_penalty: float
) -> None:
    options = DecodingOptions(
        beam_size=4, samples=4, temperature=temperature, length_penalty=length_penalty, prefix="a"
    )
    caption = captioner.caption(photos[0], options)
    assert caption.sampled == (temperature > 0)
    scores = [beam.score for beam in caption.beams]
    assert scores == sorted(scores, reverse=True)
    for beam in caption.beams:
        length = len(beam.words) + 1
        assert beam.score == pytest.approx(beam.log_probability / length**length_penalty)


def test_language_comes_from_the_checkpoint(captioner: Captioner, photos: list[Path]) -> None:
    assert captioner.caption(photos[0]).language == "en"
    recipe = {**captioner.checkpoint.recipe, "language": "de"}
    german = Captioner(dataclasses.replace(captioner.checkpoint, recipe=recipe), captioner.encoder)
    for caption in (german.caption(photos[0]), german.score(photos[0], "a dog")):
        assert caption.language == "de"
        assert not caption.sampled


def test_sampling_is_seeded(captioner: Captioner, photos: list[Path]) -> None:
    texts = [
        captioner.caption(photos[0], DecodingOptions(temperature=1.0, seed=seed)).text
        for seed in (1, 1, 2, 3)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_path_bytes_image_and_array_get_the_same_caption(
    captioner: Captioner, photos: list[Path]
) -> None:
    with Image.open(photos[0]) as image:
        picture = image.convert("RGB")
    texts = {
        captioner.caption(photo).text
        for photo in (photos[0], str(photos[0]), photos[0].read_bytes(), picture, np.array(picture))
    }
    assert len(texts) == 1


def test_copied_captioner_equals_the_original(captioner: Captioner, photos: list[Path]) -> None:
    expected = captioner.caption(photos[0]).to_dict()
    for copied in (copy.deepcopy(captioner), pickle.loads(pickle.dumps(captioner))):
        assert copied is not captioner
        assert copied.caption(photos[0]).to_dict() == expected
        assert copied.encoder.spec() == captioner.encoder.spec()


def test_captioner_is_thread_safe(captioner: Captioner, photos: list[Path]) -> None:
    expected = captioner.caption_batch(photos)
    with ThreadPoolExecutor(2) as pool:
        for captions in pool.map(captioner.caption_batch, [photos, photos]):
            assert [each.text for each in captions] == [each.text for each in expected]


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def _autocast() -> Iterator[None]:
    with torch.autocast("cpu"), torch.inference_mode():
        yield


@contextlib.contextmanager
def _bfloat16_on_meta() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def _global_state() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_rng_state().numpy().tobytes(),
    )


@pytest.mark.parametrize("state", [_float64, _autocast, _bfloat16_on_meta])
def test_captions_do_not_depend_on_torch_defaults(
    captioner: Captioner,
    photos: list[Path],
    state: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    sampled = DecodingOptions(temperature=1.0, seed=3)

    def captions(of: Captioner) -> list[Caption]:
        drawn = of.caption(photos[0], sampled)
        scored = of.score(photos[0], "a dog runs")
        return [drawn, of.explain(photos[0], scored), *of.caption_batch(photos[:2])]

    expected = captions(captioner)
    with state():
        torch.manual_seed(7)
        before = _global_state()
        loaded = Captioner.from_pretrained()
        found = [*captions(captioner), *captions(loaded)]
        assert _global_state() == before
    for one, other in zip(found, expected * 2, strict=True):
        assert one.text == other.text
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)
        assert np.allclose(one.attention, other.attention, atol=1e-4)


def test_words_of_things_have_evidence_and_function_words_have_none(
    captioner: Captioner, photos: list[Path]
) -> None:
    caption = captioner.caption(photos[0])
    maps = {word.text: word.maps for word in caption.words}
    assert caption.text.startswith("a close up of a striped cat")
    assert maps["a"].keys() == {"attended"}
    assert maps["cat"].keys() == {"attended", "evidence", "shown"}
    for word in caption.words:
        assert word.verdict is None
        assert word.fall is None
        for cells in word.maps.values():
            assert cells.shape == (7, 7)
            assert cells.dtype == np.float32
    assert maps["cat"]["shown"].max() > 0.5
    assert maps["cat"]["evidence"].sum() > 1


def test_captions_without_evidence_are_the_same(captioner: Captioner, photos: list[Path]) -> None:
    (plain,) = captioner.caption_each(photos[:1], with_evidence=False)
    assert isinstance(plain, Caption)
    full = captioner.caption(photos[0])
    assert plain.text == full.text
    assert plain.log_probability == pytest.approx(full.log_probability, abs=1e-4)
    assert all(word.maps.keys() == {"attended"} for word in plain.words)


def test_explanation_adds_maps_and_verdicts_of_one_beam(
    captioner: Captioner, photos: list[Path]
) -> None:
    caption = captioner.caption(photos[0])
    explained = captioner.explain(photos[0], caption, 1)
    assert [beam.text for beam in explained.beams] == [beam.text for beam in caption.beams]
    assert all(word.verdict is None for word in explained.words)
    for old, new in zip(caption.beams[1].words, explained.beams[1].words, strict=True):
        assert new.verdict in VERDICTS
        assert new.fall is not None
        assert new.maps.keys() == {*old.maps, "mattered"}
        for name, cells in old.maps.items():
            np.testing.assert_allclose(new.maps[name], cells, atol=1e-4)
    assert explained.beams[1].end.verdict in VERDICTS
    assert explained.seen is not None
    assert len(explained.seen) == 49
    assert any(text == "cat" for cell in explained.seen for text, _ in cell)
    probabilities = [[probability for _, probability in cell] for cell in explained.seen]
    assert probabilities == [sorted(cell, reverse=True) for cell in probabilities]
    with pytest.raises(ConfigError, match="no beam 3; there are 3"):
        captioner.explain(photos[0], caption, 3)


def test_photo_speaks_for_what_it_shows_and_against_what_it_does_not(
    captioner: Captioner, photos: list[Path]
) -> None:
    encoded = captioner.encode(photos[0])
    cat, truck = (
        captioner.explain(encoded, captioner.score(encoded, text)).words[1]
        for text in ("a cat", "a truck")
    )
    assert cat.fall is not None
    assert truck.fall is not None
    assert cat.fall > 2 > 0 > truck.fall
    assert truck.verdict == "guessed"
    assert cat.verdict != "guessed"
    assert cat.maps["mattered"].max() > 0.01


def test_verdicts_fall_if_the_caption_is_of_another_photo(
    captioner: Captioner, example_photos: list[Path]
) -> None:
    def seen(photo: Path, caption: Caption) -> float:
        words = captioner.explain(photo, caption).words
        return sum(word.verdict == "seen there" for word in words)

    photos = example_photos[:6]
    captions = captioner.caption_batch(photos)
    own = [seen(*pair) for pair in zip(photos, captions, strict=True)]
    swapped = [
        seen(photo, caption)
        for photo, caption in zip(photos, [*captions[1:], captions[0]], strict=True)
    ]
    assert min(own) >= 1
    assert sum(swapped) < sum(own) / 2


def test_only_captions_found_by_search_have_a_confidence(
    captioner: Captioner, photos: list[Path]
) -> None:
    # Bias and weight of the mean log-probability; what the detectors see does not count.
    checkpoint = dataclasses.replace(captioner.checkpoint, confidence=[0.5, 2.0, 0.0, 0.0, 0.0])
    sure = Captioner(checkpoint, captioner.encoder)
    without = Captioner(dataclasses.replace(checkpoint, confidence=None), captioner.encoder)
    assert without.caption(photos[0]).confidence is None
    captions = sure.caption_batch(photos)
    for photo, caption in zip(photos, captions, strict=True):
        mean = caption.log_probability / (len(caption.words) + 1)
        assert caption.confidence == pytest.approx(1 / (1 + np.exp(-0.5 - 2 * mean)), abs=1e-3)
        assert sure.caption(photo).confidence == pytest.approx(caption.confidence, abs=1e-3)
    for options in (DecodingOptions(prefix="a"), DecodingOptions(temperature=0.5)):
        assert sure.caption(photos[0], options).confidence is None
    assert sure.score(photos[0], captions[0].text).confidence is None


def test_empty_batch_returns_no_captions(captioner: Captioner) -> None:
    assert captioner.caption_batch([]) == []


def test_bad_photo_error_names_the_file(captioner: Captioner, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no photo")
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        captioner.caption(bad)
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        captioner.score(bad, "a dog runs")


def test_mismatched_encoder_is_refused(captioner: Captioner) -> None:
    spec = {**captioner.encoder.spec(), "sha256": "0" * 64}
    with pytest.raises(CheckpointError, match="SHA-256"):
        captioner.checkpoint.check_encoder(spec)


def test_missing_checkpoint_error_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Captioner.from_pretrained(tmp_path / "nowhere")


def test_captioner_takes_the_place_of_a_pipeline(
    captioner: Captioner, example_photos: list[Path]
) -> None:
    photos = example_photos[:2]
    texts = [captioner.caption(photo).text for photo in photos]
    assert captioner(photos[0]) == [{"generated_text": texts[0]}]
    files = [io.BytesIO(photo.read_bytes()) for photo in photos]
    expected = [[{"generated_text": text}] for text in texts]
    assert captioner(files) == captioner(tuple(photos)) == expected
    greedy = DecodingOptions(beam_size=1, prefix="two")
    assert captioner(photos[0], greedy) == [
        {"generated_text": captioner.caption(photos[0], greedy).text}
    ]


@pytest.mark.parametrize(
    ("revision", "expected"), [(None, "someone/captions"), ("v2", "someone/captions@v2")]
)
def test_revision_is_that_of_the_hub(
    revision: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def load(name: str) -> Checkpoint:
        fetched.append(name)
        raise CheckpointError("offline")

    monkeypatch.setattr(checkpoint, "load", load)
    with pytest.raises(CheckpointError, match="offline"):
        Captioner.from_pretrained("someone/captions", revision=revision)
    assert fetched == [expected]


def test_card_is_the_model_card_without_front_matter(captioner: Captioner) -> None:
    shipped = (SHIPPED_CHECKPOINT / "README.md").read_text(encoding="utf-8")
    assert shipped == captioner.checkpoint.card
    assert shipped.startswith("---\n")
    assert captioner.card
    assert shipped.endswith(f"---\n\n{captioner.card}\n")
    assert captioner.card.startswith("# ")


# How a word was chosen


@torch.no_grad()
def test_steps_have_the_numbers_of_the_caption_and_of_the_decoder(
    captioner: Captioner, photos: list[Path]
) -> None:
    caption = captioner.caption(photos[0])
    model, vocabulary = captioner.checkpoint.model, captioner.checkpoint.vocabulary
    encoded = captioner.encode(photos[0])
    state, memory = model.start(encoded.cells[None])
    previous = "<bos>"
    (beam, *_) = caption.beams
    for index, word in enumerate((*beam.words, beam.end)):
        found = captioner.steps(encoded, [each.text for each in beam.words], index)
        assert (found.previous, found.word) == (previous, word.text)
        token_ids = torch.tensor([[vocabulary.word2idx[previous]]])
        logits, attention, state = model.step(token_ids, state, memory)
        assert found.attention == pytest.approx(attention.flatten().tolist(), abs=1e-6)
        assert np.allclose(found.attention, word.attention.flatten(), atol=1e-4)
        for each in found.candidates:
            expected = float(logits[0, 0, vocabulary.word2idx[each.text]])
            assert each.logit == pytest.approx(expected, abs=1e-4)
            assert each.output + each.evidence + each.pointer == pytest.approx(expected, abs=1e-4)
        assert found.hidden == pytest.approx(float(state.hidden.norm()), rel=1e-5)
        (chosen,) = [each for each in found.candidates if each.text == word.text]
        assert chosen.probability == pytest.approx(word.probability, abs=1e-4)
        previous = word.text


def test_steps_read_texts_and_unknown_words_as_scores_do(
    captioner: Captioner, photos: list[Path]
) -> None:
    encoded = captioner.encode(photos[0])
    texts = captioner.steps(encoded, "A zyzzyva!", 1)
    assert (texts.previous, texts.word) == ("a", "<unk>")
    assert texts == captioner.steps(photos[0], ["a", "zyzzyva"], 1)
    score = captioner.score(encoded, "A zyzzyva!").words[1]
    (chosen,) = [each for each in texts.candidates if each.text == "<unk>"]
    assert chosen.probability == pytest.approx(score.probability, abs=1e-4)
    assert captioner.steps(encoded, "", 0).word == "<eos>"


@pytest.mark.parametrize(
    ("words", "index"), [("a dog", 3), ("a dog", -1), ("", 1), ("a " * 199, 0)]
)
def test_steps_of_words_that_do_not_exist_are_refused(
    captioner: Captioner, photos: list[Path], words: str, index: int
) -> None:
    with pytest.raises(ConfigError, match=r"there is no word|the limit is 198"):
        captioner.steps(photos[0], words, index)
