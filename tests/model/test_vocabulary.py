"""Text to ids and back."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from captioner.config import BOS, EOS, PAD, UNK
from captioner.errors import DataError
from captioner.model.vocabulary import SPECIALS, Vocabulary, clean, mean_words

WORDS = ["a", "dog", "runs", "in", "the", "grass", "2", "black", "cafés", "犬"]
VOCABULARY = Vocabulary.build([" ".join(WORDS)], min_count=1)

# A known word in some spelling, then something that separates it from the next.
known_word = st.tuples(
    st.sampled_from(WORDS),
    st.sampled_from([str.lower, str.upper, str.title]),
    st.sampled_from(["", ",", "!?", "_", "'", '"', "\u201d", "\N{HORIZONTAL ELLIPSIS}"]),
    st.sampled_from([" ", "  ", "\t", "\n", "\u00a0", "\u3000"]),
).map(lambda parts: parts[1](parts[0]) + parts[2] + parts[3])


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A dog runs in the grass", "a dog runs in the grass"),
        ("A dog's ball, no. 3!", "a dogs ball no 3"),
        ("  two\t\tmen \n talk  ", "two men talk"),
        ("snake_case -- and-dashes", "snakecase anddashes"),
        ("\u201cQuoted\u201d text\N{HORIZONTAL ELLIPSIS}", "quoted text"),
        ("\uff24\uff2f\uff27\u3000\uff13", "dog 3"),
        ("Cafe\u0301", "café"),
        ("<bos> <unk>", "bos unk"),
        ("", ""),
        (" .,!?-_ ", ""),
        # Vowel signs and tones are part of a word; Arabic and Hebrew points are not.
        ("बिल्ली बैठी है।", "बिल्ली बैठी है"),
        ("แมวนั่ง", "แมวนั่ง"),
        ("ແມວນັ່ງ", "ແມວນັ່ງ"),
        ("தமிழ் பூனை", "தமிழ் பூனை"),
        ("বিড়াল", unicodedata.normalize("NFC", "বিড়াল")),
        ("ကြောင်", "ကြောင်"),
        ("ឆ្មា\u200bអង្គុយ", "ឆ្មា អង្គុយ"),
        ("བྱི་ལ།", "བྱི ལ"),
        ("ድመት፡ተቀምጧል", "ድመት ተቀምጧል"),
        ("قِطَّةٌ", "قطة"),
        ("חָתוּל", "חתול"),
        ("می\u200cخوابد", "میخوابد"),  # noqa: RUF001
        ("র\u200d্যাম", "র্যাম"),
        ("İSTANBUL'da", "istanbulda"),
        ("Straße", "straße"),
        ("Ti\u1ebfng Vie\u0323\u0302t", "tiếng việt"),
        ("고양이가 자고 있다", "고양이가 자고 있다"),
        # No letter before it, struck out, or part of an emoji.
        ("\u093f \u0301a 3\ufe0f\u20e3", "a 3"),
        ("d\u0336o\u0336g\u0336", "dog"),
        ("a dog \u2764\ufe0f \N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-5}", "a dog"),
        # Each character is a word in scripts without spaces.
        ("一只dog在跑。", "一 只 dog 在 跑"),
        ("猫がソファーで", "猫 が ソ フ ァ ー で"),
        ("か\u309aき", "か\u309a き"),
        ("「コーヒー」と、ｶｯﾌﾟ", "コ ー ヒ ー と カ ッ プ"),
        ("هل يجلس؟ نعم، على العشب", "هل يجلس نعم على العشب"),
        ("क्\u200dष और क्\u200cष", "क्ष और क्ष"),
        # What French elides is a word; English genitives, contractions and quotes are not.
        ("L'homme près d\u2019un chat qu'il n'a pas", "l' homme près d' un chat qu' il n' a pas"),
        ("aujourd'hui", "aujourdhui"),
        ("the boys' dog isn't on the kid's 't' and 's'", "the boys dog isnt on the kids t and s"),
    ],
)
def test_clean(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


@settings(deadline=None)
@given(st.text())
# Hangul letters that are apart only by punctuation join once it is gone.
@example("\u1100.\u1161")
@example("İSTANBUL")
@example("\u039f\u0394\u039f\u03a3.\u0391")
@example("か.\u3099")
@example("漢\u093f")
def test_clean_is_idempotent_for_any_text(text: str) -> None:
    assert clean(clean(text)) == clean(text)


@settings(deadline=None)
@given(st.text())
def test_clean_leaves_only_letters_marks_digits_and_single_spaces(text: str) -> None:
    cleaned = clean(text)
    assert all(
        character.isalnum() or character == " " or unicodedata.category(character) in ("Mn", "Mc")
        for character in cleaned
    )
    assert cleaned == " ".join(cleaned.split())


def test_clean_keeps_words_apart_that_differ_by_a_vowel_sign() -> None:
    assert len({clean(word) for word in ("कम", "काम", "कुम")}) == 3
    assert len({clean(word) for word in ("บ้า", "บา", "บี", "บู")}) == 4


def test_chinese_captions_are_encoded_by_character() -> None:
    vocabulary = Vocabulary.build(["一只黑狗在草地上跑。", "一只 dog 在跑"], min_count=2)

    assert vocabulary.idx2word[4:] == sorted("一只在跑")
    ids = vocabulary.encode("一只在跑")
    assert vocabulary.encode(vocabulary.decode(ids)) == ids
    assert len(ids) == 4


def test_captions_without_spaces_are_rejected_unless_segmented() -> None:
    segmented = ["แมว นั่ง อยู่ บน โซฟา สี แดง", "สุนัข วิ่ง ใน สนาม หญ้า"]
    for captions in (
        [text.replace(" ", "") for text in segmented],
        ["แมวนั่ง", "หมาวิ่ง"],
        ["ឆ្មាអង្គុយលើសាឡុង", "ကြောင်တစ်ကောင်ထိုင်နေသည်"],
    ):
        with pytest.raises(DataError, match=r"no spaces between words.*PyThaiNLP"):
            Vocabulary.build(captions, min_count=1)
    assert "นั่ง" in Vocabulary.build(segmented, min_count=1).word2idx
    # One stray caption among many.
    assert mean_words(["a dog"] * 20 + ["แมวนั่งอยู่บนโซฟา"]) == pytest.approx(41 / 21)


def test_one_word_captions_get_no_advice_about_min_count() -> None:
    with pytest.raises(DataError, match="about one word each") as error:
        Vocabulary.build(["a_dog_runs", "a_cat_sits"])
    assert "--min-count" not in str(error.value)


def test_words_are_numbered_alphabetically_after_the_specials() -> None:
    vocabulary = Vocabulary.build(["the dog runs", "A dog in the grass"], min_count=1)

    assert vocabulary.idx2word == [*SPECIALS, "a", "dog", "grass", "in", "runs", "the"]
    assert vocabulary.word2idx == {word: number for number, word in enumerate(vocabulary.idx2word)}
    assert len(vocabulary) == 10
    assert [vocabulary.word2idx[word] for word in SPECIALS] == [PAD, BOS, EOS, UNK] == [0, 1, 2, 3]


def test_encode_padded_has_the_shape_of_the_report() -> None:
    """The report shows 1, 19, 1027, 2814, 1690, 3452, 1480, 2, 0, 0 for this sentence."""
    vocabulary = Vocabulary.build(["a dog runs in the grass"] * 5)

    ids = vocabulary.encode_padded("A dog runs in the grass")

    assert ids == [1, 4, 5, 8, 7, 9, 6, 2, *[0] * 12]
    # The same order of sizes as in the report: a, dog, grass, in, runs, the.
    report = [1, 19, 1027, 2814, 1690, 3452, 1480, 2]
    assert sorted(range(8), key=ids.__getitem__) == sorted(range(8), key=report.__getitem__)


@pytest.mark.parametrize(("words", "padding"), [(17, 1), (18, 0), (19, 0), (60, 0)])
def test_encode_padded_truncates_before_eos(words: int, padding: int) -> None:
    text = " ".join(f"w{number:02}" for number in range(words))
    vocabulary = Vocabulary.build([text], min_count=1)

    ids = vocabulary.encode_padded(text)

    assert len(ids) == 20
    assert ids == [BOS, *range(4, 4 + min(words, 18)), EOS, *[PAD] * padding]


def test_encode_padded_with_another_length() -> None:
    assert VOCABULARY.encode_padded("a a a a a", max_length=4) == [
        BOS,
        *VOCABULARY.encode("a a"),
        EOS,
    ]
    assert VOCABULARY.encode_padded("", max_length=4) == [BOS, EOS, PAD, PAD]


def test_build_includes_words_from_min_count_on() -> None:
    captions = ["dog cat", "Dog, cat", "DOG bird"]

    assert Vocabulary.build(captions, min_count=3).idx2word[4:] == ["dog"]
    assert Vocabulary.build(captions, min_count=2).idx2word[4:] == ["cat", "dog"]
    assert Vocabulary.build(["x " * 5 + "y " * 4]).idx2word[4:] == ["x"]


def test_build_rejects_a_min_count_that_no_word_reaches() -> None:
    with pytest.raises(DataError, match="seen 5 times"):
        Vocabulary.build(["a dog", "a cat"])
    with pytest.raises(DataError, match="seen 1 times"):
        Vocabulary.build([], min_count=1)


def test_unknown_words_become_unk() -> None:
    assert VOCABULARY.encode("a zebra runs") == [
        VOCABULARY.word2idx["a"],
        UNK,
        VOCABULARY.word2idx["runs"],
    ]
    assert VOCABULARY.decode(VOCABULARY.encode_padded("a zebra runs")) == "a <unk> runs"
    # What is written like a special is not one.
    assert VOCABULARY.encode("<pad> <bos>") == [UNK, UNK]


def test_known_ids_omits_unknown_words() -> None:
    assert VOCABULARY.known_ids(["the", "zebra", "a"]) == [
        VOCABULARY.word2idx["the"],
        VOCABULARY.word2idx["a"],
    ]


def test_decode_stops_at_eos_and_drops_padding_and_bos() -> None:
    dog, runs = VOCABULARY.word2idx["dog"], VOCABULARY.word2idx["runs"]

    assert VOCABULARY.decode([BOS, PAD, dog, PAD, runs, EOS, dog, dog]) == "dog runs"
    assert VOCABULARY.decode([dog, runs]) == "dog runs"
    assert VOCABULARY.decode([EOS, dog]) == ""


@settings(deadline=None)
@given(st.lists(known_word, max_size=18).map("".join))
def test_round_trip_of_known_words(text: str) -> None:
    assert VOCABULARY.decode(VOCABULARY.encode_padded(text)) == clean(text)


@settings(deadline=None)
@given(st.lists(known_word, min_size=19, max_size=40).map("".join))
def test_round_trip_of_a_long_text_keeps_its_beginning(text: str) -> None:
    back = VOCABULARY.decode(VOCABULARY.encode_padded(text))

    assert back.split() == clean(text).split()[:18]


@settings(deadline=None)
@given(st.text())
def test_round_trip_of_any_text_whose_words_are_known(text: str) -> None:
    cleaned = clean(text)
    vocabulary = Vocabulary.build([text, "dog"], min_count=1)
    length = len(cleaned.split()) + 2

    assert vocabulary.decode(vocabulary.encode_padded(text, length)) == cleaned


@settings(deadline=None)
@given(st.lists(st.integers(4, len(VOCABULARY) - 1), max_size=18))
def test_round_trip_of_ids(ids: list[int]) -> None:
    text = VOCABULARY.decode(ids)

    assert VOCABULARY.encode(text) == ids
    assert VOCABULARY.encode_padded(text) == [BOS, *ids, EOS, *[PAD] * (18 - len(ids))]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.text()), st.integers(1, 3), st.integers(2, 12))
def test_any_captions_build_a_vocabulary_that_encodes_them(
    captions: list[str], min_count: int, length: int
) -> None:
    captions = [*captions, "dog dog dog"]
    counts = Counter(word for text in captions for word in clean(text).split())

    vocabulary = Vocabulary.build(captions, min_count)

    words = vocabulary.idx2word[4:]
    assert words == sorted(word for word, count in counts.items() if count >= min_count)
    assert [vocabulary.encode(word) for word in words] == [[4 + row] for row in range(len(words))]
    # As it stands in a checkpoint.
    assert Vocabulary(json.loads(json.dumps(vocabulary.idx2word))) == vocabulary
    for text in captions:
        known = [word if word in words else "<unk>" for word in clean(text).split()]
        ids = vocabulary.encode_padded(text, length)
        assert len(ids) == length
        assert ids.count(BOS) == ids.count(EOS) == 1
        assert vocabulary.decode(ids).split() == known[: length - 2]


def test_vocabularies_differ_by_their_words() -> None:
    assert Vocabulary([*SPECIALS, "a"]) == Vocabulary([*SPECIALS, "a"])
    assert Vocabulary([*SPECIALS, "a"]) != Vocabulary([*SPECIALS, "b"])
    assert Vocabulary([*SPECIALS, "a"]) != [*SPECIALS, "a"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "starts with <pad> <bos> <eos> <unk>"),
        (["a", "dog"], "starts with <pad> <bos> <eos> <unk>"),
        (["<bos>", "<pad>", "<eos>", "<unk>", "a"], "starts with <pad> <bos> <eos> <unk>"),
        ([*SPECIALS, "dog", "a", "dog"], "'dog' twice"),
        ([*SPECIALS, "dog", ""], "'', which is not a word"),
        ([*SPECIALS, "a dog"], "'a dog', which is not a word"),
        ([*SPECIALS, "a\ndog"], "which is not a word"),
        ([*SPECIALS, "\ud800"], "which is not a word"),
    ],
)
def test_invalid_words_are_rejected(words: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Vocabulary(words)
