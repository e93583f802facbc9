"""Search for captions over a step function: greedy, beam search, sampling.

Ids in, ids out: knows nothing of words, photos or models. Everything is batched: W hypotheses of
each of B photos, side by side. ``beam_search`` and ``sample`` differ only in how they choose the
next ids; ``_Search`` is the loop that both run.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from captioner.config import BOS, EOS, PAD, UNK, DecodingOptions
from captioner.errors import ConfigError

# (token_ids (B, W), state, memory) -> logits (B, W, V), attention (B, W, P), next state. State is a
# named tuple of tensors (B, W, ...), memory one of tensors (B, ...).
Step: TypeAlias = Callable[[Tensor, Any, Any], tuple[Tensor, Tensor, Any]]
# (totals (B, W), scores (B, W, V)) -> parents, ids and new totals, (B, M) each, best first.
_Choose: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

# Added to the score of a suppressed id. It loses to every id that is allowed; if all are
# suppressed, the search still returns a caption.
_SUPPRESSED = -1e4
# The score of a beam that does not exist. A total below half of it cannot be reached.
_UNREACHABLE = -1e8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a search must not write.

    Attributes:
        suppress: ids that are never written.
        not_before_eos: ids that never precede ``<eos>``.
        no_repeat_word: whether to suppress the same id twice in a row.
        may_double: ids that ``no_repeat_word`` suppresses only three times in a row.
        no_repeat_trigram: whether to suppress three ids that were written before in this order.
    """

    suppress: tuple[int, ...] = ()
    not_before_eos: tuple[int, ...] = ()
    no_repeat_word: bool = False
    may_double: tuple[int, ...] = ()
    no_repeat_trigram: bool = False


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A finished caption.

    All numbers but ``score`` are the model's own, before constraints and temperature.

    Attributes:
        ids: the T ids written, from the prefix to ``<eos>``, without ``<bos>``.
        log_probabilities: (T,) of each id.
        attention: (T, P) at each id; rows sum to 1.
        alternatives: (T, A) the likeliest ids at each step, best first.
        alternative_log_probabilities: (T, A).
        score: the number that the search ranked it by.
    """

    ids: list[int]
    log_probabilities: Tensor
    attention: Tensor
    alternatives: Tensor
    alternative_log_probabilities: Tensor
    score: float

    @property
    def log_probability(self) -> float:
        """Log-probability of the whole caption."""
        return float(self.log_probabilities.sum())


@torch.inference_mode()
def beam_search(
    step: Step,
    state: Any,
    memory: Any,
    *,
    beam_size: int = 3,
    max_steps: int = 19,
    length_penalty: float = 0.5,
    prefix: Sequence[int] = (),
    constraints: Constraints | None = None,
    alternatives: int = 5,
) -> list[list[Hypothesis]]:
    """Find the best captions of each photo; ``beam_size`` 1 is greedy.

    At each step the 2 W best continuations are considered. Those among the first W that end are
    finished captions; the W best others continue. A photo is done when W captions are finished and
    none that still runs outranks them. At the last step every caption ends, with the probability
    that the model gives to ``<eos>`` there.

    Args:
        step: see ``Step``.
        state: before the first step, a named tuple of tensors (B, 1, ...).
        memory: a named tuple of tensors (B, ...).
        beam_size: W.
        max_steps: maximum number of ids, ``prefix`` and ``<eos>`` included.
        length_penalty: captions rank by log-probability / length ** length_penalty.
        prefix: the first ids of every caption, exempt from the constraints. If ``<eos>`` is last,
            the prefix is the whole caption.
        constraints: none by default.
        alternatives: A, how many of the likeliest ids to record at each step.

    Returns:
        1 to W hypotheses per photo, best first.

    Raises:
        ConfigError: the prefix leaves no room for ``<eos>``.
    """

    def choose(totals: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        joint = (totals[..., None] + scores).flatten(1)  # (B, W * V)
        best = joint.topk(min(2 * beam_size, joint.shape[1]))
        return best.indices // scores.shape[-1], best.indices % scores.shape[-1], best.values

    search = _Search(
        step,
        choose,
        width=beam_size,
        max_steps=max_steps,
        length_penalty=length_penalty,
        early_stopping=True,
        prefix=prefix,
        constraints=constraints or Constraints(),
        alternatives=alternatives,
    )
    return search.run(state, memory)


@torch.inference_mode()
def sample(
    step: Step,
    state: Any,
    memory: Any,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    max_steps: int = 19,
    length_penalty: float = 0.5,
    prefix: Sequence[int] = (),
    constraints: Constraints | None = None,
    alternatives: int = 5,
) -> list[list[Hypothesis]]:
    """Sample ``samples`` captions of each photo, independently.

    See ``beam_search`` for details of the shared arguments.

    Args:
        step: see ``Step``.
        state: before the first step.
        memory: of the photos.
        samples: W.
        temperature: divides the logits; above 0. 0.1 is close to greedy.
        top_p: sample from the likeliest ids that together reach this probability (nucleus sampling,
            Holtzman et al. 2020).
        generator: random generator on the device of ``state``.
        max_steps: maximum number of ids.
        length_penalty: ranks the samples.
        prefix: the first ids of every caption.
        constraints: none by default.
        alternatives: A.
    """

    def choose(totals: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = (scores / temperature).softmax(dim=-1)
        ordered = probabilities.sort(dim=-1, descending=True)
        outside = ordered.values.cumsum(dim=-1) - ordered.values >= top_p
        probabilities = probabilities.scatter(-1, ordered.indices, ordered.values * ~outside)
        if probabilities.shape[1] < samples:  # all samples continue the single beam of the start
            probabilities = probabilities.expand(-1, samples, -1)
            parents = torch.zeros(probabilities.shape[:2], dtype=torch.long, device=scores.device)
        else:
            parents = torch.arange(samples, device=scores.device).expand(len(scores), -1)
        ids = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
        ids = ids.view(len(scores), samples)
        sampled = scores.flatten(1).gather(1, parents * scores.shape[-1] + ids)
        return parents, ids, totals.gather(1, parents) + sampled

    search = _Search(
        step,
        choose,
        width=samples,
        max_steps=max_steps,
        length_penalty=length_penalty,
        early_stopping=False,
        prefix=prefix,
        constraints=constraints or Constraints(),
        alternatives=alternatives,
    )
    return search.run(state, memory)


def decode(
    step: Step,
    state: Any,
    memory: Any,
    options: DecodingOptions,
    *,
    prefix: Sequence[int] = (),
    bad_endings: Sequence[int] = (),
    may_double: Sequence[int] = (),
) -> list[list[Hypothesis]]:
    """Run ``sample`` if ``options.temperature`` is above 0, else ``beam_search``.

    Args:
        step: see ``Step``.
        state: before the first step.
        memory: of the photos.
        options: all settings that need no vocabulary.
        prefix: the ids of ``options.prefix``.
        bad_endings: the ids that ``options.ban_bad_endings`` bans before ``<eos>``.
        may_double: the ids that ``options.ban_repeats`` lets occur twice in a row, but not three
            times, as in Chinese 人人 and Japanese いい.
    """
    constraints = Constraints(
        suppress=(PAD, BOS, UNK) if options.ban_unknown else (PAD, BOS),
        not_before_eos=tuple(bad_endings) if options.ban_bad_endings else (),
        no_repeat_word=options.ban_repeats,
        may_double=tuple(may_double),
        no_repeat_trigram=options.ban_trigrams,
    )
    shared: dict[str, Any] = {
        "max_steps": options.max_length - 1,  # max_length includes <bos>
        "length_penalty": options.length_penalty,
        "prefix": prefix,
        "constraints": constraints,
    }
    if options.temperature > 0:
        generator = torch.Generator(device=state[0].device).manual_seed(options.seed)
        return sample(
            step,
            state,
            memory,
            samples=options.samples,
            temperature=options.temperature,
            top_p=options.top_p,
            generator=generator,
            **shared,
        )
    return beam_search(step, state, memory, beam_size=options.beam_size, **shared)


# The loop


@dataclasses.dataclass
class _Batch:
    """The beams of the photos that are not done yet.

    Attributes:
        photos: the photo in each row of the batch.
        history: (B, W, t), the ids so far, ``<bos>`` first.
        totals: (B, W), log-probabilities of the captions so far, penalties included.
        state: of the step function, a named tuple of tensors (B, W, ...).
        memory: of the step function, a named tuple of tensors (B, ...).
    """

    photos: list[int]
    history: Tensor
    totals: Tensor
    state: Any
    memory: Any

    def select_rows(self, rows: list[int]) -> None:
        """Keep only these rows."""
        index = torch.tensor(rows, device=self.history.device)
        self.photos = [self.photos[row] for row in rows]
        self.history, self.totals = self.history[index], self.totals[index]
        self.state = _map(operator.itemgetter(index), self.state)
        self.memory = _map(operator.itemgetter(index), self.memory)


@dataclasses.dataclass(frozen=True)
class _Search:
    """The loop of ``beam_search`` and ``sample``; see there for the attributes."""

    step: Step
    choose: _Choose
    _: dataclasses.KW_ONLY
    width: int
    max_steps: int
    length_penalty: float
    early_stopping: bool
    prefix: Sequence[int]
    constraints: Constraints
    alternatives: int

    def run(self, state: Any, memory: Any) -> list[list[Hypothesis]]:
        """Write id after id until every photo is done."""
        max_steps = max(self.max_steps, 1)
        if len(self.prefix) >= max_steps and EOS not in self.prefix:
            raise ConfigError(
                f"a prefix of {len(self.prefix)} ids leaves no room; the limit is {max_steps - 1}"
            )
        num_photos, device = len(state[0]), state[0].device
        batch = _Batch(
            photos=list(range(num_photos)),
            history=torch.full((num_photos, 1, 1), BOS, device=device),
            totals=torch.zeros(num_photos, 1, device=device, dtype=torch.float32),
            state=state,
            memory=memory,
        )
        beam_history = _BeamHistory(num_photos)
        finished: list[list[Hypothesis]] = [[] for _ in range(num_photos)]
        for length in range(1, max_steps + 1):
            logits, attention, batch.state = self.step(
                batch.history[..., -1], batch.state, batch.memory
            )
            log_probabilities = logits.float().log_softmax(dim=-1)  # (B, W, V)
            beam_history.record_scores(
                batch.photos, attention, log_probabilities, self.alternatives
            )
            self._extend(batch, log_probabilities, length, beam_history, finished)
            running = self._running_rows(batch, length, finished)
            if not running:
                break
            if len(running) < len(batch.photos):
                batch.select_rows(running)
        return [sorted(found, key=lambda beam: -beam.score)[: self.width] for found in finished]

    def _extend(
        self,
        batch: _Batch,
        log_probabilities: Tensor,
        length: int,
        beam_history: _BeamHistory,
        finished: list[list[Hypothesis]],
    ) -> None:
        """Write one more id: captions that end go to ``finished``, the best others continue."""
        size = log_probabilities.shape[-1]
        if length <= len(self.prefix):
            token_id = self.prefix[length - 1]
            ids = torch.full_like(batch.history[..., -1], token_id)
            parents = torch.zeros_like(ids)
            totals = batch.totals + log_probabilities[..., token_id].clamp(min=_SUPPRESSED)
        else:
            scores = self._constrained_scores(batch.history, log_probabilities, length)
            parents, ids, totals = self.choose(batch.totals, scores)
        chosen_log_probabilities = log_probabilities.flatten(1).gather(1, parents * size + ids)
        is_end = ids == EOS
        reachable_ends = is_end & (totals > _UNREACHABLE / 2)
        for row, rank in reachable_ends[:, : self.width].nonzero().tolist():
            hypothesis = beam_history.backtrack(
                batch.photos[row],
                int(parents[row, rank]),
                EOS,
                float(chosen_log_probabilities[row, rank]),
                float(totals[row, rank]) / length**self.length_penalty,
            )
            finished[batch.photos[row]].append(hypothesis)
        width = min(self.width, ids.shape[1])
        batch.totals, best = totals.masked_fill(is_end, _UNREACHABLE).topk(width)
        parents, ids = parents.gather(1, best), ids.gather(1, best)
        beam_history.record_choice(parents, ids, chosen_log_probabilities.gather(1, best))
        batch.history = torch.cat([_gather(batch.history, parents), ids[..., None]], dim=-1)
        batch.state = _map(functools.partial(_gather, beams=parents), batch.state)

    def _constrained_scores(
        self, history: Tensor, log_probabilities: Tensor, length: int
    ) -> Tensor:
        """Return scores (B, W, V) of all ids, with the constraints applied."""
        # Treat ids of probability 0 as suppressed, so that the search always returns a caption.
        size = log_probabilities.shape[-1]
        scores = log_probabilities.clamp(min=_SUPPRESSED)
        scores = scores + penalties(history, size, self.constraints)
        if length == self.max_steps - 1 and self.constraints.not_before_eos:
            # The next id can only be <eos>.
            scores[..., list(self.constraints.not_before_eos)] += _SUPPRESSED
        if length >= self.max_steps:
            scores[..., torch.arange(size, device=scores.device) != EOS] = _UNREACHABLE
        return scores

    def _running_rows(
        self, batch: _Batch, length: int, finished: list[list[Hypothesis]]
    ) -> list[int]:
        """Return the rows whose best unfinished caption can still enter the result."""
        running = []
        for row, best in enumerate(batch.totals[:, 0].tolist()):
            found = finished[batch.photos[row]]
            scores = sorted((beam.score for beam in found), reverse=True)
            is_done = best <= _UNREACHABLE / 2 or (
                self.early_stopping
                and len(scores) >= self.width
                and best / length**self.length_penalty <= scores[self.width - 1]
            )
            if not is_done:
                running.append(row)
        return running


def penalties(history: Tensor, size: int, constraints: Constraints) -> Tensor:
    """Return (B, W, V): 0, or a large negative number where ``constraints`` suppress an id.

    Args:
        history: the ids so far, (B, W, t), ``<bos>`` first.
        size: V.
        constraints: the search's constraints.
    """
    suppress, not_before_eos, may_double = _fixed_penalties(constraints, size, history.device)
    result = suppress.repeat(*history.shape[:2], 1)
    if constraints.no_repeat_word:
        last = history[..., -1:]
        is_double = history[..., -2:-1] == last if history.shape[-1] > 1 else last == BOS
        penalty = (is_double | ~may_double[last]).float() * _SUPPRESSED
        result.scatter_add_(-1, last, penalty)
    if constraints.no_repeat_trigram and history.shape[-1] >= 3:
        trigrams = history.unfold(-1, 3, 1)  # (B, W, t - 2, 3)
        begins_alike = (trigrams[..., :2] == history[..., None, -2:]).all(dim=-1)
        result.scatter_add_(-1, trigrams[..., 2], begins_alike.float() * _SUPPRESSED)
    result[..., EOS] += not_before_eos[history[..., -1]]
    return result


@functools.lru_cache(maxsize=16)
def _fixed_penalties(
    constraints: Constraints, size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors (V,).

    Returns:
        the penalty of each id, that of ``<eos>`` after each id, and whether an id may be doubled.
    """
    suppress, not_before_eos = torch.zeros(2, size, device=device, dtype=torch.float32)
    suppress[list(constraints.suppress)] = _SUPPRESSED
    not_before_eos[list(constraints.not_before_eos)] = _SUPPRESSED
    may_double = torch.zeros(size, device=device, dtype=torch.bool)
    may_double[list(constraints.may_double)] = True
    return suppress, not_before_eos, may_double


class _BeamHistory:
    """What happened at each step, to follow a caption from its end back to its start.

    Attention and alternatives are stored by the beam that was extended; parents, ids and
    log-probabilities by the beam that resulted.
    """

    def __init__(self, num_photos: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(num_photos)]  # in the batch of each step
        self._attention: list[Tensor] = []  # (B, W, P) per step
        self._alternatives: list[Tensor] = []  # (B, W, A)
        self._alternative_log_probabilities: list[Tensor] = []  # (B, W, A)
        self._parents: list[Tensor] = []  # (B, W)
        self._ids: list[Tensor] = []  # (B, W)
        self._log_probabilities: list[Tensor] = []  # (B, W)

    def record_scores(
        self, photos: list[int], attention: Tensor, log_probabilities: Tensor, alternatives: int
    ) -> None:
        """Record attention and likeliest ids of the beams; ``photos`` is the photo of each row."""
        for row, photo in enumerate(photos):
            self._rows[photo].append(row)
        best = log_probabilities.topk(min(alternatives, log_probabilities.shape[-1]))
        self._attention.append(attention.cpu())
        self._alternatives.append(best.indices.cpu())
        self._alternative_log_probabilities.append(best.values.cpu())

    def record_choice(self, parents: Tensor, ids: Tensor, log_probabilities: Tensor) -> None:
        """Record how the beams continue."""
        self._parents.append(parents.cpu())
        self._ids.append(ids.cpu())
        self._log_probabilities.append(log_probabilities.cpu())

    def backtrack(
        self, photo: int, parent: int, last_id: int, log_probability: float, score: float
    ) -> Hypothesis:
        """Return the caption that ends with ``last_id`` after the beam ``parent``.

        Args:
            photo: index of the photo.
            parent: the beam, as numbered before this step.
            last_id: the id that ends it.
            log_probability: of that id.
            score: of the caption.
        """
        rows = self._rows[photo]
        beams, ids, log_probabilities = [parent], [last_id], [log_probability]
        for step in range(len(rows) - 2, -1, -1):
            index = (rows[step], beams[-1])
            ids.append(int(self._ids[step][index]))
            log_probabilities.append(float(self._log_probabilities[step][index]))
            beams.append(int(self._parents[step][index]))
        indices = list(zip(rows, reversed(beams), strict=True))

        def collect(records: list[Tensor]) -> Tensor:
            return torch.stack([records[step][index] for step, index in enumerate(indices)])

        return Hypothesis(
            ids=ids[::-1],
            log_probabilities=torch.tensor(
                log_probabilities[::-1], dtype=torch.float32, device="cpu"
            ),
            attention=collect(self._attention),
            alternatives=collect(self._alternatives),
            alternative_log_probabilities=collect(self._alternative_log_probabilities),
            score=score,
        )


def _gather(values: Tensor, beams: Tensor) -> Tensor:
    """Reorder dim 1 of (B, W, ...) by ``beams`` (B, W)."""
    index = beams.reshape(*beams.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(*beams.shape, *values.shape[2:]))


def _map(function: Callable[[Tensor], Tensor], group: Any) -> Any:
    """Apply ``function`` to each tensor of a named tuple."""
    return type(group)(*map(function, group))
