"""Train on cached features: ``caption_loss``, ``train_one_epoch``, ``evaluate``, ``fit``.

The other loss is ``self_critical_loss``, in ``self_critical.py``.

Knows nothing of the app. A run can be killed at any moment: it resumes from its last save, with
the same result as without the interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm

from captioner.config import FEATURES_FOLDER, PAD, UNK, DecodingOptions, TrainConfig
from captioner.data.dataset import CaptionDataset
from captioner.data.shares import parse_sources
from captioner.distributed import DistributedContext, process_group
from captioner.environment import torch_defaults
from captioner.errors import CaptionerError, ConfigError, TrainingError
from captioner.files import atomic_write, locked_dir, recover_dir
from captioner.model import checkpoint as checkpoints
from captioner.model.encoder import choose_device
from captioner.model.words import detection_loss, photo_probability
from captioner.training.confidence import (
    MIN_PHOTOS,
    Reliability,
    are_right,
    cross_fitted,
    fit_weights,
    visual_words,
)
from captioner.training.evaluation import cross_entropy_of, write_captions
from captioner.training.logger import RECORD, MetricsLogger, write_record
from captioner.training.metrics import score_cleaned_captions
from captioner.training.self_critical import sample_captions, self_critical_loss
from captioner.training.setup import choose_precision, describe, prepare
from captioner.training.state import DETECTORS, REWARDS, TEXT, TrainingState

_SAVE_SECONDS = 120
# The name of an epoch's mean where it is not the cross-entropy.
_LOSS_NAMES = {DETECTORS: "detector_loss", REWARDS: "reward"}
# The metrics of its epoch that a checkpoint stores.
_METRICS = (
    *("epoch", "val_loss", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr", "ROUGE-L"),
    *("repetition", "distinct_words", "distinct_captions", "mean_length"),
)
# The metrics of each source, if there are several, as in "CIDEr flickr8k".
_SOURCE_METRICS = ("CIDEr", "BLEU-4", "val_loss")


class Stopped(TrainingError):
    """The run was interrupted by the signal ``signum``, and has saved its state."""

    def __init__(self, message: str, signum: int) -> None:
        """Keep ``signum`` for the exit code."""
        super().__init__(message)
        self.signum = signum


# The parts of a step


class Batch(NamedTuple):
    """This process's share of a batch.

    Attributes:
        indices: positions in the training set.
        features: (B, P, C).
        captions: ids (B, K, T).
        is_counted: False for the stand-in share of a process for which there are no photos left.
    """

    indices: list[int]
    features: Tensor
    captions: Tensor
    is_counted: bool


def learning_rate_at(step: int, num_steps: int, peak: float, warmup: float = 0.0) -> float:
    """Return the learning rate of the cosine schedule: linear warm-up, then half a cosine to zero.

    Args:
        step: completed steps.
        num_steps: of the whole schedule.
        peak: the rate after the warm-up.
        warmup: share of all steps, 0 to 1.
    """
    warmup *= num_steps
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))


def epoch_order(
    sizes: Sequence[int], counts: Sequence[int], views: int, *, seed: int, epoch: int
) -> list[int]:
    """Return the training indices of an epoch, each photo in a random one of its views.

    View v of photo i has the index ``v * num_photos + i``.

    Args:
        sizes: the number of photos of each source.
        counts: the number to take from each source; their sum is that of ``sizes``. All photos of
            a source are taken before one is taken again.
        views: the number of views.
        seed: of the run.
        epoch: completed epochs.
    """
    num_photos = sum(sizes)
    photos = []
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        own_order = np.random.default_rng((seed, epoch, source)).permutation(size)
        photos.append(sum(sizes[:source]) + np.resize(own_order, count))  # repeated or cut
    random = np.random.default_rng((seed, epoch))
    # Sorted, so that an epoch of each photo once is one permutation of them.
    order = np.sort(np.concatenate(photos))[random.permutation(num_photos)]
    if views > 1:
        order = order + num_photos * random.integers(0, views, num_photos)
    return order.tolist()


def _batches(state: TrainingState) -> Iterator[Batch]:
    """Yield this process's share of the rest of the epoch."""
    order = epoch_order(
        state.sizes, state.counts, state.views, seed=state.config.seed, epoch=state.epoch
    )
    size = state.batch_size
    batches = [order[at : at + size] for at in range(state.step * size, len(order), size)]
    rank, world_size = state.processes.rank, state.processes.world_size
    shares = [batch[rank::world_size] or batch[:1] for batch in batches]
    is_cuda = state.device.type == "cuda"
    loader = DataLoader(state.dataset, batch_sampler=shares, pin_memory=is_cuda)
    for batch, share, (features, captions) in zip(batches, shares, loader, strict=True):
        features = features.to(state.device, non_blocking=is_cuda).float()
        yield Batch(share, features, captions.to(state.device), len(batch) > rank)


def caption_loss(
    model: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    features: Tensor,
    captions: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, int]:
    """Return the mean cross-entropy per token, in nats, the attention, and the number of tokens.

    Args:
        model: the ``forward`` of a ``CaptionModel``.
        features: (B, P, C).
        captions: ids (B, K, T); padding is not counted.
        label_smoothing: 0 to 1.
    """
    logits, attention = model(features, captions)  # (N, V), one row per target; (B, K, T - 1, P)
    targets = captions[:, :, 1:][captions[:, :, 1:] != PAD]
    loss = cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
    return loss, attention, len(targets)


def attention_loss(attention: Tensor, logits: Tensor, captions: Tensor) -> Tensor:
    """Return how far the attention is from where the detectors see the words, mean per token.

    The cross-entropy between a word's detector, normalized over the cells, and the attention at
    that word, weighted by the detector's probability that the photo shows it at all (supervised
    attention, Liu et al. 2017).

    Args:
        attention: (B, K, T - 1, P).
        logits: (B, P, D), of the detectors; no gradient flows into them.
        captions: ids (B, K, T).
    """
    logits = logits.detach().float()
    targets = captions[:, :, 1:]
    indices = (targets - UNK - 1).flatten(1)  # (B, N), of the detectors
    has_detector = (indices >= 0) & (indices < logits.shape[-1])
    indices = indices.clamp(0, logits.shape[-1] - 1)
    certainty = photo_probability(logits).gather(1, indices) * has_detector
    shown = logits.sigmoid().transpose(1, 2)  # (B, D, P)
    shown = shown.gather(1, indices[..., None].expand(-1, -1, shown.shape[-1]))
    shown = shown / shown.sum(dim=-1, keepdim=True)
    distances = -(shown * attention.flatten(1, 2).clamp(min=1e-6).log()).sum(dim=-1)  # (B, N)
    return (certainty * distances).sum() / (targets != PAD).sum()


def words_shown(captions: Tensor, num_words: int) -> Tensor:
    """Return (B, D): 1 for each word with a detector in any caption (B, K, T), else 0."""
    counts = torch.zeros(len(captions), UNK + 1 + num_words, device=captions.device)
    is_detected = captions.flatten(1) <= UNK + num_words
    counts.scatter_(1, captions.flatten(1) * is_detected, 1.0)
    return counts[:, UNK + 1 :]


def _compute_loss(state: TrainingState, batch: Batch) -> tuple[Tensor, float, int]:
    """Return the loss, the sum of the reported loss over the tokens, and their number.

    For the detectors, the last two are over photos; in self-critical training they are the sum of
    the rewards and the number of captions.
    """
    config = state.config
    with state.autocast():
        if state.stage == DETECTORS:
            logits = state.ddp_model(batch.features)
            loss = detection_loss(logits, words_shown(batch.captions, logits.shape[-1]))
            return loss, loss.item() * len(batch.features), len(batch.features)
        if state.stage != REWARDS:
            loss, attention, num_tokens = caption_loss(
                state.ddp_model,
                batch.features,
                batch.captions,
                label_smoothing=config.label_smoothing,
            )
            loss_sum = loss.item() * num_tokens
            loss = loss + _weighted_attention_loss(state, batch.features, attention, batch.captions)
            return loss, loss_sum, num_tokens
        assert state.reward is not None
        temperature = config.reward_temperature
        captions = sample_captions(
            state.model,
            batch.features,
            samples=config.reward_samples,
            temperature=temperature,
            max_length=config.max_length,
        )
        rewards = state.reward(batch.indices, captions)
        loss, attention = self_critical_loss(
            state.ddp_model, batch.features, captions, rewards, temperature=temperature
        )
        loss = loss + _weighted_attention_loss(state, batch.features, attention, captions)
    return loss, rewards.sum().item(), rewards.numel()


def _weighted_attention_loss(
    state: TrainingState, features: Tensor, attention: Tensor, captions: Tensor
) -> Tensor | float:
    """Return the attention's part of the loss; captions without photos have none."""
    weight = state.config.attention_weight
    if not weight or not state.model.config.num_detectors or state.stage == TEXT:
        return 0.0
    return weight * attention_loss(attention, state.model.detectors(features), captions)


def _set_learning_rate(state: TrainingState) -> None:
    """Set the learning rate of the next step; the plateau schedule sets its own."""
    config, num_steps = state.config, state.num_epochs * state.steps_per_epoch
    if state.stage == REWARDS:
        rate = learning_rate_at(state.stage_step, num_steps, config.reward_learning_rate)
    elif config.schedule == "cosine" or state.stage in (DETECTORS, TEXT):
        rate = learning_rate_at(state.stage_step, num_steps, config.learning_rate, config.warmup)
    else:
        return
    state.optimizer.param_groups[0]["lr"] = rate


def _check_finite(state: TrainingState, loss: Tensor, norm: Tensor) -> None:
    """Raise ``TrainingError`` if the loss or its gradient is infinite or NaN."""
    if torch.isfinite(loss + norm):
        return
    checkpoint = state.folder / "checkpoint"
    raise TrainingError(
        f"the loss became {loss.item()} and its gradient {norm.item()} in epoch "
        f"{state.epoch + 1}: lower --learning-rate"
        + (f"; the best checkpoint so far is {checkpoint}" if checkpoint.exists() else "")
    )


# Epochs


def train_one_epoch(state: TrainingState, after_step: Callable[[], None] = lambda: None) -> float:
    """Train from ``state.step`` to the end of the epoch.

    Args:
        state: updated in place.
        after_step: called after each step; may save, and may raise to stop.

    Returns:
        the epoch's mean cross-entropy per token, in nats, label smoothing included; the detectors'
        mean loss per photo; or, in self-critical training, the mean reward of a sampled caption.
    """
    config, processes = state.config, state.processes
    use_rewards = state.stage == REWARDS
    state.model.train(not use_rewards)  # captions are sampled without dropout
    bar = tqdm(
        _batches(state),
        total=state.steps_per_epoch,
        initial=state.step,
        desc=f"epoch {state.epoch + 1:02}",
        unit="step",
        leave=False,
        disable=not processes.is_main,
    )
    for batch in bar:
        # Seeded per step, so that a resumed run has the same dropout; each process has its own.
        torch.manual_seed(config.seed * 1_000_003 + state.stage_step + (processes.rank << 40))
        _set_learning_rate(state)
        state.optimizer.zero_grad()
        loss, loss_sum, num_tokens = _compute_loss(state, batch)
        if not batch.is_counted:
            loss_sum, num_tokens = 0.0, 0
        loss_sum, all_tokens = processes.all_reduce_sum(loss_sum, num_tokens)
        # DDP averages the gradients of the processes; this makes it the mean over all tokens.
        (loss * (num_tokens * processes.world_size / all_tokens)).backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clip or math.inf)
        _check_finite(state, loss, norm)
        state.optimizer.step()
        if state.average is not None:
            state.average.update_parameters(state.model)
        state.step += 1
        state.loss_sum += loss_sum
        state.num_tokens += int(all_tokens)
        name = _LOSS_NAMES.get(state.stage, "loss")
        bar.set_postfix({name: f"{state.loss_sum / state.num_tokens:.3f}"})
        after_step()
    return state.loss_sum / state.num_tokens


def evaluate(state: TrainingState) -> dict[str, float]:
    """Return the validation loss and the scores of the captions that the model writes now.

    They are means over the sources; of several sources, each one's own scores follow.
    """
    config, data = state.config, state.data
    if state.stage == DETECTORS:
        losses = (detection_loss_of(state, source.validation) for source in data.sources)
        return {"val_detector_loss": statistics.mean(losses)}
    # Runs selected by validation loss are scored with the original report's decoding.
    by_cider = config.select_by == "cider"
    options = DecodingOptions() if by_cider else DecodingOptions.plain_greedy()
    options = dataclasses.replace(options, max_length=config.max_length)
    by_source = {}
    for source in data.sources:
        captions, _ = write_captions(
            state.eval_model, source.validation, data.vocabulary, options, config.language
        )
        by_source[source.name] = {
            "val_loss": cross_entropy_of(state.eval_model, source.validation),
            **score_cleaned_captions(captions, source.references),
        }
    names = next(iter(by_source.values()))
    row = {name: statistics.mean(scores[name] for scores in by_source.values()) for name in names}
    if len(by_source) > 1:
        for source_name, scores in by_source.items():
            row |= {f"{name} {source_name}": scores[name] for name in _SOURCE_METRICS}
    return row


@torch.inference_mode()
def detection_loss_of(state: TrainingState, dataset: CaptionDataset) -> float:
    """Return the detectors' loss on a dataset, mean over its photos."""
    detectors = state.eval_model.detectors
    loss_sum = 0.0
    for features, captions in DataLoader(dataset, batch_size=64):
        logits = detectors(features.to(state.device).float())
        is_shown = words_shown(captions.to(state.device), logits.shape[-1])
        loss_sum += detection_loss(logits, is_shown).item() * len(features)
    return loss_sum / len(dataset)


def selection_loss(config: TrainConfig, row: dict[str, float]) -> float:
    """Return the metric by which the best epoch is selected; lower is better.

    An epoch of the detectors has no captions, and is never the best.
    """
    if "CIDEr" not in row:
        return math.inf
    return row["val_loss"] if config.select_by == "loss" else -row["CIDEr"]


def save_best(state: TrainingState) -> None:
    """Save the checkpoint of the last completed epoch."""
    # Without paths of this machine.
    recipe = state.config.to_dict()
    recipe["data"] = [source.portable for source in parse_sources(state.config.data)]
    if recipe["text"] is not None and Path(recipe["text"]).exists():
        recipe["text"] = Path(recipe["text"]).resolve().name
    del recipe["encoder_weights"]
    state.set_mean_features()
    checkpoints.save(
        state.folder / "checkpoint",
        checkpoints.Checkpoint(
            state.eval_model,
            state.data.vocabulary,
            state.config.max_length,
            state.data.encoder,
            recipe,
            {
                name: value
                for name, value in state.rows[-1].items()
                if name.split(" ", 1)[0] in _METRICS
            },
        ),
    )


def save_confidence(state: TrainingState) -> None:
    """Fit the confidence of the best checkpoint on all validation photos, unless it has one.

    Prints and plots how well confidences fitted on four fifths of the photos predict the rest.
    """
    folder = state.folder / "checkpoint"
    best = checkpoints.load(folder)
    if best.confidence is not None:  # the run was finished before
        return
    options = DecodingOptions(max_length=best.max_length)
    visual = visual_words(best.model.config, best.vocabulary)
    model = best.model.to(state.device)
    features_by_source, right_by_source = [], []
    for source in state.data.sources:
        captions, features = write_captions(
            model, source.validation, best.vocabulary, options, state.config.language
        )
        features_by_source.append(features)
        right_by_source.append(are_right(captions, source.references, visual))
    features, right = torch.cat(features_by_source), torch.cat(right_by_source)
    if len(right) < MIN_PHOTOS:
        print(
            f"confidence   not calibrated: {len(right)} validation photos, {MIN_PHOTOS} are needed",
            flush=True,
        )
        return
    reliability = Reliability.of(cross_fitted(features, right), right)
    atomic_write(state.folder / "reliability.png", reliability.plot())
    checkpoints.save(folder, dataclasses.replace(best, confidence=fit_weights(features, right)))
    print(reliability, flush=True)


class _SaveOnSignal:
    """Saves every two minutes; on SIGINT or SIGTERM saves and stops."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._saved = time.monotonic()
        self._signum = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _SaveOnSignal:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._handlers[signum] = signal.signal(signum, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _record(self, signum: int, _: object) -> None:
        self._signum = signum

    def after_step(self) -> None:
        """Save if it is time; stop if any process received a signal, all after the same step."""
        (is_stopping,) = self._state.processes.all_reduce_sum(self._signum)
        if is_stopping or time.monotonic() - self._saved > _SAVE_SECONDS:
            self._state.save()
            self._saved = time.monotonic()
        if is_stopping:
            self._state.processes.barrier()  # torchrun ends all processes when one has ended
            raise Stopped(
                f"stopped in epoch {self._state.epoch + 1}, all saved: continue with --resume",
                self._signum or signal.SIGTERM,
            )


# The run


@torch_defaults()
def fit(
    config: TrainConfig, folder: Path, *, resume: bool = False, cache: Path = FEATURES_FOLDER
) -> dict[str, float]:
    """Train a decoder and keep the best epoch's checkpoint in ``folder / "checkpoint"``.

    Beside it: run.json (settings, versions, commit, metrics), metrics.csv, curves.png,
    reliability.png, tensorboard/, and state/, from which ``resume`` continues, on any number of
    processes. Several processes, started by torchrun, share the photos of each batch. All of them
    need access to ``folder`` and ``cache``; on several machines the features must already be
    cached.

    Returns:
        the metrics of the best epoch.

    Raises:
        ConfigError: the folder is not empty, the run to resume has other settings, the device does
            not exist, or there are more processes than GPUs.
        TrainingError: the loss became NaN, or the run to resume is damaged.
        WriteError: the folder cannot be written.
        Stopped: interrupted by SIGINT or SIGTERM; everything is saved.
    """
    with process_group(choose_device(config.device)) as processes, contextlib.ExitStack() as stack:
        if processes.is_main:
            _check_folder(folder, resume)
            stack.enter_context(locked_dir(folder))
            for name in ("state", "checkpoint"):
                recover_dir(folder / name)
        bfloat16, reason = choose_precision(config, processes)
        precision = "bfloat16" if bfloat16 else "float32"
        _print(processes, f"precision    {precision} ({reason})")

        def record(rows: Sequence[dict[str, float]]) -> None:
            if processes.is_main:
                write_record(folder, config, rows, processes.world_size, precision)

        is_new = not (folder / RECORD).exists()
        if is_new:
            record([])  # a run that is killed before its first save can be resumed
        processes.barrier()  # until the folder is locked
        try:
            data = prepare(config, cache, processes)
        except CaptionerError:
            if is_new and processes.is_main:  # so that the corrected command can use the folder
                (folder / RECORD).unlink()
            raise
        _print(processes, describe(data, config))
        state = TrainingState(config, data, folder, processes, bfloat16=bfloat16)
        if resume:
            state.restore()
            processes.barrier()  # until all have read the files that the main process replaces
            record(state.rows)
        _train(state, record)
        best = min(state.rows, key=lambda row: selection_loss(config, row))
        if processes.is_main:
            save_confidence(state)
            checkpoint = folder / "checkpoint"
            _print(
                processes,
                f"checkpoint   {checkpoint}, of epoch {best['epoch']}: python app.py --checkpoint "
                f"{shlex.quote(str(checkpoint))}",
            )
    return best


def _train(state: TrainingState, record: Callable[[Sequence[dict[str, float]]], None]) -> None:
    """Train until the last stage ends, recording each epoch."""
    config, processes = state.config, state.processes
    logger = MetricsLogger(state.folder, state.rows) if processes.is_main else None
    with _SaveOnSignal(state) as saver:
        while state.should_continue() or state.advance_stage():
            started = time.monotonic()
            loss_name = _LOSS_NAMES.get(state.stage, "train_loss")
            mean = train_one_epoch(state, saver.after_step)
            row = {
                "epoch": state.epoch + 1,
                loss_name: mean,
                **processes.broadcast(evaluate(state) if processes.is_main else None),
                "learning_rate": state.optimizer.param_groups[0]["lr"],
                "seconds": time.monotonic() - started,
            }
            is_best = state.finish_epoch(row, selection_loss(config, row))
            if is_best and processes.is_main:
                save_best(state)
            if logger is not None:
                logger.add(row)
            record(state.rows)
            state.save()
            _print(processes, _epoch_line(row, loss_name, is_best))
            saver.after_step()
    if state.bad_epochs >= config.patience:
        _print(processes, f"no better epoch for {config.patience} epochs: stopped")


def _check_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder that is not empty, or, to resume, one without a run."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: choose another --out")
    # Hidden files: a lock, or left by a kill at the very start.
    is_used = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
    if is_used and not resume:
        raise ConfigError(f"{folder} is not empty: choose another --out, or continue with --resume")
    if is_used and not (folder / RECORD).exists():
        raise ConfigError(f"{folder} holds no run to resume: check --out")


def _print(processes: DistributedContext, text: str) -> None:
    """Print from the main process alone."""
    if processes.is_main:
        print(text, flush=True)


def _epoch_line(row: dict[str, float], loss_name: str, is_best: bool) -> str:
    """Return the line that is printed after an epoch."""
    end = f" | lr={row['learning_rate']:.1e} | {row['seconds']:.0f} s"
    start = f"Epoch {row['epoch']:02} | {loss_name}={row[loss_name]:.4f}"
    if "CIDEr" not in row:
        return f"{start} | val_detector_loss={row['val_detector_loss']:.4f}{end}"
    by_source = ", ".join(
        f"{name.removeprefix('CIDEr ')} {value:.1f}"
        for name, value in row.items()
        if name.startswith("CIDEr ")
    )
    return (
        f"{start} | "
        f"val_loss={row['val_loss']:.4f} | BLEU-4={row['BLEU-4']:.1f} | CIDEr={row['CIDEr']:.1f}"
        + (f" ({by_source})" if by_source else "")
        + end
        + (" | best so far" if is_best else "")
    )
