"""Training the decoder on cached features: ``train_one_epoch`` and ``fit``.

Knows nothing of the app. A run can be killed at any moment: it goes on from its last save, and
comes to what it would have come to without the stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm

from captioner.config import FEATURES_FOLDER, PAD, DecodingOptions, TrainConfig
from captioner.distributed import DistributedContext, process_group
from captioner.environment import torch_defaults
from captioner.errors import ConfigError, TrainingError
from captioner.files import locked_dir, recover_dir
from captioner.model import checkpoint as checkpoints
from captioner.model.encoder import choose_device
from captioner.training import self_critical
from captioner.training.evaluation import cross_entropy_of, write_captions
from captioner.training.logger import RECORD, MetricsLogger, write_record
from captioner.training.metrics import score_captions
from captioner.training.setup import Batch, facts, prepare
from captioner.training.state import CAPTIONS, REWARDS, TEXT, Run, choose_precision

_SAVE_SECONDS = 120
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


def learning_rate_at(step: int, total: int, highest: float, warmup: float = 0.0) -> float:
    """Return the cosine schedule's rate: a linear warm-up, then half a cosine to zero.

    Args:
        step: steps done.
        total: steps in all.
        highest: the rate after the warm-up.
        warmup: share of all steps.
    """
    warmup *= total
    if step < warmup:
        return highest * min(1.0, (step + 1) / warmup)
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def epoch_order(photos: int, views: int, *, seed: int, epoch: int) -> list[int]:
    """Return the order in which an epoch goes through a training set.

    Each photo once, in one of its views (``photos`` places apart).
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(photos)
    if views > 1:
        order = order + photos * random.integers(0, views, photos)
    return order.tolist()


def _batches(run: Run) -> Iterator[tuple[list[int], bool, Batch]]:
    """Yield this process's share of what is left of the epoch.

    Numbers in the training set, whether they count, and what is there. Where there are fewer
    photos than processes, a share is a photo that does not count.
    """
    order = epoch_order(run.photos, run.views, seed=run.config.seed, epoch=run.epoch)
    left = order[run.step * run.batch_size :]
    batches = [left[at : at + run.batch_size] for at in range(0, len(left), run.batch_size)]
    rank, count = run.processes.rank, run.processes.world_size
    shares = [batch[rank::count] or batch[:1] for batch in batches]
    loader = DataLoader(run.dataset, batch_sampler=shares, pin_memory=run.device.type == "cuda")
    counts = [len(batch) > rank for batch in batches]
    yield from zip(shares, counts, loader, strict=True)


def _read(run: Run, features: Tensor, captions: Tensor) -> tuple[Tensor, float, int]:
    """Return the cross-entropy of captions, its sum over their words, and the words."""
    config = run.config
    targets = captions[:, :, 1:][captions[:, :, 1:] != PAD]
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bfloat16):
        logits, _ = run.reader(features, captions)
    loss = cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
    return loss, loss.item() * len(targets), len(targets)


def _write(run: Run, features: Tensor, numbers: list[int]) -> tuple[Tensor, float, int]:
    """Return the self-critical loss of drawn captions, their summed reward, and how many."""
    assert run.reward is not None
    config = run.config
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bfloat16):
        captions = self_critical.draw(
            run.model,
            features,
            samples=config.reward_samples,
            temperature=config.reward_temperature,
            max_length=config.max_length,
        )
        rewards = run.reward(numbers, captions)
        loss = self_critical.loss(
            run.reader, features, captions, rewards, temperature=config.reward_temperature
        )
    return loss, rewards.sum().item(), rewards.numel()


def train_one_epoch(run: Run, after_step: Callable[[], None] = lambda: None) -> float:
    """Train from ``run.step`` to the end of the epoch.

    Args:
        run: is changed.
        after_step: called after each step; may save, and may raise to stop.

    Returns:
        the epoch's mean cross-entropy a word, in nats, label smoothing included; in self-critical
        training the mean reward of a drawn caption.
    """
    config, device = run.config, run.device
    rewarded = run.stage == REWARDS
    run.model.train(not rewarded)  # what is drawn is what would be written: without dropout
    total = run.stage_epochs * run.steps_an_epoch
    name = "reward" if rewarded else "loss"
    bar = tqdm(
        _batches(run),
        total=run.steps_an_epoch,
        initial=run.step,
        desc=f"epoch {run.epoch + 1:02}",
        unit="step",
        leave=False,
        disable=not run.processes.is_main,
    )
    for numbers, counts, (features, captions) in bar:
        done = (run.epoch - run.stage_from) * run.steps_an_epoch + run.step
        # Seeded a step, so that a resumed run draws the dropout that it would have drawn; each
        # process its own.
        torch.manual_seed(config.seed * 1_000_003 + done + (run.processes.rank << 40))
        features = features.to(device, non_blocking=device.type == "cuda").float()
        if rewarded:
            rate = learning_rate_at(done, total, config.reward_learning_rate)
            run.optimizer.param_groups[0]["lr"] = rate
            loss, summed, count = _write(run, features, numbers)
        else:
            if config.schedule == "cosine" or run.stage == TEXT:
                rate = learning_rate_at(done, total, config.learning_rate, config.warmup)
                run.optimizer.param_groups[0]["lr"] = rate
            loss, summed, count = _read(run, features, captions.to(device))
        own = count if counts else 0
        summed, total_count = run.processes.all_reduce_sum(summed if counts else 0.0, own)
        run.optimizer.zero_grad()
        # The mean over all words (or captions) from the mean of the processes' gradients.
        (loss * (own * run.processes.world_size / total_count)).backward()  # type: ignore[no-untyped-call]
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
        run.summed += summed
        run.count += int(total_count)
        bar.set_postfix({name: f"{run.summed / run.count:.3f}"})
        after_step()
    return run.summed / run.count


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
        """Save if it is time; stop if this process or another was asked to, all at one step."""
        (asked,) = self._run.processes.all_reduce_sum(self._signum)
        if asked or time.monotonic() - self._saved > _SAVE_SECONDS:
            self._run.save()
            self._saved = time.monotonic()
        if asked:
            self._run.processes.barrier()  # torchrun ends all when one has ended
            raise Stopped(
                f"stopped in epoch {self._run.epoch + 1}, all saved: go on with --resume",
                self._signum or signal.SIGTERM,
            )


@torch_defaults()
def fit(
    config: TrainConfig, folder: Path, *, resume: bool = False, cache: Path = FEATURES_FOLDER
) -> dict[str, float]:
    """Train a decoder and keep the best epoch's checkpoint in ``folder / "checkpoint"``.

    Beside it: run.json (settings, versions, commit, figures), metrics.csv, curves.png,
    tensorboard/, and state/, from which ``resume`` goes on, on any number of processes. Where
    torchrun started several they share the photos of each batch; all of them need to see
    ``folder`` and ``cache``, and on several machines the features need to be there already.

    Returns:
        the figures of the best epoch.

    Raises:
        ConfigError: the folder is taken, what is to be resumed does not fit the settings, there
            is no such device, or there are more processes than GPUs.
        TrainingError: the loss became NaN, or what is to be resumed is damaged.
        WriteError: the folder cannot be written.
        Stopped: SIGINT or SIGTERM came; everything is saved.
    """
    with process_group(choose_device(config.device)) as processes, contextlib.ExitStack() as stack:
        if processes.is_main:
            _check(folder, resume)
            stack.enter_context(locked_dir(folder))
            for name in ("state", "checkpoint"):
                recover_dir(folder / name)
        return _load_state_dict(config, folder, resume, cache, processes)


def _check(folder: Path, resume: bool) -> None:
    """Refuse a folder that is taken, or is not what ``resume`` expects."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: choose another --out")
    # Hidden: a lock, or what a kill at the very start left.
    taken = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
    if taken and not resume:
        raise ConfigError(f"{folder} is not empty: choose another --out, or go on with --resume")
    if taken and not (folder / RECORD).exists():
        raise ConfigError(f"{folder} holds no run to resume: check --out")


def _load_state_dict(
    config: TrainConfig, folder: Path, resume: bool, cache: Path, processes: DistributedContext
) -> dict[str, float]:
    """Do what ``fit`` says, alone in ``folder`` or one of ``processes``."""

    def say(text: str) -> None:
        if processes.is_main:
            print(text, flush=True)

    bfloat16, why = choose_precision(config, processes)
    precision = "bfloat16" if bfloat16 else "float32"

    def record(rows: Sequence[dict[str, float]]) -> None:
        if processes.is_main:
            write_record(folder, config, rows, processes.world_size, precision)

    say(f"precision    {precision} ({why})")

    if not (folder / RECORD).exists():
        # A run that is killed before its first save can be resumed.
        record([])
    processes.barrier()  # until the folder is claimed
    prepared = prepare(config, cache, processes)
    say(facts(prepared, config))
    run = Run(config, prepared, folder, processes, bfloat16=bfloat16)
    if resume:
        run.restore()
        processes.barrier()  # until all have read what the first one will replace
        record(run.rows)
    free = config.select_by == "cider"
    options = dataclasses.replace(
        DecodingOptions() if free else DecodingOptions.plain_greedy(), max_length=config.max_length
    )
    logbook = MetricsLogger(folder, run.rows) if processes.is_main else None

    def score() -> dict[str, float]:
        """Return what an epoch's row says of the captions that are written now."""
        captions = write_captions(run.scored, prepared.validation, prepared.vocabulary, options)
        return {
            "val_loss": cross_entropy_of(run.scored, prepared.validation),
            **score_captions(captions, prepared.references),
        }

    with _Watch(run) as watch:
        while run.goes_on():
            started = time.monotonic()
            figure = "reward" if run.stage == REWARDS else "train_loss"
            trained = train_one_epoch(run, watch.after_step)
            learning_rate = run.optimizer.param_groups[0]["lr"]
            scores = processes.broadcast(score() if processes.is_main else None)
            row = {
                "epoch": run.epoch + 1,
                figure: trained,
                **scores,
                "learning_rate": learning_rate,
                "seconds": time.monotonic() - started,
            }
            _finish_epoch(run, row)
            if logbook is not None:
                logbook.add(row)
            record(run.rows)
            run.save()
            say(_line(row, run.bad_epochs))
            watch.after_step()
    if run.bad_epochs >= config.patience:
        say(f"no better epoch for {config.patience} epochs: stopped")
    return min(run.rows, key=lambda row: _badness(config, row))


def _badness(config: TrainConfig, row: dict[str, float]) -> float:
    """Return what the best epoch has least of."""
    return row["val_loss"] if config.select_by == "loss" else -row["CIDEr"]


def _finish_epoch(run: Run, row: dict[str, float]) -> None:
    """Keep the row and, if it is the best so far, the checkpoint; move on to the next epoch."""
    run.rows.append(row)
    if run.config.schedule == "plateau" and run.stage == CAPTIONS:
        run.plateau.step(row["val_loss"])
    badness = _badness(run.config, row)
    if badness < run.best:
        run.best, run.bad_epochs = badness, 0
        if run.processes.is_main:
            _keep(run, row)
    else:
        run.bad_epochs += 1
    run.epoch, run.step, run.summed, run.count = run.epoch + 1, 0, 0.0, 0


def _keep(run: Run, row: dict[str, float]) -> None:
    """Write the checkpoint of an epoch."""
    # Where the files lay on this machine is nobody else's business.
    recipe = run.config.to_dict()
    for name in ("data", "text"):
        if recipe[name] is not None and Path(recipe[name]).exists():
            recipe[name] = Path(recipe[name]).resolve().name
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


def _line(row: dict[str, float], bad_epochs: int) -> str:
    """Return an epoch's line."""
    name = "train_loss" if "train_loss" in row else "reward"
    return (
        f"Epoch {row['epoch']:02} | {name}={row[name]:.4f} | "
        f"val_loss={row['val_loss']:.4f} | BLEU-4={row['BLEU-4']:.1f} | CIDEr={row['CIDEr']:.1f} | "
        f"lr={row['learning_rate']:.1e} | {row['seconds']:.0f} s"
        + ("" if bad_epochs else " | best so far")
    )
