"""The search over probability tables, compared with every possible caption."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captioner.config import BOS, EOS, PAD, UNK, DecodingOptions
from captioner.errors import ConfigError
from captioner.model.search import Constraints, Hypothesis, beam_search, decode, sample

CELLS = 5
NO_CONSTRAINTS = Constraints()
ALL_CONSTRAINTS = Constraints(
    suppress=(PAD, BOS, UNK), not_before_eos=(4,), no_repeat_word=True, no_repeat_trigram=True
)


class CodedHistory(NamedTuple):
    """The state: the ids read so far, as one number (B, W)."""

    code: Tensor


class Tables(NamedTuple):
    """The memory: a row for beam number, logits (B, N, V) and attention (B, N, P)."""

    logits: Tensor
    attention: Tensor


class World:
    """A made-up model whose probabilities depend on all earlier ids.

    The search gets ``step``; ``log_probabilities`` and ``attention`` read the same tables in plain
    Python.
    """

    def __init__(self, photos: int = 1, *, size: int = 6, seed: int = 0, rows: int = 1499) -> None:
        """Draw tables for V = ``size`` ids and ``rows`` different histories."""
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.tables = Tables(
            2 * torch.randn(photos, rows, size, generator=generator),
            torch.rand(photos, rows, CELLS, generator=generator).softmax(dim=-1),
        )

    @classmethod
    def constant(cls, *probabilities: Sequence[float]) -> World:
        """Give each photo the same probabilities at every step."""
        world = cls(len(probabilities), size=len(probabilities[0]), rows=1)
        world.tables = world.tables._replace(logits=torch.tensor(probabilities)[:, None].log())
        return world

    def scaled(self, scale: float) -> World:
        """Scale the logits."""
        self.tables = self.tables._replace(logits=scale * self.tables.logits)
        return self

    def only(self, photo: int) -> World:
        """Return the same world with one of its photos."""
        world = World(1, size=self.size)
        world.tables = Tables(*(table[photo : photo + 1] for table in self.tables))
        return world

    @property
    def start(self) -> tuple[CodedHistory, Tables]:
        return CodedHistory(torch.zeros(len(self.tables.logits), 1, dtype=torch.long)), self.tables

    def step(
        self, token_ids: Tensor, state: CodedHistory, memory: Tables
    ) -> tuple[Tensor, Tensor, CodedHistory]:
        code = (state.code * self.size + token_ids) % memory.logits.shape[1]
        photo = torch.arange(len(code))[:, None]
        return memory.logits[photo, code], memory.attention[photo, code], CodedHistory(code)

    def _row(self, ids: Sequence[int]) -> int:
        code = 0
        for index in [BOS, *ids]:
            code = (code * self.size + index) % self.tables.logits.shape[1]
        return code

    def log_probabilities(self, ids: Sequence[int], photo: int = 0) -> list[float]:
        """Return the log-probability of each id after ``ids``."""
        logits = self.tables.logits[photo, self._row(ids)].double()
        return logits.log_softmax(dim=-1).tolist()

    def log_probability(self, ids: Sequence[int], photo: int = 0) -> float:
        """Return the log-probability of a whole caption."""
        return sum(
            self.log_probabilities(ids[:place], photo)[index] for place, index in enumerate(ids)
        )

    def attention(self, ids: Sequence[int], photo: int = 0) -> Tensor:
        """Return the attention after ``ids``."""
        return self.tables.attention[photo, self._row(ids)]

    def beam(self, **settings: Any) -> list[list[Hypothesis]]:
        return beam_search(self.step, *self.start, **settings)

    def sample(self, seed: int = 0, **settings: Any) -> list[list[Hypothesis]]:
        generator = torch.Generator().manual_seed(seed)
        return sample(self.step, *self.start, generator=generator, **settings)

    def decode(self, options: DecodingOptions, **settings: Any) -> list[list[Hypothesis]]:
        return decode(self.step, *self.start, options, **settings)


def is_allowed(ids: Sequence[int], constraints: Constraints, free: int = 0) -> bool:
    """Return whether a whole caption meets the constraints; its first ``free`` ids are exempt."""
    history = [BOS, *ids]
    for place in range(free + 1, len(history)):
        index, before = history[place], history[:place]
        if index in constraints.suppress:
            return False
        if constraints.no_repeat_word and index == before[-1]:
            return False
        if constraints.no_repeat_trigram:
            old = {tuple(before[start : start + 3]) for start in range(len(before) - 2)}
            if (*before[-2:], index) in old:
                return False
        if index == EOS and before[-1] in constraints.not_before_eos:
            return False
    return True


def every_caption(
    world: World,
    *,
    max_steps: int,
    constraints: Constraints = NO_CONSTRAINTS,
    length_penalty: float = 0.0,
    prefix: tuple[int, ...] = (),
) -> list[tuple[float, list[int], float]]:
    """Return score, ids and log-probability of all allowed captions, best first."""
    others = [index for index in range(world.size) if index != EOS]
    captions = []
    for length in range(max_steps):
        for words in itertools.product(others, repeat=length):
            ids = [*words, EOS]
            if words[: len(prefix)] == prefix and is_allowed(ids, constraints, len(prefix)):
                total = world.log_probability(ids)
                captions.append((total / len(ids) ** length_penalty, ids, total))
    return sorted(captions, reverse=True)


def assert_consistent(world: World, found: Sequence[Sequence[Hypothesis]]) -> None:
    """Check that the numbers of the captions found are those of the tables."""
    for photo, hypotheses in enumerate(found):
        for hypothesis in hypotheses:
            ids = hypothesis.ids
            assert EOS not in ids[:-1]
            assert ids[-1] == EOS
            for place, index in enumerate(ids):
                expected = torch.tensor(world.log_probabilities(ids[:place], photo)).float()
                torch.testing.assert_close(hypothesis.log_probabilities[place], expected[index])
                torch.testing.assert_close(
                    hypothesis.attention[place], world.attention(ids[:place], photo)
                )
                best = expected.topk(hypothesis.alternatives.shape[1])
                assert hypothesis.alternatives[place].tolist() == best.indices.tolist()
                torch.testing.assert_close(
                    hypothesis.alternative_log_probabilities[place], best.values
                )
            assert hypothesis.log_probability == pytest.approx(
                world.log_probability(ids, photo), abs=1e-4
            )


# Greedy


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("constraints", [NO_CONSTRAINTS, ALL_CONSTRAINTS], ids=["none", "all"])
def test_greedy_search_takes_the_best_id_at_each_step(seed: int, constraints: Constraints) -> None:
    world = World(size=12, seed=seed)
    ids: list[int] = []
    while len(ids) < 29 and (not ids or ids[-1] != EOS):
        log_probabilities = world.log_probabilities(ids)
        ids.append(
            max(
                (index for index in range(12) if is_allowed([*ids, index], constraints)),
                key=log_probabilities.__getitem__,
            )
        )

    ((found,),) = world.beam(beam_size=1, max_steps=30, constraints=constraints)

    # A caption that did not end by itself ends at the last step.
    assert found.ids == (ids if ids[-1] == EOS else [*ids, EOS])
    assert_consistent(world, [[found]])


def test_greedy_search_matches_a_worked_example() -> None:
    world = World.constant([0.01, 0.01, 0.1, 0.08, 0.5, 0.3])

    ((found,),) = world.beam(beam_size=1, max_steps=4, length_penalty=0)

    assert found.ids == [4, 4, 4, EOS]
    assert found.log_probability == pytest.approx(3 * math.log(0.5) + math.log(0.1))
    assert found.score == pytest.approx(found.log_probability)
    assert found.alternatives[0].tolist() == [4, 5, EOS, 3, 0]


# Beam search


@pytest.mark.parametrize(
    ("seed", "length_penalty", "size", "constraints"),
    [
        (0, 0.0, 6, NO_CONSTRAINTS),
        (1, 1.5, 6, Constraints(no_repeat_word=True)),
        (2, 0.7, 6, Constraints(suppress=(PAD, UNK), not_before_eos=(4,))),
        (3, 0.7, 7, ALL_CONSTRAINTS),
    ],
    ids=["none", "no repeats", "suppress", "all"],
)
def test_wide_beam_search_matches_exhaustive_search(
    seed: int, length_penalty: float, size: int, constraints: Constraints
) -> None:
    world = World(size=size, seed=seed)
    expected = every_caption(
        world, max_steps=4, constraints=constraints, length_penalty=length_penalty
    )

    (found,) = world.beam(
        beam_size=400, max_steps=4, constraints=constraints, length_penalty=length_penalty
    )

    # Captions that violate a constraint rank last.
    assert len(found) >= len(expected) > 10
    assert [beam.ids for beam in found[: len(expected)]] == [ids for _, ids, _ in expected]
    for hypothesis, (score, _, total) in zip(found, expected, strict=False):
        assert hypothesis.log_probability == pytest.approx(total, abs=1e-4)
        assert hypothesis.score == pytest.approx(score, abs=1e-4)


def test_no_repeat_trigram_matches_exhaustive_search() -> None:
    # Three ids besides the end are few enough for captions of seven.
    world = World(size=4, seed=1, rows=20_011)
    constraints = Constraints(no_repeat_trigram=True)
    expected = every_caption(world, max_steps=7, constraints=constraints, length_penalty=0.7)
    free = every_caption(world, max_steps=7, length_penalty=0.7)
    assert len(expected) < len(free)

    (found,) = world.beam(
        beam_size=len(free), max_steps=7, constraints=constraints, length_penalty=0.7
    )

    assert [beam.ids for beam in found[: len(expected)]] == [ids for _, ids, _ in expected]


@pytest.mark.parametrize(
    ("beam_size", "constraints"),
    [(1, ALL_CONSTRAINTS), (3, NO_CONSTRAINTS), (5, ALL_CONSTRAINTS)],
)
def test_beam_search_reports_the_numbers_of_its_captions(
    beam_size: int, constraints: Constraints
) -> None:
    world = World(6, size=9, seed=3)

    found = world.beam(
        beam_size=beam_size, max_steps=12, constraints=constraints, length_penalty=0.7
    )

    assert len(found) == 6
    assert_consistent(world, found)
    for photo, hypotheses in enumerate(found):
        assert 1 <= len(hypotheses) <= beam_size
        assert len({tuple(beam.ids) for beam in hypotheses}) == len(hypotheses)
        scores = [beam.score for beam in hypotheses]
        assert scores == sorted(scores, reverse=True)
        for beam in hypotheses:
            assert len(beam.ids) <= 12
            assert is_allowed(beam.ids, constraints), photo
            assert beam.score == pytest.approx(beam.log_probability / len(beam.ids) ** 0.7)


@pytest.mark.parametrize(
    ("beam_size", "constraints"), [(1, ALL_CONSTRAINTS), (3, NO_CONSTRAINTS), (3, ALL_CONSTRAINTS)]
)
def test_batch_matches_one_photo_at_a_time(beam_size: int, constraints: Constraints) -> None:
    world = World(12, size=8, seed=5)

    together = world.beam(beam_size=beam_size, max_steps=15, constraints=constraints)

    lengths = {len(beam[0].ids) for beam in together}
    assert len(lengths) > 3  # photos get done at different steps
    for photo, beams in enumerate(together):
        (alone,) = world.only(photo).beam(
            beam_size=beam_size, max_steps=15, constraints=constraints
        )
        assert [beam.ids for beam in beams] == [beam.ids for beam in alone]
        for one, other in zip(beams, alone, strict=True):
            torch.testing.assert_close(one.log_probabilities, other.log_probabilities)
            torch.testing.assert_close(one.attention, other.attention)
            assert torch.equal(one.alternatives, other.alternatives)
            assert one.score == pytest.approx(other.score, abs=1e-5)


def test_attention_and_alternatives_follow_their_beam() -> None:
    """Beams swap ranks: 5 leads at first, but what follows 4 is better."""
    world = World(size=7, rows=2503)
    logits = torch.full_like(world.tables.logits, -4.0)
    for history, index, probability in [
        ([], 5, 3.0),
        ([], 4, 2.5),
        ([5], 3, 0.0),
        ([5], 6, 0.1),
        ([4], 6, 5.0),
        ([4, 6], EOS, 5.0),
        ([5, 6], EOS, 1.0),
        ([5, 3], EOS, 1.0),
    ]:
        logits[0, world._row(history), index] = probability
    world.tables = world.tables._replace(logits=logits)

    (found,) = world.beam(beam_size=3, max_steps=5, length_penalty=0)

    assert [beam.ids for beam in found] == [[4, 6, EOS], [5, 6, EOS], [5, 3, EOS]]
    assert_consistent(world, [found])
    assert found[0].alternatives[1, 0] == 6
    assert found[0].alternatives[0, 0] == 5


def test_early_end_competes_with_longer_captions() -> None:
    # It ends at once with 0.4; the others go on for long and are worth less.
    world = World.constant([0.001, 0.001, 0.4, 0.001, 0.3, 0.297])

    (found,) = world.beam(beam_size=2, max_steps=8, length_penalty=0)

    assert [beam.ids for beam in found] == [[EOS], [4, EOS]]


def test_ended_caption_takes_no_beam_from_running_ones() -> None:
    # The end is the likeliest of all, and yet both 4 and 5 go on; 5 turns out to be the better.
    world = World(size=6)
    logits = torch.full_like(world.tables.logits, -9.0)
    logits[0, world._row([]), [EOS, 4, 5]] = torch.tensor([0.40, 0.31, 0.29]).log()
    logits[0, world._row([4]), [EOS, 3]] = torch.tensor([0.5, 0.5]).log()
    logits[0, world._row([5]), EOS] = 0.0
    world.tables = world.tables._replace(logits=logits)

    (found,) = world.beam(beam_size=2, max_steps=5, length_penalty=0)

    assert [beam.ids for beam in found] == [[EOS], [5, EOS]]


def test_length_penalty_favors_longer_captions() -> None:
    world = World.constant([0.001, 0.001, 0.3, 0.001, 0.6, 0.097])

    lengths = [
        len(world.beam(beam_size=4, max_steps=6, length_penalty=penalty)[0][0].ids)
        for penalty in (0.0, 1.0, 3.0)
    ]

    assert lengths[0] == 1
    assert lengths[0] < lengths[1] <= lengths[2] == 6


def test_beam_may_be_wider_than_the_vocabulary() -> None:
    (found,) = World(size=5).beam(beam_size=20, max_steps=2)

    assert [beam.ids for beam in found] == [
        ids for _, ids, _ in every_caption(World(size=5), max_steps=2, length_penalty=0.7)
    ]


@pytest.mark.parametrize("alternatives", [1, 50])
def test_number_of_alternatives(alternatives: int) -> None:
    ((found,),) = World().beam(beam_size=1, max_steps=5, alternatives=alternatives)

    assert found.alternatives.shape == (len(found.ids), min(alternatives, 6))


# Length


@pytest.mark.parametrize(("max_steps", "beam_size"), [(1, 3), (2, 1), (5, 3)])
def test_captions_end_at_max_steps(max_steps: int, beam_size: int) -> None:
    world = World.constant([0.01, 0.01, 0.01, 0.01, 0.5, 0.46])

    for found in (
        world.beam(beam_size=beam_size, max_steps=max_steps),
        world.sample(samples=20, max_steps=max_steps),
    ):
        assert max(len(beam.ids) for beam in found[0]) == max_steps
        # The end that it was cut to has the probability that the model gives it.
        assert_consistent(world, found)


# Constraints


def preferring(*ids: int, size: int = 8) -> World:
    """Return a world that prefers ``ids`` in this order; the others are unlikely."""
    probabilities = [1e-4] * size
    for rank, index in enumerate(ids):
        probabilities[index] = 0.9 / 2**rank
    total = sum(probabilities)
    return World.constant([value / total for value in probabilities])


def test_suppressed_ids_are_never_written() -> None:
    world = preferring(UNK, 5, 6, 7, EOS)
    assert UNK in world.beam(beam_size=3, max_steps=9)[0][0].ids

    (found,) = world.beam(beam_size=3, max_steps=9, constraints=Constraints(suppress=(UNK, 5)))
    (sampled,) = world.sample(samples=30, max_steps=9, constraints=Constraints(suppress=(UNK, 5)))

    assert {6} <= {index for beam in found for index in beam.ids}
    for beam in (*found, *sampled):
        assert not {UNK, 5} & set(beam.ids)


def test_no_repeat_word_bans_the_same_id_twice_in_a_row() -> None:
    world = preferring(5, 6, 7, EOS)
    assert world.beam(beam_size=1, max_steps=6)[0][0].ids == [5, 5, 5, 5, 5, EOS]

    (found,) = world.beam(beam_size=3, max_steps=6, constraints=Constraints(no_repeat_word=True))
    (sampled,) = world.sample(samples=30, max_steps=6, constraints=Constraints(no_repeat_word=True))

    for beam in (*found, *sampled):
        assert all(first != second for first, second in itertools.pairwise(beam.ids))
    assert world.beam(beam_size=1, max_steps=6, constraints=Constraints(no_repeat_word=True))[0][
        0
    ].ids == [
        *(5, 6, 5, 6, 5),
        EOS,
    ]


def test_no_repeat_trigram_bans_the_same_three_ids() -> None:
    world = preferring(5, 6, 7, EOS)

    (found,) = world.beam(
        beam_size=3, max_steps=12, constraints=Constraints(no_repeat_trigram=True)
    )
    (sampled,) = world.sample(
        samples=30, max_steps=12, constraints=Constraints(no_repeat_trigram=True)
    )

    for beam in (*found, *sampled):
        trigrams = list(zip(beam.ids, beam.ids[1:], beam.ids[2:], strict=False))
        assert len(set(trigrams)) == len(trigrams)
    assert len(found[0].ids) > 5


def test_not_before_eos_bans_an_ending() -> None:
    # The end is the likeliest after anything.
    world = preferring(EOS, 5, 6, 7)
    constraints = Constraints(not_before_eos=(5, 7), no_repeat_word=True)
    assert world.beam(beam_size=3, max_steps=40, prefix=[5])[0][0].ids == [5, EOS]

    (found,) = world.beam(beam_size=3, max_steps=40, prefix=[5], constraints=constraints)
    (sampled,) = world.sample(samples=30, max_steps=40, prefix=[5], constraints=constraints)

    for beam in (*found, *sampled):
        assert beam.ids[-1] == EOS
        assert beam.ids[-2] not in (5, 7)


@pytest.mark.parametrize(("beam_size", "max_steps"), [(1, 7), (3, 2)])
def test_not_before_eos_holds_for_captions_cut_at_max_steps(beam_size: int, max_steps: int) -> None:
    world = preferring(5, 6, 7)
    constraints = Constraints(not_before_eos=(5, 6))

    (found,) = world.beam(beam_size=beam_size, max_steps=max_steps, constraints=constraints)
    (sampled,) = world.sample(samples=20, max_steps=max_steps, constraints=constraints)

    for beam in (found[0], *sampled):
        assert len(beam.ids) == 1 or beam.ids[-2] not in (5, 6)


def test_constraints_change_the_ids_but_not_their_probabilities() -> None:
    world = preferring(UNK, 5, EOS)

    ((found,),) = world.beam(
        beam_size=1, max_steps=4, constraints=Constraints(suppress=(UNK,), no_repeat_word=True)
    )

    assert found.ids[0] == 5
    # 5 got a third of the probability at most, though all that was likelier is banned.
    assert math.exp(found.log_probabilities[0]) == pytest.approx(0.45 / 1.575, abs=1e-3)
    assert found.alternatives[0, 0] == UNK
    assert_consistent(world, [[found]])


ALL_BANNED = Constraints(
    suppress=tuple(range(6)),
    not_before_eos=tuple(range(6)),
    no_repeat_word=True,
    no_repeat_trigram=True,
)
NO_END = World.constant([0.2, 0.2, 1e-30, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(
    ("world", "constraints", "max_steps", "count"),
    [
        (World(), ALL_BANNED, 4, 4),
        (World(), Constraints(suppress=(EOS,)), 60, 1),
        (NO_END, NO_CONSTRAINTS, 4, 3),
        (NO_END, ALL_CONSTRAINTS, 60, 4),
        (NO_END, ALL_BANNED, 1, 1),
        (World.constant([0.2, 0.2, 0.0, 0.2, 0.2, 0.2]), NO_CONSTRAINTS, 4, 3),
    ],
    ids=["banned", "end banned", "unlikely end", "constraints", "one step", "impossible end"],
)
def test_search_always_returns_a_caption(
    world: World, constraints: Constraints, max_steps: int, count: int
) -> None:
    for found in (
        world.beam(beam_size=count, max_steps=max_steps, constraints=constraints),
        world.sample(samples=count, max_steps=max_steps, constraints=constraints),
    ):
        assert found[0]
        for beam in found[0]:
            assert beam.ids[-1] == EOS
            assert len(beam.ids) <= max_steps
            assert not beam.log_probabilities.isnan().any()


# Prefix


@pytest.mark.parametrize(
    ("prefix", "constraints"), [((5, 3), NO_CONSTRAINTS), ((3, 3, 3), ALL_CONSTRAINTS)]
)
def test_prefix_is_exempt_from_the_constraints(
    prefix: tuple[int, ...], constraints: Constraints
) -> None:
    world = World(size=7, seed=2)
    expected = every_caption(
        world, max_steps=4, constraints=constraints, length_penalty=0.7, prefix=prefix
    )
    assert expected

    (found,) = world.beam(
        beam_size=400, max_steps=4, constraints=constraints, length_penalty=0.7, prefix=prefix
    )

    assert [beam.ids for beam in found[: len(expected)]] == [ids for _, ids, _ in expected]
    assert all(beam.ids[: len(prefix)] == list(prefix) for beam in found)
    assert_consistent(world, [found])


def test_prefix_starts_every_caption_of_every_photo() -> None:
    world = World(3, size=7, seed=4)

    for found in (
        world.beam(beam_size=3, max_steps=9, prefix=[5, 6]),
        world.sample(samples=10, max_steps=9, prefix=[5, 6]),
    ):
        assert [beam.ids[:2] for beams in found for beam in beams] == [[5, 6]] * sum(
            map(len, found)
        )
        assert_consistent(world, found)
    # They go on in more than one way.
    assert len({tuple(beam.ids) for beam in world.sample(samples=10, prefix=[5, 6])[0]}) > 3


def test_constraints_take_the_prefix_into_account() -> None:
    world = preferring(5, 6, EOS)

    ((found,),) = world.beam(
        beam_size=1, max_steps=6, prefix=[6, 5], constraints=Constraints(no_repeat_word=True)
    )

    assert found.ids[2] == 6


@pytest.mark.parametrize("beam_size", [1, 3])
def test_prefix_with_eos_scores_a_whole_caption(beam_size: int) -> None:
    world = World(2, size=7, seed=6)
    caption = [4, 4, PAD, UNK, 6, EOS]

    found = world.beam(
        beam_size=beam_size,
        max_steps=6,
        prefix=caption,
        constraints=ALL_CONSTRAINTS,
        length_penalty=1,
    )

    assert [[beam.ids for beam in beams] for beams in found] == [[caption], [caption]]
    assert_consistent(world, found)
    assert found[1][0].score == pytest.approx(world.log_probability(caption, 1) / 6, abs=1e-5)
    sampled = world.sample(samples=3, max_steps=6, prefix=caption)
    assert {tuple(beam.ids) for beams in sampled for beam in beams} == {tuple(caption)}


def test_prefix_without_room_for_eos_is_rejected() -> None:
    with pytest.raises(ConfigError, match="a prefix of 3 ids leaves no room; the limit is 2"):
        World().beam(beam_size=2, max_steps=3, prefix=[4, 5, 4])


# Sampling


def test_sampling_is_reproducible_with_a_seed() -> None:
    world = World(2, size=9)

    def sampled(seed: int) -> list[list[list[int]]]:
        found = world.sample(seed, samples=6, max_steps=10)
        return [[beam.ids for beam in beams] for beams in found]

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)


def test_sampling_returns_the_requested_number_of_captions() -> None:
    world = World(4, size=9, seed=8)

    found = world.sample(samples=7, max_steps=10, temperature=1.3, length_penalty=0.7)

    assert [len(beams) for beams in found] == [7] * 4
    assert_consistent(world, found)
    for beams in found:
        scores = [beam.score for beam in beams]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("constraints", [NO_CONSTRAINTS, ALL_CONSTRAINTS], ids=["none", "all"])
def test_sampling_at_low_temperature_or_small_top_p_is_greedy(constraints: Constraints) -> None:
    world = World(3, size=8, seed=1)
    greedy = [
        beams[0].ids for beams in world.beam(beam_size=1, max_steps=9, constraints=constraints)
    ]

    cold = world.sample(samples=2, temperature=1e-4, max_steps=9, constraints=constraints)
    narrow = world.sample(samples=2, top_p=1e-6, max_steps=9, constraints=constraints)

    for found in (cold, narrow):
        assert [[beam.ids for beam in beams] for beams in found] == [[ids, ids] for ids in greedy]


FIRST = [0.02, 0.03, 0.05, 0.1, 0.5, 0.3]


def first_ids(draws: int = 3000, **settings: Any) -> Counter[int]:
    """Count what is sampled first; the second step always ends."""
    (found,) = World.constant(FIRST).sample(samples=draws, max_steps=2, **settings)
    return Counter(beam.ids[0] for beam in found)


def assert_shares(counts: Counter[int], weights: dict[int, float]) -> None:
    """Compare counts with probabilities, four standard deviations wide."""
    draws, total = counts.total(), sum(weights.values())
    assert set(counts) <= set(weights)
    for index, weight in weights.items():
        share = weight / total
        spread = math.sqrt(share * (1 - share) / draws)
        assert abs(counts[index] / draws - share) < 4 * spread + 1e-9, index


def test_sampled_frequencies_match_the_probabilities() -> None:
    assert_shares(first_ids(), dict(enumerate(FIRST)))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_or_flattens_the_distribution(temperature: float) -> None:
    weights = {index: value ** (1 / temperature) for index, value in enumerate(FIRST)}

    assert_shares(first_ids(temperature=temperature), weights)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, [4]), (0.85, [4, 5, 3])])
def test_top_p_samples_from_the_likeliest_ids(top_p: float, kept: list[int]) -> None:
    assert_shares(first_ids(1000, top_p=top_p), {index: FIRST[index] for index in kept})


def test_sampling_excludes_suppressed_ids() -> None:
    counts = first_ids(constraints=Constraints(suppress=(4, PAD)))

    assert_shares(counts, {index: FIRST[index] for index in (1, 2, 3, 5)})


def test_samples_are_independent() -> None:
    """Of two steps, beam follows its own probabilities, whatever the other samples draw."""
    world = World(size=6, seed=9)
    (found,) = world.sample(samples=3000, max_steps=3)
    counts = Counter(beam.ids[0] for beam in found)
    likely = max(counts.keys() - {EOS}, key=counts.__getitem__)
    assert counts[likely] > 500

    seconds = Counter(beam.ids[1] for beam in found if beam.ids[0] == likely)

    weights = {
        index: math.exp(value) for index, value in enumerate(world.log_probabilities([likely]))
    }
    assert_shares(seconds, weights)


# With DecodingOptions


def test_decode_runs_beam_search_with_its_options() -> None:
    world = World(3, size=9, seed=1)
    options = DecodingOptions(beam_size=4, length_penalty=1.2, max_length=8)
    constraints = Constraints(
        suppress=(PAD, BOS, UNK), not_before_eos=(4, 5), no_repeat_word=True, no_repeat_trigram=True
    )

    found = world.decode(options, prefix=[6], bad_endings=[4, 5])

    # <bos> is one of the eight.
    expected = world.beam(
        beam_size=4, max_steps=7, length_penalty=1.2, prefix=[6], constraints=constraints
    )
    assert [[beam.ids for beam in beams] for beams in found] == [
        [beam.ids for beam in beams] for beams in expected
    ]
    assert_consistent(world, found)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [5, 6, 5, 6, 7]),
        ({"ban_unknown": False}, [UNK, 5, UNK, 5, 6]),
        ({"ban_repeats": False}, [5, 5, 5, 6, 5]),
        ({"ban_trigrams": False}, [5, 6, 5, 6, 5]),
        ({"ban_repeats": False, "ban_trigrams": False}, [5, 5, 5, 5, 5]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_each_ban_can_be_lifted(changes: dict[str, bool], expected: list[int]) -> None:
    # <bos> and <pad> are the likeliest, and yet never written.
    world = preferring(BOS, PAD, UNK, 5, 6, 7)

    found = world.decode(DecodingOptions(beam_size=1, max_length=7, **changes))  # type: ignore[arg-type]

    assert found[0][0].ids == [*expected, EOS]


def test_bad_endings_can_be_banned_or_not() -> None:
    world = preferring(EOS, 5, 6)
    options = {"beam_size": 2, "prefix": "a"}

    banned = world.decode(DecodingOptions(**options), prefix=[5], bad_endings=[5])  # type: ignore[arg-type]
    free = world.decode(
        DecodingOptions(**options, ban_bad_endings=False),  # type: ignore[arg-type]
        prefix=[5],
        bad_endings=[5],
    )

    assert banned[0][0].ids == [5, 6, EOS]
    assert free[0][0].ids == [5, EOS]


def test_plain_greedy_options_have_no_bans() -> None:
    world = preferring(UNK, 5, EOS)

    found = world.decode(DecodingOptions.plain_greedy(), bad_endings=[UNK])

    assert [beam.ids for beam in found[0]] == [[UNK] * 18 + [EOS]]


@pytest.mark.parametrize("max_length", [3, 20])
def test_max_length_includes_bos_and_eos(max_length: int) -> None:
    world = preferring(5, 6, 7)

    for changes in ({}, {"temperature": 1.0}):
        options = DecodingOptions(max_length=max_length, ban_trigrams=False, **changes)  # type: ignore[arg-type]
        (found,) = world.decode(options)
        assert max(len(beam.ids) for beam in found) == max_length - 1


def test_decode_samples_above_temperature_zero() -> None:
    world = World(2, size=12, seed=2)

    def sampled(**changes: Any) -> list[list[list[int]]]:
        options = DecodingOptions(temperature=1.0, samples=5, **changes)
        return [[beam.ids for beam in beams] for beams in world.decode(options)]

    assert [len(beams) for beams in sampled()] == [5, 5]
    assert sampled(seed=3) == sampled(seed=3)
    assert sampled(seed=3) != sampled(seed=4)
    greedy = world.decode(DecodingOptions(beam_size=1))
    for found, best in zip(sampled(top_p=1e-6), greedy, strict=True):
        assert found == [best[0].ids] * 5
    for beams in sampled():
        assert all(
            is_allowed(ids, Constraints(suppress=(PAD, BOS, UNK), no_repeat_word=True))
            for ids in beams
        )


# Any tables, any options


def test_characters_may_be_doubled_but_not_tripled() -> None:
    world = preferring(5, 6, 7)
    options = DecodingOptions(beam_size=1, max_length=8, ban_trigrams=False)

    found = world.decode(options, may_double=[5, 7])

    assert found[0][0].ids == [5, 5, 6, 5, 5, 6, EOS]


SIZE = 9
OPTIONS = st.builds(
    DecodingOptions,
    beam_size=st.integers(1, 6),
    length_penalty=st.floats(0, 5),
    max_length=st.integers(3, 12),
    temperature=st.just(0.0) | st.floats(0.01, 10),
    top_p=st.floats(1e-6, 1),
    samples=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
    ban_repeats=st.booleans(),
    ban_trigrams=st.booleans(),
    ban_unknown=st.booleans(),
    ban_bad_endings=st.booleans(),
)
WORLDS = st.builds(
    lambda seed, rows, scale: World(2, size=SIZE, seed=seed, rows=rows).scaled(scale),
    st.integers(0, 2**32),
    st.sampled_from([1, 5, 1499]),
    st.sampled_from([0.1, 1.0, 20.0]),
)
IDS = st.integers(0, SIZE - 1).filter(lambda index: index != EOS)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(WORLDS, OPTIONS, st.lists(IDS, max_size=6), st.sets(IDS, max_size=SIZE))
def test_any_search_with_any_options_is_consistent(
    world: World, options: DecodingOptions, prefix: list[int], bad_endings: set[int]
) -> None:
    steps = options.max_length - 1
    prefix = prefix[: steps - 1]
    arguments: dict[str, Any] = {"prefix": prefix, "bad_endings": sorted(bad_endings)}
    constraints = Constraints(
        suppress=(PAD, BOS, UNK) if options.ban_unknown else (PAD, BOS),
        not_before_eos=tuple(bad_endings) if options.ban_bad_endings else (),
        no_repeat_word=options.ban_repeats,
        no_repeat_trigram=options.ban_trigrams,
    )

    found = world.decode(options, **arguments)

    assert_consistent(world, found)
    sampled = options.temperature > 0
    for photo, beams in enumerate(found):
        assert len(beams) == options.samples if sampled else 1 <= len(beams) <= options.beam_size
        scores = [beam.score for beam in beams]
        assert scores == sorted(scores, reverse=True)
        assert sampled or len({tuple(beam.ids) for beam in beams}) == len(beams)
        for beam in beams:
            assert beam.ids[: len(prefix)] == prefix
            assert len(prefix) < len(beam.ids) <= steps
            # Ranked by its probability; captions that violate a constraint rank far behind.
            share = len(beam.ids) ** options.length_penalty
            is_fair = beam.score * share == pytest.approx(beam.log_probability, abs=1e-2)
            assert is_fair == is_allowed(beam.ids, constraints, len(prefix))
        if not sampled:
            (alone,) = world.only(photo).decode(options, **arguments)
            assert [beam.ids for beam in beams] == [beam.ids for beam in alone]
            for one, other in zip(beams, alone, strict=True):
                torch.testing.assert_close(one.log_probabilities, other.log_probabilities)
                torch.testing.assert_close(one.attention, other.attention)
