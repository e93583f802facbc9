"""The decoder: the report's with every option off, and correct with any options on."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm, pad, softplus

from captioner.config import BOS, EOS, PAD, ModelConfig
from captioner.model.decoder import Attention, CaptionModel, Memory
from tests.model.tiny import (
    ALL_ON,
    CAPTIONS,
    CELLS,
    CHANNELS,
    HIDDEN,
    IS_TARGET,
    PAIRWISE,
    REPORT,
    VOCABULARY,
    WORDS,
    Options,
    make_cells,
    make_model,
    name_of,
)

pairwise = pytest.mark.parametrize("options", PAIRWISE, ids=name_of)
none_and_all = pytest.mark.parametrize("options", [REPORT, ALL_ON], ids=["report", "all"])


def backward(model: CaptionModel, captions: Tensor = CAPTIONS) -> float:
    """Leave the gradients of the loss in the parameters; return the loss."""
    logits, _ = model(make_cells(), captions)
    targets = captions[:, :, 1:]
    loss = cross_entropy(logits, targets[targets != PAD])
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def test_model_without_options_has_the_parameters_of_the_report() -> None:
    model = CaptionModel(ModelConfig(vocabulary_size=3881, encoder_channels=2048))

    assert {name: tuple(value.shape) for name, value in model.named_parameters()} == {
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


@none_and_all
def test_shapes(options: Options) -> None:
    model = make_model(**options)

    logits, attention = model(make_cells(), CAPTIONS)
    assert logits.shape == (int(IS_TARGET.sum()), VOCABULARY)
    assert attention.shape == (2, 3, 6, CELLS)

    state, memory = model.start(make_cells(), 4)
    assert state.hidden.shape == state.cell.shape == (2, 4, HIDDEN)
    step_logits, step_attention, state = model.step(torch.full((2, 4), BOS), state, memory)
    assert step_logits.shape == (2, 4, VOCABULARY)
    assert step_attention.shape == (2, 4, CELLS)
    assert state.hidden.shape == state.cell.shape == (2, 4, HIDDEN)


@pairwise
def test_attention_sums_to_one_and_is_zero_at_padding(options: Options) -> None:
    _, attention = make_model(**options)(make_cells(), CAPTIONS)

    assert (attention >= 0).all()
    torch.testing.assert_close(attention.sum(dim=-1), IS_TARGET.float())


@pairwise
def test_captions_of_a_batch_do_not_influence_each_other(options: Options) -> None:
    model = make_model(**options)
    logits, attention = model(make_cells(), CAPTIONS)
    targets = IS_TARGET.nonzero()

    for photo, caption in itertools.product(range(2), range(3)):
        alone, alone_attention = model(
            make_cells()[photo : photo + 1], CAPTIONS[photo : photo + 1, caption : caption + 1]
        )
        own = (targets[:, 0] == photo) & (targets[:, 1] == caption)
        torch.testing.assert_close(alone, logits[own])
        length = int(own.sum())
        torch.testing.assert_close(
            alone_attention[0, 0, :length], attention[photo, caption, :length]
        )


@none_and_all
def test_prediction_depends_only_on_earlier_words(options: Options) -> None:
    model = make_model(**options)
    changed = CAPTIONS.clone()
    changed[0, 0, 4] = 3 + (changed[0, 0, 4] - 2) % (VOCABULARY - 3)
    assert (changed != CAPTIONS).sum() == 1

    before, _ = model(make_cells(), CAPTIONS)
    after, _ = model(make_cells(), changed)

    torch.testing.assert_close(before[:4], after[:4])
    assert (before[4] - after[4]).abs().max() > 1e-4


def with_words(model: CaptionModel, logits: Tensor, hidden: Tensor, attention: Tensor) -> Tensor:
    """Add what the cells of the first photo show to the logits (V,), word for word."""
    cells, logits = make_cells(1)[0], logits.clone()
    evidence = model.detectors.linear(layer_norm(cells, cells.shape[-1:]))
    evidence = attention @ (evidence - model.detectors.mean_logits)
    logits[4:9] += softplus(model.evidence_gain(hidden))[0] * evidence
    classes = attention @ model.pointer.classifier(cells[:, :4]).softmax(dim=-1)
    pointed = torch.zeros(VOCABULARY)
    for name, probability in zip(WORDS["class_names"], classes, strict=True):
        pointed[name[0]] += probability
    logits[21:] = -25.0  # names that no caption held
    for word in {name[0] for name in WORDS["class_names"]}:
        gate = model.pointer.gate(hidden)[0, 0]
        logits[word] = torch.logaddexp(logits[word], 0.7 * pointed[word].log() + gate)
    return logits


@pairwise
def test_step_matches_the_equations(options: Options) -> None:
    """The equations of Xu et al. 2015: the gate of section 4.2.1, the output of equation 7."""
    model = make_model(**options)
    start, memory = model.start(make_cells(1))
    _, _, before = model.step(torch.tensor([[BOS]]), start, memory)

    logits, attention, after = model.step(torch.tensor([[7]]), before, memory)

    word, hidden = model.embedding.weight[7], before.hidden[0, 0]
    features = make_cells(1)[0]
    if options["feature_norm"]:
        variance, mean = torch.var_mean(features, dim=-1, keepdim=True, correction=0)
        features = (features - mean) / (variance + 1e-5).sqrt()
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
    written = output
    if options["deep_output"]:
        written = word + model.hidden_output(output) + model.context_output(context)
    expected = (written @ model.fc.weight.T + model.fc.bias)[0]
    if options["words"]:
        expected = with_words(model, expected, output, attention[0, 0])
    torch.testing.assert_close(logits[0, 0], expected)


def test_attention_matches_its_equation() -> None:
    torch.manual_seed(0)
    attention = Attention(CHANNELS, HIDDEN, 5)
    features, hidden = make_cells(), torch.randn(2, 3, HIDDEN)
    nothing = features[..., :0]

    context, weights = attention(Memory(features, attention.Wf(features), nothing, nothing), hidden)

    for photo, caption in itertools.product(range(2), range(3)):
        query = attention.Wh(hidden[photo, caption])
        scores = torch.stack(
            [attention.v(torch.tanh(attention.Wf(cell) + query))[0] for cell in features[photo]]
        )
        expected = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(weights[photo, caption], expected)
        pairs = zip(expected, features[photo], strict=True)
        torch.testing.assert_close(context[photo, caption], sum(w * cell for w, cell in pairs))


@none_and_all
def test_attention_depends_on_earlier_words(options: Options) -> None:
    model = make_model(**options)
    captions = torch.tensor([[[BOS, 5, 6, EOS], [BOS, 9, 6, EOS]]])

    _, attention = model(make_cells(1), captions)

    # The hidden state has not read the previous word yet; only word_query asks with it.
    first = 1 if options["word_query"] else 2
    torch.testing.assert_close(attention[0, 0, :first], attention[0, 1, :first])
    assert (attention[0, 0, first] - attention[0, 1, first]).abs().max() > 1e-4
    assert (attention[0, 0, 0] - attention[0, 0, 2]).abs().max() > 1e-4


@none_and_all
def test_attention_and_logits_depend_on_the_photo(options: Options) -> None:
    logits, attention = make_model(**options)(make_cells(), CAPTIONS[:1].expand(2, -1, -1))

    first, second = logits.chunk(2)
    assert (first - second).abs().amax(dim=1).min() > 1e-5
    difference = (attention[0] - attention[1]).abs().amax(dim=-1)
    assert difference[IS_TARGET[0]].min() > 1e-4


def test_start_is_zero_or_with_mean_start_the_mean_of_the_cells() -> None:
    zeros, _ = make_model().start(make_cells())
    state, _ = make_model(mean_start=True).start(make_cells(), 2)

    assert not zeros.hidden.any()
    assert not zeros.cell.any()
    assert (state.hidden[0] - state.hidden[1]).abs().max() > 1e-3
    torch.testing.assert_close(state.hidden[:, 0], state.hidden[:, 1])
    # The mean does not depend on the order of the cells.
    mixed, _ = make_model(mean_start=True).start(make_cells().flip(1))
    torch.testing.assert_close(mixed.cell, state.cell[:, :1])


def test_feature_norm_removes_offset_and_scale() -> None:
    def logits(cells: Tensor, **options: bool) -> Tensor:
        return make_model(**options)(cells, CAPTIONS)[0]

    torch.testing.assert_close(
        logits(1000 * make_cells() + 50, feature_norm=True),
        logits(2000 * make_cells(), feature_norm=True),
        atol=1e-4,
        rtol=1e-4,
    )
    assert (logits(make_cells() + 50) - logits(make_cells())).abs().max() > 1e-2


def test_closed_context_gate_hides_the_photo() -> None:
    model = make_model(context_gate=True)
    model.gate.weight.data.zero_()
    model.gate.bias.data.fill_(-100)

    logits, _ = model(make_cells(), CAPTIONS[:1].expand(2, -1, -1))

    torch.testing.assert_close(*logits.chunk(2))


def test_tied_embedding_stays_one_matrix_after_training_and_loading() -> None:
    model = make_model(deep_output=True, tied_embedding=True)

    assert model.fc.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert len(list(model.parameters())) == len(list(make_model(deep_output=True).parameters())) - 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    backward(model)
    optimizer.step()
    torch.testing.assert_close(model.fc.weight, model.embedding.weight)
    model.load_state_dict(make_model(deep_output=True, tied_embedding=True).state_dict())
    assert model.fc.weight.data_ptr() == model.embedding.weight.data_ptr()
    untied = make_model(deep_output=True)
    assert untied.fc.weight.data_ptr() != untied.embedding.weight.data_ptr()


@none_and_all
def test_longer_padding_changes_neither_logits_nor_gradients(options: Options) -> None:
    results = []
    for captions in (CAPTIONS, pad(CAPTIONS, (0, 4), value=PAD)):
        model = make_model(**options)
        logits, attention = model(make_cells(), captions)
        assert attention.shape[2] == captions.shape[2] - 1
        loss = backward(model, captions)
        gradients = {name: value.grad for name, value in model.named_parameters()}
        results.append((logits, loss, gradients))

    torch.testing.assert_close(results[0], results[1])


@none_and_all
def test_padding_gets_no_gradient(options: Options) -> None:
    model = make_model(**options)
    if options["tied_embedding"]:
        model.fc.bias.data[PAD] = -1e4  # nor as an output
    backward(model)

    gradient = model.embedding.weight.grad
    assert gradient is not None
    assert not gradient[PAD].any()
    assert gradient[BOS].any()


@pairwise
def test_gradients_reach_every_parameter(options: Options) -> None:
    model = make_model(**options).train()
    backward(model)

    for name, parameter in model.named_parameters():
        if name.startswith(("detectors.", "pointer.classifier.")):
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # Softmax ignores a constant that is added to all scores.
        if name != "attn.v.bias":
            assert parameter.grad.abs().max() > 1e-7, name


def test_training_halves_the_loss() -> None:
    model = make_model(**ALL_ON)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    first = backward(model)
    for _ in range(40):
        optimizer.zero_grad()
        last = backward(model)
        optimizer.step()

    assert last < 0.5 * first


def test_dropout_is_active_in_training_only() -> None:
    model = make_model(dropout=0.5, feature_dropout=0.5)
    first, second = (model(make_cells(), CAPTIONS)[0] for _ in range(2))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, make_model()(make_cells(), CAPTIONS)[0])

    model.train()
    first, second = (model(make_cells(), CAPTIONS)[0] for _ in range(2))
    assert (first - second).abs().max() > 1e-3


def test_feature_dropout_drops_a_channel_in_all_cells() -> None:
    torch.manual_seed(0)
    model = make_model(feature_dropout=0.5).train()

    _, memory = model.start(make_cells(32))

    dropped = memory.features == 0  # (B, P, C)
    assert torch.equal(dropped.any(dim=1), dropped.all(dim=1))
    assert 0.3 < dropped.float().mean() < 0.7


def test_bfloat16_stays_close_to_float32() -> None:
    model = make_model(**ALL_ON)
    logits, attention = model(make_cells(), CAPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, rough_attention = model(make_cells(), CAPTIONS)

    torch.testing.assert_close(rough.float(), logits, atol=0.1, rtol=0.05)
    torch.testing.assert_close(rough_attention.float(), attention, atol=0.05, rtol=0)
    torch.testing.assert_close(rough_attention.float().sum(dim=-1), IS_TARGET.float())
