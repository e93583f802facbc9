"""The numbers of one step add up to what the model returns, and their code is where they say."""

from __future__ import annotations

import ast
import dataclasses
import json
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from captioner.config import BOS, EOS
from captioner.model import decoder, search, steps
from captioner.model.decoder import CaptionModel
from captioner.model.steps import WordSteps, code_of, word_steps
from captioner.model.words import UNWRITTEN
from tests.model.tiny import (
    ALL_ON,
    PAIRWISE,
    REPORT,
    VOCABULARY,
    WORDS,
    Options,
    make_cells,
    make_model,
    name_of,
)

# 5 and 12 are names and 13 one after 12; 4 to 8 have a detector; only the pointer writes 21.
IDS = [9, 5, 12, 13, 21, EOS]
TEXTS = [f"w{index}" for index in range(VOCABULARY)]
NAMES_ONLY: Options = {**ALL_ON, **WORDS, "words": False, "evidence": False}


def explain(model: CaptionModel, index: int) -> WordSteps:
    return word_steps(model, make_cells(1)[0], IDS[: index + 1], TEXTS)


@torch.no_grad()
def plain_step(model: CaptionModel, index: int) -> tuple[Tensor, Tensor, decoder.State]:
    """Return logits (V,), attention (P,) and the state of ``CaptionModel.step`` at a word."""
    state, memory = model.start(make_cells(1))
    for token in [BOS, *IDS][: index + 1]:
        logits, attention, state = model.step(torch.tensor([[token]]), state, memory)
    return logits[0, 0], attention[0, 0], state


def close(number: float) -> object:
    return pytest.approx(number, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("options", [*PAIRWISE, NAMES_ONLY], ids=name_of)
def test_numbers_add_up_to_what_the_step_returns(options: Options) -> None:
    model = make_model(**options)
    for index in range(len(IDS)):
        found = explain(model, index)
        logits, attention, state = plain_step(model, index)
        torch.testing.assert_close(torch.tensor(found.attention), attention)
        torch.testing.assert_close(torch.tensor(found.scores).softmax(dim=0), attention)
        assert found.hidden == close(float(state.hidden.norm()))
        assert found.cell == close(float(state.cell.norm()))
        assert found.log_sum_exp == close(float(logits.logsumexp(dim=0)))
        probabilities = logits.softmax(dim=0)
        for each in found.candidates:
            token = TEXTS.index(each.text)
            assert each.output + each.evidence + each.pointer == close(each.logit)
            assert each.logit == close(float(logits[token]))
            assert each.probability == close(float(probabilities[token]))
        best = [TEXTS[token] for token in probabilities.topk(5).indices]
        assert [each.text for each in found.candidates][:5] == best
        assert TEXTS[IDS[index]] in [each.text for each in found.candidates]
        assert (found.previous, found.word) == tuple(TEXTS[k] for k in [BOS, *IDS][index:][:2])


@torch.no_grad()
def test_vectors_of_a_step_have_the_norms_that_it_tells() -> None:
    model = make_model(**ALL_ON)
    before, after = plain_step(model, 1)[2], plain_step(model, 2)[2]
    found = explain(model, 2)
    word = model.embedding.weight[IDS[1]]
    assert found.word_norm == close(float(word.norm()))
    assert found.hidden_before == close(float(before.hidden.norm()))
    assert found.query == close(float((before.hidden.norm() ** 2 + word.norm() ** 2).sqrt()))
    query = torch.cat([before.hidden[0, 0], word])
    assert found.projected_query == close(float(model.attn.Wh(query).norm()))
    context = torch.tensor(found.attention) @ model.remember(make_cells(1)).features[0]
    assert found.context == close(float(context.norm()))
    assert found.cell_before == close(float(before.cell.norm()))
    assert found.cell_change == close(float((after.cell - before.cell).norm()))
    assert found.gate == close(float(torch.sigmoid(model.gate(before.hidden))))


@torch.no_grad()
def test_lstm_gates_are_those_that_make_the_next_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(**ALL_ON)
    seen: list[Tensor] = []
    lstm_gates = steps._lstm_gates

    def recorded(*arguments: object) -> tuple[Tensor, ...]:
        seen.extend(lstm_gates(*arguments))  # type: ignore[arg-type]
        return tuple(seen)

    monkeypatch.setattr(steps, "_lstm_gates", recorded)
    found = explain(model, 2)
    before, after = plain_step(model, 1)[2], plain_step(model, 2)[2]
    entered, kept, shown = seen
    # h = o tanh(c), and what f leaves of the old cell and i lets in of at most 1 is the new one.
    torch.testing.assert_close(shown * after.cell[0].tanh(), after.hidden[0])
    new = (after.cell[0] - kept * before.cell[0]) / entered
    assert new.abs().max() < 1
    assert new.abs().max() > 0.1
    means = [float(gate.mean()) for gate in seen]
    assert [found.input_gate, found.forget_gate, found.output_gate] == [close(x) for x in means]


def test_evidence_and_pointer_are_explained_by_their_factors() -> None:
    model = make_model(**ALL_ON)
    torch.nn.init.constant_(model.pointer.gate.bias, 3.0)
    candidates = []
    for index in range(len(IDS)):
        found = explain(model, index)
        assert found.evidence_gain is not None
        assert found.pointer_gate is not None
        assert found.pointer_scale is not None
        for each in found.candidates:
            candidates.append(each)
            assert each.evidence == close(found.evidence_gain * (each.seen or 0))
            if each.named is None:
                assert each.pointer == close(0)
                continue
            written = torch.tensor(each.output + each.evidence)
            pointed = found.pointer_scale * torch.tensor(each.named).log() + found.pointer_gate
            assert each.logit == close(float(torch.logaddexp(written, pointed)))
    assert any(abs(each.evidence) > 0.01 for each in candidates)
    assert any(each.pointer > 0.01 for each in candidates)
    (unwritten,) = [each for each in explain(model, 4).candidates if each.text == "w21"]
    assert unwritten.is_unwritten
    assert unwritten.output == UNWRITTEN


def test_steps_that_a_model_lacks_are_left_out() -> None:
    always = ["query", "scores", "attention", "context", "lstm", "output", "softmax"]
    report = explain(make_model(**REPORT), 2)
    assert list(report.code) == always
    missing = {name for name, value in dataclasses.asdict(report).items() if value is None}
    assert missing == {"gate", "evidence_gain", "pointer_gate", "pointer_scale"}
    assert report.sizes["query"] == report.sizes["hidden"]
    assert {(each.evidence, each.pointer) for each in report.candidates} == {(0, 0)}
    everything = explain(make_model(**ALL_ON), 2)
    assert set(everything.code) - set(always) == {"gate", "deep", "evidence", "pointer"}
    assert everything.sizes["query"] == everything.sizes["hidden"] + everything.sizes["word"]


def test_steps_are_plain_json() -> None:
    found = explain(make_model(**ALL_ON), 2)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["scores"] == found.scores
    assert values["candidates"][0]["text"] == found.candidates[0].text
    assert values["code"]["query"][0]["line"] == found.code["query"][0].line


# The code

WHERE = {
    "query": "CaptionModel.step_unaided",
    "scores": "Attention.score",
    "attention": "Attention.attend",
    "context": "Attention.attend",
    "gate": "CaptionModel.gate_context",
    "lstm": "CaptionModel.step_unaided",
    "deep": "CaptionModel.predict",
    "output": "CaptionModel.predict",
    "evidence": "CaptionModel.add_recognized",
    "pointer": "CaptionModel.add_recognized",
    "softmax": "_Search.run",
}


def holder_of(path: Path, line: int) -> str:
    """Return the class and method around a line."""
    found = [
        f"{group.name}.{method.name}"
        for group in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(group, ast.ClassDef)
        for method in group.body
        if isinstance(method, ast.FunctionDef) and method.lineno <= line <= (method.end_lineno or 0)
    ]
    assert len(found) == 1, f"{path.name}:{line}"
    return found[0]


def test_code_of_every_step_is_a_whole_statement_of_its_method() -> None:
    assert list(WHERE) == list(steps._CODE)
    for step, method in WHERE.items():
        module = search if step == "softmax" else decoder
        path = Path(str(module.__file__))
        for each in code_of(step):
            assert each.file == path.name
            source = path.read_text(encoding="utf-8").splitlines()
            shown = each.text.splitlines()
            for number, text in enumerate(shown, each.line):
                assert source[number - 1].endswith(text)
            body = textwrap.indent(each.text, "    ")
            assert len(ast.parse(f"def method(self):\n{body}").body[0].body) == 1  # type: ignore[attr-defined]
            assert holder_of(path, each.line) == method, step


def test_code_that_is_gone_or_ambiguous_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for beginning, count in (("no such line", 0), ("def forward(", 2)):
        monkeypatch.setitem(steps._CODE, "lost", [(decoder, beginning, 1)])
        with pytest.raises(LookupError, match=f"has {count} lines"):
            code_of("lost")
