"""RESULTS.md is true: every row shows the figures of its records and the command that made them."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import train
from captioner.arguments import build_parser as captioner_parser
from captioner.config import TrainConfig
from captioner.training.word_kinds import KINDS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
RECORDS = ROOT / "assets" / "runs"
LINK = re.compile(r"\]\((assets/runs/[\w.-]+\.json)\)")
COMMAND = re.compile(r"`(python [^`]+)`")
SOURCES = ("flickr8k", "everyday")  # of runs on both
# Column -> name in the records.
SCORES = {
    **{name: name for name in ("BLEU-1", "BLEU-4", "CIDEr", "ROUGE-L", "repetition", "epoch")},
    "cross-entropy": "val_loss",
    "words": "mean_length",
    **{
        f"{name} {source}": f"{name} {source}" for name in ("BLEU-4", "CIDEr") for source in SOURCES
    },
}
# Column -> test, captions, kind of word, of the tables of maps.
MAP_SCORES = {
    "people's captions": ("pointing", "people", "all"),
    "objects alone": ("pointing", "people", "object"),
    "the model's captions": ("pointing", "model", "all"),
    "focus": ("focus", "people", "all"),
    "focus, objects": ("focus", "people", "object"),
    "hottest, objects": ("hottest", "people", "object"),
    **{test: (test, "model", "all") for test in ("deletion", "insertion", "likeness", "cells")},
    **{kind: ("verdicts", "model", kind) for kind in ("all", *KINDS)},
}
BASELINES = ("center", "chance", "shuffled")
# Depend on the reader's files and machine.
LOCAL_SETTINGS = ("data", "text", "encoder_weights", "device", "bfloat16", "seed")


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
    """Return the figures of the saved epoch, or of an evaluation."""
    if "scores" in record:
        scores = record["report_scores" if decoding == "greedy, no bans" else "scores"]
        return {**scores, "val_loss": record["cross_entropy"]}
    sign = 1 if record["config"]["select_by"] == "loss" else -1
    key = "val_loss" if sign == 1 else "CIDEr"
    scored = [row for row in record["epochs"] if key in row]  # detectors write no captions
    best: dict[str, float] = min(scored, key=lambda row: sign * row[key])
    return best


def _records(row: dict[str, str]) -> list[dict[str, Any]]:
    links = LINK.findall(" ".join(row.values()))
    return [json.loads((ROOT / link).read_text(encoding="utf-8")) for link in links]


def test_every_record_has_a_row() -> None:
    assert len(ROWS) > 5
    linked = {Path(link).name for link in LINK.findall(RESULTS)}
    assert linked == {path.name for path in RECORDS.iterdir()}


def _is_of_maps(row: dict[str, str]) -> bool:
    return "map" in row or "verdict" in row


def test_rows_of_maps_show_the_figures_of_their_records() -> None:
    rows = [row for row in ROWS if _is_of_maps(row)]
    assert len(rows) > 10
    for row in rows:
        (record,) = _records(row)
        name = row.get("map") or row["verdict"]
        scores = {
            (each["test"], each["captions"], each["kind"]): each
            for each in record["maps"]
            if each["map"] == name
        }
        checked = [column for column in row if column in MAP_SCORES]
        assert len(checked) >= 3, row
        for column in checked:
            score = scores[MAP_SCORES[column]]
            value, *bounds = re.findall(r"-?[\d.]+", row[column].partition(" [")[0])
            assert value == f"{score['value']:.1f}", (column, row)
            if bounds:
                assert bounds == [f"{bound:.1f}" for bound in score["interval"]], (column, row)
            if "[" in row[column]:
                baseline = "chance" if column in ("deletion", "insertion") else "shuffled"
                assert row[column].endswith(f"[{score[baseline]:.1f}]"), (column, row)
        for column in row.keys() & set(BASELINES):
            assert row[column] == f"{scores['pointing', 'people', 'all'][column]:.1f}", row


def test_words_that_are_seen_there_are_there() -> None:
    record = json.loads((RECORDS / "maps-shipped-coco-boxes.json").read_text(encoding="utf-8"))
    found = [
        score for score in record["maps"] if (score["test"], score["kind"]) == ("seen there", "all")
    ]
    words = sum(score["words"] for score in found)
    assert words > 300
    right = sum(score["value"] * score["words"] for score in found) / words
    assert right >= 85
    assert f"{right:.1f} % are" in RESULTS
    for score in found:
        low, high = score["interval"]
        assert f"{score['value']:.1f} ({low:.1f}\u2013{high:.1f}) % of {score['words']}" in RESULTS


def test_rows_show_the_figures_of_their_records() -> None:
    for row in ROWS:
        if _is_of_maps(row):
            continue
        figures = [_best(record, row.get("decoding", "")) for record in _records(row)]
        columns = [name for name in SCORES if row.get(name, "-") not in ("", "-")]
        assert len(columns) >= 2, row
        if "people invented" in row:
            found = [record["invented_people"] for record in _records(row)]
            shown = [f"{each['captions']} of {each['photos']}" for each in found]
            assert [row["people invented"]] == shown, row
        for column in columns:
            name = SCORES[column]
            scale = 100 if name == "repetition" else 1
            values = [figure[name] * scale for figure in figures]
            mean, *spread = (part.strip(" %") for part in row[column].split("±"))
            tolerance = 0.500001 * 10 ** -len(mean.partition(".")[2])
            assert abs(float(mean) - statistics.mean(values)) <= tolerance, (column, row)
            assert len(spread) == (len(values) > 1), (column, row)
            for deviation in spread:
                assert abs(float(deviation) - statistics.stdev(values)) <= tolerance, (column, row)


def test_commands_of_rows_made_their_records() -> None:
    for row in ROWS:
        match = COMMAND.search(" ".join(row.values()))
        assert match, row
        _, program, *arguments = shlex.split(match[1])
        records = _records(row)
        if program != "train.py":
            captioner_parser().parse_args(arguments[1:])
        elif "commit" in row:  # made with settings that are removed since
            assert all(record["git_commit"] == row["commit"] for record in records), row
        else:
            _assert_settings(arguments, records)


def _assert_settings(arguments: list[str], records: list[dict[str, Any]]) -> None:
    """Check that a command has the settings of its records, and one of their seeds."""
    options = vars(train.build_parser().parse_args(arguments))
    config = train.config_of(options).to_dict()
    for record in records:
        # A record may hold a setting that is removed since, and lack a newer one.
        newer = (
            *("language", "detector_epochs", "detector_photos", "attention_weight", "pointer"),
            *("image_column", "caption_column", "mirror_words"),
        )
        defaults = {name: getattr(TrainConfig(), name) for name in newer}
        recorded = {**defaults, **record["config"]}
        for name in config.keys() - set(LOCAL_SETTINGS):
            assert recorded[name] == config[name], (name, arguments)
        assert record["git_commit"]
    seeds = {record["config"]["seed"] for record in records}
    assert len(seeds) == len(records)
    assert config["seed"] in seeds


# Speed


def _speed_rows() -> dict[str, list[str]]:
    """Return the cells of the table of ratios, by name."""
    _, section = RESULTS.split("\n## Speed\n", 1)
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_ratio_table_shows_the_recorded_benchmarks() -> None:
    record = json.loads((ROOT / "assets" / "benchmarks.json").read_text(encoding="utf-8"))
    rows = _speed_rows()
    for name, values in record["rows"].items():
        ratio, aim = rows[name][:2]
        assert ratio == f"{values['ratio']:.2f}", name
        assert aim == values["aim"], name
    assert record["machine"]["cores"] == 2


def test_every_benchmark_has_a_row() -> None:
    code = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "benchmarks").glob("*.py")
    )
    tests = re.findall(r"^def test_", code, flags=re.MULTILINE)
    record = json.loads((ROOT / "assets" / "benchmarks.json").read_text(encoding="utf-8"))
    assert len(record["rows"]) >= len(tests)
