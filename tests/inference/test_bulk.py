"""``python -m captioner caption --output``: any number of photos, and resuming a stopped job."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner import Captioner, DecodingOptions
from captioner.__main__ import main
from captioner.data.sources import stream_photos
from captioner.errors import WriteError
from captioner.inference import bulk

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]


def table(output: Path) -> dict[str, Row]:
    """Return the rows by photo, and make sure that none comes twice."""
    if output.suffix == ".csv":
        with output.open(encoding="utf-8", newline="") as file:
            rows: list[Row] = [
                {name: value or None for name, value in row.items()} for row in csv.DictReader(file)
            ]
        for row in rows:
            for name in ("log_probability", "confidence"):
                row[name] = row[name] and float(row[name])
    elif output.suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    else:
        rows = pq.read_table(output).to_pylist()
    assert len({row["photo"] for row in rows}) == len(rows)
    return {row["photo"]: row for row in rows}


def rounded(output: Path) -> dict[str, Row]:
    """Return the rows with what batches of any size have in common of the numbers."""
    rows = table(output)
    for row in rows.values():
        for name in ("log_probability", "confidence"):
            row[name] = row[name] and round(row[name], 3)
    return rows


@pytest.fixture(autouse=True)
def _load_shipped_checkpoint_once(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Captioner.from_pretrained

    def load_once(path: str | None = None, *rest: Any, **options: Any) -> Captioner:
        return load(path, *rest, **options) if path else captioner

    monkeypatch.setattr(Captioner, "from_pretrained", load_once)


@pytest.fixture
def album(tmp_path: Path, example_photos: list[Path]) -> Path:
    """Four photos in two folders, one of them broken, and a name that is no valid text."""
    folder = tmp_path / "album"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(example_photos[0], folder / "b.png")
    shutil.copy(example_photos[1], folder / "deep" / "a.png")
    shutil.copy(example_photos[0], folder / os.fsdecode(b"\xff.png"))
    (folder / "broken.jpg").write_bytes(b"no photo")
    (folder / "notes.txt").write_text("no photo either")
    return folder


def test_every_photo_gets_a_row_with_caption_or_error(
    captioner: Captioner, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "captions.parquet"
    assert main(["caption", str(album), "--output", str(output)]) == 1
    assert f"4 photos in {output}, 1 of them with an error" in capsys.readouterr().out
    rows = table(output)
    whole = captioner.caption(album / "b.png")
    assert rows[f"{album}/b.png"] == {
        "photo": f"{album}/b.png",
        "filename": "b.png",
        "caption": whole.text,
        "log_probability": pytest.approx(whole.log_probability, abs=1e-4),
        "confidence": pytest.approx(whole.confidence, abs=1e-4),
        "error": None,
    }
    assert rows[f"{album}/deep/a.png"]["caption"] == captioner.caption(album / "deep/a.png").text
    assert rows[f"{album}/\\xff.png"]["caption"] == whole.text
    broken = rows[f"{album}/broken.jpg"]
    assert broken["caption"] is None
    assert "isn't an image we can read" in broken["error"]


def test_resumed_job_skips_captioned_photos(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "captions.parquet"
    main(["caption", str(album / "b.png"), "--output", str(output)])
    before = table(output)
    attempted: list[Any] = []
    original = Captioner.caption_each

    def record(self: Captioner, photos: list[Any], *rest: Any, **options: Any) -> Any:
        attempted.extend(photos)
        return original(self, photos, *rest, **options)

    monkeypatch.setattr(Captioner, "caption_each", record)
    main(["caption", str(album), "--output", str(output)])
    assert len(attempted) >= 3  # the broken one stops its batch, and all are tried one by one
    assert album / "b.png" not in attempted
    assert before.items() <= table(output).items()
    assert len(table(output)) == 4


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_text_output_equals_parquet_and_resumes_after_a_torn_row(
    captioner: Captioner,
    album: Path,
    tmp_path: Path,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (album / "b.png").rename(album / 'b, "\n=1+1.png')
    attempted: list[Any] = []
    original = Captioner.caption_each

    def record(self: Captioner, photos: list[Any], *rest: Any, **options: Any) -> Any:
        attempted.extend(photos)
        return original(self, photos, *rest, **options)

    monkeypatch.setattr(Captioner, "caption_each", record)

    def write(output: Path) -> None:
        paths = sorted(path for path in album.rglob("*.*g") if path.is_file())
        options = DecodingOptions(beam_size=1)
        stream = bulk.from_paths(lambda: paths)
        counts = bulk.caption_all(lambda: captioner, stream, output, options)
        assert counts == (4, 1)

    folder, output = tmp_path / "captions.parquet", tmp_path / f"captions{suffix}"
    write(folder)
    write(output)
    assert rounded(output) == rounded(folder)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == ".") == [
        f".{output.name}.job"
    ]
    attempted.clear()
    write(output)
    assert not attempted
    whole = output.read_bytes()
    # A kill while the last row is written, in the name's line break or anywhere else.
    for end in (whole.rindex(b"1+1.png"), len(whole) - 1, 5):
        output.write_bytes(whole[:end])
        attempted.clear()
        write(output)
        assert rounded(output) == rounded(folder)
        assert attempted
    output.unlink()  # and all of them are captioned again
    write(output)
    assert rounded(output) == rounded(folder)


def test_leftover_parquet_parts_are_moved_into_text_output(
    captioner: Captioner, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "captions.csv"
    paths = [album / "b.png", album / "broken.jpg"]

    def write() -> None:
        bulk.caption_all(
            lambda: captioner, bulk.from_paths(lambda: paths), output, DecodingOptions(beam_size=1)
        )

    monkeypatch.setattr(bulk, "_collect", lambda *_: None)  # as if killed before it
    write()
    assert not output.exists()
    (part,) = (tmp_path / ".captions.csv.job").glob("*.parquet")
    saved = part.read_bytes()
    monkeypatch.undo()
    write()
    assert list(table(output)) == [str(path) for path in paths]
    part.write_bytes(saved)  # as if killed before it was deleted
    write()
    assert list(table(output)) == [str(path) for path in paths]
    assert not part.exists()


def test_dataset_rows_carry_filenames(
    captioner: Captioner,
    hub_row: Callable[..., Row],
    draw: Callable[..., bytes],
    write_parquet: Callable[[Path, dict[str, list[Row]]], Path],
    tmp_path: Path,
) -> None:
    rows = [hub_row(n, ("train", "val", "test")[max(0, n - 12) // 4]) for n in range(24)]
    for row in rows:
        del row["filename"], row["img_id"]
    stored = write_parquet(tmp_path / "stored", {"test": rows})
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(draw(0))
    (photos / "metadata.csv").write_text("file_name,text\na.png,a dog\n")
    captioned = tmp_path / "captioned"
    (captioned / "Images").mkdir(parents=True)
    (captioned / "Images" / "b.png").write_bytes(draw(1))
    (captioned / "captions.txt").write_text("image,caption\nb.png,a dog\nb.png,a cat\n")
    for number, (source, split, names) in enumerate(
        (
            (stored, "test", [f"{1000 + n}.png" for n in range(20, 24)]),
            (stored, "val", [f"{1000 + n}.png" for n in range(16, 20)]),
            (photos, "train", ["a.png"]),
            (captioned, "Train", ["b.png"]),
        )
    ):
        output = tmp_path / f"{number}.jsonl"
        stream = stream_photos(str(source), split)
        options = DecodingOptions(beam_size=1)
        assert bulk.caption_all(lambda: captioner, stream, output, options) == (len(names), 0)
        assert [row["filename"] for row in table(output).values()] == names


def test_dataset_without_captions_is_captioned(
    captioner: Captioner,
    hub_row: Callable[..., Row],
    write_parquet: Callable[[Path, dict[str, list[Row]]], Path],
    tmp_path: Path,
) -> None:
    rows = [{name: hub_row(n)[name] for name in ("image", "filename")} for n in range(5)]
    rows[2]["image"] = None
    rows[3]["filename"] = rows[4]["filename"]  # photos go by their row, not by their name
    data = write_parquet(tmp_path / "data", {"train": rows})
    output = tmp_path / "captions"
    arguments = ["caption", "--data", str(data), "--output", str(output), "--beam-size", "1"]
    assert main(arguments) == 1
    found = table(output)
    assert list(found) == ["0", "1", "2", "3", "4"]
    assert [row["filename"] for row in found.values()] == [row["filename"] for row in rows]
    assert [bool(row["error"]) for row in found.values()] == [False, False, True, False, False]
    greedy = captioner.caption(rows[4]["image"]["bytes"], DecodingOptions(beam_size=1))
    assert found["4"]["caption"] == greedy.text
    assert main(arguments) == 1
    assert table(output) == found


@pytest.mark.slow
def test_killed_job_resumes_and_equals_an_uninterrupted_one(
    example_photos: list[Path], tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(60):
        shutil.copy(example_photos[number % len(example_photos)], photos / f"{number:02}.png")
    code = (
        "import sys; from captioner.inference import bulk; from captioner.__main__ import main; "
        "bulk._BATCH = bulk._PART = 16; sys.exit(main(sys.argv[1:]))"
    )
    whole, output = tmp_path / "whole", tmp_path / "killed"

    def command(folder: Path) -> list[str]:
        return [sys.executable, "-c", code, "caption", str(photos), "--output", str(folder)]

    process = subprocess.Popen(command(output), cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(output.glob("*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 16 <= len(table(output)) < 60
    (output / f".{'0' * 32}.part").write_bytes(b"what a kill left")
    for folder in (output, whole):
        subprocess.run(command(folder), cwd=ROOT, check=True, capture_output=True)
    assert not list(output.glob(".*.part"))
    found, wanted = table(output), table(whole)
    assert len(wanted) == 60
    assert found.keys() == wanted.keys()
    for photo, row in wanted.items():
        assert found[photo]["caption"] == row["caption"]
        assert found[photo]["log_probability"] == pytest.approx(row["log_probability"], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a PATH"),
        (["--data", "somewhere"], "--data needs --output"),
        (["--output", "out"], "either PATHs or --data"),
        (["photo.jpg", "--data", "somewhere", "--output", "out"], "either PATHs or --data"),
        (["photo.jpg", "--output", "out", "--json"], "writes no maps"),
        (["photo.jpg", "--output", "out", "--heatmaps", "maps"], "writes no maps"),
        (["photo.jpg", "--output", "x.json"], ".jsonl (JSON Lines), or as a folder of Parquet"),
        (["photo.jpg", "--output", "x.xlsx"], "not as .xlsx: choose another --output"),
        (["photo.jpg", "--output", "x.csv.gz", "--engine", "ray"], "written as .csv, as .jsonl"),
        (["photo.jpg", "--engine", "ray"], "--engine ray needs --output"),
        (["photo.jpg", "--output", "x.csv", "--workers", "0"], "a whole number from 1"),
    ],
)
def test_conflicting_arguments_exit_with_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["caption", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unsuitable_output_or_data_is_refused_and_kept(
    album: Path,
    tmp_path: Path,
    hub_row: Callable[..., Row],
    write_parquet: Callable[[Path, dict[str, list[Row]]], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:

    def message(photos: list[str], output: Path) -> str:
        assert main(["caption", *photos, "--output", str(output)]) == 2
        return capsys.readouterr().err

    file = tmp_path / "file.parquet"
    file.write_text("mine")
    assert "is a file" in message([str(album)], file)
    other = tmp_path / "other"
    other.mkdir()
    pq.write_table(pa.table({"mine": [1]}), other / "mine.parquet")
    assert "is not a file of captions" in message([str(album)], other)
    (other / "mine.parquet").write_bytes(b"PAR1 cut off")
    assert "is damaged: delete it" in message([str(album)], other)
    assert file.read_text() == "mine"
    for name, text in (("mine.csv", "a,b\n1,2\n"), ("mine.jsonl", "mine"), ("2.jsonl", "{}\n")):
        (tmp_path / name).write_text(text)
        assert "is not a file of captions" in message([str(album)], tmp_path / name)
        assert (tmp_path / name).read_text() == text
    damaged = ",".join(bulk.SCHEMA.names) + "\na,b\n"
    (tmp_path / "damaged.csv").write_text(damaged)
    assert "is damaged after 0 rows" in message([str(album)], tmp_path / "damaged.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder" in message([str(album)], tmp_path / "folder.csv")
    assert not list(tmp_path.glob(".*"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["caption", str(empty), "--output", str(tmp_path / "out")]) == 1
    assert "holds no photo" in capsys.readouterr().err
    assert "cannot read the split" in message(
        ["--data", str(tmp_path / "nowhere")], tmp_path / "out"
    )
    data = write_parquet(tmp_path / "data", {"train": [{"alt_text": hub_row(0)["alt_text"]}]})
    assert "no column with photos" in message(["--data", str(data)], tmp_path / "out")


def test_output_of_another_job_is_refused(
    album: Path,
    tmp_path: Path,
    hub_row: Callable[..., Row],
    write_parquet: Callable[[Path, dict[str, list[Row]]], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = str(write_parquet(tmp_path / "data", {"train": [hub_row(0)], "test": [hub_row(1)]}))
    output = tmp_path / "captions"
    command = ["caption", "--data", data, "--output", str(output)]
    assert main(command) == 0
    before = table(output)
    for more, what in (
        (["--split", "test"], "data"),
        (["--beam-size", "2"], "options"),
        (["--split", "test", "--no-bans"], "data and options"),
    ):
        assert main([*command, *more]) == 2
        assert f"holds captions of other {what}: choose another" in capsys.readouterr().err
    assert main(["caption", str(album), "--output", str(output)]) == 2
    assert main(command) == 0
    assert table(output) == before


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_damaged_data_keeps_the_rows_written_before(
    tmp_path: Path,
    hub_row: Callable[..., Row],
    write_parquet: Callable[[Path, dict[str, list[Row]]], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
) -> None:
    monkeypatch.setattr(bulk, "_BATCH", 2)
    data = write_parquet(tmp_path / "data", {"train": [hub_row(n) for n in range(4)]})
    (first,) = data.rglob("*.parquet")
    broken = first.with_name("train-00001-of-00002.parquet")
    broken.write_bytes(first.read_bytes()[:-100])
    output = tmp_path / "captions"
    command = ["caption", "--data", str(data), "--output", str(output), "--engine", engine]
    assert main(command) == (2 if engine == "local" else 1)
    assert "cannot read the remaining photos" in capsys.readouterr().err.splitlines()[-1]
    if engine == "local":
        assert {"0", "1"} <= table(output).keys()
    broken.unlink()
    assert main(command) == 0
    assert list(table(output)) == ["0", "1", "2", "3"]


def test_second_job_in_the_same_folder_is_refused(captioner: Captioner, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with filelock.FileLock(output / ".lock"), pytest.raises(WriteError, match="another"):
        bulk.caption_all(lambda: captioner, bulk.from_paths(lambda: []), output, DecodingOptions())


_RAY = """
import sys
from captioner.inference import bulk
from captioner.__main__ import main
from captioner.errors import WriteError
bulk._BATCH = bulk._PART = 8  # several files for each worker
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ray_output_equals_local_output(
    album: Path, example_photos: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason='pip install "ray[data]<2.64"')
    for number in range(40):
        shutil.copy(example_photos[number % len(example_photos)], album / f"{number:02}.png")
    outputs = {engine: tmp_path / engine for engine in ("local", "ray")}
    for engine, output in outputs.items():
        more = ["--engine", engine, "--workers", "2"]
        done = subprocess.run(
            [sys.executable, "-c", _RAY, "caption", str(album), "--output", str(output), *more],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 1, done.stderr
        assert f"44 photos in {output}, 1 of them with an error" in done.stdout
    alone, spread = table(outputs["local"]), table(outputs["ray"])
    assert alone.keys() == spread.keys()
    for photo, row in alone.items():
        for name in ("log_probability", "confidence"):
            value = row.pop(name)
            assert spread[photo].pop(name) == (value and pytest.approx(value, abs=1e-4))
        assert spread[photo] == row
    assert len(list(outputs["ray"].glob("*.parquet"))) >= 5


@pytest.mark.slow
def test_ray_resumes_and_reports_a_bad_checkpoint(album: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason='pip install "ray[data]<2.64"')
    output = tmp_path / "captions.csv"
    assert main(["caption", str(album / "b.png"), "--output", str(output)]) == 0
    before = table(output)
    command = ["caption", str(album), "--output", str(output), "--engine", "ray", "--workers", "1"]
    assert main(command) == 1
    assert before.items() <= table(output).items()
    assert len(table(output)) == 4
    assert main([*command, "--checkpoint", str(album)]) == 2


def test_missing_ray_error_names_the_package(
    album: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    output = tmp_path / "captions"
    assert main(["caption", str(album), "--output", str(output), "--engine", "ray"]) == 2
    assert 'pip install "ray[data]<2.64"' in capsys.readouterr().err
