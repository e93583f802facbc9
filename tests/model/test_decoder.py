"""The decoder: the report's when every option is off, and right with every option on."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from captioner.config import BOS, EOS, PAD, ModelConfig
from captioner.model.decoder import Attention, CaptionModel, Memory

VOCABULARY, CHANNELS, CELLS, HIDDEN, EMBEDDING = 23, 6, 9, 10, 7

NAMES = (
    "feature_size",
    "feature_norm",
    "word_query",
    "mean_start",
    "context_gate",
    "deep_output",
    "tied_embedding",
)
COMBINATIONS = [
    {
        name: 4 * flag if name == "feature_size" else flag
        for name, flag in zip(NAMES, flags, strict=True)
    }
    for flags in itertools.product([False, True], repeat=len(NAMES))
    if flags[-2] or not flags[-1]
]
SEED, ALL_ON = COMBINATIONS[0], COMBINATIONS[-1]


def name_of(options: dict[str, bool]) -> str:
    return "+".join(name for name, on in options.items() if on) or "seed"


every_combination = pytest.mark.parametrize("options", COMBINATIONS, ids=name_of)
# None, each alone, all together.
every_option = pytest.mark.parametrize(
    "options",
    [each for each in COMBINATIONS if sum(map(bool, each.values())) <= 1 or each == ALL_ON],
    ids=name_of,
)


def make_model(**options: float) -> CaptionModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocabulary_size=VOCABULARY,
        encoder_channels=CHANNELS,
        embedding_size=EMBEDDING,
        hidden_size=HIDDEN,
        attention_size=5,
        **options,  # type: ignore[arg-type]
    )
    model = CaptionModel(config)
    # At its start a model hardly looks; here it should have opinions.
    for parameter in model.attn.parameters():
        parameter.data *= 4
    return model.eval()


def make_features(photos: int = 2) -> Tensor:
    return torch.randn(photos, CELLS, CHANNELS, generator=torch.Generator().manual_seed(1))


def make_captions() -> Tensor:
    """Two photos with three captions each, of 0 to 5 words."""
    generator = torch.Generator().manual_seed(2)
    captions = torch.full((2, 3, 7), PAD)
    for place, words in enumerate([5, 2, 0, 1, 5, 3]):
        ids = torch.randint(3, VOCABULARY, (words,), generator=generator)
        caption = captions[place // 3, place % 3]
        caption[0] = BOS
        caption[1 : words + 1] = ids
        caption[words + 1] = EOS
    return captions


CAPTIONS = make_captions()
IS_TARGET = CAPTIONS[:, :, 1:] != PAD


def loss_of(model: CaptionModel, features: Tensor, captions: Tensor) -> Tensor:
    logits, _ = model(features, captions)
    targets = captions[:, :, 1:]
    return torch.nn.functional.cross_entropy(logits, targets[targets != PAD])


def learn(model: CaptionModel, captions: Tensor = CAPTIONS) -> float:
    """Leave the gradients of the loss in the parameters; return the loss."""
    loss = loss_of(model, make_features(), captions)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def read_step_by_step(
    model: CaptionModel, features: Tensor, captions: Tensor
) -> tuple[Tensor, Tensor]:
    """Return logits (B, K, T - 1, V) and attention (B, K, T - 1, P) of single steps."""
    state, memory = model.start(features, captions.shape[1])
    logits, attention = [], []
    for words in captions[:, :, :-1].unbind(dim=-1):
        some_logits, some_attention, state = model.step(words, state, memory)
        logits.append(some_logits)
        attention.append(some_attention)
    return torch.stack(logits, dim=2), torch.stack(attention, dim=2)


def test_seed_has_the_report_s_parameters() -> None:
    model = CaptionModel(ModelConfig(vocabulary_size=3881, encoder_channels=2048))

    assert {name: tuple(each.shape) for name, each in model.named_parameters()} == {
        "embedding.weight": (3881, 256),
        "attn.Wf.weight": (256, 2048),
        "attn.Wf.bias": (256,),
        "attn.Wh.weight": (256, 512),
        "attn.Wh.bias": (256,),
        "attn.v.weight": (1, 256),
        "attn.v.bias": (1,),
        "lstm.weight_ih": (4 * 512, 2048 + 256),
        "lstm.weight_hh": (4 * 512, 512),
        "lstm.bias_ih": (4 * 512,),
        "lstm.bias_hh": (4 * 512,),
        "fc.weight": (3881, 512),
        "fc.bias": (3881,),
    }
    assert isinstance(model.lstm, torch.nn.LSTMCell)


@every_option
def test_shapes(options: dict[str, bool]) -> None:
    model = make_model(**options)

    logits, attention = model(make_features(), CAPTIONS)
    assert logits.shape == (int(IS_TARGET.sum()), VOCABULARY)
    assert attention.shape == (2, 3, 6, CELLS)

    state, memory = model.start(make_features(), 4)
    assert state.hidden.shape == state.cell.shape == (2, 4, HIDDEN)
    step_logits, step_attention, state = model.step(torch.full((2, 4), BOS), state, memory)
    assert step_logits.shape == (2, 4, VOCABULARY)
    assert step_attention.shape == (2, 4, CELLS)
    assert state.hidden.shape == state.cell.shape == (2, 4, HIDDEN)


@every_option
def test_attention_is_a_share_of_one_for_each_cell(options: dict[str, bool]) -> None:
    _, attention = make_model(**options)(make_features(), CAPTIONS)

    assert (attention >= 0).all()
    torch.testing.assert_close(attention.sum(dim=-1), IS_TARGET.float())


@every_combination
def test_step_by_step_equals_reading_at_once(options: dict[str, bool]) -> None:
    model = make_model(**options, dropout=0.5, feature_dropout=0.5)

    logits, attention = model(make_features(), CAPTIONS)
    step_logits, step_attention = read_step_by_step(model, make_features(), CAPTIONS)

    torch.testing.assert_close(logits, step_logits[IS_TARGET])
    torch.testing.assert_close(attention[IS_TARGET], step_attention[IS_TARGET])


@every_combination
def test_gradients_are_those_of_reading_step_by_step(options: dict[str, bool]) -> None:
    model = make_model(**options)
    targets = CAPTIONS[:, :, 1:][IS_TARGET]

    def gradients(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, targets).backward()  # type: ignore[no-untyped-call]
        parameters = model.named_parameters()
        return {name: part.grad.clone() for name, part in parameters if part.grad is not None}

    at_once = gradients(model(make_features(), CAPTIONS)[0])
    by_step = gradients(read_step_by_step(model, make_features(), CAPTIONS)[0][IS_TARGET])

    assert at_once.keys() == by_step.keys() == dict(model.named_parameters()).keys()
    for name, gradient in by_step.items():
        torch.testing.assert_close(at_once[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
        # A photo's share of attention does not see a number added to all scores.
        assert name == "attn.v.bias" or gradient.abs().max() > 0


@every_option
def test_photos_and_captions_do_not_see_each_other(options: dict[str, bool]) -> None:
    model = make_model(**options)
    logits, attention = model(make_features(), CAPTIONS)
    places = IS_TARGET.nonzero()

    for photo, caption in itertools.product(range(2), range(3)):
        alone, alone_attention = model(
            make_features()[photo : photo + 1], CAPTIONS[photo : photo + 1, caption : caption + 1]
        )
        here = (places[:, 0] == photo) & (places[:, 1] == caption)
        torch.testing.assert_close(alone, logits[here])
        length = int(here.sum())
        torch.testing.assert_close(
            alone_attention[0, 0, :length], attention[photo, caption, :length]
        )


@every_option
def test_a_word_is_foretold_from_the_words_before_it_only(options: dict[str, bool]) -> None:
    model = make_model(**options)
    changed = CAPTIONS.clone()
    changed[0, 0, 4] = 3 + (changed[0, 0, 4] - 2) % (VOCABULARY - 3)
    assert (changed != CAPTIONS).sum() == 1

    before, _ = read_step_by_step(model, make_features(), CAPTIONS)
    after, _ = read_step_by_step(model, make_features(), changed)
    logits, _ = model(make_features(), CAPTIONS)
    changed_logits, _ = model(make_features(), changed)

    torch.testing.assert_close(before[0, 0, :4], after[0, 0, :4])
    torch.testing.assert_close(logits[:4], changed_logits[:4])
    assert (before[0, 0, 4] - after[0, 0, 4]).abs().max() > 1e-4
    assert (logits[4] - changed_logits[4]).abs().max() > 1e-4


@every_combination
def test_a_step_by_hand(options: dict[str, bool]) -> None:
    """The equations of Xu et al. 2015: the gate of section 4.2.1, the output of equation 7."""
    model = make_model(**options)
    start, memory = model.start(make_features(1))
    _, _, before = model.step(torch.tensor([[BOS]]), start, memory)

    logits, attention, after = model.step(torch.tensor([[7]]), before, memory)

    word, hidden = model.embedding.weight[7], before.hidden[0, 0]
    features = make_features(1)[0]
    if options["feature_norm"]:
        mean = features.mean(dim=-1, keepdim=True)
        features = (features - mean) / (
            features.var(dim=-1, keepdim=True, correction=0) + 1e-5
        ).sqrt()
    if options["feature_size"]:
        features = (features @ model.projection.weight.T + model.projection.bias).clamp(min=0)
    query = torch.cat([hidden, word]) if options["word_query"] else hidden
    scores = model.attn.v(torch.tanh(model.attn.Wf(features) + model.attn.Wh(query)))[:, 0]
    torch.testing.assert_close(attention[0, 0], scores.softmax(dim=0))
    context = attention[0, 0] @ features
    if options["context_gate"]:
        context = torch.sigmoid(model.gate(hidden)) * context
    output, cell = model.lstm(torch.cat([word, context])[None], (hidden[None], before.cell[0]))
    torch.testing.assert_close(after.hidden[0], output)
    torch.testing.assert_close(after.cell[0], cell)
    if options["deep_output"]:
        output = word + model.hidden_output(output) + model.context_output(context)
    torch.testing.assert_close(logits[0], output @ model.fc.weight.T + model.fc.bias)


def test_attention_by_hand() -> None:
    torch.manual_seed(0)
    attention = Attention(CHANNELS, HIDDEN, 5)
    features, hidden = make_features(), torch.randn(2, 3, HIDDEN)

    context, weights = attention(Memory(features, attention.Wf(features)), hidden)

    for photo, caption in itertools.product(range(2), range(3)):
        scores = torch.stack(
            [
                attention.v(
                    torch.tanh(attention.Wf(cell) + attention.Wh(hidden[photo, caption]))
                ).squeeze()
                for cell in features[photo]
            ]
        )
        shares = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(weights[photo, caption], shares)
        seen = sum(share * cell for share, cell in zip(shares, features[photo], strict=True))
        torch.testing.assert_close(context[photo, caption], seen)


@every_option
def test_attention_depends_on_what_was_written(options: dict[str, bool]) -> None:
    model = make_model(**options)
    captions = torch.tensor([[[BOS, 5, 6, EOS], [BOS, 9, 6, EOS]]])

    _, attention = model(make_features(1), captions)

    # The hidden state that looks has not read the word before, unless that asks too.
    same = 1 if options["word_query"] else 2
    torch.testing.assert_close(attention[0, 0, :same], attention[0, 1, :same])
    assert (attention[0, 0, same] - attention[0, 1, same]).abs().max() > 1e-4
    assert (attention[0, 0, 0] - attention[0, 0, 2]).abs().max() > 1e-4


@every_option
def test_attention_and_words_depend_on_the_photo(options: dict[str, bool]) -> None:
    model = make_model(**options)
    captions = CAPTIONS[:1].expand(2, -1, -1)

    logits, attention = model(make_features(), captions)

    half = len(logits) // 2
    assert (logits[:half] - logits[half:]).abs().amax(dim=1).min() > 1e-5
    apart = (attention[0] - attention[1]).abs().amax(dim=-1)
    assert apart[IS_TARGET[0]].min() > 1e-4


def test_seed_starts_from_zeros_and_mean_start_from_the_photo() -> None:
    zeros, _ = make_model().start(make_features())
    state, _ = make_model(mean_start=True).start(make_features(), 2)

    assert not zeros.hidden.any()
    assert not zeros.cell.any()
    assert (state.hidden[0] - state.hidden[1]).abs().max() > 1e-3
    torch.testing.assert_close(state.hidden[:, 0], state.hidden[:, 1])
    # The mean knows no places.
    mixed, _ = make_model(mean_start=True).start(make_features().flip(1))
    torch.testing.assert_close(mixed.cell, state.cell[:, :1])


def test_feature_norm_makes_brightness_and_contrast_of_features_one() -> None:
    def read(features: Tensor, **options: bool) -> Tensor:
        logits, _ = make_model(**options)(features, CAPTIONS)
        return logits

    torch.testing.assert_close(
        read(1000 * make_features() + 50, feature_norm=True),
        read(1000 * make_features(), feature_norm=True),
        atol=1e-4,
        rtol=1e-4,
    )
    assert (read(make_features() + 50) - read(make_features())).abs().max() > 1e-2


def test_a_closed_gate_hides_the_photo() -> None:
    model = make_model(context_gate=True)
    model.gate.weight.data.zero_()
    model.gate.bias.data.fill_(-100)
    captions = CAPTIONS[:1].expand(2, -1, -1)

    logits, _ = model(make_features(), captions)

    half = len(logits) // 2
    torch.testing.assert_close(logits[:half], logits[half:])


def test_tied_embedding_is_one_matrix() -> None:
    model = make_model(deep_output=True, tied_embedding=True)

    assert model.fc.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert len(list(model.parameters())) == len(list(make_model(deep_output=True).parameters())) - 1
    # Still so after training on it and after loading a checkpoint.
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    learn(model)
    optimizer.step()
    torch.testing.assert_close(model.fc.weight, model.embedding.weight)
    model.load_state_dict(make_model(deep_output=True, tied_embedding=True).state_dict())
    assert model.fc.weight.data_ptr() == model.embedding.weight.data_ptr()
    untied = make_model(deep_output=True)
    assert untied.fc.weight.data_ptr() != untied.embedding.weight.data_ptr()


@every_option
def test_more_padding_changes_nothing(options: dict[str, bool]) -> None:
    """Neither what is foretold nor what is learned depends on how far captions are padded."""
    gradients = []
    for captions in (CAPTIONS, torch.nn.functional.pad(CAPTIONS, (0, 4), value=PAD)):
        model = make_model(**options)
        logits, attention = model(make_features(), captions)
        assert attention.shape[2] == captions.shape[2] - 1
        loss = learn(model, captions)
        grads = {name: each.grad for name, each in model.named_parameters()}
        gradients.append((logits, loss, grads))

    torch.testing.assert_close(gradients[0], gradients[1])


@every_option
def test_padding_learns_nothing_as_a_word(options: dict[str, bool]) -> None:
    model = make_model(**options)
    if options["tied_embedding"]:
        model.fc.bias.data[PAD] = -1e4  # not as an output either
    learn(model)

    gradient = model.embedding.weight.grad
    assert gradient is not None
    assert not gradient[PAD].any()
    assert gradient[BOS].any()


@every_option
def test_gradients_reach_every_parameter(options: dict[str, bool]) -> None:
    model = make_model(**options).train()
    learn(model)

    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # Softmax takes no notice of what is added to all scores.
        if name != "attn.v.bias":
            assert parameter.grad.abs().max() > 1e-7, name


@pytest.mark.parametrize("options", [SEED, ALL_ON], ids=["seed", "all on"])
def test_it_learns(options: dict[str, bool]) -> None:
    model = make_model(**options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first = learn(model)
    for _ in range(60):
        optimizer.zero_grad()
        learn(model)
        optimizer.step()

    assert learn(model) < 0.5 * first


def test_dropout_is_for_training_only() -> None:
    model = make_model(dropout=0.5, feature_dropout=0.5)
    calm = [model(make_features(), CAPTIONS)[0] for _ in range(2)]
    model.train()
    wild = [model(make_features(), CAPTIONS)[0] for _ in range(2)]

    torch.testing.assert_close(calm[0], calm[1])
    assert (wild[0] - wild[1]).abs().max() > 1e-3


def test_feature_dropout_takes_a_channel_from_all_cells() -> None:
    torch.manual_seed(0)
    model = make_model(feature_dropout=0.5).train()

    _, memory = model.start(make_features(32))

    dropped = memory.features == 0  # (B, P, C)
    assert torch.equal(dropped.any(dim=1), dropped.all(dim=1))
    assert 0.3 < dropped.float().mean() < 0.7


def test_bfloat16_training_stays_close() -> None:
    model = make_model(**ALL_ON)
    logits, attention = model(make_features(), CAPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, rough_attention = model(make_features(), CAPTIONS)

    torch.testing.assert_close(rough.float(), logits, atol=0.1, rtol=0.05)
    torch.testing.assert_close(rough_attention.float(), attention, atol=0.05, rtol=0)
    torch.testing.assert_close(rough_attention.float().sum(dim=-1), IS_TARGET.float())
