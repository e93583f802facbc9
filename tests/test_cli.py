"""``python -m captioner`` as a shell sees it: what it prints where, and its exit codes."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from huggingface_hub.utils._http import http_backoff
from PIL import Image

import train
from captioner import Captioner, DecodingOptions, __version__, images
from captioner.__main__ import _COMMANDS, _to_json, main
from captioner.arguments import build_parser
from captioner.config import VERDICTS
from captioner.inference.heatmaps import HeatmapFolder
from captioner.model import checkpoint as checkpoints
from captioner.model.vocabulary import clean
from captioner.training.metrics import invented_people

ROOT = Path(__file__).resolve().parent.parent
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


@pytest.fixture(autouse=True)
def _captioner_loaded_once(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Captioner.from_pretrained

    def load_once(checkpoint: str | None, *arguments: Any, **options: Any) -> Captioner:
        return load(checkpoint, *arguments, **options) if checkpoint else captioner

    monkeypatch.setattr(Captioner, "from_pretrained", load_once)


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pillow-heif look as if it was not installed."""
    monkeypatch.setattr(images, "_FORMATS", [name for name in images._FORMATS if name != "HEIF"])
    monkeypatch.setattr(images, "SUFFIXES", images.SUFFIXES - {".heic", ".heif", ".hif"})


def test_caption_prints_a_line_per_photo_and_searches_folders(
    captioner: Captioner,
    example_photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inside = tmp_path / "album" / "deep"
    inside.mkdir(parents=True)
    for photo in example_photos[:2]:
        (inside / photo.name).write_bytes(photo.read_bytes())
    (inside / "notes.txt").write_text("no photo")
    assert main(["caption", str(tmp_path / "album")]) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = [
        f"{inside / photo.name}\t{captioner.caption(photo).text}"
        for photo in sorted(example_photos[:2], key=lambda photo: photo.name)
    ]
    assert lines == wanted


def test_caption_without_bans_matches_plain_greedy_decoding(
    captioner: Captioner, example_photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    photos = [str(photo) for photo in example_photos]
    assert main(["caption", *photos, "--beam-size", "1", "--no-bans"]) == 0
    texts = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    wanted = captioner.caption_batch(photos, DecodingOptions.plain_greedy())
    assert texts == [caption.text for caption in wanted]
    assert texts != [caption.text for caption in captioner.caption_batch(photos)]


def test_caption_json_holds_every_number(
    example_photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", "--json", "--beam-size", "2", str(example_photos[0])]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record["path"] == str(example_photos[0])
    assert len(record["beams"]) == 2
    word = record["beams"][0]["words"][0]
    assert len(word["maps"]["attended"]) == len(word["maps"]["attended"][0]) == 7
    assert sum(map(sum, word["maps"]["attended"])) == pytest.approx(1, abs=1e-3)
    assert len(word["alternatives"]) == 5


def test_explain_prints_the_verdict_of_each_word(
    captioner: Captioner, example_photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(example_photos[0])]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    caption = captioner.caption(example_photos[0])
    assert first == f"{example_photos[0]}\t{caption.text}"
    rows = [line.split("\t") for line in lines]
    assert [row[1] for row in rows] == [*caption.text.split(), "<eos>"]
    assert [row[0] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
    verdicts = {row[1]: row[3] for row in rows}
    assert verdicts["of"] == "from the sentence"
    assert verdicts["striped"].startswith("seen there (")


def test_explain_prints_the_maps_of_one_word(
    example_photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    photo = str(example_photos[0])
    assert main(["explain", photo, "--text", "a cat", "--word", "2"]) == 0
    first, _, *blocks = capsys.readouterr().out.split("\n")
    assert first.startswith("2\tcat\t")
    titles = [line.split(":")[0] for line in blocks if ":" in line]
    assert titles == ["attended", "evidence", "mattered", "shown", "logits"]
    rows = [line.split() for line in blocks if line and ":" not in line]
    assert [len(row) for row in rows[:28]] == [7] * 28
    for _, *numbers, share in rows[28:]:
        output, evidence, pointer, logit = map(float, numbers)
        assert output + evidence + pointer == pytest.approx(logit, abs=0.03)
        assert share.endswith("%")
    assert "cat" in {text for text, *_ in rows[28:]}
    attended = sum(float(cell) for row in rows[:7] for cell in row)
    assert attended == pytest.approx(100, abs=0.3)
    assert main(["explain", photo, "--text", "a cat", "--word", "4"]) == 2
    assert "no word 4: the caption has 2, and 3 is its end" in capsys.readouterr().err


def test_explain_as_json_has_everything(
    example_photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["explain", str(example_photos[0]), "--word", "7", "--json", "--format", "html"]
    assert main([*arguments, "--heatmaps", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    word = record["beams"][0]["words"][-1]
    assert word["verdict"] in VERDICTS
    assert "mattered" in word["maps"]
    assert len(record["seen"]) == 49
    assert record["steps"]["word"] == record["beams"][0]["words"][6]["text"]
    (page,) = tmp_path.iterdir()
    assert f'"verdict": "{word["verdict"]}"' in page.read_text()


def test_heatmaps_of_photos_with_the_same_name_are_numbered(
    example_photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for folder in ("one", "two"):
        path = tmp_path / folder / "photo.jpg"
        path.parent.mkdir()
        with Image.open(example_photos[0]) as image:
            image.convert("RGB").save(path)
        paths.append(str(path))
    maps = tmp_path / "maps"
    assert main(["caption", *paths, "--heatmaps", str(maps)]) == 0
    capsys.readouterr()
    assert sorted(path.name for path in maps.iterdir()) == ["photo.jpg-2.png", "photo.jpg.png"]
    for path in maps.iterdir():
        Image.open(path).verify()


@pytest.mark.parametrize("kind", ["png", "gif", "html", "json"])
def test_heatmaps_have_the_chosen_format(
    kind: str,
    captioner: Captioner,
    example_photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    album = tmp_path / "album" / "deep"
    album.mkdir(parents=True)
    (album / "photo.jpg").write_bytes(example_photos[0].read_bytes())
    maps = tmp_path / "maps"
    arguments = [str(album.parent), "--heatmaps", str(maps), "--format", kind]
    assert main(["caption", *arguments]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (path,) = (path for path in maps.rglob("*") if path.is_file())
    assert path == maps / "deep" / f"photo.jpg.{kind}"
    data = path.read_bytes()
    if kind == "html":
        assert f">{line.split(chr(9))[1]}</title>".encode() in data
    elif kind == "json":
        wanted = captioner.caption(example_photos[0]).to_dict()
        assert json.loads(data) == {**wanted, "chosen": 0}
    else:
        with Image.open(path) as picture:
            assert picture.format == kind.upper()


def test_unreadable_photos_are_reported_and_skipped(
    example_photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_text("no photo")
    paths = [str(tmp_path / "bad.jpg"), str(tmp_path / "missing.jpg"), str(example_photos[0])]
    assert main(["caption", *paths]) == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert "bad.jpg" in printed.err
    assert "missing.jpg" in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["caption", "x.jpg", "--beam-size", "0"],
        ["caption", "x.jpg", "--beam-size", "1000000000"],
        ["caption", "x.jpg", "--checkpoint", "nowhere"],
        ["caption", ""],
        ["caption", "x.jpg", "--prefix", "zxcvb"],
        ["caption", "x.jpg", "--prefix", "a dog " * 20],
        ["caption", "x.jpg", "--samples", "3"],
        ["caption", "x.jpg", "--top-p", "0.5", "--temperature", "0"],
        ["caption", "-", "--output", "out"],
        ["caption", "https://example.org/x.jpg", "--output", "out"],
        ["score", "x.jpg", " !? "],
        ["score", "x.jpg", "a dog " * 200],
        ["evaluate", "--sheet", "sheet.jpg"],
        ["evaluate", "--json", "/"],
        ["caption", "--data", "photos"],
        ["caption", "x.jpg", "--engine", "ray"],
        ["caption", "x.jpg", "--output", "out", "--json"],
        ["caption", "x.jpg", "--beam-size", "two"],
        ["caption", "x.jpg", "--format", "bmp"],
        ["export"],
        ["paint"],
        [],
    ],
)
def test_bad_arguments_print_one_line_and_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["caption", "score", "evaluate", "export"])
def test_unknown_option_is_refused_with_the_command_to_ask(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"caption": ["x.jpg"], "score": ["x.jpg", "a dog"]}.get(command, [])
    assert main([command, *arguments, "--checkpoints"]) == 2
    assert capsys.readouterr().err == (
        "captioner: unknown argument --checkpoints (did you mean --checkpoint?); "
        f"see python -m captioner {command} --help\n"
    )


def test_version_and_program_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"captioner {__version__}\n"
    for path, name in (
        ("/usr/bin/captioner", "captioner"),
        ("captioner.exe", "captioner"),
        ("/home/me/captioner/__main__.py", "python -m captioner"),
    ):
        monkeypatch.setattr(sys, "argv", [path])
        assert build_parser().prog == name


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ([], "evaluate"),
        (["caption"], "--temperature X 0 = beam search; above 0 samples words"),
        (["score"], "--heatmaps DIR"),
        (["evaluate"], "--beam-size N Number of hypotheses kept at each step."),
        (["export"], "--hub USER/NAME"),
    ],
)
def test_help_describes_the_options(
    command: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert option in " ".join(capsys.readouterr().out.split())


# Decoding


def test_decoding_options_match_python(
    captioner: Captioner, example_photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    photo = str(next(path for path in example_photos if path.name == "lion.jpg"))
    for given in (
        {"prefix": "two women", "max_length": 8},
        {"length_penalty": 3.0, "beam_size": 2},
        {"temperature": 0.9, "top_p": 0.8, "samples": 2, "seed": 1},
    ):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        assert main(["caption", "--json", photo, *flags]) == 0
        record = json.loads(capsys.readouterr().out)
        wanted = captioner.caption(photo, DecodingOptions(**given))
        assert record == {"path": photo, **json.loads(json.dumps(wanted.to_dict()))}
        assert record["text"] != captioner.caption(photo).text


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--temperature", "20", "temperature is 20.0; it must be a number from 0 to 10"),
        ("--temperature", "nan", "temperature is nan; it must be a number from 0 to 10"),
        ("--temperature", "0.001", "it must be 0 (beam search) or at least 0.01"),
        ("--max-length", "2", "max_length is 2; it must be a whole number from 3 to 200"),
        ("--length-penalty", "-1", "length_penalty is -1.0; it must be a number from 0 to 5"),
        ("--seed", "-1", "seed is -1; it must be a whole number from 0"),
    ],
)
def test_decoding_options_out_of_range_are_named(
    flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", "x.jpg", f"{flag}={value}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_max_length_defaults_to_the_checkpoint(
    captioner: Captioner,
    example_photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = dataclasses.replace(captioner.checkpoint, max_length=6)
    monkeypatch.setattr(captioner, "checkpoint", short)
    monkeypatch.setattr("captioner.model.checkpoint.load", lambda _: short)
    photo, out = str(example_photos[0]), tmp_path / "captions.parquet"
    assert main(["caption", photo]) == 0
    text = capsys.readouterr().out.strip().split("\t")[1]
    assert text == captioner.caption(photo, DecodingOptions(max_length=6)).text
    assert len(text.split()) <= 4
    assert main(["caption", photo, "--output", str(out)]) == 0
    assert pyarrow.parquet.read_table(out)["caption"].to_pylist() == [text]


# Scoring


def test_score_prints_the_probability_of_each_word(
    captioner: Captioner,
    example_photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photo, text, maps = str(example_photos[0]), "An okapi on the street!", tmp_path / "maps"
    wanted = captioner.score(photo, text)
    assert main(["score", photo, text, "--heatmaps", str(maps), "--format", "json"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in rows] == [
        *("an", "okapi", "on", "the", "street", "<eos>", "log probability")
    ]
    assert rows[1][1].endswith(" (unknown word)")
    numbers = [float(value.split()[0]) for _, value in rows]
    assert numbers[:-1] == pytest.approx(
        [word.probability for word in (*wanted.words, wanted.beams[0].end)], rel=0.01
    )
    assert numbers[-1] == pytest.approx(wanted.log_probability, abs=1e-3)
    assert sum(map(math.log, numbers[:-1])) == pytest.approx(numbers[-1], abs=0.1)
    (file,) = maps.iterdir()
    assert file.name == f"{example_photos[0].name}.json"
    record = json.loads(file.read_text())
    assert main(["score", photo, text, "--json"]) == 0
    printed_record = json.loads(capsys.readouterr().out)
    assert {**printed_record, "chosen": 0} == {"path": photo, **record}
    assert main(["score", "nowhere.jpg", text, "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "path": "nowhere.jpg",
        "error": "there is no file nowhere.jpg",
    }
    assert printed.err == "captioner: there is no file nowhere.jpg\n"


# Failures


def test_json_has_one_object_per_photo_in_order(
    example_photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, empty = str(example_photos[0]), tmp_path / "empty"
    empty.mkdir()
    address = "https://example.org//x.jpg"
    names = [str(tmp_path / "missing.jpg"), good, str(empty), address, good]
    assert main(["caption", "--json", *names]) == 1
    printed = capsys.readouterr()
    records = [json.loads(line) for line in printed.out.splitlines()]
    assert [record["path"] for record in records] == names
    assert ["text" in record for record in records] == [False, True, False, False, True]
    errors = [record["error"] for record in records if "error" in record]
    assert [f"captioner: {error}" for error in errors] == printed.err.splitlines()
    assert errors[0].startswith("there is no file")
    assert "holds no photo" in errors[1]
    assert errors[2].startswith(f"{address} is an address, not a file: download it")


def test_json_replaces_nan_by_null() -> None:
    record = {"beams": [{"score": math.nan, "text": "\u0936"}], "size": [math.inf, 1.5]}
    text = _to_json(record, ensure_ascii=False)
    assert text == '{"beams": [{"score": null, "text": "\u0936"}], "size": [null, 1.5]}'


@pytest.mark.usefixtures("without_heif")
def test_photos_left_out_of_a_folder_are_reported(
    captioner: Captioner,
    example_photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    album, other = tmp_path / "album", tmp_path / "other"
    album.mkdir()
    other.mkdir()
    shutil.copy(example_photos[0], album / "a.jpg")
    shutil.copy(example_photos[1], other / "b.jpg")
    (album / "link").symlink_to(other)
    (other / "back").symlink_to(album)
    (album / "IMG_1.HEIC").write_bytes(HEIC)
    assert main(["caption", str(album)]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"{album}/a.jpg\t{captioner.caption(example_photos[0]).text}",
        f"{album}/link/b.jpg\t{captioner.caption(example_photos[1]).text}",
    ]
    (line,) = printed.err.splitlines()
    assert f"{album}/IMG_1.HEIC is a HEIC photo: pip install pillow-heif" in line

    # In a table too, and what is left out can be captioned later.
    output = tmp_path / "captions.parquet"
    assert main(["caption", str(album), "--output", str(output)]) == 1
    printed = capsys.readouterr()
    names = pyarrow.parquet.read_table(output)["photo"].to_pylist()
    assert sorted(names) == [f"{album}/a.jpg", f"{album}/link/b.jpg"]
    assert f"{album}/IMG_1.HEIC is a HEIC photo: pip install pillow-heif" in printed.err
    assert "left out of the table: 1" in printed.err
    (album / "a.jpg").unlink()
    (album / "link").unlink()
    for more in ([], ["--output", str(tmp_path / "new.parquet")]):
        assert main(["caption", str(album), *more]) == 1
        assert "pip install pillow-heif" in capsys.readouterr().err


def test_dash_reads_a_photo_from_standard_input(
    captioner: Captioner,
    example_photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photo, text = str(example_photos[0]), captioner.caption(example_photos[0]).text

    def set_stdin(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    maps = tmp_path / "maps"
    set_stdin(example_photos[0].read_bytes())
    assert main(["caption", "-", photo, "-", "--heatmaps", str(maps)]) == 0
    assert capsys.readouterr().out == f"-\t{text}\n{photo}\t{text}\n-\t{text}\n"
    written = {"stdin.png", "stdin-2.png", f"{example_photos[0].name}.png"}
    assert {path.name for path in maps.iterdir()} == written
    set_stdin(example_photos[0].read_bytes())
    assert main(["score", "-", text]) == 0
    assert capsys.readouterr().out.startswith("a\t")
    monkeypatch.setattr(images, "MAX_BYTES", 1_000)
    for data, error in (
        (b"", "standard input isn't an image we can read"),
        (example_photos[0].read_bytes(), "standard input has 0 megabytes, more than"),
    ):
        set_stdin(data)
        assert main(["caption", "-", "--json"]) == 1
        record = json.loads(capsys.readouterr().out)
        assert record["path"] == "-"
        assert record["error"].startswith(error)
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["caption", "-"]) == 1
    assert "cannot read standard input" in capsys.readouterr().err


# Heat maps


def test_unwritable_heatmap_does_not_end_the_run(
    example_photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maps, names = tmp_path / "maps", ["vanishes.jpg", "blocked.jpg", "a" * 250 + ".jpg", "z.jpg"]
    paths = [tmp_path / name for name in names]
    for path in paths:
        shutil.copy(example_photos[0], path)
    (maps / "blocked.jpg.json").mkdir(parents=True)
    caption_each = Captioner.caption_each

    def vanish(*arguments: Any, **options: Any) -> Any:
        captions = caption_each(*arguments, **options)
        paths[0].unlink()
        return captions

    monkeypatch.setattr(Captioner, "caption_each", vanish)

    command = ["caption", *map(str, paths), "--heatmaps", str(maps), "--format", "json"]
    assert main(command) == 1

    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 4
    vanished, blocked = printed.err.splitlines()
    assert "there is no file" in vanished
    assert "vanishes.jpg" in vanished
    assert "cannot write" in blocked
    assert "blocked.jpg.json: Is a directory" in blocked
    files = sorted(path.name for path in maps.iterdir() if path.is_file())
    assert files[1] == "z.jpg.json"
    assert len(files[0]) == 255
    assert files[0].startswith("a" * 230)


def test_full_disk_ends_the_run_with_its_cause(
    example_photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    command = ["caption", str(example_photos[0]), str(example_photos[1])]
    assert main([*command, "--heatmaps", str(tmp_path / "maps"), "--format", "json"]) == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    (line,) = printed.err.splitlines()
    assert "No space left on device; make room and start again" in line


def test_heatmap_names_are_short_unique_and_valid_text(tmp_path: Path) -> None:
    folder = HeatmapFolder(tmp_path, "html")
    names = ["a" * 250 + "1.jpg", "a" * 250 + "2.jpg", "\N{CAT}" * 63 + "jpg", "a" * 249 + ".jpg"]
    names += [os.fsdecode(b"\xff" * 254), "a.jpg"]
    paths = [folder.unused_path(Path("deep", name)) for name in [*names, *names]]
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert path.parent == tmp_path / "deep"
        assert len(os.fsencode(path.name)) <= 255
        path.name.encode()  # fails on half a character
        assert path.suffix == ".html"
    assert paths[5].name == "a.jpg.html"
    assert paths[11].name == "a.jpg-2.html"


@pytest.mark.parametrize("name", ["x.JPG", "x.html", "x.pdf", "file"])
def test_heatmaps_refuse_the_name_of_a_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for command in (["caption", "x.jpg"], ["score", "x.jpg", "a dog"]):
        assert main([*command, "--heatmaps", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "folder" in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Warnings


def test_warnings_and_the_first_retry_of_the_hub_are_printed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(*_: object, **__: object) -> int:
        logging.getLogger("captioner.data.sources").warning("a warning of ours")
        library = logging.getLogger("some_library")
        library.addHandler(handler := logging.StreamHandler())
        library.warning("a warning of theirs")
        library.removeHandler(handler)
        with pytest.raises(Exception, match="refused"):
            http_backoff("HEAD", "http://127.0.0.1:9", max_retries=3, base_wait_time=0.001)
        return 0

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # pytest's; a command has none
    monkeypatch.setitem(_COMMANDS, "caption", warn)
    monkeypatch.setattr(train, "fit", warn)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (printer,) = logging.getLogger("huggingface_hub").handlers
    monkeypatch.setattr(printer, "stream", sys.stderr)
    for command, prefix in ((main, "captioner: "), (train.main, "")):
        assert command(["caption"] if command is main else []) == 0
        assert root.handlers == []
        lines = capsys.readouterr().err.splitlines()
        assert lines[:2] == [f"{prefix}a warning of ours", "a warning of theirs"]
        assert len(lines) == 3
        assert "refused' thrown while requesting HEAD http://127.0.0.1:9" in lines[2]


# Processes


@pytest.mark.slow
def test_caption_imports_no_training_or_page_libraries(
    example_photos: list[Path],
) -> None:
    code = (
        "import sys; from captioner.__main__ import main; "
        f"main(['caption', {str(example_photos[0])!r}]); "
        "print([n for n in ('gensim', 'datasets', 'gradio', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_closed_pipe_is_no_error(example_photos: list[Path]) -> None:
    command = f"{sys.executable} -m captioner caption {example_photos[0]} {example_photos[1]}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -c 1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_evaluate_prints_scores_and_writes_captions_and_sheet(
    parquet_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "scores.json", tmp_path / "sheet.png"
    arguments = ["evaluate", "--data", str(parquet_folder), "--split", "validation"]
    arguments += ["--cache", str(tmp_path / "cache"), "--json", str(out), "--sheet", str(picture)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for name in ("BLEU-1", "BLEU-4", "CIDEr", "ROUGE-L", "cross-entropy", "repetition"):
        assert name in printed
    record = json.loads(out.read_text())
    assert record["conditions"]["references_per_photo"] == 5
    assert record["conditions"]["photos"] == len(record["photos"])
    assert all(photo["caption"] and photo["references"] for photo in record["photos"])
    assert sum(each["photos"] for each in record["confidence"]["bins"]) == len(record["photos"])
    assert record["invented_people"] is None  # no reference mentions anybody
    Image.open(picture).verify()
    assert main(arguments) == 0
    assert json.loads(out.read_text()) == record


def test_columns_are_named_on_the_command_line(
    tmp_path: Path,
    hub_row: Callable[..., dict[str, Any]],
    write_parquet: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [hub_row(number) for number in range(3)]
    named = [{"picture": row["image"], "en": row["alt_text"][0]} for row in rows]
    data = ["--data", str(write_parquet(tmp_path / "data", {"train": named})), "--split", "train"]
    table, scores = tmp_path / "captions.csv", tmp_path / "scores.json"
    arguments = ["caption", *data, "--output", str(table), "--beam-size", "1"]
    assert main(arguments) == 2
    assert "only: picture, en; name it with --image-column" in capsys.readouterr().err
    assert main([*arguments, "--image-column", "picture"]) == 0
    assert len(table.read_text().splitlines()) == 4
    arguments = ["evaluate", *data, "--json", str(scores), "--cache", str(tmp_path / "cache")]
    arguments += ["--image-column", "picture", "--caption-column", "en"]
    assert main(arguments) == 0
    assert "photos from picture, captions from en" in capsys.readouterr().err
    references = [photo["references"] for photo in json.loads(scores.read_text())["photos"]]
    assert references == [[clean(row["en"])] for row in named]


def test_evaluate_tests_maps_and_plots_them_beside_the_scores(
    parquet_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--data", str(parquet_folder), "--limit", "4", "--maps"]
    arguments += ["--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "scores.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for test in ("focus, people's captions", "likeness, model's captions", "deletion, model's"):
        assert test in printed
    maps = json.loads((tmp_path / "scores.json").read_text())["maps"]
    assert {score["map"] for score in maps} >= {"attended", "mattered"}
    assert all(score["interval"][0] <= score["value"] <= score["interval"][1] for score in maps)
    Image.open(tmp_path / "scores.maps.png").verify()


def test_evaluate_counts_invented_people(
    csv_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(csv_folder, folder)
    with (folder / "captions.csv").open("a", encoding="utf-8") as file:
        file.write("0.png,a child with a square\n")
    out = tmp_path / "scores.json"
    arguments = ["evaluate", "--data", str(folder), "--split", "train", "--json", str(out)]
    assert main([*arguments, "--cache", str(tmp_path / "cache")]) == 0
    record = json.loads(out.read_text())
    captions = [photo["caption"] for photo in record["photos"]]
    references = [photo["references"] for photo in record["photos"]]
    people = record["invented_people"]
    assert (people["captions"], people["photos"]) == invented_people(captions, references)
    assert people["photos"] == len(captions) - 1
    line = f"people in {people['captions']} captions of the {people['photos']} photos"
    assert line in capsys.readouterr().out


def test_people_are_not_counted_in_other_languages(
    captioner: Captioner, csv_folder: Path, tmp_path: Path
) -> None:
    """The words for people are English, and "person" is German as well."""
    folder = tmp_path / "photos"
    shutil.copytree(csv_folder, folder)
    with (folder / "captions.csv").open("a", encoding="utf-8") as file:
        file.write("0.png,eine Person mit einem Quadrat\n")
    recipe = {**captioner.checkpoint.recipe, "language": "de"}
    checkpoints.save(tmp_path / "de", dataclasses.replace(captioner.checkpoint, recipe=recipe))
    out = tmp_path / "scores.json"
    arguments = ["evaluate", "--data", str(folder), "--checkpoint", str(tmp_path / "de")]
    arguments += ["--split", "train", "--cache", str(tmp_path / "cache"), "--json", str(out)]
    assert main(arguments) == 0
    assert json.loads(out.read_text())["invented_people"] is None


def test_evaluate_measures_the_confidence_that_the_checkpoint_has(
    captioner: Captioner, parquet_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints.save(
        tmp_path / "sure",
        dataclasses.replace(captioner.checkpoint, confidence=[20.0, 0.0, 0.0, 0.0, 0.0]),
    )
    out = tmp_path / "scores.json"
    arguments = ["evaluate", "--data", str(parquet_folder), "--checkpoint", str(tmp_path / "sure")]
    arguments += ["--cache", str(tmp_path / "cache"), "--json", str(out), "--limit", "4"]
    assert main(arguments) == 0
    assert "Brier score" in capsys.readouterr().out
    found = json.loads(out.read_text())["confidence"]
    # Certain of each caption: it errs as often as they are wrong.
    assert found["bins"][9]["photos"] == 4
    wrong = 1 - found["base_rate"]
    assert found["brier"] == pytest.approx(wrong, abs=1e-4)
    assert found["calibration_error"] == pytest.approx(wrong, abs=1e-4)


def test_evaluate_names_the_splits_if_one_is_unknown(
    parquet_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--data", str(parquet_folder), "--split", "dessert"]) == 2
    printed = capsys.readouterr().err
    assert "validation" in printed
    assert len(printed.splitlines()) == 1
