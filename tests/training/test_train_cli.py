"""train.py from the outside: what it writes, how it stops and goes on, and how it fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from captioner.model import checkpoint as checkpoints
from captioner.model.decoder import CaptionModel
from captioner.model.encoder import load_encoder
from tests.training.runs import assert_same_run, figures

ROOT = Path(__file__).resolve().parents[2]
MakeRow = Callable[..., dict[str, Any]]
Write = Callable[[Path, dict[str, list[dict[str, Any]]]], Path]
MakeArguments = Callable[..., list[str]]
EPOCH_LINE = re.compile(
    r"Epoch (\d\d) \| (train_loss|reward)=(\d+\.\d+) \| val_loss=(\d+\.\d+) \| "
    r".*BLEU-4.*CIDEr.*lr="
)


@pytest.fixture(scope="session")
def arguments(
    parquet_folder: Path, timm_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> MakeArguments:
    """``arguments(out, …)``: a command line that trains a small run in a second or two."""
    cache = tmp_path_factory.mktemp("features")

    def make(out: Path, *more: str) -> list[str]:
        settings = {
            "--data": str(parquet_folder),
            "--encoder": "timm:test_resnet",
            "--encoder-weights": str(timm_weights),
            "--recipe": "best",
            "--out": str(out),
            "--cache": str(cache),
            "--epochs": "2",
            "--reward-epochs": "1",
            "--batch-size": "4",
            "--min-count": "2",
            "--device": "cpu",
            "--seed": "1",
        }
        return [*(part for pair in settings.items() for part in pair), *more]

    return make


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, arguments: MakeArguments) -> tuple[Path, str]:
    """A run of recipe ``best`` from start to end, and what it printed."""
    folder, output = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    with contextlib.redirect_stdout(output):
        assert train.main(arguments(folder)) == 0
    return folder, output.getvalue()


# What comes of a run


def test_best_writes_all_its_files(
    whole: tuple[Path, str], parquet_folder: Path, timm_weights: Path
) -> None:
    folder, _ = whole
    names = {"checkpoint", "curves.png", "metrics.csv", "run.json", "state", "tensorboard"}
    assert {path.name for path in folder.iterdir()} - {".lock"} == names
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["recipe"] == "best"
    assert record["config"]["seed"] == 1
    assert record["config"]["data"] == str(parquet_folder)
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    if (ROOT / ".git").exists():
        assert re.match(r"[0-9a-f]{7,}|v?\d", record["git_commit"])
    assert [row["epoch"] for row in figures(folder)] == ["1", "2", "3"]
    assert [row["CIDEr"] for row in record["epochs"]] == [
        float(row["CIDEr"]) for row in figures(folder)
    ]
    with Image.open(folder / "curves.png") as image:
        image.load()
    assert next((folder / "tensorboard").iterdir()).stat().st_size > 100
    checkpoint = checkpoints.load(folder / "checkpoint")
    checkpoint.check_encoder(load_encoder("timm:test_resnet", timm_weights).spec())
    assert checkpoint.recipe["recipe"] == "best"
    assert checkpoint.recipe["epochs"] == 2
    assert parquet_folder.name in (folder / "checkpoint/README.md").read_text()
    # What is passed on does not say where the files lay on this machine.
    for name in ("config.json", "README.md"):
        assert str(parquet_folder.parent) not in (folder / "checkpoint" / name).read_text()
    best = max(figures(folder), key=lambda row: float(row["CIDEr"]))
    assert checkpoint.metrics["epoch"] == int(best["epoch"])
    assert checkpoint.metrics["CIDEr"] == float(best["CIDEr"])
    assert not [path for path in folder.rglob("*") if path.suffix in {".pt", ".pth", ".pkl"}]


def test_best_prints_the_facts_and_a_line_an_epoch(whole: tuple[Path, str]) -> None:
    folder, output = whole
    assert "train 24, validation 8" in output
    precision = json.loads((folder / "run.json").read_text())["precision"]
    assert re.match(rf"precision    {precision} \(.+\)\n", output)
    assert "(4, 3, 224, 224) -> features (4, 49, 96), captions (4, 5, 20)" in output
    ids = re.search(r"its ids +\[(.*)\]", output)
    assert ids is not None
    assert len(ids[1].split(",")) == 20
    assert ids[1].startswith("1, ")
    assert "'a red circle on the left'" in output
    assert "'a red circle on the left'" in output
    lines = [match for line in output.splitlines() if (match := EPOCH_LINE.match(line))]
    assert [match[1] for match in lines] == ["01", "02", "03"]
    assert [match[2] for match in lines] == ["train_loss", "train_loss", "reward"]
    for match, row in zip(lines, figures(folder), strict=True):
        assert float(match[3]) == pytest.approx(float(row[match[2]]), abs=1e-4)
        assert float(match[4]) == pytest.approx(float(row["val_loss"]), abs=1e-4)


def test_seed_trains_on_first_captions_with_a_tenth_held_back(
    csv_folder: Path, arguments: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 20 photos beside a captions.csv, with no validation split; the report's batch of 32.
    out = tmp_path / "run"
    more = ["--recipe", "seed", "--data", str(csv_folder), "--batch-size", "32", "--epochs", "4"]
    more += ["--reward-epochs", "0"]
    assert train.main(arguments(out, *more)) == 0
    output = capsys.readouterr().out
    assert "train 18, validation 2" in output
    assert "captions (18, 1, 20)" in output
    rows = figures(out)
    assert len(rows) == 4
    losses = [float(row["val_loss"]) for row in rows]
    assert losses[-1] < losses[0]
    assert float(rows[0]["learning_rate"]) == pytest.approx(1e-3)
    checkpoint = checkpoints.load(out / "checkpoint")
    # The report's own model: no option that the literature found later.
    assert not checkpoint.model.config.deep_output
    assert not checkpoint.model.config.mean_start
    assert checkpoint.model.lstm.hidden_size == 512
    assert checkpoint.metrics["val_loss"] == min(losses)


@pytest.mark.usefixtures("no_curves")
def test_best_holds_a_tenth_back_where_there_is_no_validation_split(
    csv_folder: Path,
    arguments: MakeArguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "run"
    more = ["--data", str(csv_folder), "--batch-size", "8", "--epochs", "1"]
    assert train.main(arguments(out, *more)) == 0
    output = capsys.readouterr()
    assert "train 18, validation 2" in output.out
    assert "no split 'validation'" in caplog.text + output.err
    assert "captions (8, 5, 20)" in output.out
    checkpoints.load(out / "checkpoint")


@pytest.mark.usefixtures("no_curves")
def test_limit_takes_that_many_photos_of_each_split(
    arguments: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--limit", "6", "--batch-size", "4", "--epochs", "1"]
    assert train.main(arguments(tmp_path / "run", *more)) == 0
    assert "train 6, validation 6" in capsys.readouterr().out


# Stopped, killed, resumed


@contextlib.contextmanager
def _training(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run ``python train.py`` on its own, both streams in one."""
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _read_until(stream: IO[str] | None, text: str) -> None:
    """Read until ``text`` was printed; progress bars end in no newline."""
    seen = ""
    assert stream is not None
    while text not in seen:
        character = stream.read(1)
        assert character, f"it ended before it printed {text!r}:\n{seen}"
        seen += character


def test_sigterm_saves_and_resume_comes_to_the_same_bits(
    whole: tuple[Path, str],
    arguments: MakeArguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    with _training(arguments(out)) as process:
        _read_until(process.stdout, "epoch 02")
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "all saved: continue with --resume" in rest
    assert "Traceback" not in rest
    state = json.loads((out / "state" / "state.json").read_text())
    assert state["epoch"] == 1
    assert 0 < state["step"] < 6  # in the middle of the epoch
    assert train.main(arguments(out, "--resume")) == 0
    output = capsys.readouterr().out
    epochs = [m[1] for line in output.splitlines() if (m := EPOCH_LINE.match(line))]
    assert epochs == ["02", "03"]
    assert_same_run(out, whole[0])


def test_a_killed_run_goes_on_from_its_last_save(
    whole: tuple[Path, str], arguments: MakeArguments, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with _training(arguments(out)) as process:
        _read_until(process.stdout, "epoch 02")
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert len(figures(out)) == 1  # the figures of what was done are there
    checkpoints.load(out / "checkpoint")
    assert train.main(arguments(out, "--resume")) == 0
    assert_same_run(out, whole[0])


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(("recipe", "steps"), [("seed", [1, 3]), ("best", [2, 4, 5])])
def test_a_stop_after_any_step_changes_nothing(
    arguments: MakeArguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    steps: list[int],
) -> None:
    # In batches of 5 two steps an epoch: of 10 photos, or of 8 with a tenth held back.
    more = ["--recipe", recipe, "--limit", "10", "--batch-size", "5"]
    assert train.main(arguments(tmp_path / "whole", *more)) == 0
    really_step = torch.optim.AdamW.step
    for wanted in steps:
        left = iter(range(1, 100))

        def step_and_ask(
            optimizer: torch.optim.AdamW, *rest: Any, left: Any = left, wanted: int = wanted
        ) -> Any:
            if next(left) == wanted:
                os.kill(os.getpid(), signal.SIGINT)
            return really_step(optimizer, *rest)

        out = tmp_path / str(wanted)
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step_and_ask)
            assert train.main(arguments(out, *more)) == 128 + signal.SIGINT
        assert "--resume" in capsys.readouterr().err
        assert train.main(arguments(out, *more, "--resume")) == 0
        assert_same_run(out, tmp_path / "whole")


@pytest.mark.usefixtures("no_curves")
def test_captions_without_photos_are_read_first_and_a_stop_there_changes_nothing(
    arguments: MakeArguments,
    tmp_path: Path,
    write_parquet: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"alt_text": [f"a red circle on the {side}"] * 5} for side in ("left", "right") * 10]
    text = write_parquet(tmp_path / "text", {"train": rows})
    more = ["--limit", "10", "--batch-size", "5", "--epochs", "1"]
    more += ["--text", str(text), "--set", "text_epochs=2"]
    seen = []
    really_read = CaptionModel.forward

    def look(model: CaptionModel, features: torch.Tensor, captions: torch.Tensor) -> Any:
        if model.training:
            seen.append(bool((features != features[:1, :1]).any()))
        return really_read(model, features, captions)

    with monkeypatch.context() as patch:
        patch.setattr(CaptionModel, "forward", look)
        assert train.main(arguments(tmp_path / "whole", *more)) == 0
    # 20 rows without photos and 10 with captions of their own are 6 steps, twice.
    assert seen == [False] * 12 + [True] * 2
    assert [row["epoch"] for row in figures(tmp_path / "whole")] == ["1", "2", "3", "4"]
    really_step = torch.optim.AdamW.step
    left = iter(range(1, 100))

    def step_and_ask(optimizer: torch.optim.AdamW, *rest: Any) -> Any:
        if next(left) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return really_step(optimizer, *rest)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step_and_ask)
        assert train.main(arguments(out, *more)) == 128 + signal.SIGINT
    # The same text may lie elsewhere by now, but it must be the same.
    other = write_parquet(tmp_path / "other", {"train": rows[:-1]})
    assert train.main(arguments(out, *more, "--text", str(other), "--resume")) == 2
    assert "started on other photos, captions" in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    moved = text.rename(tmp_path / "elsewhere" / "text")
    assert train.main(arguments(out, *more, "--text", str(moved), "--resume")) == 0
    assert_same_run(out, tmp_path / "whole")
    card = (out / "checkpoint/README.md").read_text()
    assert "after reading the captions of `text`." in card
    assert str(tmp_path) not in card + (out / "checkpoint/config.json").read_text()


def test_a_finished_run_is_left_as_it_is(whole: tuple[Path, str], arguments: MakeArguments) -> None:
    folder, _ = whole
    files = [folder / "metrics.csv", folder / "checkpoint/model.safetensors"]
    before = [path.read_bytes() for path in files]
    assert train.main(arguments(folder, "--resume")) == 0
    assert [path.read_bytes() for path in files] == before


def test_resume_with_other_settings_is_refused_by_their_names(
    whole: tuple[Path, str], arguments: MakeArguments, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = whole
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    more = ["--resume", "--batch-size", "8", "--learning-rate", "0.5"]
    assert train.main(arguments(folder, *more)) == 2
    error = capsys.readouterr().err
    assert "batch_size" in error
    assert "learning_rate" in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("no_curves")
def test_more_epochs_are_the_same_run_where_the_schedule_allows(
    arguments: MakeArguments, tmp_path: Path
) -> None:
    out, more = tmp_path / "run", ["--recipe", "seed", "--limit", "10", "--reward-epochs", "0"]
    assert train.main(arguments(out, *more, "--epochs", "1")) == 0
    assert train.main(arguments(out, *more, "--epochs", "3", "--resume")) == 0
    whole = tmp_path / "whole"
    assert train.main(arguments(whole, *more, "--epochs", "3")) == 0
    assert figures(out) == figures(whole)


def test_resume_in_a_folder_without_a_run_is_refused(
    arguments: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    assert train.main(arguments(tmp_path, "--resume")) == 2
    assert "holds no run to resume: check --out" in _last_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_folder_that_holds_something_is_refused(
    whole: tuple[Path, str], arguments: MakeArguments, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = whole
    before = figures(folder)
    assert train.main(arguments(folder)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert figures(folder) == before


@pytest.mark.usefixtures("no_curves")
def test_resume_where_nothing_was_begun_begins(arguments: MakeArguments, tmp_path: Path) -> None:
    # As after a kill before the first save.
    more = ["--resume", "--limit", "4", "--epochs", "1"]
    assert train.main(arguments(tmp_path / "run", *more)) == 0
    checkpoints.load(tmp_path / "run" / "checkpoint")


# Failing well


def _last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error, which must be one line at the end of standard error."""
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.strip()]
    assert "Traceback" not in output.err
    errors = [number for number, line in enumerate(lines) if line.startswith("train.py: ")]
    assert errors == [len(lines) - 1], output.err
    return lines[-1]


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in (
        "--data",
        "--encoder",
        "--encoder-weights",
        "--recipe {seed,best}",
        "--out",
        "--limit",
        "--resume",
        "--seed",
        "--device {auto,cpu,cuda,mps}",
        "--epochs",
        "--batch-size",
    ):
        assert option in text
    assert "AnyModal/flickr30k" in text
    assert "resnet50, efficientnet_lite2 or timm:<name>" in text


@pytest.mark.parametrize(
    "wrong",
    [
        ["--recipe", "worst"],
        ["--device", "tpu"],
        ["--epochs", "many"],
        ["--no-such-option"],
        ["surplus"],
    ],
)
def test_arguments_that_argparse_refuses_exit_with_2(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(wrong)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--encoder", "vgg"], "resnet50, efficientnet_lite2, timm:<name>"),
        (["--encoder", "timm:no_such_model"], "no_such_model"),
        (["--encoder-weights", "no/such.file"], "there is no weights file"),
        (["--epochs", "0"], "epochs is 0"),
        (["--batch-size", "-1"], "batch_size is -1"),
        (["--set", "label_smoothing=2"], "label_smoothing is 2"),
        (["--set", "model.dropout=high"], "dropout is 'high'"),
        (["--set", "model.width=1"], "ModelConfig does not know: width"),
        (["--set", "colour=red"], "TrainConfig does not know: colour"),
        (["--set", "name=3"], "TrainConfig does not know: name"),
        (["--set", "cls=3"], "TrainConfig does not know: cls"),
        (["--set", "recipe=seed"], "choose it with --recipe"),
        (["--set", "model=5"], "model is 5"),
        (["--set", "model.vocabulary_size=7"], "model.vocabulary_size follows from data"),
        (["--set", "model.deep_output=1"], "deep_output is 1; it must be true or false"),
        (["--set", "model.dropout=NaN"], "dropout is nan"),
        (["--set", "word2vec=maybe"], "word2vec is 'maybe'; it must be true or false"),
        (["--set", "data=5"], "data is 5; it must be text"),
        (["--set", "encoder=null"], "encoder is None; it must be text"),
        (["--set", "text=[1]"], "text is [1]; it must be text or nothing"),
        (["--set", "min_count=1e3"], "min_count is 1000.0; it must be a whole number"),
        (["--set", "learning_rate=1e400"], "learning_rate is inf"),
        (["--set", f"batch_size=1{'0' * 400}"], "batch_size is 1"),
        (["--set", f"captions={'first' * 1000}"], "captions is 'first"),
        (["--set", f"views={'[' * 50_000}"], "views is '[[["),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--limit", "-5"], "limit is -5"),
        (["--seed", "-1"], "seed is -1"),
        (["--min-count", "0"], "min_count is 0"),
        (["--patience", "0"], "patience is 0"),
    ],
)
def test_arguments_that_mean_nothing_exit_with_2(
    arguments: MakeArguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: list[str],
    says: str,
) -> None:
    assert train.main(arguments(tmp_path / "run", *wrong)) == 2
    assert says in _last_line(capsys)


def _columns_differ(folder: Path, row: MakeRow, write: Write) -> Path:
    other = {"image": row(1)["image"], "alt_text": 7.5, "more": [{"deep": 1}]}
    return write(folder, {"train": [row(0)], "validation": [other]})


def _garbage(folder: Path, row: MakeRow, write: Write) -> Path:
    write(folder, {"train": [row(0)]})
    (folder / "data/train-00000-of-00001.parquet").write_bytes(b"PAR1 nothing PAR1")
    return folder


def _no_alt_text(folder: Path, row: MakeRow, write: Write) -> Path:
    return write(folder, {"train": [{"image": row(0)["image"]}]})


def _broken_photos(folder: Path, row: MakeRow, write: Write) -> Path:
    rows = [row(n) | {"image": {"bytes": b"broken", "path": ""}} for n in range(12)]
    return write(folder, {"train": rows})


def _no_folder(folder: Path, *_: Any) -> Path:
    return folder / "nothing" / "here"


def _no_user(*_: Any) -> Path:
    return Path("~no-such-user/photos")


def _no_name(*_: Any) -> Path:
    return Path("a" * 5000)


def _line_break_in_a_name(folder: Path, row: MakeRow, _: Write) -> Path:
    folder.mkdir()
    (folder / "a\nb.png").write_bytes(row(0)["image"]["bytes"])
    (folder / "captions.csv").write_text('image,caption\n"a\nb.png",a circle\n')
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_no_folder, "there is no folder"),
        (_no_user, "there is no folder"),
        (_no_name, "there is no folder"),
        (_line_break_in_a_name, "rename the file"),
        (_no_alt_text, "no column 'alt_text'"),
        (_columns_differ, "cannot read the Parquet files"),
        (_garbage, "cannot read the Parquet files"),
        (_broken_photos, "none of the 12 photos"),
    ],
)
def test_bad_data_exits_with_2_and_one_line(
    arguments: MakeArguments,
    tmp_path: Path,
    hub_row: MakeRow,
    write_parquet: Write,
    capsys: pytest.CaptureFixture[str],
    make: Callable[..., Path],
    says: str,
) -> None:
    data = make(tmp_path / "data", hub_row, write_parquet)
    assert train.main(arguments(tmp_path / "run", "--data", str(data))) == 2
    assert says in _last_line(capsys)


def test_without_internet_the_default_data_names_the_local_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    assert train.main(arguments) == 2
    error = _last_line(capsys)
    assert "AnyModal/flickr30k" in error
    assert "captions.csv" in error


def test_too_few_photos_and_too_rare_words_are_errors(
    arguments: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(arguments(tmp_path / "few", "--recipe", "seed", "--limit", "5")) == 2
    assert "5 photos are too few" in _last_line(capsys)
    assert train.main(arguments(tmp_path / "rare", "--min-count", "1000")) == 2
    assert "--min-count" in _last_line(capsys)


@pytest.mark.parametrize("name", ["empty", "file", "nothing"])
def test_text_that_holds_no_captions_is_an_error(
    arguments: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a dog")
    assert train.main(arguments(tmp_path / "run", "--text", str(tmp_path / name))) == 2
    assert f"cannot read captions from {tmp_path / name}" in _last_line(capsys)


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_a_file_in_the_place_of_a_folder_is_an_error(
    arguments: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert train.main(arguments(tmp_path / "run", option, str(tmp_path / "file"))) in (1, 2)
    assert "file" in _last_line(capsys)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_mostly_broken_photos_train_or_say_why_not(
    arguments: MakeArguments,
    tmp_path: Path,
    hub_row: MakeRow,
    write_parquet: Write,
    capsys: pytest.CaptureFixture[str],
    seed: str,
) -> None:
    # Of the tenth that is held back, one photo or none may be left.
    rows = [hub_row(number) for number in range(10)]
    for row in rows[2:]:
        row["image"]["bytes"] = b"broken"
    data = write_parquet(tmp_path / "data", {"train": rows})
    more = ["--data", str(data), "--recipe", "seed", "--seed", seed]
    more += ["--min-count", "1", "--epochs", "1"]
    code = train.main(arguments(tmp_path / "run", *more))
    if code:
        assert code == 2
        assert "photo" in _last_line(capsys)


@pytest.mark.usefixtures("no_curves")
def test_features_too_large_for_float16_end_in_a_message(
    arguments: MakeArguments,
    tmp_path: Path,
    timm_weights: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = load_file(timm_weights)
    scales = [n for n in state if n.startswith("layer4") and ".bn" in n and n.endswith("weight")]
    assert scales
    for name in scales:
        state[name].fill_(1e6)
    save_file(state, tmp_path / "huge.safetensors")
    more = ["--encoder-weights", str(tmp_path / "huge.safetensors")]
    assert train.main(arguments(tmp_path / "run", *more)) == 2
    assert "float16" in _last_line(capsys)
    assert not (tmp_path / "run" / "checkpoint").exists()
