"""Bad checkpoints, data, settings and requests: refused in one sentence, without a traceback."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

import app
import train
from captioner.__main__ import main
from captioner.config import DecodingOptions, ModelConfig
from captioner.model.checkpoint import Checkpoint, save
from captioner.model.decoder import CaptionModel
from captioner.model.encoder import load_encoder
from captioner.model.vocabulary import SPECIALS, Vocabulary
from captioner.web.controls import setting_values
from tests.page import CALL, ROOT, UPLOAD

Row: TypeAlias = dict[str, Any]
QUEUE = "/gradio_api/queue"
WORDS = ["a", "circle", "is", "on", "red", "square", "the"]


@pytest.fixture
def folder(tmp_path: Path, timm_weights: Path) -> Path:
    """A checkpoint of a very small encoder, to be damaged."""
    encoder = load_encoder("timm:test_resnet", timm_weights)
    torch.manual_seed(0)
    config = ModelConfig(
        vocabulary_size=len(SPECIALS) + len(WORDS),
        encoder_channels=encoder.channels,
        embedding_size=8,
        hidden_size=8,
        attention_size=8,
    )
    checkpoint = Checkpoint(
        CaptionModel(config),
        Vocabulary([*SPECIALS, *WORDS]),
        12,
        encoder.spec(),
        {"recipe": "seed", "data": ["shapes"]},
        {"CIDEr": 1.0},
    )
    save(tmp_path / "checkpoint", checkpoint)
    return tmp_path / "checkpoint"


def _edit(folder: Path, change: Callable[[Row], object]) -> None:
    """Change config.json and update its digest of the weights, as a forger would."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    weights = (folder / "model.safetensors").read_bytes()
    config["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    change(config)
    path.write_text(json.dumps(config))


def _edit_weights(folder: Path, change: Callable[[bytearray], object]) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def _flip_bit(data: bytearray) -> None:
    data[-100] ^= 4


def _write_nan(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["fc.bias"][3] = math.nan
    save_file(state, folder / "model.safetensors")
    _edit(folder, lambda _: None)


def _write_pickle(folder: Path) -> None:
    torch.save({"fc.bias": torch.zeros(3)}, folder / "model.safetensors")
    _edit(folder, lambda _: None)


def _claim_huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((10 * 2**30).to_bytes(8, "little") + path.read_bytes()[8:])
    _edit(folder, lambda _: None)


# Message -> damage.
DAMAGES: dict[str, Callable[[Path], object]] = {
    "is truncated, damaged": lambda folder: _edit_weights(folder, lambda data: data.pop()),
    "damaged or from another": lambda folder: _edit_weights(folder, _flip_bit),
    "fc.bias holds values that are not finite": _write_nan,
    "is not a safetensors file": _write_pickle,
    "header too large": _claim_huge_header,
    "10737418240 bytes": lambda folder: os.truncate(folder / "model.safetensors", 10 * 2**30),
    "1073741824 bytes": lambda folder: os.truncate(folder / "config.json", 2**30),
    "recursion": lambda folder: (folder / "config.json").write_text("[" * 10**6),
    "it has no model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "is (8, 8), not (8, 9)": lambda folder: _edit(
        folder, lambda config: config["model"].update(hidden_size=9)
    ),
    "12 words for a model of 11": lambda folder: _edit(
        folder, lambda config: config["vocabulary"].append("zebra")
    ),
    "it lacks 'weights_sha256'": lambda folder: _edit(
        folder, lambda config: config.pop("weights_sha256")
    ),
    "update captioner": lambda folder: _edit(folder, lambda config: config.update(format=3)),
    "hidden_size is 1000000000": lambda folder: _edit(
        folder, lambda config: config["model"].update(hidden_size=10**9)
    ),
    "max_length is 1000000000": lambda folder: _edit(
        folder, lambda config: config.update(max_length=10**9)
    ),
    "'red' twice": lambda folder: _edit(
        folder, lambda config: config["vocabulary"].__setitem__(-1, "red")
    ),
    "an encoder of 7 channels": lambda folder: _edit(
        folder, lambda config: config["encoder"].update(channels=7)
    ),
}
# Refused once the encoder is loaded.
OTHER_ENCODERS: dict[str, Callable[[Path], object]] = {
    "encoder has grid [8, 8]": lambda folder: _edit(
        folder, lambda config: config["encoder"].update(grid=[8, 8])
    ),
    "encoder has transform": lambda folder: _edit(
        folder, lambda config: config["encoder"]["transform"].update(size=10**9)
    ),
    "the weights of timm:test_resnet are not those": lambda folder: _edit(
        folder, lambda config: config["encoder"].update(sha256="0" * 64)
    ),
    "unknown encoder 'vgg'": lambda folder: _edit(
        folder, lambda config: config["encoder"].update(name="vgg")
    ),
}


def _assert_refused(code: int, printed: Any, message: str) -> None:
    """Check that a command printed one line with the message, and nothing else."""
    assert code == 2, printed.err
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert message.lower() in line.lower()


# Checkpoints


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_checkpoint_is_refused_by_every_command(
    folder: Path,
    parquet_folder: Path,
    example_photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    message: str,
) -> None:
    DAMAGES[message](folder)
    written = tmp_path / "written"
    choice = ["--checkpoint", str(folder)]
    data = ["--data", str(parquet_folder)]
    photo = str(example_photos[0])
    files = ["--json", str(written / "scores.json"), "--sheet", str(written / "sheet.png")]
    for arguments in (
        ["caption", photo, "--heatmaps", str(written)],
        ["caption", *data, "--output", str(written)],
        ["evaluate", *data, *files, "--cache", str(written)],
    ):
        code = main([*arguments, *choice])
        printed = capsys.readouterr()
        _assert_refused(code, printed, message)
        assert str(folder) in printed.err
    code = app.main(choice)
    _assert_refused(code, capsys.readouterr(), message)
    assert not written.exists()


@pytest.mark.parametrize("message", OTHER_ENCODERS)
def test_checkpoint_of_another_encoder_is_refused(
    folder: Path,
    timm_weights: Path,
    example_photos: list[Path],
    capsys: pytest.CaptureFixture[str],
    message: str,
) -> None:
    OTHER_ENCODERS[message](folder)
    arguments = ["--checkpoint", str(folder), "--encoder-weights", str(timm_weights)]
    code = main(["caption", str(example_photos[0]), *arguments])
    _assert_refused(code, capsys.readouterr(), message)
    code = app.main(arguments)
    _assert_refused(code, capsys.readouterr(), message)


@pytest.mark.parametrize("name", ["a" * 5_000, "~no-such-user/checkpoint", "/dev/null", "/"])
def test_impossible_checkpoint_path_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = app.main(["--checkpoint", name])
    _assert_refused(code, capsys.readouterr(), "checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "captioner", "caption", "photo.jpg"], ["app.py"]])
def test_process_ends_in_one_line_for_a_flipped_bit(folder: Path, command: list[str]) -> None:
    _edit_weights(folder, _flip_bit)
    done = subprocess.run(
        [sys.executable, *command, "--checkpoint", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "copy or download" in line


# Data


def _missing_column(folder: Path, row: Callable[..., Row], write: Callable[..., Path]) -> None:
    write(folder, {"train": [{"image": row(0)["image"]}]})


def _mixed_types(folder: Path, row: Callable[..., Row], write: Callable[..., Path]) -> None:
    write(folder, {"train": [row(number) for number in range(3)]})
    table = pyarrow.Table.from_pylist([row(4) | {"alt_text": 7}])
    pyarrow.parquet.write_table(table, folder / "data/train-00001-of-00001.parquet")


def _captions_by_language(
    folder: Path, row: Callable[..., Row], write: Callable[..., Path]
) -> None:
    write(folder, {"train": [row(0) | {"alt_text": {"en": "a dog"}}]})


def _line_break_in_a_name(folder: Path, row: Callable[..., Row], _: object) -> None:
    folder.mkdir()
    for name in ("a.png", "b\nc.png"):
        (folder / name).write_bytes(row(0)["image"]["bytes"])
    text = 'image,caption\na.png,a circle\n"b\nc.png",a circle\n'
    (folder / "captions.csv").write_text(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_missing_column, "no column with captions"),
        (_mixed_types, "cannot read the files in"),
        (_captions_by_language, "captions cannot be a dict"),
        (_line_break_in_a_name, "spans several lines up to line 4"),
    ],
)
def test_unreadable_data_is_refused_by_name(
    folder: Path,
    timm_weights: Path,
    hub_row: Callable[..., Row],
    write_parquet: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[..., None],
    message: str,
) -> None:
    data, written = tmp_path / "data", tmp_path / "written"
    make(data, hub_row, write_parquet)
    arguments = ["--data", str(data), "--split", "train", "--checkpoint", str(folder)]
    arguments += ["--encoder-weights", str(timm_weights), "--cache", str(written)]
    training = ["--data", str(data), "--encoder", "timm:test_resnet", "--cache", str(written)]
    training += ["--encoder-weights", str(timm_weights), "--out", str(tmp_path / "run")]
    scores = ["--json", str(written / "scores.json")]
    for run, command in ((main, ["evaluate", *arguments, *scores]), (train.main, training)):
        assert run(command) == 2
        errors = capsys.readouterr().err.splitlines()
        assert message in errors[-1].lower()
        assert not any("Traceback" in line for line in errors)
        assert not written.exists()
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_broken_photo_is_named_and_the_others_are_captioned(
    folder: Path,
    timm_weights: Path,
    hub_row: Callable[..., Row],
    write_parquet: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [hub_row(number) for number in range(100)]
    rows[61]["image"]["bytes"] = rows[61]["image"]["bytes"][:60]
    data = ["--data", str(write_parquet(tmp_path / "data", {"train": rows})), "--split", "train"]
    choice = ["--checkpoint", str(folder), "--encoder-weights", str(timm_weights)]
    captions, scores = tmp_path / "captions", tmp_path / "scores.json"

    assert main(["caption", *data, *choice, "--output", str(captions)]) == 1

    assert "100 photos" in capsys.readouterr().out
    written = pyarrow.parquet.read_table(captions).to_pylist()
    (broken,) = (row for row in written if row["error"] is not None)
    assert (broken["photo"], broken["filename"]) == ("61", rows[61]["filename"])
    assert sum(row["caption"] is not None for row in written) == 99

    cache = ["--cache", str(tmp_path / "cache"), "--limit", "70"]
    assert main(["evaluate", *data, *choice, *cache, "--json", str(scores)]) == 0

    names = [photo["name"] for photo in json.loads(scores.read_text())["photos"]]
    assert len(names) == 69
    assert rows[61]["filename"] not in names


# Settings


@pytest.mark.parametrize("beam_size", ["0", "-1", "1000000000"])
def test_impossible_beam_size_is_refused_by_both_commands(
    beam_size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["caption", "x.jpg"], ["evaluate"]):
        code = main([*command, "--beam-size", beam_size])
        _assert_refused(code, capsys.readouterr(), f"beam_size is {beam_size}; it must be")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--beam-size", "nan"), ("--beam-size", "3.5"), ("--device", "tpu"), ("--format", "../x")],
)
def test_malformed_option_value_prints_the_usage(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["caption", "x.jpg", option, value])
    _assert_refused(code, capsys.readouterr(), value)


def test_negative_limit_is_refused(
    parquet_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["evaluate", "--data", str(parquet_folder), "--limit", "-5"])
    _assert_refused(code, capsys.readouterr(), "limit is -5")


# The page


@dataclasses.dataclass(frozen=True)
class Client:
    """A client of the page.

    Attributes:
        http: has the page's address.
        events: the number of each event of the page.
        path: where the page stored the client's photo.
        caption: the photo's caption.
    """

    http: httpx.Client
    events: dict[str, int]
    path: str
    caption: Row

    def error(self, event: str, data: object) -> str:
        """Send a request as the page's script does; return the error message that it shows."""
        session = uuid.uuid4().hex
        body = {"data": [], "event_data": data, "fn_index": self.events[event]}
        joined = self.http.post(
            f"{QUEUE}/join",
            content=json.dumps(body | {"session_hash": session}),  # httpx would refuse NaN
            headers={"content-type": "application/json"},
        )
        if joined.status_code != 200:
            return str(joined.json()["detail"])
        stream = self.http.get(f"{QUEUE}/data", params={"session_hash": session}).text
        messages = [json.loads(line[6:]) for line in stream.splitlines() if line[:6] == "data: "]
        (done,) = (message for message in messages if message["msg"] == "process_completed")
        assert not done["success"], (ascii(data)[-700:], done["output"])
        return str(done["output"]["error"])


@pytest.fixture(scope="module")
def client(served_page: str, example_photos: list[Path]) -> Iterator[Client]:
    with httpx.Client(base_url=served_page, timeout=60) as http:
        upload = http.post(UPLOAD, files={"files": ("photo.jpg", example_photos[0].read_bytes())})
        (path,) = upload.json()
        photo = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event_id = http.post(CALL, json={"data": [photo, {}]}).json()["event_id"]
        (caption,) = json.loads(http.get(f"{CALL}/{event_id}").text.partition("data: ")[2])
        events = {
            event: dependency["id"]
            for dependency in http.get("/config").json()["dependencies"]
            for _, event in dependency["targets"]
            if event in ("caption", "cover", "export")
        }
        yield Client(http, events, path, caption)


def _changed(record: Row, field: str, *values: object) -> list[Row]:
    """Return the record once per value, with that value in the field."""
    return [{**record, field: value} for value in values]


def _without(record: Row) -> list[Row]:
    """Return the record once per field, without that field."""
    return [{name: record[name] for name in record if name != missing} for missing in record]


SETTINGS = setting_values(DecodingOptions())
BAD_SETTINGS = [
    *_changed(SETTINGS, "beam_size", 0, 10**9, 2.5, math.nan, "3", None),
    *_changed(SETTINGS, "length_penalty", -1, math.inf, ""),
    *_changed(SETTINGS, "max_words", 10**9, 3.5, "18", None),
    *_changed(SETTINGS, "temperature", -1, math.nan, "0", []),
    *_changed(SETTINGS, "seed", -1, math.inf, 0.5, "x", {}),
    *_changed(SETTINGS, "ban_repeats", None, 5, "ban", ["nothing"], [[]]),
    *_without(SETTINGS),
    SETTINGS | {"unknown": 1},
]
NON_EVENTS: list[object] = [None, 5, [], "text", {}]
BAD_PATHS: list[object] = [None, 5, [], {}, "", "x", "\0", "a" * 10**5, "/etc/passwd", "/dev/zero"]


def _assert_all_refused(
    client: Client, event: str, requests: list[object], capfd: pytest.CaptureFixture[str]
) -> None:
    """Check that each request is answered with one sentence, and that no traceback is printed."""
    for request in requests:
        sentence = client.error(event, request)
        assert sentence[0].isupper() or sentence[0] == '"'
        assert sentence.endswith((".", "?"))
        assert "\n" not in sentence
        assert len(sentence) < 400
    printed = capfd.readouterr().err
    assert "Traceback" not in printed, printed[-1500:]


def test_forged_caption_requests_are_refused(
    client: Client, example_photos: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    good = {
        "request": 1,
        "example": "cat",
        "file": None,
        "text": "a dog",
        "given": [1],
        "whole": False,
        "drawn": True,
        "settings": SETTINGS,
    }
    elsewhere = (str(example_photos[0]), f"{client.path}/..", f"{client.path}/../../../../app.py")
    needed = {name: value for name, value in good.items() if name not in ("file", "example")}
    requests: list[object] = [
        *NON_EVENTS,
        *_without(needed),
        *_changed(good, "request", None, "1", 0.5),
        *_changed(good, "example", "nothing", "../cat", 5, [], "a" * 10**5),
        *_changed(good | {"example": None}, "file", *BAD_PATHS, *elsewhere),
        *_changed(good, "text", None, 5, ["a"], "a " * 10**6, "a" * 10**6, "\ud800", "zyzzyva"),
        *_changed(good | {"whole": True, "given": []}, "text", "", "!", "a " * 400),
        *_changed(good, "given", None, "01", 5, [10**9], [-1], [{}], ["0"]),
        *_changed(good, "whole", None, "yes"),
        *_changed(good, "drawn", None, 1),
        *_changed(good, "settings", None, [], "x", *BAD_SETTINGS),
    ]
    _assert_all_refused(client, "caption", requests, capfd)


def test_forged_cover_requests_are_refused(
    client: Client, example_photos: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    good = {"request": 1, "example": "cat", "file": None, "text": "a dog", "word": 1}
    good |= {"cells": [3, 24], "settings": SETTINGS}
    elsewhere = (str(example_photos[0]), f"{client.path}/..")
    needed = {name: value for name, value in good.items() if name not in ("file", "example")}
    requests: list[object] = [
        *NON_EVENTS,
        *_without(needed),
        *_changed(good, "request", None, "1", 0.5),
        *_changed(good, "example", "nothing", "../cat", 5, []),
        *_changed(good | {"example": None}, "file", *BAD_PATHS, *elsewhere),
        *_changed(good, "text", None, 5, ["a"], "a " * 10**6, "a " * 400),
        *_changed(good, "word", None, "1", 0.5, -1, 3, 10**9, True),
        *_changed(good, "cells", None, "3", {}, [], [49], [-1], [1, 1], [0.5], [True], [[]]),
        *_changed(good, "cells", list(range(49)), [0] * 10**6, [10**400], [math.nan]),
        *_changed(good, "settings", None, [], "x", *BAD_SETTINGS),
    ]
    _assert_all_refused(client, "cover", requests, capfd)


def test_forged_export_requests_are_refused(
    client: Client, example_photos: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    good = {
        "example": None,
        "file": client.path,
        "format": "png",
        "caption": client.caption,
        "beam": 0,
        "word": 0,
        "appearance": {},
    }

    def forge_word(key: str, *values: object) -> list[Row]:
        """Return requests whose first word is forged."""
        beam = client.caption["beams"][0]
        beams = _changed(
            beam, "words", *([word] for word in _changed(beam["words"][0], key, *values))
        )
        captions = _changed(client.caption, "beams", *([beam] for beam in beams))
        return _changed(good, "caption", *captions)

    elsewhere = (str(example_photos[0]), f"{client.path}/..")
    look = {"colors": "inferno", "shape": "smooth", "scale": "word", "strength": 0.75}
    requests: list[object] = [
        *NON_EVENTS,
        *_without(good | {"example": "cat"})[2:],
        *_changed(good, "file", *BAD_PATHS, *elsewhere),
        *_changed(good, "example", "nothing", 5, []),
        *_changed(good, "caption", None, "a dog", [], {}),
        *_changed(good, "caption", *_changed(client.caption, "beams", None, [], [{}])),
        *_changed(good, "caption", *_changed(client.caption, "size", None, [-1, 10**400])),
        *forge_word(
            "maps", None, {}, {"attended": [[1], [1, 2]]}, {"attended": [[math.nan] * 7] * 7}
        ),
        *forge_word(
            "maps", {"attended": [[0.5] * 1000] * 1000}, {"attended": [[0] * 7] * 7, "x": 1}
        ),
        *forge_word("verdict", "true", 5),
        *forge_word("text", None, "\ud800", "a" * 10**6),
        *forge_word("probability", None, math.nan, 2, "x"),
        *_changed(good, "appearance", None, [], "x", {"unknown": 1}),
        *_changed(good, "appearance", *_changed(look, "colors", None, "jet", [], "../x")),
        *_changed(good, "appearance", *_changed(look, "shape", None, "round", 5)),
        *_changed(good, "appearance", *_changed(look, "scale", None, "beam", {})),
        *_changed(good, "appearance", *_changed(look, "strength", None, -1, 2, math.nan, "1")),
        *_changed(good, "format", "../../etc", "", "PNG", None, 5),
        *_changed(good, "beam", 10**6, -1, None, 0.5),
        *_changed(good, "word", 10**6, -1, None, 0.5),
    ]
    _assert_all_refused(client, "export", requests, capfd)
