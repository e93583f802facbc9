"""``train.py`` from the outside: its files, its output, stopping and resuming, its errors."""

from __future__ import annotations

import contextlib
import dataclasses
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
from captioner.config import DATA_FIELDS, ModelConfig, TrainConfig
from captioner.data.shares import DataSource
from captioner.errors import ConfigError
from captioner.model import checkpoint as checkpoints
from captioner.model.encoder import load_encoder
from captioner.model.fast import FusedForward
from captioner.training import loop
from captioner.training.setup import photos_per_epoch, prepare
from captioner.training.state import TrainingState
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
            **({} if "--data" in more else {"--data": str(parquet_folder)}),
            "--encoder": "timm:test_resnet",
            "--encoder-weights": str(timm_weights),
            "--recipe": "best",
            "--out": str(out),
            "--cache": str(cache),
            "--epochs": "2",
            "--detector-epochs": "0" if "seed" in more else "1",
            "--detector-photos": "2",
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


# Results of a run


def test_best_writes_all_files(
    whole: tuple[Path, str], parquet_folder: Path, timm_weights: Path
) -> None:
    folder, _ = whole
    names = {"checkpoint", "curves.png", "metrics.csv", "run.json", "state", "tensorboard"}
    assert {path.name for path in folder.iterdir()} - {".lock"} == names
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["recipe"] == "best"
    assert record["config"]["seed"] == 1
    assert record["config"]["data"] == [str(parquet_folder)]
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    if (ROOT / ".git").exists():
        assert re.match(r"[0-9a-f]{7,}|v?\d", record["git_commit"])
    assert [row["epoch"] for row in figures(folder)] == ["1", "2", "3", "4"]
    assert [bool(row["detector_loss"]) for row in figures(folder)] == [True, False, False, False]
    assert [row["CIDEr"] for row in record["epochs"][1:]] == [
        float(row["CIDEr"]) for row in figures(folder)[1:]
    ]
    with Image.open(folder / "curves.png") as image:
        image.load()
    assert next((folder / "tensorboard").iterdir()).stat().st_size > 100
    checkpoint = checkpoints.load(folder / "checkpoint")
    checkpoint.check_encoder(load_encoder("timm:test_resnet", timm_weights).spec())
    assert checkpoint.recipe["recipe"] == "best"
    assert checkpoint.recipe["epochs"] == 2
    assert parquet_folder.name in (folder / "checkpoint/README.md").read_text()
    # What is passed on does not name this machine's folders.
    for name in ("config.json", "README.md"):
        assert str(parquet_folder.parent) not in (folder / "checkpoint" / name).read_text()
    best = max(figures(folder)[1:], key=lambda row: float(row["CIDEr"]))
    assert checkpoint.metrics["epoch"] == int(best["epoch"])
    assert checkpoint.metrics["CIDEr"] == float(best["CIDEr"])
    assert not [path for path in folder.rglob("*") if path.suffix in {".pt", ".pth", ".pkl"}]


def test_best_prints_shapes_and_a_line_per_epoch(whole: tuple[Path, str]) -> None:
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
    assert [match[1] for match in lines] == ["02", "03", "04"]
    assert [match[2] for match in lines] == ["train_loss", "train_loss", "reward"]
    for match, row in zip(lines, figures(folder)[1:], strict=True):
        assert float(match[3]) == pytest.approx(float(row[match[2]]), abs=1e-4)
        assert float(match[4]) == pytest.approx(float(row["val_loss"]), abs=1e-4)


def test_seed_uses_first_captions_and_holds_back_a_tenth(
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
    # The report's own model has no later options.
    assert not checkpoint.model.config.deep_output
    assert not checkpoint.model.config.mean_start
    assert checkpoint.model.lstm.hidden_size == 512
    assert checkpoint.metrics["val_loss"] == min(losses)


@pytest.mark.usefixtures("no_curves")
def test_best_holds_back_a_tenth_without_a_validation_split(
    csv_folder: Path,
    arguments: MakeArguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "run"
    more = ["--data", str(csv_folder), "--batch-size", "8", "--epochs", "1"]
    more += ["--reward-epochs", "0"]
    assert train.main(arguments(out, *more)) == 0
    output = capsys.readouterr()
    assert "train 18, validation 2" in output.out
    assert "no split 'validation'" in caplog.text + output.err
    assert "captions (8, 5, 20)" in output.out
    checkpoints.load(out / "checkpoint")


@pytest.mark.usefixtures("no_curves")
def test_damaged_validation_split_is_an_error(
    arguments: MakeArguments,
    tmp_path: Path,
    hub_row: MakeRow,
    write_parquet: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [hub_row(number) for number in range(12)]
    splits = {"train": rows, "validation": [row | {"alt_text": 7} for row in rows]}
    data = str(write_parquet(tmp_path / "data", splits))
    assert train.main(arguments(tmp_path / "run", "--data", data)) == 2
    assert "captions cannot be a int" in _last_line(capsys)


@pytest.mark.usefixtures("no_curves")
def test_columns_are_named_on_the_command_line(
    arguments: MakeArguments,
    tmp_path: Path,
    hub_row: MakeRow,
    write_parquet: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [hub_row(number) for number in range(12)]
    names = [
        {"picture": row["image"], "caption": "none", "en": row["alt_text"][:2], "more": "a circle"}
        for row in rows
    ]
    data = str(write_parquet(tmp_path / "data", {"train": names}))
    more = ["--data", data, "--recipe", "seed", "--captions", "all", "--epochs", "1"]
    more += ["--reward-epochs", "0", "--detector-epochs", "0", "--image-column", "picture"]
    out = tmp_path / "run"
    columns = ["--caption-column", "en", "--caption-column", "more"]
    assert train.main(arguments(out, *more, *columns)) == 0
    assert "train: photos from picture, captions from en, more" in capsys.readouterr().err
    config = json.loads((out / "run.json").read_text())["config"]
    assert (config["image_column"], config["caption_column"]) == ("picture", ["en", "more"])
    assert "none" not in checkpoints.load(out / "checkpoint").vocabulary.idx2word
    assert train.main(arguments(tmp_path / "other", *more, "--caption-column", "fr")) == 2
    error = _last_line(capsys)
    assert "has no column 'fr', only: picture, caption, en, more; name one of these" in error


@pytest.mark.usefixtures("no_curves")
def test_limit_applies_to_each_split(
    arguments: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--limit", "6", "--epochs", "1", "--reward-epochs", "0"]
    assert train.main(arguments(tmp_path / "run", *more)) == 0
    assert "train 6, validation 6" in capsys.readouterr().out


# Several sources


@pytest.fixture
def two_sources(
    arguments: MakeArguments,
    parquet_folder: Path,
    tmp_path: Path,
    hub_row: MakeRow,
    write_parquet: Write,
) -> MakeArguments:
    """``two_sources(out, …)``: trains on the usual source and 12 photos with two captions each."""
    rows = [hub_row(number) for number in range(80, 92)]
    for row in rows:
        row["alt_text"] = [f"{text} in the dark" for text in row["alt_text"][:2]]
    more = write_parquet(tmp_path / "more", {"train": rows, "validation": rows[:4]})

    def make(out: Path, *options: str) -> list[str]:
        return arguments(out, "--data", str(parquet_folder), "--data", f"{more}=0.75", *options)

    return make


@pytest.mark.usefixtures("no_curves")
def test_two_sources_share_vocabulary_epochs_and_card(
    two_sources: MakeArguments,
    tmp_path: Path,
    parquet_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, name = tmp_path / "run", parquet_folder.name
    assert train.main(two_sources(out, "--epochs", "1")) == 0
    output = capsys.readouterr().out
    assert "photos       train 36, validation 12\n" in output
    assert f"  {name}: train 24, 9 per epoch, validation 8\n" in output
    assert "  more: train 12, 27 per epoch, validation 4\n" in output
    assert re.search(rf"CIDEr=\S+ \({name} \d+\.\d, more \d+\.\d\) \| lr=", output)
    checkpoint = checkpoints.load(out / "checkpoint")
    assert checkpoint.vocabulary.known_ids(["circle", "dark"])
    assert checkpoint.recipe["data"] == [name, "more=0.75"]
    assert f"Trained on: `{name}`, `more` (0.75 of each epoch)." in checkpoint.card
    best = max(figures(out)[1:], key=lambda row: float(row["CIDEr"]))
    for metric in ("CIDEr", "BLEU-4", "val_loss"):
        values = [float(best[f"{metric} {source}"]) for source in (name, "more")]
        assert float(best[metric]) == pytest.approx(sum(values) / 2)
        assert checkpoint.metrics[f"{metric} more"] == values[1]
    assert "| cross-entropy more | " in checkpoint.card
    assert json.loads((out / "run.json").read_text())["epochs"][1]["CIDEr more"] >= 0


@pytest.mark.usefixtures("no_curves")
def test_two_sources_resume_only_with_the_same_shares(
    two_sources: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--recipe", "seed", "--reward-epochs", "0", "--views", "2"]
    assert train.main(two_sources(tmp_path / "run", *more, "--epochs", "1")) == 0
    assert train.main(two_sources(tmp_path / "run", *more, "--epochs", "2", "--resume")) == 0
    assert train.main(two_sources(tmp_path / "whole", *more, "--epochs", "2")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    options = two_sources(tmp_path / "run", *more, "--epochs", "2", "--resume")
    options[options.index(f"{tmp_path / 'more'}=0.75")] = f"{tmp_path / 'more'}=0.5"
    assert train.main(options) == 2
    assert "other photos, shares, captions" in _last_line(capsys)


@pytest.mark.usefixtures("no_curves")
def test_one_source_with_the_whole_epoch_needs_no_share(
    arguments: MakeArguments, tmp_path: Path, parquet_folder: Path
) -> None:
    more = ["--epochs", "1", "--reward-epochs", "0"]
    assert train.main(arguments(tmp_path / "plain", *more)) == 0
    shared = arguments(tmp_path / "shared", "--data", f"{parquet_folder}=1", *more)
    assert train.main(shared) == 0
    assert figures(tmp_path / "shared") == figures(tmp_path / "plain")


def test_folder_of_a_command_that_cannot_start_can_be_used_again(
    arguments: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = arguments(tmp_path / "run", "--caption-column", "no such column")
    for _ in range(2):
        assert train.main(wrong) == 2
        assert "no such column" in _last_line(capsys)


def test_rewards_and_mean_cell_come_from_all_sources(
    two_sources: MakeArguments, tmp_path: Path
) -> None:
    text = str(tmp_path / "more")  # only its captions are read
    options = vars(train.build_parser().parse_args(two_sources(tmp_path, "--text", text)))
    data = prepare(train.config_of(options), options["cache"])
    first, second = data.sources
    assert (first.num_photos, second.num_photos) == (24, 12)
    assert len(data.train_references) == 3 * 36
    assert data.train_references[23][0] == data.vocabulary.decode(data.train[23][1][0].tolist())
    assert data.train_references[24] == [
        data.vocabulary.decode(token_ids.tolist()) for token_ids in data.train[24][1][:2]
    ]
    assert data.train_references[24][0].endswith("in the dark")
    cells = torch.stack([data.train[index][0].float().mean(dim=0) for index in range(36)])
    assert data.text is not None
    torch.testing.assert_close(data.text[0][0].float()[0], cells.mean(dim=0), atol=1e-3, rtol=1e-3)
    state = TrainingState(train.config_of(options), data, tmp_path / "run")
    state.set_mean_features()
    model = state.eval_model.eval()
    with torch.no_grad():
        photos = torch.stack([data.train[index][0].float() for index in range(36)])
        expected = model.remember(photos).features.mean(dim=(0, 1))
    torch.testing.assert_close(model.mean_features, expected)
    assert expected.abs().min() >= 0 < expected.max()


@pytest.mark.parametrize(
    ("shares", "sizes", "expected"),
    [
        ([None], [7], [7]),
        ([None, None, None], [60, 3, 37], [60, 3, 37]),
        ([None, 0.3], [60, 40], [70, 30]),
        ([0.5, None, None], [10, 60, 30], [50, 33, 17]),
        ([1 / 3, 1 / 3, 1 / 3], [1, 1, 98], [33, 34, 33]),
        ([0.1, 0.2, 0.7], [10, 10, 10], [3, 6, 21]),
    ],
)
def test_epoch_divides_by_share_then_by_size(
    shares: list[float | None], sizes: list[int], expected: list[int]
) -> None:
    sources = [DataSource("a", "a", share, is_local=False) for share in shares]
    assert photos_per_epoch(sources, sizes) == expected


def test_share_of_less_than_a_photo_is_refused() -> None:
    sources = [DataSource("a", "a", None, False), DataSource("b", "b", 0.001, False)]
    with pytest.raises(ConfigError, match="share of b is less than one of the 100 photos"):
        photos_per_epoch(sources, [50, 50])


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


@pytest.mark.slow
def test_sigterm_saves_and_resume_gives_the_same_bits(
    whole: tuple[Path, str],
    arguments: MakeArguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    with _training(arguments(out)) as process:
        _read_until(process.stdout, "epoch 03")
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "all saved: continue with --resume" in rest
    assert "Traceback" not in rest
    state = json.loads((out / "state" / "state.json").read_text())
    assert state["epoch"] == 2
    assert 0 < state["step"] < 6  # in the middle of the epoch
    assert train.main(arguments(out, "--resume")) == 0
    output = capsys.readouterr().out
    epochs = [m[1] for line in output.splitlines() if (m := EPOCH_LINE.match(line))]
    assert epochs == ["03", "04"]
    assert_same_run(out, whole[0])


@pytest.mark.slow
def test_killed_run_resumes_from_its_last_save(
    whole: tuple[Path, str], arguments: MakeArguments, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with _training(arguments(out)) as process:
        _read_until(process.stdout, "epoch 03")
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert len(figures(out)) == 2  # the figures of what was done are there
    checkpoints.load(out / "checkpoint")
    assert train.main(arguments(out, "--resume")) == 0
    assert_same_run(out, whole[0])


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(
    ("recipe", "steps"),
    [("seed", [3]), pytest.param("best", [1, 2, 4, 7], marks=pytest.mark.slow)],
)
def test_stop_after_any_step_changes_nothing(
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
    step = torch.optim.AdamW.step
    for wanted in steps:
        left = iter(range(1, 100))

        def step_with_interrupt(
            optimizer: torch.optim.AdamW, *rest: Any, left: Any = left, wanted: int = wanted
        ) -> Any:
            if next(left) == wanted:
                os.kill(os.getpid(), signal.SIGINT)
            return step(optimizer, *rest)

        out = tmp_path / str(wanted)
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step_with_interrupt)
            assert train.main(arguments(out, *more)) == 128 + signal.SIGINT
        assert "--resume" in capsys.readouterr().err
        assert train.main(arguments(out, *more, "--resume")) == 0
        assert_same_run(out, tmp_path / "whole")


@pytest.mark.usefixtures("no_curves")
@pytest.mark.slow
def test_text_is_learned_first_and_a_stop_there_changes_nothing(
    arguments: MakeArguments,
    tmp_path: Path,
    write_parquet: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"alt_text": [f"a red circle on the {side}"] * 5} for side in ("left", "right") * 10]
    text = write_parquet(tmp_path / "text", {"train": rows})
    more = ["--limit", "10", "--batch-size", "5", "--epochs", "1"]
    more += ["--text", str(text), "--text-epochs", "2"]
    uses_photos = []
    forward = FusedForward.forward

    def record_features(fused: FusedForward, features: torch.Tensor, captions: torch.Tensor) -> Any:
        if fused.model.training:
            uses_photos.append(bool((features != features[:1, :1]).any()))
        return forward(fused, features, captions)

    with monkeypatch.context() as patch:
        patch.setattr(FusedForward, "forward", record_features)
        assert train.main(arguments(tmp_path / "whole", *more)) == 0
    # 20 rows without photos and 10 with captions of their own are 6 steps, twice.
    assert uses_photos == [False] * 12 + [True] * 2
    assert [row["epoch"] for row in figures(tmp_path / "whole")] == list("12345")
    step = torch.optim.AdamW.step
    left = iter(range(1, 100))

    def step_with_interrupt(optimizer: torch.optim.AdamW, *rest: Any) -> Any:
        if next(left) == 10:  # after two steps of the detectors, in the text's second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return step(optimizer, *rest)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step_with_interrupt)
        assert train.main(arguments(out, *more)) == 128 + signal.SIGINT
    # The same text may lie elsewhere by now, but it must be the same.
    other = write_parquet(tmp_path / "other", {"train": rows[:-1]})
    assert train.main(arguments(out, *more, "--text", str(other), "--resume")) == 2
    assert "started on other photos, shares, captions" in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    moved = text.rename(tmp_path / "elsewhere" / "text")
    assert train.main(arguments(out, *more, "--text", str(moved), "--resume")) == 0
    assert_same_run(out, tmp_path / "whole")
    card = (out / "checkpoint/README.md").read_text()
    assert "after reading the captions of `text`." in card
    assert str(tmp_path) not in card + (out / "checkpoint/config.json").read_text()


def test_finished_run_is_left_unchanged_by_resume(
    whole: tuple[Path, str], arguments: MakeArguments
) -> None:
    folder, _ = whole
    files = [folder / "metrics.csv", folder / "checkpoint/model.safetensors"]
    before = [path.read_bytes() for path in files]
    assert train.main(arguments(folder, "--resume")) == 0
    assert [path.read_bytes() for path in files] == before


def test_resume_names_the_settings_that_differ(
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
def test_resume_with_more_epochs_matches_one_longer_run(
    arguments: MakeArguments, tmp_path: Path
) -> None:
    out, more = tmp_path / "run", ["--recipe", "seed", "--limit", "10", "--reward-epochs", "0"]
    # There is nothing to resume yet, as after a kill before the first save.
    assert train.main(arguments(out, *more, "--epochs", "1", "--resume")) == 0
    assert train.main(arguments(out, *more, "--epochs", "3", "--resume")) == 0
    whole = tmp_path / "whole"
    assert train.main(arguments(whole, *more, "--epochs", "3")) == 0
    assert figures(out) == figures(whole)


def test_resume_refuses_a_folder_without_a_run(
    arguments: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    assert train.main(arguments(tmp_path, "--resume")) == 2
    assert "holds no run to resume: check --out" in _last_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_folder_that_is_not_empty_is_refused(
    whole: tuple[Path, str], arguments: MakeArguments, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = whole
    before = figures(folder)
    assert train.main(arguments(folder)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert figures(folder) == before


# Errors


def _last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error, which must be one line at the end of standard error."""
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.strip()]
    assert "Traceback" not in output.err
    errors = [number for number, line in enumerate(lines) if line.startswith("train.py: ")]
    assert errors == [len(lines) - 1], output.err
    return lines[-1]


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    options = {f"--{field.name}" for field in dataclasses.fields(TrainConfig)} - {"--model"}
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - DATA_FIELDS
    options |= {f"--model.{name}" for name in fields}
    for option in [*options, "--out", "--resume", "--cache"]:
        assert f" {option.replace('_', '-')} " in text
    assert "--recipe {seed,best}" in text
    assert "--views N Number of views of each photo" in text
    assert "Default: 1 (best: 3)." in text
    assert "Frozen backbone: resnet50, efficientnet_lite2 or timm:<name>." in text
    assert "None" not in text


def test_options_change_single_fields_of_the_recipe() -> None:
    options = ["--recipe", "best", "--learning-rate", ".5", "--word2vec", "False", "--seed", "007"]
    options += ["--model.dropout", "0", "--bfloat16", "true", "--language", "de"]
    config = train.config_of(vars(train.build_parser().parse_args(options)))
    best = TrainConfig.from_recipe("best")
    assert config == TrainConfig.from_recipe(
        "best",
        learning_rate=0.5,
        word2vec=False,
        seed=7,
        bfloat16=True,
        language="de",
        model={**best.model, "dropout": 0.0},
    )
    assert train.config_of(vars(train.build_parser().parse_args([]))) == TrainConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--learning-rat 1", "unknown argument --learning-rat (did you mean --learning-rate?)"),
        ("surplus", "unknown argument surplus; see train.py --help"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--set label_smoothing=0", "write --label-smoothing 0 instead of --set label_smoothing=0"),
        ("--set model.dropout=0.5", "write --model.dropout 0.5 instead of --set model.dropout"),
        ("--recipe worst", "there is no recipe 'worst'; choose one of seed, best"),
        ("--device tpu", "device is 'tpu'; it must be one of auto, cpu, cuda, mps"),
        ("--epochs many", "epochs is 'many'; it must be a whole number from 1 to 1000000"),
        ("--min-count 1e3", "min_count is '1e3'; it must be a whole number of at least 1"),
        ("--limit -5", "limit is -5; it must be a whole number of at least 0"),
        ("--learning-rate nan", "learning_rate is nan; it must be a number from 1e-12 to 10"),
        ("--learning-rate 1e400", "learning_rate is inf"),
        (f"--batch-size 1{'0' * 400}", "batch_size is 1"),
        (f"--batch-size 1{'0' * 5000}", "batch_size is '1"),
        (f"--captions {'first' * 1000}", "captions is 'first"),
        ("--word2vec maybe", "word2vec is 'maybe'; it must be true or false"),
        ("--bfloat16 1", "bfloat16 is '1'; it must be true, false or auto"),
        ("--language english_us", "language is 'english_us'; it must be a BCP 47 tag"),
        ("--model.dropout high", "dropout is 'high'; it must be a number from 0 to 0.95"),
        ("--model.vocabulary-size 7", "unknown argument --model.vocabulary-size"),
        ("--recipe seed --model.tied-embedding true", "tied_embedding needs deep_output"),
        ("--encoder vgg", "resnet50, efficientnet_lite2, timm:<name>"),
        ("--encoder timm:no_such_model", "no_such_model"),
        ("--encoder-weights no/such.file", "there is no weights file"),
    ],
    ids=lambda value: value[:40],
)
def test_bad_options_print_one_line_and_exit_with_2(
    arguments: MakeArguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    assert train.main(arguments(tmp_path / "run", *options.split())) == 2
    assert message in _last_line(capsys)
    assert not (tmp_path / "run" / "checkpoint").exists()


def _columns_differ(folder: Path, row: MakeRow, write: Write) -> Path:
    other = {"image": row(1)["image"], "alt_text": 7.5, "more": [{"deep": 1}]}
    write(folder, {"train-a": [row(0)], "train-b": [other]})
    return folder


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
    ("make", "message"),
    [
        (_no_folder, "there is no folder"),
        (_no_user, "there is no folder"),
        (_no_name, "there is no folder"),
        (_line_break_in_a_name, "rename the file"),
        (_no_alt_text, "no column with captions"),
        (_columns_differ, "cannot read the files in"),
        (_garbage, "cannot read the files in"),
        (_broken_photos, "none of the 12 photos"),
    ],
)
def test_bad_data_prints_one_line_and_exits_with_2(
    arguments: MakeArguments,
    tmp_path: Path,
    hub_row: MakeRow,
    write_parquet: Write,
    capsys: pytest.CaptureFixture[str],
    make: Callable[..., Path],
    message: str,
) -> None:
    data = make(tmp_path / "data", hub_row, write_parquet)
    assert train.main(arguments(tmp_path / "run", "--data", str(data))) == 2
    assert message in _last_line(capsys)


def test_default_data_without_internet_names_local_alternatives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    assert train.main(arguments) == 2
    error = _last_line(capsys)
    assert "AnyModal/flickr30k" in error
    assert "captions.csv" in error


def test_too_few_photos_or_too_rare_words_are_refused(
    arguments: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(arguments(tmp_path / "few", "--recipe", "seed", "--limit", "5")) == 2
    assert "5 photos are too few" in _last_line(capsys)
    assert train.main(arguments(tmp_path / "rare", "--min-count", "1000")) == 2
    assert "--min-count" in _last_line(capsys)


@pytest.mark.parametrize("name", ["empty", "file", "nothing"])
def test_text_without_captions_is_refused(
    arguments: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a dog")
    assert train.main(arguments(tmp_path / "run", "--text", str(tmp_path / name))) == 2
    assert f"cannot read captions from {tmp_path / name}" in _last_line(capsys)


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_file_in_place_of_a_folder_is_refused(
    arguments: MakeArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert train.main(arguments(tmp_path / "run", option, str(tmp_path / "file"))) in (1, 2)
    assert "file" in _last_line(capsys)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_mostly_broken_photos_train_or_are_refused(
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
def test_features_too_large_for_float16_are_refused(
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


# The confidence


def test_finished_run_has_a_confidence_also_if_killed_before_it(
    arguments: MakeArguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loop, "MIN_PHOTOS", 5)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--recipe", "seed", "--validation", "split", "--epochs", "1", "--reward-epochs", "0")
    assert train.main(arguments(whole, *options)) == 0
    assert "calibration error" in capsys.readouterr().out
    assert (whole / "reliability.png").exists()
    assert checkpoints.load(whole / "checkpoint").confidence is not None

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_confidence", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(arguments(killed, *options))
    assert checkpoints.load(killed / "checkpoint").confidence is None
    assert train.main(arguments(killed, *options, "--resume")) == 0
    assert_same_run(whole, killed)


def test_few_validation_photos_give_no_confidence(arguments: MakeArguments, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.main(arguments(run, "--recipe", "seed", "--epochs", "1")) == 0
    assert checkpoints.load(run / "checkpoint").confidence is None
    assert not (run / "reliability.png").exists()
