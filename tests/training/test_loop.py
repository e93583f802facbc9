"""The training loop, its schedules and stages, the logger, and the saved state."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import platform
import subprocess
import sys
from collections import Counter
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
from torch.utils.data import DataLoader

from captioner.config import (
    BOS,
    EOS,
    PAD,
    RECIPES,
    DecodingOptions,
    ModelConfig,
    TrainConfig,
)
from captioner.data.dataset import CaptionDataset
from captioner.data.features import cache_features
from captioner.data.sources import load_captions
from captioner.distributed import DistributedContext
from captioner.errors import ConfigError, TrainingError
from captioner.inference.captioner import Captioner
from captioner.model import checkpoint as checkpoints
from captioner.model.decoder import CaptionModel
from captioner.model.encoder import Encoder, choose_device
from captioner.model.vocabulary import Vocabulary
from captioner.training import loop as training
from captioner.training.evaluation import cross_entropy_of
from captioner.training.logger import MetricsLogger, curves
from captioner.training.loop import (
    caption_loss,
    epoch_order,
    evaluate,
    fit,
    learning_rate_at,
    train_one_epoch,
)
from captioner.training.setup import Source, TrainingData, choose_precision
from captioner.training.state import CAPTIONS, DETECTORS, REWARDS, TrainingState

MakeRow = Callable[..., dict[str, Any]]
Write = Callable[[Path, dict[str, list[dict[str, Any]]]], Path]


def _data(
    features: np.ndarray,
    captions: list[list[str]],
    encoder: dict[str, Any],
    num_detectors: int = 0,
) -> TrainingData:
    """Train and validate on the same photos."""
    vocabulary = Vocabulary.build([text for texts in captions for text in texts], 1)
    dataset = CaptionDataset(features, range(len(captions)), captions, vocabulary, max_length=20)
    return TrainingData(
        vocabulary=vocabulary,
        train=dataset,
        sources=[
            Source(
                name="toy",
                num_photos=len(captions),
                per_epoch=len(captions),
                validation=dataset,
                references=captions,
            )
        ],
        text=None,
        train_references=captions,
        embedding=None,
        model={
            "vocabulary_size": len(vocabulary),
            "encoder_channels": features.shape[-1],
            "num_detectors": num_detectors,
        },
        classifier=None,
        encoder=encoder,
        fingerprint=[],
    )


# Learning


@pytest.mark.parametrize("recipe", [pytest.param("seed", marks=pytest.mark.slow), "best"])
def test_training_memorizes_ten_photos(
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
    captions = [texts[:1] for texts in photos.captions]
    assert len({caption for (caption,) in captions}) == 10
    config = TrainConfig.from_recipe(
        recipe,
        data=(str(folder),),
        encoder="efficientnet_lite2",
        captions="first",
        views=1,
        batch_size=5,
        epochs=60,
        learning_rate=5e-3 if recipe == "best" else 3e-3,
        label_smoothing=0.0,
        ema_decay=0.9 if recipe == "best" else 0.0,
        device="cpu",
        # Smaller, and without regularization.
        model={
            **RECIPES[recipe].get("model", {}),
            **{"hidden_size": 128, "embedding_size": 64, "dropout": 0.0, "feature_dropout": 0.0},
        },
    )
    num_detectors = 5 if recipe == "best" else 0
    data = _data(features.array, captions, lite2.spec(), num_detectors)
    state = TrainingState(config, data, tmp_path)
    while state.stage == DETECTORS:
        train_one_epoch(state)
        state.finish_epoch({}, math.inf)
        if not state.should_continue():
            state.advance_stage()
    losses = []
    for _ in range(config.epochs):
        losses.append(train_one_epoch(state))
        state.finish_epoch({"val_loss": losses[-1]}, losses[-1])
    assert losses[0] > 1.5
    assert losses[-1] < 0.05
    assert cross_entropy_of(state.eval_model, state.data.sources[0].validation) < 0.05
    # From pixels to text, through the saved checkpoint.
    checkpoints.save(
        tmp_path / "checkpoint",
        checkpoints.Checkpoint(
            state.eval_model, state.data.vocabulary, 20, lite2.spec(), config.to_dict(), {}
        ),
    )
    captioner = Captioner(checkpoints.load(tmp_path / "checkpoint"), lite2)
    results = captioner.caption_batch(
        [draw(3 * number) for number in range(10)], DecodingOptions.plain_greedy()
    )
    assert [[caption.text] for caption in results] == captions


def _toy(encoder_channels: int = 6, photos: int = 8) -> TrainingData:
    """Return random features; each photo has its own word."""
    features = np.random.default_rng(0).standard_normal((photos, 49, encoder_channels))
    captions = [[f"word{number} is here"] for number in range(photos)]
    spec = {"name": "toy", "channels": encoder_channels, "sha256": "0", "transform": {"size": 224}}
    return _data(features.astype(np.float16), captions, spec)


_SMALL: dict[str, Any] = {"hidden_size": 16, "embedding_size": 8, "attention_size": 8}


def test_caption_loss_is_cross_entropy_of_targets_without_padding() -> None:
    captions = torch.tensor([[[BOS, 7, EOS, PAD], [BOS, 5, 6, EOS]]])
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    log_probs = logits.log_softmax(-1)
    expected = -log_probs[range(5), [7, EOS, 5, 6, EOS]].mean()
    loss, _, num_tokens = caption_loss(lambda *_: (logits, logits), torch.zeros(1, 49, 2), captions)
    assert num_tokens == 5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    smoothed, _, _ = caption_loss(
        lambda *_: (logits, logits), torch.zeros(1, 49, 2), captions, label_smoothing=0.1
    )
    expected = 0.9 * expected - 0.1 * log_probs.mean()
    assert smoothed.item() == pytest.approx(expected.item(), rel=1e-6)


def test_validation_loss_is_mean_over_tokens_of_all_batches() -> None:
    captions = [["a dog runs in the snow", "a cat"], ["dog"], ["the cat sits", "a dog runs"]]
    features = np.random.default_rng(0).standard_normal((3, 49, 6)).astype(np.float16)
    dataset = _data(features, captions, {}).sources[0].validation
    torch.manual_seed(0)
    config = ModelConfig.from_dict({"vocabulary_size": 12, "encoder_channels": 6, **_SMALL})
    model = CaptionModel(config).eval()
    cells, token_ids = next(iter(DataLoader(dataset, batch_size=3)))
    with torch.no_grad():
        expected, _, num_tokens = caption_loss(model, cells.float(), token_ids)
    assert num_tokens == 6 + 2 + 1 + 3 + 3 + 5  # with <eos>
    assert cross_entropy_of(model, dataset, batch_size=2) == pytest.approx(
        expected.item(), rel=1e-5
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinite_or_nan_loss_stops_training(tmp_path: Path, value: float) -> None:
    data = _toy()
    data.sources[0].validation.features[3, 5, 1] = value
    run = TrainingState(TrainConfig(batch_size=2, device="cpu", model=_SMALL), data, tmp_path)
    with pytest.raises(TrainingError, match=r"became .*(nan|inf).* in epoch 1.*--learning-rate"):
        train_one_epoch(run)


def test_epoch_loss_does_not_depend_on_batch_size(tmp_path: Path) -> None:
    # At a learning rate of almost zero.
    losses = []
    for batch_size in (1, 3, 8):
        config = TrainConfig(batch_size=batch_size, learning_rate=1e-12, device="cpu", model=_SMALL)
        losses.append(train_one_epoch(TrainingState(config, _toy(), tmp_path)))
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-4)
    assert losses[0] == pytest.approx(math.log(14), rel=0.2)


def test_evaluate_scores_each_source_and_their_mean(tmp_path: Path) -> None:
    one, other = _toy(), _toy(photos=12)
    sources = [
        dataclasses.replace(one.sources[0], name="one"),
        dataclasses.replace(other.sources[0], name="other"),
    ]
    config = TrainConfig(device="cpu", model=_SMALL)
    row = evaluate(TrainingState(config, dataclasses.replace(other, sources=sources), tmp_path))
    alone = [
        evaluate(TrainingState(config, dataclasses.replace(other, sources=[source]), tmp_path))
        for source in sources
    ]
    assert "CIDEr one" not in alone[0]
    assert alone[0]["val_loss"] != alone[1]["val_loss"]
    for name in alone[0]:
        assert row[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2), name
    for name in ("CIDEr", "BLEU-4", "val_loss"):
        assert [row[f"{name} one"], row[f"{name} other"]] == [scores[name] for scores in alone]
    assert len(row) == len(alone[0]) + 6


# Schedules


def test_cosine_schedule_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate_at(step, 1000, 1e-3, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[49] == pytest.approx(5e-4)
    assert rates[99] == pytest.approx(1e-3)
    assert rates[100] == pytest.approx(1e-3)
    assert rates[550] == pytest.approx(5e-4)
    assert 0 < rates[999] < 1e-8
    assert all(first < second for first, second in pairwise(rates[:100]))
    assert all(first > second for first, second in pairwise(rates[100:]))
    assert learning_rate_at(0, 10, 1e-3) == pytest.approx(1e-3)  # without warm-up


def test_learning_rate_stays_between_zero_and_peak() -> None:
    for warmup in (0.0, 0.05, 0.3, 1.0):
        for num_steps in (1, 3, 10, 19, 30, 50, 999):
            rates = [learning_rate_at(step, num_steps, 1e-3, warmup) for step in range(num_steps)]
            assert min(rates) > 0
            assert max(rates) <= 1e-3 * (1 + 1e-9), (num_steps, warmup)


def test_optimizer_follows_the_schedule_of_its_stage(tmp_path: Path) -> None:
    config = TrainConfig(
        batch_size=2,
        epochs=2,
        schedule="cosine",
        warmup=0.25,
        learning_rate=0.01,
        reward_epochs=1,
        reward_batch_size=4,
        reward_learning_rate=0.001,
        device="cpu",
        model=_SMALL,
    )
    state = TrainingState(config, _toy(), tmp_path)
    rates: list[float] = []

    def record() -> None:
        rates.append(state.optimizer.param_groups[0]["lr"])

    for _ in range(2):
        train_one_epoch(state, record)
        state.finish_epoch({"val_loss": 1.0}, 1.0)
    assert rates == pytest.approx([learning_rate_at(step, 8, 0.01, 0.25) for step in range(8)])
    rates.clear()
    state.begin_stage(REWARDS)
    train_one_epoch(state, record)
    assert rates == pytest.approx([learning_rate_at(step, 2, 0.001) for step in range(2)])


def test_evaluated_weights_are_the_moving_average(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=4, learning_rate=0.1, ema_decay=0.5, device="cpu", model=_SMALL)
    state = TrainingState(config, _toy(), tmp_path)
    weights: list[torch.Tensor] = []
    train_one_epoch(state, lambda: weights.append(state.model.fc.weight.detach().clone()))
    first, second = weights  # the decay after the first step is (1 + 1) / (10 + 1)
    expected = first.lerp(second, 1 - 2 / 11)
    assert torch.allclose(state.eval_model.fc.weight, expected, atol=1e-6)
    assert not torch.allclose(state.model.fc.weight, expected, atol=1e-3)


def test_stages_advance_only_when_asked(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=8, epochs=3, patience=2, device="cpu", model=_SMALL)
    state = TrainingState(config, _toy(), tmp_path)
    for loss in (3.0, 3.5):
        assert state.should_continue()
        assert state.should_continue()  # it changes nothing
        state.finish_epoch({"val_loss": loss}, loss)
    assert (state.epoch, state.bad_epochs, state.best_loss) == (2, 1, 3.0)
    state.finish_epoch({"val_loss": 2.0}, 2.0)
    assert state.bad_epochs == 0
    assert not state.should_continue()  # all epochs are done
    assert not state.advance_stage()  # and no rewards are wanted
    state.begin_stage(CAPTIONS)
    assert state.should_continue()
    for _ in range(2):
        state.finish_epoch({"val_loss": 2.0}, 2.0)
    assert not state.should_continue()  # no patience left


def test_epoch_order_holds_each_photo_once() -> None:
    for num_photos in (1, 7, 100):
        sizes = [num_photos]
        orders = [epoch_order(sizes, sizes, 1, seed=0, epoch=epoch) for epoch in range(3)]
        assert all(sorted(order) == list(range(num_photos)) for order in orders)
        assert epoch_order(sizes, sizes, 1, seed=0, epoch=1) == orders[1]
    assert orders[0] != orders[1] != orders[2]
    assert orders[2] == np.random.default_rng((0, 2)).permutation(100).tolist()
    assert epoch_order([100], [100], 1, seed=1, epoch=0) != orders[0]
    # Two sources without shares are one long source.
    assert epoch_order([60, 40], [60, 40], 1, seed=0, epoch=0) == orders[0]


def test_epoch_order_repeats_or_samples_sources_with_a_share() -> None:
    sizes, counts = [60, 40, 10], [15, 15, 80]
    orders = [epoch_order(sizes, counts, 3, seed=0, epoch=epoch) for epoch in range(9)]
    for order in orders:
        assert len(order) == 110
        times = Counter(index % 110 for index in order)
        assert sum(photo < 60 for photo in times) == 15
        assert sum(60 <= photo < 100 for photo in times) == 15
        assert {count for photo, count in times.items() if photo < 100} == {1}
        assert all(times[photo] == 8 for photo in range(100, 110))
    assert len({index % 110 for order in orders for index in order}) > 100
    # Part of a round takes other photos in other epochs.
    partly = [epoch_order([4, 16], [14, 6], 1, seed=0, epoch=epoch) for epoch in range(9)]
    rounds = [Counter(photo for photo in order if photo < 4) for order in partly]
    assert all(sorted(times.values()) == [3, 3, 4, 4] for times in rounds)
    assert len({tuple(sorted(times.items())) for times in rounds}) > 1
    assert epoch_order([4, 16], [14, 6], 1, seed=0, epoch=8) == partly[8]


def test_epoch_order_mixes_views() -> None:
    orders = [epoch_order([200], [200], 3, seed=0, epoch=epoch) for epoch in range(4)]
    for order in orders:
        assert sorted(index % 200 for index in order) == list(range(200))
        for view in range(3):
            assert 40 < sum(index // 200 == view for index in order) < 95
    indices = {index for order in orders for index in order}
    assert len(indices) > 400  # most photos appear in several views


def test_choose_device_refuses_missing_device() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ConfigError, match=f"no {missing} device: use --device auto"):
        choose_device(missing)


# Stages and stopping


@pytest.fixture
def scripted(
    no_curves: None,  # noqa: ARG001
    parquet_folder: Path,
    timm_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Callable[..., tuple[dict[str, float], list[dict[str, str]]]]:
    """Return ``fit`` on real photos, with validation losses given by the test."""
    cache = tmp_path_factory.getbasetemp() / "scripted-features"

    def run(losses: list[float], **changes: Any) -> tuple[dict[str, float], list[dict[str, str]]]:
        remaining = iter(losses)
        monkeypatch.setattr(training, "cross_entropy_of", lambda *_, **__: next(remaining))
        config = TrainConfig.from_recipe(
            "seed",
            data=(str(parquet_folder),),
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


def test_training_stops_after_patience_and_keeps_best_epoch(
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
    assert "no better epoch for 3 epochs" in "".join(lines)
    folder = tmp_path / "run" / "checkpoint"
    assert lines[-1] == (f"checkpoint   {folder}, of epoch 2: python app.py --checkpoint {folder}")


def test_better_epoch_resets_patience(
    scripted: Callable[..., tuple[dict[str, float], list[dict[str, str]]]],
) -> None:
    best, rows = scripted([3.0, 3.1, 2.9, 3.1, 2.8, 3.0, 3.1], epochs=10, patience=2)
    assert len(rows) == 7
    assert best["epoch"] == 5


def test_plateau_schedule_lowers_rate_after_two_bad_epochs(
    scripted: Callable[..., tuple[dict[str, float], list[dict[str, str]]]],
) -> None:
    _, rows = scripted([2.0, 2.1, 2.2, 1.9, 1.8], epochs=5, patience=5)
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4, 1e-4])


def test_seed_recipe_lowers_rate_before_patience_ends(
    scripted: Callable[..., tuple[dict[str, float], list[dict[str, str]]]],
) -> None:
    # A schedule that only acts when training stops would be useless.
    _, rows = scripted([2.0, 2.1, 2.2, 2.3], epochs=4)
    assert float(rows[-1]["learning_rate"]) < float(rows[0]["learning_rate"])


# The logbook


def _row(epoch: int) -> dict[str, float]:
    names = ("train_loss", "val_loss", "CIDEr", "ROUGE-L", "BLEU-4", "learning_rate")
    return {"epoch": epoch, **{name: epoch + place / 10 for place, name in enumerate(names)}}


def test_logger_writes_csv_tensorboard_and_curves(tmp_path: Path) -> None:
    logbook = MetricsLogger(tmp_path, [])
    for epoch in (1, 2):
        logbook.add(_row(epoch))
        # Immediately, so that a killed run leaves its figures.
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


def test_curves_plot_losses_scores_and_rate() -> None:
    figure = curves([_row(1), _row(2), _row(3)])
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 3
    assert [len(axes.lines) for axes in figure.axes] == [2, 3, 1]
    line = figure.axes[0].lines[1]
    assert list(np.asarray(line.get_xdata())) == [1, 2, 3]
    assert list(np.asarray(line.get_ydata())) == pytest.approx([1.1, 2.1, 3.1])


# The saved state


def test_curves_draw_each_source_like_its_mean() -> None:
    names = ("CIDEr", "val_loss")
    rows = [
        _row(epoch) | {f"{name} {source}": 1.5 for source in ("my_dogs", "cats") for name in names}
        for epoch in (1, 2)
    ]
    losses, scores, _ = curves(rows).axes
    assert [line.get_label() for line in losses.lines] == [
        *("train loss", "val loss", "val loss my_dogs", "val loss cats")
    ]
    mean, *sources = scores.lines[:3]
    assert {line.get_color() for line in sources} == {mean.get_color()}
    assert len({line.get_linestyle() for line in scores.lines[:3]}) == 3
    assert np.array_equal(sources[0].get_ydata(), [1.5, 1.5])
    assert scores.get_legend() is not None


def test_restored_state_equals_saved_state(tmp_path: Path) -> None:
    options = {**_SMALL, "mean_start": True, "deep_output": True, "tied_embedding": True}
    config = TrainConfig(
        batch_size=3, ema_decay=0.9, device="cpu", seed=5, model={**options, "dropout": 0.3}
    )
    first = TrainingState(config, _toy(), tmp_path)
    train_one_epoch(first)
    first.finish_epoch({"val_loss": 2.5}, 2.5)
    first.finish_epoch({"val_loss": 2.6}, 2.6)
    first.save()
    saved = load_file(tmp_path / "state" / "state.safetensors")
    values = (tmp_path / "state" / "state.json").read_text()
    assert any(name.startswith("optimizer.") for name in saved)
    again = TrainingState(config, _toy(), tmp_path)
    again.restore()
    again.save()
    restored = load_file(tmp_path / "state" / "state.safetensors")
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
    assert (tmp_path / "state" / "state.json").read_text() == values
    assert (again.epoch, again.best_loss, again.bad_epochs) == (2, 2.5, 1)
    assert again.rows == first.rows
    # The next epoch of both is the same, including the optimizer's moments.
    assert train_one_epoch(again) == train_one_epoch(first)
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".json", ".safetensors"}


def test_damaged_state_raises_training_error(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=4, device="cpu", model=_SMALL)
    run = TrainingState(config, _toy(), tmp_path)
    train_one_epoch(run)
    run.save()
    whole = (tmp_path / "state" / "state.safetensors").read_bytes()
    (tmp_path / "state" / "state.safetensors").write_bytes(whole[:-50])
    with pytest.raises(TrainingError, match="state is damaged"):
        TrainingState(config, _toy(), tmp_path).restore()
    (tmp_path / "state" / "state.safetensors").write_bytes(whole)
    (tmp_path / "state" / "state.json").write_text("{}")
    with pytest.raises(TrainingError, match="state is damaged"):
        TrainingState(config, _toy(), tmp_path).restore()


def test_restore_refuses_other_captions(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=4, device="cpu", model=_SMALL)
    run = TrainingState(config, _toy(), tmp_path)
    train_one_epoch(run)
    run.save()
    with pytest.raises(ConfigError, match="other photos, shares, captions or encoder weights"):
        TrainingState(config, _toy(photos=9), tmp_path).restore()


# Precision


class _Slower(DistributedContext):
    """Two processes, of which the other one is not faster in bfloat16."""

    def all_reduce_sum(self, *values: float) -> list[float]:
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
def test_bfloat16_is_used_if_faster_or_set(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    setting: bool | str,
    speedup: float,
    processes: DistributedContext,
    expected: bool,
) -> None:
    monkeypatch.setattr("captioner.training.setup.bfloat16_speedup", lambda _: speedup)
    config = TrainConfig.from_recipe("best", bfloat16=setting, device="cpu")
    chosen, _ = choose_precision(config, processes)
    assert chosen is expected
    assert ("bfloat16 is slow on this machine" in caplog.text) == (setting is True and speedup < 1)


_OLD_PROCESSOR = """
import torch
from captioner.training.setup import bfloat16_speedup
print(torch.backends.cpu.get_cpu_capability(), bfloat16_speedup(torch.device("cpu")))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86")
def test_bfloat16_is_slow_without_processor_support() -> None:
    # oneDNN and torch use no newer instructions.
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
