"""``python -m captioner caption|evaluate|export``: arguments and printing only."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from captioner.config import DEFAULT_SOURCE, FEATURES_FOLDER, FORMATS, DecodingOptions
from captioner.errors import CaptionerError, ConfigError, ImageError
from captioner.files import write_whole, writing

_BATCH = 16


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m captioner",
        description="Captions for photos, and where the model looked for each word.",
        epilog="Exit codes: 0 all went well, 1 something could not be read or done, 2 a setting, a "
        "checkpoint or a data set cannot be used.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    caption = commands.add_parser(
        "caption",
        help="caption photos and folders of photos",
        description="Print a line a photo: its path, a tab, its caption. With --output write a "
        "table instead, of any number of photos; the same command goes on where it was stopped.",
    )
    caption.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="photo or folder")
    caption.add_argument(
        "--data",
        metavar="HUB_ID|FOLDER",
        help="the photos of a data set instead of PATH, with --output: a Hub id, a folder of "
        "Parquet (column image), or photos with captions.csv, captions.txt or metadata.csv",
    )
    caption.add_argument(
        "--split",
        default="train",
        help="of --data, such as train, validation (or val) and test; default %(default)s",
    )
    caption.add_argument(
        "--output",
        type=Path,
        metavar="TABLE",
        help="write photo, filename, caption, log_probability and error to captions.csv, to "
        "captions.jsonl (JSON Lines), or as Parquet files into a folder such as captions.parquet. "
        "photo is the path as given, or the row number in the split of --data; filename is the "
        "photo's name there",
    )
    caption.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="of --output: ray is Ray Data (pip install 'ray[data]'), on this machine or on the "
        "cluster that RAY_ADDRESS names; default %(default)s",
    )
    caption.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="of Ray, each with its own model; default %(default)s",
    )
    caption.add_argument("--json", action="store_true", help="one JSON object a line: every number")
    caption.add_argument(
        "--heatmaps", type=Path, metavar="DIR", help="also write a file with the maps of each photo"
    )
    caption.add_argument(
        "--format",
        choices=FORMATS,
        default="png",
        help="of those files: a sheet, an animation, every number, or a web page that works "
        "offline; default %(default)s",
    )
    caption.set_defaults(run=_caption)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a checkpoint on photos with captions",
        description="Score freely written captions against all references, with the settings "
        "given and as the original report decodes (greedy, no bans).",
    )
    evaluate.add_argument(
        "--data", default=DEFAULT_SOURCE, help="Hub id or folder, as for train.py; %(default)s"
    )
    evaluate.add_argument("--split", default="validation", help="default %(default)s")
    evaluate.add_argument("--limit", type=int, default=0, help="at most so many photos")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write scores and captions")
    evaluate.add_argument(
        "--sheet", type=Path, metavar="FILE", help="write a PNG of 20 photos with GT and PRED"
    )
    evaluate.add_argument(
        "--cache", type=Path, default=FEATURES_FOLDER, help="features; default %(default)s"
    )
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser(
        "export",
        help="make a Hugging Face Space of a checkpoint, or put it on the Hub",
        description="Write the folder of a Space, ready to be uploaded, or upload a checkpoint as "
        "a model, which --checkpoint USER/NAME then takes. Uploading needs `hf auth login`.",
    )
    export.add_argument("--space", type=Path, metavar="DIR", help="a new folder for a Space")
    export.add_argument("--hub", metavar="USER/NAME", help="the model's name on the Hub")
    export.add_argument("--private", action="store_true", help="of --hub: seen by its owner only")
    export.set_defaults(run=_export)

    for command in (caption, evaluate, export):
        command.add_argument(
            "--checkpoint", metavar="PATH|HUB_ID", help="a checkpoint; default: the shipped one"
        )
    for command in (caption, evaluate):
        command.add_argument("--encoder-weights", metavar="FILE", help="the encoder's weights")
        command.add_argument(
            "--device",
            choices=["auto", "cpu", "cuda", "mps"],
            default="cpu",
            help="auto is the fastest that is there; default %(default)s",
        )
        command.add_argument(
            "--beam-size",
            type=int,
            default=DecodingOptions().beam_size,
            metavar="N",
            help="1 is greedy; default %(default)s",
        )
        command.add_argument(
            "--no-bans",
            action="store_true",
            help="allow stutter, <unk> and ends on 'a' or 'of', as the original report does",
        )
    return parser


def _photos_in(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield photos with the place that their sheet gets in the folder of heat maps."""
    from captioner.images import SUFFIXES

    if not os.path.isdir(path):  # noqa: PTH112 -- Path raises where a name is too long
        yield path, Path(path.name)
        return
    found = False
    for folder, folders, names in os.walk(path):
        folders.sort()
        for each in (Path(folder, name) for name in sorted(names)):
            if each.suffix.lower() in SUFFIXES and each.is_file():
                found = True
                yield each, each.relative_to(path)
    if not found:
        raise ImageError(f"{path} holds no photo ({' '.join(sorted(SUFFIXES))})")


def _write(path: Path, data: bytes) -> None:
    """Write a file and its folders."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout, say
            path.write_bytes(data)
            return
    write_whole(path, data)


def _free_name(path: Path, taken: set[Path]) -> Path:
    """Return ``path``, numbered if two photos would land there."""
    number, free = 2, path
    while free in taken:
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    taken.add(free)
    return free


def _caption(arguments: argparse.Namespace, options: DecodingOptions) -> int:
    """Caption what is named; what cannot be read is told and passed over."""
    if arguments.output:
        return _caption_all(arguments, options)
    if arguments.data:
        raise ConfigError("--data needs --output, a folder for the captions")
    if arguments.engine != "local":
        raise ConfigError("--engine ray needs --output, a folder for the captions")
    if not arguments.paths:
        raise ConfigError("give a PATH: a photo or a folder of photos")
    from captioner.images import open_photo
    from captioner.predictor import Captioner

    captioner = Captioner.load(
        arguments.checkpoint, arguments.encoder_weights, device=arguments.device
    )
    failed = False
    taken: set[Path] = set()
    photos: list[tuple[Path, Path]] = []
    for named in arguments.paths:
        try:
            photos += _photos_in(named)
        except ImageError as error:
            failed = True
            print(f"captioner: {error}", file=sys.stderr)
    for start in range(0, len(photos), _BATCH):
        batch = photos[start : start + _BATCH]
        captions = captioner.caption_each([path for path, _ in batch], options)
        for (path, place), caption in zip(batch, captions, strict=True):
            if isinstance(caption, ImageError):
                failed = True
                print(f"captioner: {caption}", file=sys.stderr)
                continue
            if arguments.json:
                print(json.dumps({"path": str(path), **caption.to_dict()}), flush=True)
            else:
                print(f"{path}\t{caption.text}", flush=True)
            if arguments.heatmaps:
                from captioner.overlay import render

                target = arguments.heatmaps / place.with_name(f"{place.name}.{arguments.format}")
                data = render(open_photo(path), caption, arguments.format)
                _write(_free_name(target, taken), data)
    return 1 if failed else 0


def _caption_all(arguments: argparse.Namespace, options: DecodingOptions) -> int:
    """Write the captions of any number of photos to a table; print how many there are."""
    if bool(arguments.paths) == bool(arguments.data):
        raise ConfigError("--output takes either PATHs or --data: give one of them")
    if arguments.json or arguments.heatmaps:
        raise ConfigError("--output writes no maps: leave --json and --heatmaps away")
    from captioner import bulk
    from captioner.encoders import choose_device
    from captioner.predictor import Captioner

    if arguments.engine == "ray":  # its workers may stand in another folder
        for name in ("data", "checkpoint", "encoder_weights", "output"):
            value = getattr(arguments, name)
            if value is not None and (name == "output" or Path(value).exists()):
                setattr(arguments, name, type(value)(Path(value).resolve()))
        arguments.paths = [path.absolute() for path in arguments.paths]
    source = ""
    if arguments.data:
        from captioner.data import split_name, stream_photos

        photos = stream_photos(arguments.data, arguments.split)
        place = Path(arguments.data)
        source = f"{place.resolve() if place.exists() else place} {split_name(arguments.split)}"
    else:
        # Walked once before, so that a folder that holds no photo is told at the start.
        for named in arguments.paths:
            next(_photos_in(named))
        photos = bulk.photos_at(
            lambda: (p for named in arguments.paths for p, _ in _photos_in(named))
        )
    rows, errors = bulk.caption_all(
        functools.partial(
            Captioner.load,
            arguments.checkpoint,
            arguments.encoder_weights,
            device=arguments.device,
        ),
        photos,
        arguments.output,
        options,
        source=source,
        engine=arguments.engine,
        workers=arguments.workers,
        gpus=int(choose_device(arguments.device).type == "cuda"),
    )
    print(f"{rows} photos in {arguments.output}, {errors} of them with an error")
    return 1 if errors else 0


def _evaluate(arguments: argparse.Namespace, options: DecodingOptions) -> int:
    """Print the scores; write captions and sheet where asked to."""
    from captioner import checkpoint as checkpoints
    from captioner.evaluation import evaluate_checkpoint
    from captioner.predictor import SHIPPED_CHECKPOINT

    checkpoint = checkpoints.load(arguments.checkpoint or SHIPPED_CHECKPOINT)
    options = dataclasses.replace(options, max_length=checkpoint.max_length)
    result = evaluate_checkpoint(
        checkpoint,
        arguments.data,
        arguments.split,
        options,
        encoder_weights=arguments.encoder_weights,
        limit=arguments.limit,
        cache=arguments.cache,
        device=arguments.device,
    )
    conditions = result.conditions
    print(
        f"{conditions['photos']} photos of {conditions['data']} {conditions['split']}, "
        f"{conditions['references_a_photo']} references each; {conditions['tokenization']}"
    )
    print(f"cross-entropy {result.cross_entropy:.4f} nats a word, unsmoothed")
    search = f"beam {options.beam_size}" if options.beam_size > 1 else "greedy"
    search += ", no bans" if arguments.no_bans else ", bans"
    print(f"{'':18} {search:>16} {'greedy, no bans':>16}")
    for name, value in result.scores.items():
        digits = 4 if name in ("repetition", "distinct_captions") else 1
        print(f"{name:18} {value:16.{digits}f} {result.report_scores[name]:16.{digits}f}")
    if arguments.json:
        text = json.dumps(result.to_dict(), indent=1, ensure_ascii=False)
        _write(arguments.json, text.encode())
    if arguments.sheet:
        from captioner.overlay import comparison

        shown = [result.photos.photo(row) for row in result.rows[:20]]
        _write(arguments.sheet, comparison(shown, result.captions, result.references))
    return 0


def _export(arguments: argparse.Namespace, _: DecodingOptions) -> int:
    """Write a Space's folder, upload a checkpoint, or both."""
    if not arguments.space and not arguments.hub:
        raise ConfigError("give --space DIR, --hub USER/NAME, or both")
    from captioner import export
    from captioner.predictor import SHIPPED_CHECKPOINT

    checkpoint = arguments.checkpoint or SHIPPED_CHECKPOINT
    if arguments.space:
        export.write_space(arguments.space, checkpoint)
        print(
            f"{arguments.space} is ready: hf upload USER/NAME {arguments.space} --repo-type space"
        )
    if arguments.hub:
        print(export.push_to_hub(checkpoint, arguments.hub, private=arguments.private))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    logging.basicConfig(format="captioner: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file's name may be no valid text; it is printed all the same.
        sys.stdout.reconfigure(errors="backslashreplace")
    parsed = build_parser().parse_args(arguments)
    try:
        options = DecodingOptions()
        if "beam_size" in parsed:
            options = DecodingOptions.report() if parsed.no_bans else options
            options = dataclasses.replace(options, beam_size=parsed.beam_size)
        return int(parsed.run(parsed, options))
    except CaptionerError as error:
        print(f"captioner: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader (head, say) has had enough; keep Python from complaining as it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"captioner: {error.strerror or error} ({error.filename})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
