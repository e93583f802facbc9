"""A training run: all that changes while it goes on, its stages, and its way to disk and back.

Knows no loop and no loss. Captions are read (cross-entropy), after captions without photos where
there are any, and then, where the settings ask for it, written and rewarded (self-critical
training).
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import linear
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

log = logging.getLogger(__name__)

# The stages of a run.
TEXT, CAPTIONS, REWARDS = "text", "captions", "rewards"


# Below this bfloat16 is not worth its rounding.
_MIN_SPEEDUP = 1.2


@functools.cache
def bfloat16_speedup(device: torch.device) -> float:
    """Return how many times as fast this machine multiplies matrices in bfloat16 as in float32.

    Processors without bfloat16 instructions emulate them, up to 200 times slower, and no flag of
    torch's says so for all of them: one small product is timed instead. A GPU is asked, since a
    product this small measures only how fast it is launched; the answer is 0 or infinity.
    """
    if device.type == "cuda":
        return math.inf if torch.cuda.is_bf16_supported(including_emulation=False) else 0.0
    if device.type != "cpu":
        return 0.0
    inputs = torch.rand(256, 512, generator=torch.Generator().manual_seed(0))
    best = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    end = time.perf_counter() + 0.2
    for turn in range(20):
        if turn > 1 and time.perf_counter() > end:
            break
        for dtype in best:  # in turns: a busy moment slows both
            x = inputs.to(dtype)
            started = time.perf_counter()
            linear(x, x)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.float32] / best[torch.bfloat16]


def choose_precision(config: TrainConfig, processes: DistributedContext) -> tuple[bool, str]:
    """Return whether to train in bfloat16, and why, in a few words.

    Several processes train alike: in bfloat16 only if each of them is faster with it.
    """
    speedup = bfloat16_speedup(choose_device(config.device))
    (slower,) = processes.all_reduce_sum(speedup < _MIN_SPEEDUP)
    why = "this machine is not faster in bfloat16" if slower else "faster than float32 here"
    if config.bfloat16 == "auto":
        return not slower, why
    if config.bfloat16 and slower:
        log.warning("bfloat16 is slow on this machine: leave bfloat16 at auto")
    return bool(config.bfloat16), "as set"


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

    def __init__(
        self,
        config: TrainConfig,
        prepared: TrainingData,
        folder: Path,
        processes: DistributedContext | None = None,
        *,
        bfloat16: bool = False,
    ) -> None:
        """Start with seeded random weights; every one of ``processes`` has the same ones.

        With ``bfloat16`` matrix products are computed in it; the weights stay float32.
        """
        self.config, self.prepared, self.folder = config, prepared, folder
        self.processes = processes or DistributedContext()
        self.device = choose_device(config.device)
        self.bfloat16 = bfloat16
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
        # What reads captions: gradients come to ``model`` as means over the processes.
        self.reader = self.processes.wrap_ddp(FusedForward(self.model))
        self.reward: Reward | None = None
        self.begin(CAPTIONS if prepared.text is None else TEXT, 0)
        # Where the run stands: epochs done, steps done in this one, its summed loss (or reward)
        # and over how many words (or captions).
        self.epoch, self.step, self.summed, self.count = 0, 0, 0.0, 0
        self.best, self.bad_epochs = math.inf, 0
        self.rows: list[dict[str, float]] = []

    def begin(self, stage: str, epoch: int) -> None:
        """Start a stage on the weights as they are; ``epoch`` is its first."""
        config, prepared = self.config, self.prepared
        self.stage, self.stage_from = stage, epoch
        self.dataset, self.photos, self.views = prepared.train, prepared.photos, config.views
        self.batch_size = config.batch_size
        rate, decay = config.learning_rate, config.weight_decay
        if stage == TEXT:
            assert prepared.text is not None
            self.dataset, self.photos, self.views = prepared.text, len(prepared.text), 1
        if stage == REWARDS:
            self.reward = Reward(prepared.train_references, prepared.vocabulary)
            self.batch_size = config.reward_batch_size
            rate, decay = config.reward_learning_rate, 0.0
        self.stage_epochs = {
            TEXT: config.text_epochs,
            CAPTIONS: config.epochs,
            REWARDS: config.reward_epochs,
        }[stage]
        self.steps_an_epoch = math.ceil(self.photos / self.batch_size)
        self.average = (
            AveragedModel(self.model, multi_avg_fn=_ema(config.ema_decay))
            if config.ema_decay
            else None
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=decay)
        self.plateau = ReduceLROnPlateau(self.optimizer, factor=0.1, patience=1)

    def goes_on(self) -> bool:
        """Say whether there is another epoch; after the last of a stage turn to the next one."""
        left = self.epoch < self.stage_from + self.stage_epochs
        if left and (self.bad_epochs < self.config.patience or self.stage == TEXT):
            return True
        if self.stage == TEXT:
            self.model.load_state_dict(self.scored.state_dict())
            self.begin(CAPTIONS, self.epoch)
        elif self.stage == CAPTIONS and self.config.reward_epochs:
            # On from the best epoch, which is not always the last.
            best = checkpoints.load(self.folder / "checkpoint").model
            self.model.load_state_dict(best.state_dict())
            self.begin(REWARDS, self.epoch)
        else:
            return False
        self.bad_epochs = 0
        self.save()
        return True

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
        """Write everything that going on needs; the files are replaced in one step.

        All processes hold the same, and the first one writes it.

        Raises:
            WriteError: the disk is full, say; the last save stays.
        """
        if not self.processes.is_main:
            return
        # clone: tied weights would share memory, which safetensors refuses.
        tensors = {name: value.detach().cpu().clone() for name, value in self._tensors().items()}
        numbers = {
            "epoch": self.epoch,
            "step": self.step,
            "summed": self.summed,
            "count": self.count,
            "best": self.best,
            "bad_epochs": self.bad_epochs,
            "stage": self.stage,
            "stage_from": self.stage_from,
            "rows": self.rows,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "plateau": {
                name: getattr(self.plateau, name)
                for name in ("best", "num_bad_epochs", "last_epoch", "cooldown_counter")
            },
            "config": self.config.to_dict(),
            "vocabulary": self.prepared.vocabulary.idx2word,
            "sources": self.prepared.sources,
        }
        with atomic_dir(self.folder / "state") as state:
            (state / "state.safetensors").write_bytes(save(tensors))
            (state / "state.json").write_text(json.dumps(numbers))

    def restore(self) -> None:
        """Go back to the last save; without one, stay at the start."""
        state = self.folder / "state"
        if not state.exists():
            return
        try:
            numbers = json.loads((state / "state.json").read_text())
            tensors = load_file(state / "state.safetensors")  # what it is loaded into moves it
            kept = numbers["config"]
        except Exception as error:
            raise TrainingError(f"{state} is damaged ({error}): start again without it") from error
        ours = self.config.to_dict()
        # Another device is the same run, and so are the same files in another place. The tag of
        # the language is no part of training.
        free = ("device", "data", "text", "encoder_weights", "language")
        changed = [name for name in ours if kept.get(name) != ours[name] and name not in free]
        if changed == ["epochs"] and self.config.schedule == "plateau":
            changed = []
        if changed:
            raise ConfigError(
                f"{self.folder} was started with other settings ({', '.join(changed)}): resume "
                "with the same ones, or choose another --out"
            )
        same_words = numbers["vocabulary"] == self.prepared.vocabulary.idx2word
        # The sources go by the photos, the encoder, its weights and the text.
        if not same_words or numbers["sources"] != self.prepared.sources:
            raise ConfigError(
                f"{self.folder} was started on other photos, captions or encoder weights: give the "
                "same ones, or choose another --out"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }

        if numbers["stage"] != self.stage:
            self.begin(numbers["stage"], numbers["stage_from"])
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
        self.summed, self.count = numbers["summed"], numbers["count"]
        self.best, self.bad_epochs = numbers["best"], numbers["bad_epochs"]
        self.rows = numbers["rows"]
