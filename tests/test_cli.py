"""``python -m captioner`` as a shell sees it: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from captioner import Captioner, DecodingOptions
from captioner.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


def test_a_line_a_photo_and_folders_are_walked(
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


def test_without_bans_it_decodes_as_the_report_does(
    captioner: Captioner, example_photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    photos = [str(photo) for photo in example_photos]
    assert main(["caption", *photos, "--beam-size", "1", "--no-bans"]) == 0
    told = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    wanted = captioner.caption_batch(photos, DecodingOptions.report())
    assert told == [caption.text for caption in wanted]
    assert told != [caption.text for caption in captioner.caption_batch(photos)]


def test_json_holds_every_number(
    example_photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", "--json", "--beam-size", "2", str(example_photos[0])]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record["path"] == str(example_photos[0])
    assert len(record["beams"]) == 2
    word = record["beams"][0]["words"][0]
    assert len(word["attention"]) == len(word["attention"][0]) == 7
    assert sum(map(sum, word["attention"])) == pytest.approx(1, abs=1e-3)
    assert len(word["alternatives"]) == 5


def test_heatmaps_of_photos_with_one_name_do_not_overwrite_each_other(
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
def test_heatmaps_are_written_in_the_format_that_was_asked_for(
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
        assert f"<title>{line.split(chr(9))[1]}</title>".encode() in data
    elif kind == "json":
        values = captioner.caption(example_photos[0]).to_dict()
        assert json.loads(data) == {"chosen": 0, **values}
    else:
        with Image.open(path) as picture:
            assert picture.format == kind.upper()


def test_bad_photos_are_told_and_passed_over(
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
    ],
)
def test_bad_settings_are_one_line_and_code_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["caption", "--nonsense", "x"],
        ["caption", "x.jpg", "--format", "bmp"],
    ],
)
def test_a_wrong_command_line_is_code_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["caption"], ["evaluate"]])
def test_help_is_there(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_path_to_a_caption_imports_nothing_that_it_does_not_need(
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


def test_a_reader_that_leaves_early_is_no_error(example_photos: list[Path]) -> None:
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


def test_evaluate_prints_scores_and_writes_captions_and_a_sheet(
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
    assert record["conditions"]["references_a_photo"] == 5
    assert record["conditions"]["photos"] == len(record["photos"])
    assert all(photo["caption"] and photo["references"] for photo in record["photos"])
    Image.open(picture).verify()
    assert main(arguments) == 0
    assert json.loads(out.read_text()) == record


def test_evaluate_names_the_splits_that_there_are(
    parquet_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--data", str(parquet_folder), "--split", "dessert"]) == 2
    printed = capsys.readouterr().err
    assert "validation" in printed
    assert len(printed.splitlines()) == 1
