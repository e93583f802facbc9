"""Search for captions over a step function: greedy, beam, sampling.

Ids in, ids out: knows no words, no photos and no model. Everything is batched, W hypotheses of
each of B photos side by side.
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

# (words (B, W), state, memory) -> logits (B, W, V), attention (B, W, P), next state. State is a
# named tuple of tensors (B, W, ...), memory one of tensors (B, ...).
Step: TypeAlias = Callable[[Tensor, Any, Any], tuple[Tensor, Tensor, Any]]

# What is banned loses to everything that is not; where all is banned, something still comes back.
_SUPPRESSED = -1e4
# What cannot be reached at all: the place of a beam that does not exist.
_UNREACHABLE = -1e8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a search may not write, in ids.

    Attributes:
        suppress: ids that are never written.
        not_before_eos: ids that never stand before ``<eos>``.
        no_repeat_word: whether the same id twice in a row is suppressed.
        no_repeat_trigram: whether repeating the same three ids is suppressed.
    """

    suppress: tuple[int, ...] = ()
    not_before_eos: tuple[int, ...] = ()
    no_repeat_word: bool = False
    no_repeat_trigram: bool = False


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A caption that a search came to.

    The numbers are the model's own, before any rule or temperature.

    Attributes:
        ids: the T ids written, the prefix included, ``<bos>`` not; ``<eos>`` last if it ended.
        log_probabilities: (T,) of each id.
        attention: (T, P) at each id; rows sum to 1.
        alternatives: (T, A) the likeliest ids at each place, best first.
        alternative_log_probabilities: (T, A).
        score: what the search ranked it by.
    """

    ids: list[int]
    log_probabilities: Tensor
    attention: Tensor
    alternatives: Tensor
    alternative_log_probabilities: Tensor
    score: float

    @property
    def log_probability(self) -> float:
        """Of the whole caption."""
        return float(self.log_probabilities.sum())


def penalties(history: Tensor, size: int, constraints: Constraints) -> Tensor:
    """Return (B, W, V): 0, or a large negative number for an id that ``constraints`` ban here.

    Args:
        history: the ids so far, (B, W, t), ``<bos>`` first.
        size: V.
        constraints: what is banned.
    """
    suppress, not_before_eos = _fixed_penalties(constraints, size, history.device)
    result = suppress.repeat(*history.shape[:2], 1)
    if constraints.no_repeat_word:
        result.scatter_(-1, history[..., -1:], _SUPPRESSED)
    if constraints.no_repeat_trigram and history.shape[-1] >= 3:
        trigrams = history.unfold(-1, 3, 1)  # (B, W, t - 2, 3)
        same = (trigrams[..., :2] == history[..., None, -2:]).all(dim=-1)
        result.scatter_add_(-1, trigrams[..., 2], same.float() * _SUPPRESSED)
    result[..., EOS] += not_before_eos[history[..., -1]]
    return result


@functools.lru_cache(maxsize=16)
def _fixed_penalties(
    constraints: Constraints, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (V,): what each id gets at any place, and what ``<eos>`` gets after each id."""
    suppress, not_before_eos = torch.zeros(2, size, device=device, dtype=torch.float32)
    suppress[list(constraints.suppress)] = _SUPPRESSED
    not_before_eos[list(constraints.not_before_eos)] = _SUPPRESSED
    return suppress, not_before_eos


class _BeamHistory:
    """What was written at each step, to walk back from a caption's end to its start.

    A step's records of looking (attention, alternatives) stand by the beam that was asked, those
    of writing (parents, ids, log_probabilities) by the beam that came of it.
    """

    def __init__(self) -> None:
        self.attention: list[Tensor] = []  # (B, W, P) a step
        self.alternatives: list[Tensor] = []  # (B, W, A)
        self.alternative_log_probabilities: list[Tensor] = []  # (B, W, A)
        self.parents: list[Tensor] = []  # (B, W)
        self.ids: list[Tensor] = []  # (B, W)
        self.log_probabilities: list[Tensor] = []  # (B, W)

    def look(self, attention: Tensor, log_probabilities: Tensor, alternatives: int) -> None:
        """Keep what the beams saw and thought of."""
        best = log_probabilities.topk(min(alternatives, log_probabilities.shape[-1]))
        self.attention.append(attention.cpu())
        self.alternatives.append(best.indices.cpu())
        self.alternative_log_probabilities.append(best.values.cpu())

    def write(self, parents: Tensor, ids: Tensor, log_probabilities: Tensor) -> None:
        """Keep what the beams that go on wrote."""
        self.parents.append(parents.cpu())
        self.ids.append(ids.cpu())
        self.log_probabilities.append(log_probabilities.cpu())

    def walk(
        self, rows: Sequence[int], parent: int, last: int, log_probability: float, score: float
    ) -> Hypothesis:
        """Collect the caption that ends with the id ``last``, written by the beam ``parent``.

        Args:
            rows: where the photo stood in the batch at each step, this one included.
            parent: the beam, as numbered before this step.
            last: the id that ends it.
            log_probability: of that id.
            score: to keep with it.
        """
        beams, ids, log_probabilities = [parent], [last], [log_probability]
        for step in range(len(rows) - 2, -1, -1):
            here = (rows[step], beams[-1])
            ids.append(int(self.ids[step][here]))
            log_probabilities.append(float(self.log_probabilities[step][here]))
            beams.append(int(self.parents[step][here]))
        places = list(enumerate(zip(rows, reversed(beams), strict=True)))

        def collect(records: list[Tensor]) -> Tensor:
            return torch.stack([records[step][place] for step, place in places])

        return Hypothesis(
            ids=ids[::-1],
            log_probabilities=torch.tensor(
                log_probabilities[::-1], dtype=torch.float32, device="cpu"
            ),
            attention=collect(self.attention),
            alternatives=collect(self.alternatives),
            alternative_log_probabilities=collect(self.alternative_log_probabilities),
            score=score,
        )


def _gather(values: Tensor, beams: Tensor) -> Tensor:
    """Reorder dim 1 of (B, W, ...) by ``beams`` (B, W)."""
    index = beams.reshape(*beams.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(*beams.shape, *values.shape[2:]))


def _map(function: Callable[[Tensor], Tensor], group: Any) -> Any:
    """Apply ``function`` to each tensor of a named tuple."""
    return type(group)(*map(function, group))


# (totals (B, W), scores (B, W, V)) -> parents, ids and new totals, (B, M) each, best first.
_Choose: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _search(
    step: Step,
    state: Any,
    memory: Any,
    choose: _Choose,
    *,
    width: int,
    max_steps: int,
    length_penalty: float,
    early_stopping: bool,
    prefix: Sequence[int],
    constraints: Constraints,
    alternatives: int,
) -> list[list[Hypothesis]]:
    """Write step by step what ``choose`` chooses, until every photo is done."""
    if len(prefix) >= max_steps and EOS not in prefix:
        raise ConfigError(f"a beginning of {len(prefix)} ids leaves no room in {max_steps}")
    photos = len(state[0])
    history = torch.full((photos, 1, 1), BOS, device=state[0].device)
    # Penalties included.
    totals = torch.zeros(photos, 1, device=state[0].device, dtype=torch.float32)
    trail = _BeamHistory()
    active = list(range(photos))  # the photo in each row of the batch
    rows: list[list[int]] = [[] for _ in range(photos)]  # its row at each step
    found: list[list[Hypothesis]] = [[] for _ in range(photos)]
    for length in range(1, max_steps + 1):
        logits, attention, state = step(history[..., -1], state, memory)
        log_probabilities = logits.float().log_softmax(dim=-1)  # (B, W, V)
        trail.look(attention, log_probabilities, alternatives)
        size = log_probabilities.shape[-1]
        if length <= len(prefix):
            ids = torch.full_like(history[..., -1], prefix[length - 1])
            parents = torch.zeros_like(ids)
            new_totals = totals + log_probabilities[..., prefix[length - 1]].clamp(min=_SUPPRESSED)
        else:
            # An impossible id counts as a banned one, so that something always comes back.
            scores = log_probabilities.clamp(min=_SUPPRESSED) + penalties(
                history, size, constraints
            )
            if (
                length == max_steps - 1 and constraints.not_before_eos
            ):  # the next id can only be <eos>
                scores[..., list(constraints.not_before_eos)] += _SUPPRESSED
            if length == max_steps:
                scores[..., torch.arange(size, device=scores.device) != EOS] = _UNREACHABLE
            parents, ids, new_totals = choose(totals, scores)
        written = log_probabilities.flatten(1).gather(1, parents * size + ids)
        ends = ids == EOS
        ranks = (ends & (new_totals > _UNREACHABLE / 2))[:, :width].nonzero().tolist()
        for row, photo in enumerate(active):
            rows[photo].append(row)
        for row, rank in ranks:
            photo = active[row]
            found[photo].append(
                trail.walk(
                    rows[photo],
                    int(parents[row, rank]),
                    EOS,
                    float(written[row, rank]),
                    float(new_totals[row, rank]) / length**length_penalty,
                )
            )
        totals, kept = new_totals.masked_fill(ends, _UNREACHABLE).topk(min(width, ids.shape[1]))
        parents, ids = parents.gather(1, kept), ids.gather(1, kept)
        trail.write(parents, ids, written.gather(1, kept))
        history = torch.cat([_gather(history, parents), ids[..., None]], dim=-1)
        state = _map(functools.partial(_gather, beams=parents), state)
        running = []
        for row, best in enumerate(totals[:, 0].tolist()):
            scores_found = sorted((each.score for each in found[active[row]]), reverse=True)
            full = early_stopping and len(scores_found) >= width
            if best > _UNREACHABLE / 2 and not (
                full and best / length**length_penalty <= scores_found[width - 1]
            ):
                running.append(row)
        if not running:
            break
        if len(running) < len(active):
            index = torch.tensor(running, device=history.device)
            active = [active[row] for row in running]
            history, totals = history[index], totals[index]
            state = _map(operator.itemgetter(index), state)
            memory = _map(operator.itemgetter(index), memory)
    return [sorted(some, key=lambda each: -each.score)[:width] for some in found]


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

    Of the 2 W best continuations those among the first W that end are set aside, and the W best
    others go on. A photo is done when W captions have ended and the best that still runs ranks
    behind them. What still runs at the last step ends there, with the probability that the model
    gives that, so something always comes back.

    Args:
        step: writes one id, see ``Step``.
        state: before the first step, a named tuple of tensors (B, 1, ...).
        memory: a named tuple of tensors (B, ...).
        beam_size: W.
        max_steps: ids at most, ``prefix`` and ``<eos>`` included.
        length_penalty: captions rank by log-probability / length ** length_penalty.
        prefix: ids that every caption begins with, exempt from the constraints; with ``<eos>`` last it is
            the whole caption.
        constraints: what is banned.
        alternatives: A, how many of the likeliest ids to keep at each place.

    Returns:
        for each photo 1 to W hypotheses, best first.
    """

    def choose(totals: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        joint = (totals[..., None] + scores).flatten(1)  # (B, W * V)
        best = joint.topk(min(2 * beam_size, joint.shape[1]))
        return best.indices // scores.shape[-1], best.indices % scores.shape[-1], best.values

    return _search(
        step,
        state,
        memory,
        choose,
        width=beam_size,
        max_steps=max(max_steps, 1),
        length_penalty=length_penalty,
        early_stopping=True,
        prefix=prefix,
        constraints=constraints or Constraints(),
        alternatives=alternatives,
    )


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
    """Draw ``samples`` captions of each photo, independently.

    Args:
        step: writes one id.
        state: before the first step.
        memory: of the photos.
        samples: W.
        temperature: above 0; logits are divided by it, so 0.1 is close to greedy.
        top_p: draw from the likeliest ids that together reach this probability (nucleus sampling,
            Holtzman et al. 2020).
        generator: of the random numbers, on the device of ``state``.
        max_steps: ids at most.
        length_penalty: how the captions are ranked.
        prefix: ids that every caption begins with.
        constraints: what is banned.
        alternatives: A.
    """

    def choose(totals: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = (scores / temperature).softmax(dim=-1)
        ordered = probabilities.sort(dim=-1, descending=True)
        outside = ordered.values.cumsum(dim=-1) - ordered.values >= top_p
        probabilities = probabilities.scatter(-1, ordered.indices, ordered.values * ~outside)
        if probabilities.shape[1] < samples:  # all draw from the one beam of the start
            probabilities = probabilities.expand(-1, samples, -1)
            parents = torch.zeros(probabilities.shape[:2], dtype=torch.long, device=scores.device)
        else:
            parents = torch.arange(samples, device=scores.device).expand(len(scores), -1)
        ids = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
        ids = ids.view(len(scores), samples)
        chosen = scores.flatten(1).gather(1, parents * scores.shape[-1] + ids)
        return parents, ids, totals.gather(1, parents) + chosen

    return _search(
        step,
        state,
        memory,
        choose,
        width=samples,
        max_steps=max(max_steps, 1),
        length_penalty=length_penalty,
        early_stopping=False,
        prefix=prefix,
        constraints=constraints or Constraints(),
        alternatives=alternatives,
    )


def decode(
    step: Step,
    state: Any,
    memory: Any,
    options: DecodingOptions,
    *,
    prefix: Sequence[int] = (),
    bad_endings: Sequence[int] = (),
) -> list[list[Hypothesis]]:
    """Search, or draw where ``options.temperature`` is above 0, as ``options`` say.

    Args:
        step: writes one id.
        state: before the first step.
        memory: of the photos.
        options: everything but words.
        prefix: the ids of ``options.prefix``.
        bad_endings: the ids that ``options.ban_bad_endings`` is about.
    """
    constraints = Constraints(
        suppress=(PAD, BOS, UNK) if options.ban_unknown else (PAD, BOS),
        not_before_eos=tuple(bad_endings) if options.ban_bad_endings else (),
        no_repeat_word=options.ban_repeats,
        no_repeat_trigram=options.ban_trigrams,
    )
    # <bos> is one of the ids that max_length counts.
    max_steps = options.max_length - 1
    shared: dict[str, Any] = {
        "max_steps": max_steps,
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
