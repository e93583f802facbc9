"""RESULTS.md tells the truth: every row is what its records say, and its command made them."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest

import train
from captioner.arguments import build_parser as captioner_parser

ROOT = Path(__file__).resolve().parent.parent
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
RECORDS = ROOT / "assets" / "runs"
LINK = re.compile(r"\]\((assets/runs/[\w.-]+\.json)\)")
COMMAND = re.compile(r"`(python [^`]+)`")
# Columns, and what records call it.
SCORES = {
    **{name: name for name in ("BLEU-1", "BLEU-4", "CIDEr", "ROUGE-L", "repetition", "epoch")},
    "cross-entropy": "val_loss",
    "words": "mean_length",
}
# Where the files lie is the reader's own business, and so is the machine.
ELSEWHERE = ("data", "text", "encoder_weights", "device", "bfloat16", "seed")


def _rows() -> list[dict[str, str]]:
    """Return the cells of every table row that links to a record, by column."""
    rows: list[dict[str, str]] = []
    names: list[str] = []
    for line in RESULTS.splitlines():
        if not line.startswith("|"):
            names = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not names:
            names = cells
        elif LINK.search(line):
            rows.append(dict(zip(names, cells, strict=True)))
    return rows


ROWS = _rows()


def _best(record: dict[str, Any], decoding: str) -> dict[str, float]:
    """Return the figures of the epoch that was kept, or of an evaluation."""
    if "scores" in record:
        scores = record["report_scores" if decoding == "greedy, no bans" else "scores"]
        return {**scores, "val_loss": record["cross_entropy"]}
    sign = 1 if record["config"]["select_by"] == "loss" else -1
    key = "val_loss" if sign == 1 else "CIDEr"
    best: dict[str, float] = min(record["epochs"], key=lambda row: sign * row[key])
    return best


def _records(row: dict[str, str]) -> list[dict[str, Any]]:
    links = LINK.findall(" ".join(row.values()))
    return [json.loads((ROOT / link).read_text(encoding="utf-8")) for link in links]


def test_there_are_rows_and_every_record_has_one() -> None:
    assert len(ROWS) > 5
    linked = {Path(link).name for link in LINK.findall(RESULTS)}
    assert linked == {path.name for path in RECORDS.iterdir()}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: next(iter(row.values())))
def test_a_row_says_what_its_records_say(row: dict[str, str]) -> None:
    found = [_best(record, row.get("decoding", "")) for record in _records(row)]
    compared = 0
    for column, name in SCORES.items():
        if column not in row or row[column] in ("", "-"):
            continue
        values = [each[name] * (100 if name == "repetition" else 1) for each in found]
        mean, *spread = (float(part.strip(" %")) for part in row[column].split("±"))
        digits = len(row[column].split("±")[0].strip(" %").partition(".")[2])
        tolerance = 0.500001 * 10**-digits
        assert abs(mean - statistics.mean(values)) <= tolerance, column
        assert bool(spread) == (len(values) > 1)
        if spread:
            assert abs(spread[0] - statistics.stdev(values)) <= tolerance, column
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("row", ROWS, ids=lambda row: next(iter(row.values())))
def test_a_row_s_command_is_the_one_that_made_its_records(row: dict[str, str]) -> None:
    match = COMMAND.search(" ".join(row.values()))
    assert match, row
    words = shlex.split(match[1])
    if words[1] != "train.py":
        captioner_parser().parse_args(words[3:])
        return
    if "commit" in row:  # settings that did not pay are gone since
        assert all(record["git_commit"] == row["commit"] for record in _records(row))
        return
    options = vars(train.build_parser().parse_args(words[2:]))
    config = train.config_of(options).to_dict()
    for record in _records(row):
        # May hold a setting that did not pay and is gone since, and lack one that is newer.
        kept = {"language": "en", **record["config"]}
        for name in config.keys() - set(ELSEWHERE):
            assert kept[name] == config[name], name
        assert record["git_commit"]
    seeds = [record["config"]["seed"] for record in _records(row)]
    assert len(set(seeds)) == len(seeds)
    assert config["seed"] in seeds


# Speed


def _speed_rows() -> dict[str, list[str]]:
    """Return the cells of the table of ratios, by name."""
    _, section = RESULTS.split("\n## Speed\n", 1)
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_the_table_of_ratios_is_what_the_benchmarks_wrote() -> None:
    record = json.loads((ROOT / "assets" / "benchmarks.json").read_text(encoding="utf-8"))
    rows = _speed_rows()
    for name, values in record["rows"].items():
        ratio, aim = rows[name][:2]
        assert ratio == f"{values['ratio']:.2f}", name
        assert aim == values["aim"], name
    assert record["machine"]["cores"] == 2


def test_every_benchmark_has_its_row() -> None:
    code = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "benchmarks").glob("*.py")
    )
    tests = re.findall(r"^def test_", code, flags=re.MULTILINE)
    record = json.loads((ROOT / "assets" / "benchmarks.json").read_text(encoding="utf-8"))
    assert len(record["rows"]) >= len(tests)
