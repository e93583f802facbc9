"""The command line of ``python -m captioner``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from captioner import __version__
from captioner.config import (
    DEFAULT_SOURCE,
    FEATURES_FOLDER,
    FORMATS,
    DecodingOptions,
    TrainConfig,
)
from captioner.errors import ConfigError
from captioner.files import user_path
from captioner.options import OptionParser, add_options


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = OptionParser(
        prog="captioner" if Path(sys.argv[0]).stem == "captioner" else "python -m captioner",
        description="Caption photos and show where the model looked for each word.",
        epilog="Exit codes: 0 success, 1 something could not be read or done, 2 a setting, a "
        "checkpoint or a data set cannot be used.",
    )
    parser.add_argument("--version", action="version", version=f"captioner {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_caption(commands)
    _add_score(commands)
    _add_explain(commands)
    _add_evaluate(commands)
    _add_export(commands)
    return parser


def _add_caption(commands: Any) -> None:
    caption = commands.add_parser(
        "caption",
        help="caption photos and folders of photos",
        description="Print a line per photo: its path, a tab, its caption. With --output write a "
        "table instead, of any number of photos; the same command resumes where it was stopped.",
    )
    caption.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="Photo or folder; - reads a photo from standard input.",
    )
    _add_table(caption)
    _add_results(caption)
    _add_model(caption)
    _add_decoding(
        caption,
        *("length_penalty", "max_length", "prefix", "temperature", "top_p", "samples", "seed"),
    )


def _add_table(caption: argparse.ArgumentParser) -> None:
    table = caption.add_argument_group("tables of captions")
    table.add_argument(
        "--output",
        type=user_path,
        metavar="TABLE",
        help="Write photo, filename, caption, log_probability, confidence and error to "
        "captions.csv, to captions.jsonl (JSON Lines), or as Parquet files into a folder such as "
        "captions.parquet. photo is the path as given, or the row number in the split of --data; "
        "filename is the photo's name there; confidence is the probability that people would use "
        "two thirds of the caption's words for what the photo shows.",
    )
    table.add_argument(
        "--data",
        metavar="SOURCE",
        help="Caption the photos of a dataset instead of PATH: a Hub id, a folder or a file, as "
        "for train.py. It needs no captions.",
    )
    add_options(table, TrainConfig, {"image_column": "by rule"})
    table.add_argument(
        "--split",
        default="train",
        help="Split of --data: train, validation (or val), test. Default: %(default)s.",
    )
    table.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray is Ray Data (pip install 'ray[data]<2.64'), on this machine or on the cluster "
        "that RAY_ADDRESS names. Default: %(default)s.",
    )
    table.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="Number of Ray workers, each with its own model. Default: %(default)s.",
    )


def _add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        help="score a caption that you wrote",
        description="Print the model's probability of each word of a caption and of the whole "
        "caption.",
    )
    score.add_argument("photo", metavar="PHOTO", help="Photo; - reads it from standard input.")
    score.add_argument("text", metavar="TEXT", help='The caption, as in "two dogs play".')
    _add_results(score)
    _add_model(score)


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="tell where each word of a caption comes from",
        description="Print each word's verdict: seen there (and where), from the scene, from the "
        "sentence, or guessed. With --word print that word's maps as numbers, and how it was "
        "chosen; with --json everything.",
    )
    explain.add_argument("photo", metavar="PHOTO", help="Photo; - reads it from standard input.")
    explain.add_argument(
        "--text", metavar="TEXT", help="Explain this caption instead of the model's own."
    )
    explain.add_argument(
        "--word",
        type=int,
        metavar="N",
        help="Print the maps of the N-th word, counted from 1; the number after the last is the "
        "end.",
    )
    _add_results(explain)
    _add_model(explain)
    _add_decoding(explain)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score a checkpoint on photos with captions",
        description="Score generated captions against all references, with the given settings "
        "and with the original report's decoding (greedy, no bans), and how well the confidence "
        "predicts which captions are right.",
    )
    evaluate.add_argument(
        "--data",
        default=DEFAULT_SOURCE,
        metavar="SOURCE",
        help="Hub id, folder or file, as for train.py. Default: %(default)s.",
    )
    columns = {"image_column": "by rule", "caption_column": "by rule"}
    add_options(evaluate, TrainConfig, columns)
    evaluate.add_argument("--split", default="validation", help="Default: %(default)s.")
    evaluate.add_argument(
        "--limit", type=int, default=0, metavar="N", help="Maximum number of photos. 0 = all."
    )
    evaluate.add_argument(
        "--json",
        type=user_path,
        metavar="FILE",
        help="Write scores, reliability and captions to FILE.",
    )
    evaluate.add_argument(
        "--maps",
        action="store_true",
        help="Test the words' maps too: do they point at boxes (if the data has the column boxes) "
        "and at the right photo of a mosaic? With --json FILE, plot the figures beside FILE.",
    )
    evaluate.add_argument(
        "--sheet",
        type=user_path,
        metavar="FILE",
        help="Write a PNG of 20 photos with reference (GT) and caption (PRED).",
    )
    evaluate.add_argument(
        "--cache",
        type=user_path,
        default=FEATURES_FOLDER,
        help="Folder for the cached encoder features. Default: %(default)s.",
    )
    _add_model(evaluate)
    _add_decoding(evaluate)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="make a Hugging Face Space or ONNX models from a checkpoint, or upload it to the Hub",
        description="Write the folder of a Space, ready to be uploaded, upload a checkpoint as a "
        "model, which --checkpoint USER/NAME then takes, or write it as ONNX, which runs without "
        "PyTorch. Uploading needs `hf auth login`.",
    )
    export.add_argument("--space", type=user_path, metavar="DIR", help="New folder for a Space.")
    export.add_argument("--hub", metavar="USER/NAME", help="Name of the model on the Hub.")
    export.add_argument("--private", action="store_true", help="Make the uploaded model private.")
    export.add_argument(
        "--onnx",
        type=user_path,
        metavar="DIR",
        help="New folder for ONNX models (pip install onnxscript), with a script that captions a "
        "photo with onnxruntime, numpy and pillow alone.",
    )
    _add_checkpoint(export)


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="Print a JSON object per line, with every number."
    )
    parser.add_argument(
        "--heatmaps",
        type=user_path,
        metavar="DIR",
        help="Also write a file with the maps of each photo into this folder.",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="png",
        help="Format of those files: a sheet, an animation, every number, or a web page that works "
        "offline. Default: %(default)s.",
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", metavar="PATH|HUB_ID", help="Default: the shipped checkpoint."
    )
    parser.add_argument("--encoder-weights", metavar="FILE", help="File of the encoder's weights.")


def _add_model(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="cpu",
        help="auto = the fastest available. Default: %(default)s.",
    )


def _add_decoding(parser: argparse.ArgumentParser, *names: str) -> None:
    group = parser.add_argument_group("decoding")
    defaults = {name: getattr(DecodingOptions(), name) for name in ("beam_size", *names)}
    if "max_length" in defaults:
        defaults["max_length"] = "as in the checkpoint's training"
    add_options(group, DecodingOptions, defaults)
    group.add_argument(
        "--no-bans",
        action="store_true",
        help="Allow repetitions, <unk> and endings like 'a' or 'of', as the original report does.",
    )


def decoding_options(arguments: argparse.Namespace) -> DecodingOptions:
    """Return the decoding that parsed arguments ask for.

    Raises:
        ConfigError: an option is out of its range, or needs another one.
    """
    options = DecodingOptions()
    if "no_bans" in arguments and arguments.no_bans:
        options = dataclasses.replace(
            DecodingOptions.plain_greedy(), beam_size=DecodingOptions().beam_size
        )
    changes = {
        name: value
        for name, value in vars(arguments).items()
        if name in vars(options) and value is not None
    }
    options = dataclasses.replace(options, **changes)
    for name in ("top_p", "samples"):
        if name in changes and not options.temperature:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} needs --temperature above 0: beam search samples nothing")
    return options
