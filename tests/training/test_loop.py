"""Training: it learns, its schedules are what they say, and it stops where it should."""

from __future__ import annotations

import csv
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing import event_accumulator

from captioner.config import RECIPES, DecodingOptions, TrainConfig
from captioner.data.dataset import CaptionDataset
from captioner.data.features import cache_features
from captioner.data.sources import load_captions
from captioner.distributed import DistributedContext
from captioner.errors import ConfigError, TrainingError
from captioner.inference.captioner import Captioner
from captioner.model import checkpoint as checkpoints
from captioner.model.encoder import Encoder, choose_device
from captioner.model.vocabulary import Vocabulary, clean
from captioner.training import loop as training
from captioner.training.evaluation import cross_entropy_of
from captioner.training.logger import MetricsLogger, curves
from captioner.training.loop import epoch_order, fit, learning_rate_at, train_one_epoch
from captioner.training.setup import TrainingData
from captioner.training.state import Run, choose_precision

MakeRow = Callable[..., dict[str, Any]]
Write = Callable[[Path, dict[str, list[dict[str, Any]]]], Path]


def _prepared(
    features: np.ndarray, captions: list[list[str]], encoder: dict[str, Any]
) -> TrainingData:
    """Train and validate on the same photos."""
    vocabulary = Vocabulary.build([text for some in captions for text in some], 1)
    dataset = CaptionDataset(features, range(len(captions)), captions, vocabulary, max_length=20)
    return TrainingData(
        vocabulary=vocabulary,
        train=dataset,
        photos=len(captions),
        text=None,
        train_references=captions,
        example=captions[0][0],
        validation=dataset,
        references=captions,
        matrix=None,
        encoder=encoder,
        sources=[],
        pixels=(1, 3, 224, 224),
    )


# Learning


@pytest.mark.parametrize("recipe", ["seed", "best"])
def test_ten_photos_are_learned_by_heart(
    tmp_path: Path,
    hub_row: MakeRow,
    draw: Callable[..., bytes],
    write_parquet: Write,
    lite2: Encoder,
    recipe: str,
) -> None:
    rows = [hub_row(3 * number) for number in range(10)]
    folder = write_parquet(tmp_path / "data", {"train": rows})
    photos = load_captions(str(folder))
    features = cache_features(lite2, photos, tmp_path / "cache")
    captions = [texts[:1] for texts in photos.captions()]
    assert len({caption for (caption,) in captions}) == 10
    config = TrainConfig.from_recipe(
        recipe,
        data=str(folder),
        encoder="efficientnet_lite2",
        captions="first",
        views=1,
        batch_size=5,
        epochs=60,
        learning_rate=5e-3 if recipe == "best" else 3e-3,
        label_smoothing=0.0,
        ema_decay=0.9 if recipe == "best" else 0.0,
        device="cpu",
        # Smaller, and without what is there to keep it from learning by heart.
        model={
            **RECIPES[recipe].get("model", {}),
            **{"hidden_size": 128, "embedding_size": 64, "dropout": 0.0, "feature_dropout": 0.0},
        },
    )
    run = Run(config, _prepared(features.array, captions, lite2.spec()), tmp_path)
    losses = []
    for _ in range(config.epochs):
        losses.append(train_one_epoch(run))
        run.epoch, run.step, run.summed, run.count = run.epoch + 1, 0, 0.0, 0
    assert losses[0] > 1.5
    assert losses[-1] < 0.05
    assert cross_entropy_of(run.scored, run.prepared.validation) < 0.05
    # Through the checkpoint, the encoder and the search, to text.
    checkpoints.save(
        tmp_path / "checkpoint",
        checkpoints.Checkpoint(
            run.scored, run.prepared.vocabulary, 20, lite2.spec(), config.to_dict(), {}
        ),
    )
    captioner = Captioner(checkpoints.load(tmp_path / "checkpoint"), lite2)
    found = captioner.caption_batch(
        [draw(3 * number) for number in range(10)], DecodingOptions.plain_greedy()
    )
    assert [caption.text for caption in found] == [clean(caption) for (caption,) in captions]


def _toy(encoder_channels: int = 6, photos: int = 8) -> TrainingData:
    """Random features; each photo has its own word."""
    features = np.random.default_rng(0).standard_normal((photos, 49, encoder_channels))
    captions = [[f"word{number} is here"] for number in range(photos)]
    spec = {"name": "toy", "channels": encoder_channels, "sha256": "0", "transform": {"size": 224}}
    return _prepared(features.astype(np.float16), captions, spec)


_SMALL = {"hidden_size": 16, "embedding_size": 8, "attention_size": 8}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_a_message(tmp_path: Path, value: float) -> None:
    prepared = _toy()
    prepared.validation.features[3, 5, 1] = value
    run = Run(TrainConfig(batch_size=2, device="cpu", model=_SMALL), prepared, tmp_path)
    with pytest.raises(TrainingError, match=r"became .*(nan|inf).* in epoch 1.*--learning-rate"):
        train_one_epoch(run)


def test_the_loss_of_an_epoch_is_a_mean_over_its_words(tmp_path: Path) -> None:
    # At a rate of nearly nothing, batches of any size come to the same.
    losses = []
    for batch_size in (1, 3, 8):
        config = TrainConfig(batch_size=batch_size, learning_rate=1e-12, device="cpu", model=_SMALL)
        losses.append(train_one_epoch(Run(config, _toy(), tmp_path)))
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-4)
    assert losses[0] == pytest.approx(math.log(14), rel=0.2)


# Schedules


def test_the_cosine_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate_at(step, 1000, 1e-3, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[49] == pytest.approx(5e-4)
    assert rates[99] == pytest.approx(1e-3)
    assert rates[100] == pytest.approx(1e-3)
    assert rates[550] == pytest.approx(5e-4)
    assert 0 < rates[999] < 1e-8
    assert all(first < second for first, second in pairwise(rates[:100]))
    assert all(first > second for first, second in pairwise(rates[100:]))
    assert [learning_rate_at(step, 1000, 1e-3, 0.1) for step in range(1000)] == rates


def test_without_warm_up_it_starts_at_the_top() -> None:
    assert learning_rate_at(0, 10, 1e-3) == pytest.approx(1e-3)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 1.0])
def test_the_rate_never_passes_the_highest(warmup: float) -> None:
    for total in (1, 3, 10, 19, 30, 50, 999):
        rates = [learning_rate_at(step, total, 1e-3, warmup) for step in range(total)]
        assert min(rates) > 0
        assert max(rates) <= 1e-3 * (1 + 1e-9), total


@pytest.mark.parametrize("photos", [1, 7, 100])
def test_an_epoch_goes_through_each_photo_once(photos: int) -> None:
    orders = [epoch_order(photos, 1, seed=0, epoch=epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(photos))
    assert epoch_order(photos, 1, seed=0, epoch=1) == orders[1]
    if photos == 100:
        assert orders[0] != orders[1] != orders[2]
        assert epoch_order(photos, 1, seed=1, epoch=0) != orders[0]


def test_each_photo_comes_once_an_epoch_in_one_of_its_views() -> None:
    orders = [epoch_order(200, 3, seed=0, epoch=epoch) for epoch in range(4)]
    for order in orders:
        assert sorted(place % 200 for place in order) == list(range(200))
        for view in range(3):
            assert 40 < sum(place // 200 == view for place in order) < 95
    seen = {place for order in orders for place in order}
    assert len(seen) > 400  # most photos were shown in several views


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ConfigError, match=f"no {missing} device: use --device auto"):
        choose_device(missing)


# When to stop, and what is kept


@pytest.fixture
def scripted(
    no_curves: None,  # noqa: ARG001
    parquet_folder: Path,
    timm_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Callable[..., tuple[dict[str, float], list[dict[str, str]]]]:
    """``fit`` with validation losses that the test makes up, on real photos."""
    cache = tmp_path_factory.getbasetemp() / "scripted-features"

    def run(losses: list[float], **changes: Any) -> tuple[dict[str, float], list[dict[str, str]]]:
        left = iter(losses)
        monkeypatch.setattr(training, "cross_entropy_of", lambda *_, **__: next(left))
        config = TrainConfig.from_recipe(
            "seed",
            data=str(parquet_folder),
            encoder="timm:test_resnet",
            encoder_weights=str(timm_weights),
            min_count=1,
            device="cpu",
            model=_SMALL,
            **changes,
        )
        best = fit(config, tmp_path / "run", cache=cache)
        with (tmp_path / "run" / "metrics.csv").open() as file:
            return best, list(csv.DictReader(file))

    return run


def test_training_stops_after_patience_and_keeps_the_best(
    scripted: Callable[..., tuple[dict[str, float], list[dict[str, str]]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    best, rows = scripted([3.0, 2.0, 2.1, 2.2, 2.3, 1.0], epochs=10, patience=3)
    assert [float(row["val_loss"]) for row in rows] == [3.0, 2.0, 2.1, 2.2, 2.3]
    assert best["epoch"] == 2
    assert checkpoints.load(tmp_path / "run" / "checkpoint").metrics["val_loss"] == 2.0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in lines if line.startswith("Epoch")] == [
        f"Epoch {number:02}" for number in range(1, 6)
    ]
    assert ["best so far" in line for line in lines if line.startswith("Epoch")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert "no better epoch for 3 epochs" in lines[-1]


def test_a_better_epoch_starts_patience_anew(
    scripted: Callable[..., tuple[dict[str, float], list[dict[str, str]]]],
) -> None:
    best, rows = scripted([3.0, 3.1, 2.9, 3.1, 2.8, 3.0, 3.1], epochs=10, patience=2)
    assert len(rows) == 7
    assert best["epoch"] == 5


def test_the_rate_falls_after_two_epochs_without_a_lower_loss(
    scripted: Callable[..., tuple[dict[str, float], list[dict[str, str]]]],
) -> None:
    _, rows = scripted([2.0, 2.1, 2.2, 1.9, 1.8], epochs=5, patience=5)
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4, 1e-4])


def test_the_rate_falls_before_patience_ends(
    scripted: Callable[..., tuple[dict[str, float], list[dict[str, str]]]],
) -> None:
    # The recipe as it stands: a schedule that only acts when training stops would be none.
    _, rows = scripted([2.0, 2.1, 2.2, 2.3], epochs=4)
    assert float(rows[-1]["learning_rate"]) < float(rows[0]["learning_rate"])


# The logbook


def _row(epoch: int) -> dict[str, float]:
    names = ("train_loss", "val_loss", "CIDEr", "ROUGE-L", "BLEU-4", "learning_rate")
    return {"epoch": epoch, **{name: epoch + place / 10 for place, name in enumerate(names)}}


def test_every_epoch_goes_to_csv_tensorboard_and_curves(tmp_path: Path) -> None:
    logbook = MetricsLogger(tmp_path, [])
    for epoch in (1, 2):
        logbook.add(_row(epoch))
        # At once, so that a killed run leaves its figures.
        with (tmp_path / "metrics.csv").open() as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        assert rows == [_row(number) for number in range(1, epoch + 1)]
        with Image.open(tmp_path / "curves.png") as image:
            image.load()
            assert image.width > 2 * image.height
    resumed = MetricsLogger(tmp_path, [_row(1), _row(2)])
    resumed.add(_row(3))
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("CIDEr")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("val_loss")] == pytest.approx([1.1, 2.1, 3.1])


def test_the_curves_show_losses_scores_and_rate() -> None:
    figure = curves([_row(1), _row(2), _row(3)])
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 3
    assert [len(axes.lines) for axes in figure.axes] == [2, 3, 1]
    line = figure.axes[0].lines[1]
    assert list(np.asarray(line.get_xdata())) == [1, 2, 3]
    assert list(np.asarray(line.get_ydata())) == pytest.approx([1.1, 2.1, 3.1])


# A run's state


def test_a_saved_run_is_restored_to_the_bit(tmp_path: Path) -> None:
    options = {**_SMALL, "mean_start": True, "deep_output": True, "tied_embedding": True}
    config = TrainConfig(
        batch_size=3, ema_decay=0.9, device="cpu", seed=5, model={**options, "dropout": 0.3}
    )
    first = Run(config, _toy(), tmp_path)
    train_one_epoch(first)
    first.save()
    state = load_file(tmp_path / "state" / "state.safetensors")
    again = Run(config, _toy(), tmp_path)
    again.restore()
    again.save()
    restored = load_file(tmp_path / "state" / "state.safetensors")
    assert state.keys() == restored.keys()
    assert all(torch.equal(state[name], restored[name]) for name in state)
    assert (again.epoch, again.step, again.count) == (first.epoch, first.step, first.count)
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=4, device="cpu", model=_SMALL)
    run = Run(config, _toy(), tmp_path)
    train_one_epoch(run)
    run.save()
    whole = (tmp_path / "state" / "state.safetensors").read_bytes()
    (tmp_path / "state" / "state.safetensors").write_bytes(whole[:-50])
    with pytest.raises(TrainingError, match="state is damaged"):
        Run(config, _toy(), tmp_path).restore()
    (tmp_path / "state" / "state.safetensors").write_bytes(whole)
    (tmp_path / "state" / "state.json").write_text("{}")
    with pytest.raises(TrainingError, match="state is damaged"):
        Run(config, _toy(), tmp_path).restore()


def test_a_run_on_other_captions_is_not_resumed(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=4, device="cpu", model=_SMALL)
    run = Run(config, _toy(), tmp_path)
    train_one_epoch(run)
    run.save()
    with pytest.raises(ConfigError, match="other photos, captions or encoder weights"):
        Run(config, _toy(photos=9), tmp_path).restore()


# Precision


class _Slower(DistributedContext):
    """Two processes, of which the other one is not faster in bfloat16."""

    def total(self, *values: float) -> list[float]:
        return [value + 1 for value in values]


@pytest.mark.parametrize(
    ("setting", "speedup", "processes", "expected"),
    [
        ("auto", 2.0, DistributedContext(), True),
        ("auto", 1.1, DistributedContext(), False),
        ("auto", 0.01, DistributedContext(), False),
        ("auto", 2.0, _Slower(), False),
        (True, 2.0, DistributedContext(), True),
        (True, 0.01, DistributedContext(), True),
        (False, 2.0, DistributedContext(), False),
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster_or_set(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    setting: bool | str,
    speedup: float,
    processes: DistributedContext,
    expected: bool,
) -> None:
    monkeypatch.setattr("captioner.training.state.bfloat16_speedup", lambda _: speedup)
    config = TrainConfig.from_recipe("best", bfloat16=setting, device="cpu")
    chosen, _ = choose_precision(config, processes)
    assert chosen is expected
    assert ("bfloat16 is slow on this machine" in caplog.text) == (setting is True and speedup < 1)


_OLD_PROCESSOR = """
import torch
from captioner.training.state import bfloat16_speedup
print(torch.backends.cpu.get_cpu_capability(), bfloat16_speedup(torch.device("cpu")))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86")
def test_a_processor_without_bfloat16_instructions_trains_in_float32() -> None:
    # oneDNN and torch do without what newer processors have.
    old = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", _OLD_PROCESSOR],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | old,
        capture_output=True,
        text=True,
        check=True,
    )
    capability, speedup = done.stdout.split()
    assert capability == "AVX2"
    assert float(speedup) < 1
