"""What changes while training, and its way to disk and back.

A run has up to four stages: word detectors, captions without photos, captions of photos (both
cross-entropy), and self-critical training on rewards. Knows nothing of the loop and its losses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from captioner.config import TrainConfig
from captioner.distributed import DistributedContext
from captioner.errors import ConfigError, TrainingError
from captioner.files import atomic_dir
from captioner.model import checkpoint as checkpoints
from captioner.model.decoder import CaptionModel
from captioner.model.encoder import choose_device
from captioner.model.fast import FusedForward
from captioner.training.self_critical import Reward
from captioner.training.setup import TrainingData

# The stages of a run.
DETECTORS, TEXT, CAPTIONS, REWARDS = "detectors", "text", "captions", "rewards"

# Fields saved as they are.
_PROGRESS = (
    *("epoch", "step", "loss_sum", "num_tokens", "best_loss", "bad_epochs"),
    *("stage", "first_epoch", "rows"),
)
# Settings that may change on resume: the same photos and captions may be in another place, under
# other columns.
_FREE_SETTINGS = ("device", "data", "image_column", "caption_column", "text", "encoder_weights")


class TrainingState:
    """Everything that changes while training.

    Attributes:
        model: the weights that are trained.
        ddp_model: computes the model's forward pass; gradients are means over the processes.
        average: the moving average of the weights, or None.
        stage: DETECTORS, TEXT, CAPTIONS or REWARDS; ``first_epoch`` is its first epoch.
        sizes: the number of photos of each source; an epoch takes ``counts`` of them.
        epoch: completed epochs.
        step: completed steps of the current epoch.
        loss_sum: sum of the epoch's losses (or rewards) so far.
        num_tokens: number of tokens (or captions) in ``loss_sum``.
        best_loss: the lowest ``selection_loss`` so far; ``bad_epochs`` have passed since.
        rows: the metrics of each completed epoch.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        folder: Path,
        processes: DistributedContext | None = None,
        *,
        bfloat16: bool = False,
    ) -> None:
        """Start with seeded random weights, the same in each of ``processes``.

        With ``bfloat16`` matrix products are computed in it; the weights stay float32.
        """
        self.config, self.data, self.folder = config, data, folder
        self.processes = processes or DistributedContext()
        self.device = choose_device(config.device)
        self.bfloat16 = bfloat16
        torch.manual_seed(config.seed)
        self.model = CaptionModel(config.model_config(**data.model))
        with torch.no_grad():
            if data.embedding is not None:
                self.model.embedding.weight.copy_(data.embedding)
            self.model.attn.Wh.weight *= config.attention_gain
            self.model.attn.v.weight *= config.attention_gain
            if data.classifier is not None:
                self.model.pointer.classifier.load_state_dict(data.classifier.state_dict())
        self.model.to(self.device)
        self.reward: Reward | None = None
        self.epoch, self.step, self.loss_sum, self.num_tokens = 0, 0, 0.0, 0
        self.best_loss, self.bad_epochs = math.inf, 0
        self.rows: list[dict[str, float]] = []
        self.begin_stage(DETECTORS if data.model["num_detectors"] else self._after_detectors)

    def begin_stage(self, stage: str) -> None:
        """Start a stage from the current weights, with a new optimizer and average."""
        config, data = self.config, self.data
        self.stage, self.first_epoch, self.bad_epochs = stage, self.epoch, 0
        self.dataset, self.views = data.train, config.views
        self.sizes = [source.num_photos for source in data.sources]
        self.counts = [source.per_epoch for source in data.sources]
        self.batch_size, self.num_epochs = config.batch_size, config.epochs
        rate, decay = config.learning_rate, config.weight_decay
        if stage == DETECTORS:
            self.num_epochs = config.detector_epochs
        elif stage == TEXT:
            assert data.text is not None
            self.dataset, self.views = data.text, 1
            self.sizes = self.counts = [len(data.text)]
            self.num_epochs = config.text_epochs
        elif stage == REWARDS:
            self.reward = Reward(data.train_references, data.vocabulary)
            self.batch_size, self.num_epochs = config.reward_batch_size, config.reward_epochs
            rate, decay = config.reward_learning_rate, 0.0
        self.steps_per_epoch = math.ceil(sum(self.counts) / self.batch_size)
        self.average = (
            AveragedModel(self.model, multi_avg_fn=_moving_average(config.ema_decay))
            if config.ema_decay
            else None
        )
        # Gradients that the last stage left would count as part of the next one's norm.
        self.model.zero_grad()
        for name, parameter in self.model.named_parameters():
            is_detector = name.startswith("detectors.")
            is_frozen = name.startswith("pointer.classifier.")
            parameter.requires_grad = is_detector == (stage == DETECTORS) and not is_frozen
        learning = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=decay)
        self.ddp_model = self.processes.wrap_ddp(
            self.model.detectors if stage == DETECTORS else FusedForward(self.model)
        )
        self.plateau = ReduceLROnPlateau(self.optimizer, factor=0.1, patience=1)

    @property
    def _after_detectors(self) -> str:
        """The stage that follows the detectors."""
        return CAPTIONS if self.data.text is None else TEXT

    @torch.no_grad()
    def _mean_over_photos(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the mean (N,) of a function of cells, (1, P, C) -> (1, P, N), on a sample."""
        num_photos = sum(source.num_photos for source in self.data.sources)
        sample = range(0, num_photos, max(1, num_photos // 1000))
        values = [
            function(self.data.train[index][0][None].to(self.device).float()).mean(dim=(0, 1))
            for index in sample
        ]
        return torch.stack(values).mean(dim=0)

    def _set_mean_logits(self) -> None:
        """Measure what the detectors see on average."""
        detectors = self.model.detectors
        detectors.mean_logits.copy_(self._mean_over_photos(detectors))

    def set_mean_features(self) -> None:
        """Measure what the evaluated model remembers of a cell on average."""
        model = self.eval_model
        is_training = model.training
        model.eval()  # no dropout
        model.mean_features.copy_(
            self._mean_over_photos(lambda cells: model.remember(cells).features)
        )
        model.train(is_training)

    @property
    def stage_step(self) -> int:
        """Completed steps of the stage."""
        return (self.epoch - self.first_epoch) * self.steps_per_epoch + self.step

    @property
    def eval_model(self) -> CaptionModel:
        """The weights that are evaluated and saved: the average, if there is one."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]

    def autocast(self) -> torch.autocast:
        """Return the context in which losses are computed."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def should_continue(self) -> bool:
        """Return whether the stage has another epoch."""
        is_patient = self.stage in (DETECTORS, TEXT) or self.bad_epochs < self.config.patience
        return is_patient and self.epoch < self.first_epoch + self.num_epochs

    def advance_stage(self) -> bool:
        """Begin the next stage; return False if there is none."""
        if self.stage == DETECTORS:
            self.model.load_state_dict(self.eval_model.state_dict())
            self._set_mean_logits()
            self.begin_stage(self._after_detectors)
        elif self.stage == TEXT:
            self.model.load_state_dict(self.eval_model.state_dict())
            self.begin_stage(CAPTIONS)
        elif self.stage == CAPTIONS and self.config.reward_epochs:
            # The best epoch is not always the last one.
            best = checkpoints.load(self.folder / "checkpoint").model
            self.model.load_state_dict(best.state_dict())
            self.begin_stage(REWARDS)
        else:
            return False
        self.save()
        return True

    def finish_epoch(self, row: dict[str, float], loss: float) -> bool:
        """Add an epoch's row; return whether its selection loss is the lowest so far."""
        self.rows.append(row)
        if self.config.schedule == "plateau" and self.stage == CAPTIONS:
            self.plateau.step(row["val_loss"])
        is_best = loss < self.best_loss
        self.best_loss = min(loss, self.best_loss)
        self.bad_epochs = 0 if is_best else self.bad_epochs + 1
        self.epoch, self.step, self.loss_sum, self.num_tokens = self.epoch + 1, 0, 0.0, 0
        return is_best

    def save(self) -> None:
        """Write everything needed to resume; the files are replaced in one step.

        The state is the same in all processes; the main one writes it.

        Raises:
            WriteError: the disk is full, for example; the last save stays.
        """
        if not self.processes.is_main:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            average = self.average.state_dict()
            tensors |= {f"average.{name}": value for name, value in average.items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
        # clone: tied weights would share memory, which safetensors refuses.
        tensors = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        values = {
            **{name: getattr(self, name) for name in _PROGRESS},
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "plateau": self.plateau.state_dict(),
            "config": self.config.to_dict(),
            "vocabulary": self.data.vocabulary.idx2word,
            "sources": self.data.fingerprint,
        }
        with atomic_dir(self.folder / "state") as folder:
            (folder / "state.safetensors").write_bytes(save(tensors))
            (folder / "state.json").write_text(json.dumps(values))

    def restore(self) -> None:
        """Return to the last save; without one, stay at the start."""
        folder = self.folder / "state"
        if not folder.exists():
            return
        try:
            values = json.loads((folder / "state.json").read_text())
            tensors = load_file(folder / "state.safetensors")
            self._check_same_run(values)
        except ConfigError:
            raise
        except Exception as error:
            raise TrainingError(f"{folder} is damaged ({error}): start again without it") from error
        if values["stage"] != self.stage:
            self.begin_stage(values["stage"])
        for name in _PROGRESS:
            setattr(self, name, values[name])
        self.model.load_state_dict(_with_prefix(tensors, "model."))
        if self.average is not None:
            self.average.load_state_dict(_with_prefix(tensors, "average."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _with_prefix(tensors, "optimizer.").items():
            number, field = name.split(".", 1)
            moments.setdefault(int(number), {})[field] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.optimizer.param_groups[0]["lr"] = values["learning_rate"]
        self.plateau.load_state_dict(values["plateau"])

    def _check_same_run(self, values: dict[str, Any]) -> None:
        """Refuse to resume with other settings or data."""
        settings, saved = json.loads(json.dumps(self.config.to_dict())), values["config"]
        changed = [
            name
            for name, value in settings.items()
            if saved.get(name) != value and name not in _FREE_SETTINGS
        ]
        if changed == ["epochs"] and self.config.schedule == "plateau":
            changed = []
        if changed:
            raise ConfigError(
                f"{self.folder} was started with other settings ({', '.join(changed)}): resume "
                "with the same ones, or choose another --out"
            )
        own = self.data.vocabulary.idx2word, self.data.fingerprint
        if (values["vocabulary"], values["sources"]) != own:
            raise ConfigError(
                f"{self.folder} was started on other photos, shares, captions or encoder weights: "
                "give the same ones, or choose another --out"
            )


def _moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return an exponential moving average for ``AveragedModel``.

    Its memory grows with the steps up to ``decay``, so that the random start is soon forgotten.
    """

    @torch.no_grad()
    def update(averages: list[Tensor], currents: list[Tensor], steps: Tensor | int) -> None:
        current_decay = min(decay, (1 + int(steps)) / (10 + int(steps)))
        for average, current in zip(averages, currents, strict=True):
            average.lerp_(current, 1 - current_decay)

    return update


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix``, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
