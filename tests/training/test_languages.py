"""Captions in other languages, from training to the pictures and the page."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import html
import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from captioner import Captioner
from captioner.__main__ import main
from captioner.config import BAD_ENDINGS, EOS, TrainConfig
from captioner.data.dataset import mirror_text, swapped_words
from captioner.inference import render as rendering
from captioner.inference.render import comparison, render
from captioner.model.vocabulary import SPECIALS, Vocabulary, clean
from captioner.training.setup import prepare

# Red, green and blue circles and squares, six at the left and six at the right.
_PHOTOS = (*range(6), *range(8, 14))
CAPTIONS = {
    "fr": """Un cercle rouge à gauche de l'image.
        À gauche, il n'y a qu'un carré rouge.
        Le cercle vert se trouve sur le côté gauche.
        Un carré vert s\u2019étend à gauche.
        L'objet bleu à gauche est un cercle.
        On voit un carré bleu dans la partie gauche.
        Un cercle rouge est placé à droite.
        Sur le côté droit, un carré rouge.
        Près du bord droit flotte un cercle vert.
        Un carré d'un vert foncé, à droite.
        À droite de l'image : un cercle bleu !
        Le carré bleu est tout à droite.""",
    "de": """Links ist ein roter Kreis zu sehen.
        Ein rotes Quadrat hängt links an der weißen Fläche an.
        Ein grüner Kreis auf der linken Seite.
        Das grüne Quadrat liegt am linken Rand.
        Der linke Kreis ist blau.
        Links außen: ein blaues Quadrat.
        Rechts ist ein großer roter Kreis.
        Ein rotes Quadrat auf der rechten Seite.
        Am rechten Rand schwebt ein grüner Kreis.
        Das grüne Quadrat steht rechts.
        Rechts sieht man einen blauen Kreis.
        Ein blaues Quadrat, ganz rechts.""",
    "ar": """دائرة حمراء على اليسار.
        مربّع أحمر على يسار الصورة.
        توجد دائرة خضراء في الجانب الأيسر.
        هناك مربع أخضر، على اليسار.
        دائرة زرقاء إلى اليسار على خلفية بيضاء.
        في الجهة اليسرى مربع أزرق.
        دائرة حمراء على اليمين.
        مُرَبَّعٌ أحمر على يمين الصورة.
        توجد دائرة خضراء في الجانب الأيمن.
        هناك مربع أخضر على اليمين.
        هل ترى الدائرة الزرقاء على اليمين؟
        في الجهة اليمنى مربع أزرق.""",
    "hi": """बाईं ओर एक लाल वृत्त है।
        तस्वीर के बाएँ हिस्से में लाल वर्ग है।
        बाएं किनारे पर हरा वृत्त।
        एक हरा वर्ग बायीं ओर दिखता है।
        नीला वृत्त बाईं तरफ़ है।
        बाईं ओर नीले रंग का एक वर्ग।
        दाईं ओर एक लाल वृत्त है।
        तस्वीर के दाएँ हिस्से में लाल वर्ग है।
        दाएं किनारे पर हरा वृत्त।
        एक हरा वर्ग दायीं ओर दिखता है।
        नीला वृत्त दाईं तरफ़ है।
        दाईं ओर नीले रंग का एक वर्ग।""",
    "zh": """左边有一个红色的圆。
        一个红色的正方形在左侧。
        左边是绿色的圆形。
        画面左侧有一个绿色方块。
        靠左的地方,有个小小的蓝色圆。
        左边的方块是蓝色的。
        右边有一个红色的圆。
        一个红色的正方形在右侧。
        右边是绿色的圆形。
        画面右侧有一个绿色方块。
        人人都看得见右边蓝色的圆\uff01
        右边的方块是蓝色的。""",
    "ja": """左に赤い丸があります。
        赤い四角が左側に描かれている。
        左側に緑のサークルが見える。
        緑色の四角は左にある。
        左の端に、かわいい青い丸。
        白いスペースの左に青い四角。
        右に赤い丸があります。
        赤い四角が右側に描かれている。
        右側に緑のサークルが見える。
        緑色の四角は右にある。
        右の端に、かわいい青い丸。
        白いスペースの右に青い四角。""",
}
Options = Callable[..., list[str]]


def captions_in(language: str) -> list[str]:
    return [line.strip() for line in CAPTIONS[language].splitlines()]


@pytest.fixture(scope="session")
def options(
    tmp_path_factory: pytest.TempPathFactory, draw: Callable[..., bytes], timm_weights: Path
) -> Options:
    """``options(language, out)``: a command line that trains on captions of a language."""
    folder = tmp_path_factory.mktemp("languages")

    def make(language: str, out: Path) -> list[str]:
        source = folder / language
        if not source.exists():
            source.mkdir()
            with (source / "captions.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["image", "caption"])
                for number, text in zip(_PHOTOS, captions_in(language), strict=True):
                    (source / f"{number}.png").write_bytes(draw(number))
                    writer.writerow([f"{number}.png", text])
        return f"""--recipe best --data {source} --language {language} --out {out}
            --cache {folder / "features"} --encoder timm:test_resnet
            --encoder-weights {timm_weights} --epochs 8 --ema-decay 0 --detector-epochs 1
            --detector-photos 2 --reward-epochs 1 --batch-size 4 --min-count 1 --max-length 40
            --learning-rate 0.01
            --device cpu""".split()

    return make


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("language", CAPTIONS)
def test_language_trains_captions_and_renders(
    language: str,
    options: Options,
    tmp_path: Path,
    timm_weights: Path,
    draw: Callable[..., bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = options(language, tmp_path / "run")
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main(arguments) == 0
    assert "no caption names a side" not in caplog.text
    checkpoint = tmp_path / "run/checkpoint"
    captioner = Captioner.from_pretrained(checkpoint, encoder_weights=timm_weights)
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert f"writes a caption (language: {language})" in card
    assert "English" not in card
    # Two of the twelve photos are held back.
    texts = captions_in(language)
    known = set(captioner.checkpoint.vocabulary.idx2word[len(SPECIALS) :])
    assert known <= {word for text in texts for word in clean(text).split()}
    assert sum(known.issuperset(clean(text).split()) for text in texts) >= 10

    photo = Image.open(io.BytesIO(draw(0)))
    caption = captioner.score(
        photo, next(text for text in texts if known >= {*clean(text).split()})
    )
    written = captioner.caption(photo)
    assert written.text
    assert {word.text for word in written.beams[0].words} <= known
    for each in (caption, written):
        assert each.language == language
        assert not (language in ("zh", "ja") and " " in each.text)
        assert "' " not in each.text
    assert main(["caption", "--checkpoint", str(checkpoint), "--encoder-weights", str(timm_weights),
                 "--data", str(arguments[3]), "--split", "train",
                 "--output", str(tmp_path / "captions.csv")]) == 0  # fmt: skip
    rows = (tmp_path / "captions.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 13

    # A machine without a font for the script says so; with one, each letter has a glyph.
    rendering._fonts_for.cache_clear()
    rendering._warn_of_missing_glyphs.cache_clear()
    with caplog.at_level(logging.WARNING, rendering.__name__):
        caplog.clear()
        files = {kind: render(photo, caption, kind) for kind in ("png", "gif", "html")}
    _, missing = rendering._search_fonts("".join(caption.text.split()))
    assert bool(missing) == ("no installed font" in caplog.text)
    assert not (missing and language in ("fr", "de", "ar"))  # DejaVu has their letters
    for kind in ("png", "gif"):
        assert np.asarray(Image.open(io.BytesIO(files[kind])).convert("L")).std() > 1
    page = files["html"].decode()
    assert f'<p lang="{language}" dir="auto">{html.escape(caption.text)}</p>' in page
    assert f"<title>{html.escape(caption.text)}</title>" in page


@pytest.mark.parametrize("language", CAPTIONS)
def test_mirrored_photos_swap_the_sides_of_each_caption(
    language: str, options: Options, tmp_path: Path
) -> None:
    config = train.config_of(vars(train.build_parser().parse_args(options(language, tmp_path))))
    data = prepare(dataclasses.replace(config, views=2), tmp_path / "features")
    plain = [texts[0] for texts in data.train_references]
    half = len(plain) // 2
    swaps = swapped_words(language)
    assert half == 10
    # Both sides are named by the same words, so each caption tells them apart.
    for text, mirrored in zip(plain[:half], plain[half:], strict=True):
        assert mirrored != text
        assert mirrored == mirror_text(text, swaps)


def test_captions_without_sides_are_reported(
    options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """German captions, trained on as if they were English."""
    arguments = options("de", tmp_path)
    arguments[arguments.index("--language") + 1] = "en"
    config = train.config_of(vars(train.build_parser().parse_args(arguments)))
    prepare(config, tmp_path / "features")
    assert "no caption names a side (left right)" in caplog.text
    caplog.clear()
    prepare(dataclasses.replace(config, mirror_words=("links=rechts",)), tmp_path / "features")
    assert "no caption names a side" not in caplog.text


def test_unknown_sides_stop_a_run_with_mirrored_photos(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options("fr", tmp_path / "run")
    arguments[arguments.index("--language") + 1] = "fi"
    assert train.main(arguments) == 2
    assert "--mirror-words LEFT=RIGHT, or use --views 1" in capsys.readouterr().err
    config = TrainConfig(language="fi", data=(arguments[3],), encoder="timm:test_resnet")
    weights = arguments[arguments.index("--encoder-weights") + 1]
    config = dataclasses.replace(config, encoder_weights=weights, views=1)
    assert len(prepare(config, tmp_path / "features").train_references) == 10


def test_banned_endings_are_english() -> None:
    vocabulary = Vocabulary([*SPECIALS, "an", "dog", "in"])
    assert vocabulary.bad_endings("en-US") == [4, 6]
    assert vocabulary.bad_endings("de") == []  # "Ein Mann zieht sich an"
    assert {"an", "in"} < set(BAD_ENDINGS)


def test_characters_are_single_and_han_or_kana() -> None:
    words = ["人", "い", "ー", "か\u309a", "人人", "dog", "a", "ب"]
    vocabulary = Vocabulary([*SPECIALS, *words])
    assert [vocabulary.idx2word[index] for index in vocabulary.characters()] == words[:4]
    assert EOS not in vocabulary.characters()


def test_sheet_and_comparison_write_chinese_without_spaces(
    monkeypatch: pytest.MonkeyPatch, captioner: Captioner
) -> None:
    """And break its lines between characters, instead of cutting them."""
    lines: list[str] = []
    measure = rendering._Typesetter.wrap
    monkeypatch.setattr(
        rendering,
        "_write_text",
        lambda _, texts: lines.extend(each.text for each in texts),
    )
    photo = Image.new("RGB", (60, 40))
    caption = captioner.score(photo, "a dog")
    words = caption.beams[0].words
    letters = "左边有红色的圆"
    beam = dataclasses.replace(
        caption.beams[0],
        words=tuple(dataclasses.replace(words[0], text=letter) for letter in letters),
    )
    render(photo, dataclasses.replace(caption, beams=(beam,), language="zh"), "png")
    assert letters in lines

    wrapped: list[str] = []

    def wrap(self: rendering._Typesetter, texts: list[str], width: float) -> list[list[str]]:
        found = measure(self, texts, width)
        wrapped.extend(word for line in found for word in line)
        return found

    monkeypatch.setattr(rendering._Typesetter, "wrap", wrap)
    comparison([photo], [letters * 9], [[letters]], "zh")
    assert "".join(wrapped) == f"GT:{letters}PRED:{letters * 9}"
