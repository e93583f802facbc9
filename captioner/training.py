"""Training the decoder on cached features: ``train_one_epoch`` and ``fit``.

Knows nothing of the app. A run can be killed at any moment: it goes on from its last save, and
comes to what it would have come to without the stop.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from captioner import checkpoint as checkpoints
from captioner.config import FEATURES_FOLDER, PAD, DecodingOptions, TrainConfig
from captioner.errors import TrainingError
from captioner.evaluation import cross_entropy_of, write_captions
from captioner.logbook import Logbook
from captioner.metrics import score_captions
from captioner.model import CaptionModel
from captioner.preparation import Batch, Prepared, choose_device, facts, prepare

_SAVE_SECONDS = 120
_RECORD = "run.json"
# What a checkpoint remembers of its epoch's row.
_METRICS = (
    *("epoch", "val_loss", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr", "ROUGE-L"),
    *("repetition", "distinct_words", "distinct_captions", "mean_length"),
)


class Stopped(TrainingError):
    """The run was asked to stop, and has saved; ``signum`` is the signal that asked."""

    def __init__(self, message: str, signum: int) -> None:
        """Keep ``signum`` for the exit code."""
        super().__init__(message)
        self.signum = signum


def learning_rate_at(step: int, total: int, config: TrainConfig) -> float:
    """Return the cosine schedule's rate: a linear warm-up, then half a cosine to zero."""
    warmup = config.warmup * total
    if step < warmup:
        return config.learning_rate * min(1.0, (step + 1) / warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def epoch_order(config: TrainConfig, photos: int, epoch: int) -> list[int]:
    """Return the order in which an epoch goes through the training set.

    Each photo once; with ``flips`` either as it is or mirrored (``photos`` places further on).
    """
    random = np.random.default_rng((config.seed, epoch))
    order = random.permutation(photos)
    if config.flips:
        order = order + photos * random.integers(0, 2, photos)
    return order.tolist()


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return an exponential moving average for ``AveragedModel``.

    Its memory grows with the steps up to ``decay``, so that the random start is soon forgotten.
    """

    @torch.no_grad()
    def update(averages: list[Tensor], currents: list[Tensor], steps: Tensor | int) -> None:
        now = min(decay, (1 + int(steps)) / (10 + int(steps)))
        for average, current in zip(averages, currents, strict=True):
            average.lerp_(current, 1 - now)

    return update


class Run:
    """All that changes while training, and its way to disk and back."""

    def __init__(self, config: TrainConfig, prepared: Prepared, folder: Path) -> None:
        """Start with seeded random weights."""
        self.config, self.prepared, self.folder = config, prepared, folder
        self.device = choose_device(config.device)
        torch.manual_seed(config.seed)
        self.model = CaptionModel(
            config.model_config(
                vocabulary_size=len(prepared.vocabulary),
                encoder_channels=prepared.encoder["channels"],
            )
        )
        with torch.no_grad():
            if prepared.matrix is not None:
                self.model.embedding.weight.copy_(prepared.matrix)
            self.model.attn.Wh.weight *= config.attention_gain
            self.model.attn.v.weight *= config.attention_gain
        self.model.to(self.device)
        self.average = (
            AveragedModel(self.model, multi_avg_fn=_ema(config.ema_decay))
            if config.ema_decay
            else None
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.plateau = ReduceLROnPlateau(self.optimizer, factor=0.1, patience=1)
        self.steps_an_epoch = math.ceil(prepared.photos / config.batch_size)
        # Where the run stands: epochs done, steps done in this one, its summed loss and words.
        self.epoch, self.step, self.loss_sum, self.words = 0, 0, 0.0, 0
        self.best, self.bad_epochs = math.inf, 0
        self.rows: list[dict[str, float]] = []

    @property
    def scored(self) -> CaptionModel:
        """The weights that are scored and shipped: the averaged ones, if there are any."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            state = self.average.state_dict()
            tensors |= {f"average.{name}": value for name, value in state.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        return tensors

    def save(self) -> None:
        """Write everything that going on needs; the files are replaced in one step."""
        partial = self.folder / "state.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        # clone: tied weights would share memory, which safetensors refuses.
        tensors = {name: value.detach().cpu().clone() for name, value in self._tensors().items()}
        save_file(tensors, partial / "state.safetensors")
        numbers = {
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "words": self.words,
            "best": self.best,
            "bad_epochs": self.bad_epochs,
            "rows": self.rows,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "plateau": {
                name: getattr(self.plateau, name)
                for name in ("best", "num_bad_epochs", "last_epoch", "cooldown_counter")
            },
            "config": self.config.to_dict(),
            "vocabulary": self.prepared.vocabulary.idx2word,
            "caches": self.prepared.caches,
        }
        (partial / "state.json").write_text(json.dumps(numbers))
        state, old = self.folder / "state", self.folder / "state.old"
        if state.exists():
            shutil.rmtree(old, ignore_errors=True)
            state.replace(old)
        partial.replace(state)
        shutil.rmtree(old, ignore_errors=True)

    def restore(self) -> None:
        """Go back to the last save; without one, stay at the start."""
        state = self.folder / "state"
        if not state.exists():
            state = self.folder / "state.old"  # killed between the two renames of a save
        if not state.exists():
            return
        try:
            numbers = json.loads((state / "state.json").read_text())
            tensors = load_file(state / "state.safetensors", device=str(self.device))
            kept = numbers["config"]
        except Exception as error:
            raise TrainingError(f"{state} is damaged ({error}): start again without it") from error
        ours = self.config.to_dict()
        # Another device is the same run, and so are the same photos and weights in another place.
        elsewhere = ("device", "data", "encoder_weights")
        changed = [name for name in ours if kept.get(name) != ours[name] and name not in elsewhere]
        if changed == ["epochs"] and self.config.schedule == "plateau":
            changed = []
        if changed:
            raise TrainingError(
                f"{self.folder} was started with other settings ({', '.join(changed)}): resume "
                "with the same ones, or choose another --out"
            )
        same_words = numbers["vocabulary"] == self.prepared.vocabulary.idx2word
        # The caches go by the photos, the encoder and its weights.
        if not same_words or numbers["caches"] != self.prepared.caches:
            raise TrainingError(
                f"{self.folder} was started on other photos, captions or encoder weights: give the "
                "same ones, or choose another --out"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }

        self.model.load_state_dict(part("model."))
        if self.average is not None:
            self.average.load_state_dict(part("average."))
        optimizer = self.optimizer.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer.").items():
            number, field = name.split(".", 1)
            moments.setdefault(int(number), {})[field] = value
        optimizer["state"] = moments
        self.optimizer.load_state_dict(optimizer)
        self.optimizer.param_groups[0]["lr"] = numbers["learning_rate"]
        for name, value in numbers["plateau"].items():
            setattr(self.plateau, name, value)
        self.epoch, self.step = numbers["epoch"], numbers["step"]
        self.loss_sum, self.words = numbers["loss_sum"], numbers["words"]
        self.best, self.bad_epochs = numbers["best"], numbers["bad_epochs"]
        self.rows = numbers["rows"]


def _batches(run: Run) -> Iterator[Batch]:
    """Yield what is left of the epoch."""
    order = epoch_order(run.config, run.prepared.photos, run.epoch)
    left = order[run.step * run.config.batch_size :]
    yield from DataLoader(run.prepared.train, batch_size=run.config.batch_size, sampler=left)


def train_one_epoch(run: Run, after_step: Callable[[], None] = lambda: None) -> float:
    """Train from ``run.step`` to the end of the epoch.

    Args:
        run: is changed.
        after_step: called after each step; may save, and may raise to stop.

    Returns:
        the epoch's mean cross-entropy a word, in nats, label smoothing included.
    """
    config, device = run.config, run.device
    run.model.train()
    total = config.epochs * run.steps_an_epoch
    bar = tqdm(
        _batches(run),
        total=run.steps_an_epoch,
        initial=run.step,
        desc=f"epoch {run.epoch + 1:02}",
        unit="step",
        leave=False,
    )
    for features, captions in bar:
        done = run.epoch * run.steps_an_epoch + run.step
        # Seeded a step, so that a resumed run draws the dropout that it would have drawn.
        torch.manual_seed(config.seed * 1_000_003 + done)
        if config.schedule == "cosine":
            run.optimizer.param_groups[0]["lr"] = learning_rate_at(done, total, config)
        captions = captions.to(device)
        targets = captions[:, :, 1:][captions[:, :, 1:] != PAD]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
            logits, _ = run.model(features.to(device).float(), captions)
        loss = cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        run.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.gradient_clip or math.inf)
        if not torch.isfinite(loss + norm):
            kept = run.folder / "checkpoint"
            raise TrainingError(
                f"the loss became {loss.item()} and its gradient {norm.item()} in epoch "
                f"{run.epoch + 1}: lower --learning-rate"
                + (f"; the best checkpoint so far is {kept}" if kept.exists() else "")
            )
        run.optimizer.step()
        if run.average is not None:
            run.average.update_parameters(run.model)
        run.step += 1
        run.loss_sum += loss.item() * len(targets)
        run.words += len(targets)
        bar.set_postfix(loss=f"{run.loss_sum / run.words:.3f}")
        after_step()
    return run.loss_sum / run.words


def _git_commit() -> str | None:
    """Return the commit that the code stands at, if it is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _write_config(config: TrainConfig, folder: Path) -> None:
    """Write the settings, versions and commit beside what comes of them."""
    packages = ("torch", "torchvision", "timm", "datasets", "gensim", "numpy", "sacrebleu")
    record = {
        "config": config.to_dict(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "git_commit": _git_commit(),
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=1))


class _Watch:
    """Saves every two minutes and, when asked to stop by SIGINT or SIGTERM, saves and stops."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._saved = time.monotonic()
        self._signum = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _Watch:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._handlers[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _ask(self, signum: int, _: object) -> None:
        self._signum = signum

    def after_step(self) -> None:
        """Save if it is time; stop if asked to."""
        if self._signum or time.monotonic() - self._saved > _SAVE_SECONDS:
            self._run.save()
            self._saved = time.monotonic()
        if self._signum:
            raise Stopped(
                f"stopped in epoch {self._run.epoch + 1}, all saved: go on with --resume",
                self._signum,
            )


def fit(
    config: TrainConfig, folder: Path, *, resume: bool = False, cache: Path = FEATURES_FOLDER
) -> dict[str, float]:
    """Train a decoder and keep the best epoch's checkpoint in ``folder / "checkpoint"``.

    Beside it: run.json (settings, versions, commit), metrics.csv, curves.png, tensorboard/, and
    state/, from which ``resume`` goes on.

    Returns:
        the figures of the best epoch.

    Raises:
        TrainingError: the folder is taken, the loss became NaN, or what is to be resumed does not
            fit the settings.
        Stopped: SIGINT or SIGTERM came; everything is saved.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file: choose another --out")
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise TrainingError(f"{folder} is not empty: choose another --out, or go on with --resume")
    if resume and folder.exists() and any(folder.iterdir()) and not (folder / _RECORD).exists():
        raise TrainingError(f"{folder} holds no run to resume: check --out")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            return _fit(config, folder, resume, cache)
    except filelock.Timeout as error:
        raise TrainingError(f"another process is training in {folder}") from error


def _fit(config: TrainConfig, folder: Path, resume: bool, cache: Path) -> dict[str, float]:
    """Do what ``fit`` says, alone in ``folder``."""
    if not (folder / _RECORD).exists():
        _write_config(config, folder)  # a run that is killed before its first save can be resumed
    prepared = prepare(config, cache)
    print(facts(prepared, config), flush=True)
    run = Run(config, prepared, folder)
    if resume:
        run.restore()
        _write_config(config, folder)
    free = config.select_by == "cider"
    options = dataclasses.replace(
        DecodingOptions() if free else DecodingOptions.report(), max_length=config.max_length
    )
    logbook = Logbook(folder, run.rows)
    with _Watch(run) as watch:
        while run.epoch < config.epochs and run.bad_epochs < config.patience:
            started = time.monotonic()
            train_loss = train_one_epoch(run, watch.after_step)
            learning_rate = run.optimizer.param_groups[0]["lr"]
            captions = write_captions(run.scored, prepared.validation, prepared.vocabulary, options)
            seconds = time.monotonic() - started
            row = {
                "epoch": run.epoch + 1,
                "train_loss": train_loss,
                "val_loss": cross_entropy_of(run.scored, prepared.validation),
                **score_captions(captions, prepared.references),
                "learning_rate": learning_rate,
                "seconds": seconds,
            }
            _finish_epoch(run, row)
            logbook.add(row)
            run.save()
            print(_line(row, run.bad_epochs), flush=True)
            if run.epoch < config.epochs:
                watch.after_step()
    logbook.close()
    if run.bad_epochs >= config.patience:
        print(f"no better epoch for {config.patience} epochs: stopped")
    return min(run.rows, key=lambda row: _badness(config, row))


def _badness(config: TrainConfig, row: dict[str, float]) -> float:
    """Return what the best epoch has least of."""
    return row["val_loss"] if config.select_by == "loss" else -row["CIDEr"]


def _finish_epoch(run: Run, row: dict[str, float]) -> None:
    """Keep the row and, if it is the best so far, the checkpoint; move on to the next epoch."""
    run.rows.append(row)
    if run.config.schedule == "plateau":
        run.plateau.step(row["val_loss"])
    badness = _badness(run.config, row)
    if badness < run.best:
        run.best, run.bad_epochs = badness, 0
        # Where the files lay on this machine is nobody else's business.
        data = Path(run.config.data)
        recipe = {
            **run.config.to_dict(),
            "data": data.resolve().name if data.exists() else str(data),
        }
        del recipe["encoder_weights"]
        checkpoints.save(
            run.folder / "checkpoint",
            checkpoints.Checkpoint(
                run.scored,
                run.prepared.vocabulary,
                run.config.max_length,
                run.prepared.encoder,
                recipe,
                {name: value for name, value in row.items() if name in _METRICS},
            ),
        )
    else:
        run.bad_epochs += 1
    run.epoch, run.step, run.loss_sum, run.words = run.epoch + 1, 0, 0.0, 0


def _line(row: dict[str, float], bad_epochs: int) -> str:
    """Return an epoch's line."""
    return (
        f"Epoch {row['epoch']:02} | train_loss={row['train_loss']:.4f} | "
        f"val_loss={row['val_loss']:.4f} | BLEU-4={row['BLEU-4']:.1f} | CIDEr={row['CIDEr']:.1f} | "
        f"lr={row['learning_rate']:.1e} | {row['seconds']:.0f} s"
        + ("" if bad_epochs else " | best so far")
    )
