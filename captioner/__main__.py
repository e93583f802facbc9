"""``python -m captioner caption|score|evaluate|export``: arguments and printing only."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import __version__
from captioner.config import DEFAULT_SOURCE, FEATURES_FOLDER, FORMATS, DecodingOptions
from captioner.errors import (
    CaptionerError,
    ConfigError,
    ImageError,
    WriteError,
    first_line,
    logging_to_stderr,
)
from captioner.files import atomic_write, reraise_os_errors, user_path

if TYPE_CHECKING:
    from captioner.images import Photo
    from captioner.inference.caption import Caption

_BATCH = 16
_MAX_NAME = 255  # bytes of a file's name
_MAX_NAMED = 10  # photos left out of a table that are named one by one

# The other fields of DecodingOptions that ``caption`` takes.
_DECODING: dict[str, tuple[type, str, str]] = {
    "length_penalty": (
        float,
        "X",
        f"higher favours longer captions; default {DecodingOptions().length_penalty}",
    ),
    "max_length": (int, "N", "at most N - 2 words; default: as in the checkpoint's training"),
    "prefix": (str, "TEXT", "words that the caption begins with"),
    "temperature": (
        float,
        "X",
        "above 0 words are sampled, more randomly as it rises; default 0: beam search",
    ),
    "top_p": (float, "P", "of --temperature: sample from the likeliest words of this probability"),
    "samples": (int, "N", "of --temperature: captions to sample; --json holds all of them"),
    "seed": (int, "N", "of --temperature; default 0"),
}


class _CommandParser(argparse.ArgumentParser):
    """A sub-command's parser, which prints its own usage where a flag is unknown."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; the parser of all commands would only print that there are commands."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="captioner" if Path(sys.argv[0]).stem == "captioner" else "python -m captioner",
        description="Captions for photos, and where the model looked for each word.",
        epilog="Exit codes: 0 all went well, 1 something could not be read or done, 2 a setting, a "
        "checkpoint or a data set cannot be used.",
    )
    parser.add_argument("--version", action="version", version=f"captioner {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser
    )

    caption = commands.add_parser(
        "caption",
        help="caption photos and folders of photos",
        description="Print a line a photo: its path, a tab, its caption. With --output write a "
        "table instead, of any number of photos; the same command goes on where it was stopped.",
    )
    caption.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="photo or folder; - reads a photo from standard input",
    )
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
        type=user_path,
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
    caption.set_defaults(run=_caption)

    score = commands.add_parser(
        "score",
        help="read a caption that you wrote",
        description="Print how likely the model finds each word of a caption, and all of it.",
    )
    score.add_argument("photo", metavar="PHOTO", help="- reads it from standard input")
    score.add_argument("text", metavar="TEXT", help='the caption, as in "two dogs play"')
    score.set_defaults(run=_score)

    for command in (caption, score):
        command.add_argument(
            "--json", action="store_true", help="one JSON object a line: every number"
        )
        command.add_argument(
            "--heatmaps",
            type=user_path,
            metavar="DIR",
            help="also write a file with the maps of each photo into this folder",
        )
        command.add_argument(
            "--format",
            choices=FORMATS,
            default="png",
            help="of those files: a sheet, an animation, every number, or a web page that works "
            "offline; default %(default)s",
        )

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
    evaluate.add_argument(
        "--json", type=user_path, metavar="FILE", help="write scores and captions"
    )
    evaluate.add_argument(
        "--sheet", type=user_path, metavar="FILE", help="write a PNG of 20 photos with GT and PRED"
    )
    evaluate.add_argument(
        "--cache", type=user_path, default=FEATURES_FOLDER, help="features; default %(default)s"
    )
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser(
        "export",
        help="make a Hugging Face Space of a checkpoint, or put it on the Hub",
        description="Write the folder of a Space, ready to be uploaded, or upload a checkpoint as "
        "a model, which --checkpoint USER/NAME then takes. Uploading needs `hf auth login`.",
    )
    export.add_argument("--space", type=user_path, metavar="DIR", help="a new folder for a Space")
    export.add_argument("--hub", metavar="USER/NAME", help="the model's name on the Hub")
    export.add_argument("--private", action="store_true", help="of --hub: seen by its owner only")
    export.set_defaults(run=_export)

    for command in (caption, score, evaluate, export):
        command.add_argument(
            "--checkpoint", metavar="PATH|HUB_ID", help="a checkpoint; default: the shipped one"
        )
    for command in (caption, score, evaluate):
        command.add_argument("--encoder-weights", metavar="FILE", help="the encoder's weights")
        command.add_argument(
            "--device",
            choices=["auto", "cpu", "cuda", "mps"],
            default="cpu",
            help="auto is the fastest that is there; default %(default)s",
        )
    for command in (caption, evaluate):
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
    for name, (kind, metavar, text) in _DECODING.items():
        flag = f"--{name.replace('_', '-')}"
        caption.add_argument(flag, type=kind, metavar=metavar, help=text)
    return parser


def _search(path: Path) -> Iterator[tuple[Path, Path, ImageError | None]]:
    """Yield the photos at a path.

    Each comes with the place of its maps in their folder, and the error if it cannot be read.
    """
    from captioner.images import SUFFIXES, find_photos

    if not os.path.isdir(path):  # noqa: PTH112 -- Path raises where a name is too long
        yield path, Path(path.name), None
        return
    empty = True
    for photo, error in find_photos(path):
        empty = False
        yield photo, photo.relative_to(path), error
    if empty:
        suffixes = " ".join(sorted(SUFFIXES))
        yield path, Path(path.name), ImageError(f"{path} holds no photo ({suffixes})")


def _photos_in(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield photos with the place of their maps; ``ImageError`` if there is none."""
    first_error, found = None, False
    for photo, place, error in _search(path):
        first_error = first_error or error
        if error is None:
            found = True
            yield photo, place
    if first_error and not found:
        raise first_error


def _report_left_out(paths: list[Path]) -> int:
    """Count and name what ``_photos_in`` leaves out of a table; return the exit code."""
    count = 0
    for path in paths:
        for _, _, error in _search(path):
            if error:
                count += 1
                if count <= _MAX_NAMED:
                    print(f"captioner: {error}", file=sys.stderr)
    if count:
        print(f"captioner: left out of the table: {count}", file=sys.stderr)
    return 1 if count else 0


def _to_json(record: dict[str, Any], **options: Any) -> str:
    """Return JSON, which has no NaN and no infinity: they become null."""
    try:
        return json.dumps(record, allow_nan=False, **options)
    except ValueError:
        finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
        return json.dumps(finite, **options)


def _write(path: Path, data: bytes) -> None:
    """Write a file and its folders."""
    with reraise_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout, say
            path.write_bytes(data)
            return
    atomic_write(path, data)


def _unused_path(folder: Path, place: Path, suffix: str, used: set[Path]) -> Path:
    """Return where the maps of a photo go: its name with ``suffix``, numbered where it is used.

    A name that would be too long is cut, and a digest of all of it keeps it apart from others.
    """
    name, number = os.fsencode(place.name), 1
    while True:
        end = suffix if number == 1 else f"-{number}{suffix}"
        stem = name
        if len(name) + len(end) > _MAX_NAME:
            digest = hashlib.blake2b(name, digest_size=4).hexdigest()
            stem = name[: _MAX_NAME - len(end) - len(digest) - 1]
            # Not in the midst of a character.
            stem = f"{stem.decode(errors='ignore')}-{digest}".encode()
        path = folder / place.with_name(os.fsdecode(stem) + end)
        if path not in used:
            used.add(path)
            return path
        number += 1


def _check_maps_folder(folder: Path) -> None:
    """Refuse what is a file, or was meant to be one: maps go into a folder."""
    from captioner.images import SUFFIXES

    if os.path.isdir(folder):  # noqa: PTH112 -- Path raises where a name is too long
        return
    if os.path.lexists(folder):
        raise ConfigError(f"{folder} is not a folder: --heatmaps needs one for the maps")
    suffix = folder.suffix.lower()
    if suffix in SUFFIXES | {f".{kind}" for kind in FORMATS} | {".htm", ".pdf", ".svg"}:
        raise ConfigError(
            f"--heatmaps is a folder, not the file {folder}: use --heatmaps "
            f"{folder.with_suffix('')}, and --format for the kind of its files"
        )


class _Results:
    """Prints captions and errors, and writes maps; one photo's failure does not end the run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.exit_code = 0
        self._json, self._format = arguments.json, arguments.format
        self._folder: Path | None = arguments.heatmaps
        self._used: set[Path] = set()
        if self._folder:
            with reraise_os_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)

    def add(self, path: str, photo: Photo, place: Path, caption: Caption, text: str) -> None:
        """Print a caption, as ``text`` or JSON, and write its maps."""
        record = {"path": path, **caption.to_dict()}
        print(_to_json(record) if self._json else text, flush=True)
        if not self._folder:
            return
        from captioner.images import open_photo
        from captioner.inference.render import render

        target = _unused_path(self._folder, place, f".{self._format}", self._used)
        try:
            _write(target, render(open_photo(photo), caption, self._format))
        except (ImageError, WriteError) as error:  # it may have vanished meanwhile
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._report(path, error)

    def fail(self, path: str, error: ImageError) -> None:
        """Print that there is no caption of a photo."""
        message = self._report(path, error)
        if self._json:
            print(_to_json({"path": path, "error": message}), flush=True)

    def _report(self, path: str, error: CaptionerError) -> str:
        self.exit_code = 1
        message = str(error)
        if path == "-":
            message = message.replace("the photo", "standard input", 1)
        print(f"captioner: {message}", file=sys.stderr)
        return message


def _standard_input() -> bytes | ImageError:
    """Read a photo; of one that is too large only as much as shows it."""
    from captioner.images import MAX_BYTES

    try:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    except (AttributeError, OSError, ValueError) as error:  # closed, say
        return ImageError(f"cannot read standard input: {first_line(error)}")


def _named(name: str) -> Path | str:
    """Return what ``open_photo`` takes; a Path would lose one slash of an address."""
    return name if "://" in name else Path(name)


def _caption(arguments: argparse.Namespace, options: DecodingOptions) -> int:
    """Caption photos and folders; unreadable photos are reported and skipped."""
    if "" in arguments.paths:
        raise ConfigError("a PATH is empty: give a photo or a folder of photos")
    if arguments.output:
        return _caption_table(arguments, options)
    if arguments.data:
        raise ConfigError("--data needs --output, a folder for the captions")
    if arguments.engine != "local":
        raise ConfigError("--engine ray needs --output, a folder for the captions")
    if not arguments.paths:
        raise ConfigError("give a PATH: a photo or a folder of photos")
    if arguments.heatmaps:
        _check_maps_folder(arguments.heatmaps)
    from captioner.inference.captioner import Captioner

    captioner = Captioner.load(
        arguments.checkpoint, arguments.encoder_weights, device=arguments.device
    )
    if arguments.max_length is None:
        options = dataclasses.replace(options, max_length=captioner.checkpoint.max_length)
    results = _Results(arguments)
    # Path, photo, place of its maps.
    photos: list[tuple[str, Photo | ImageError, Path]] = []
    standard_input = _standard_input() if "-" in arguments.paths else b""
    for name in arguments.paths:
        if name == "-":
            photos.append((name, standard_input, Path("stdin")))
        elif isinstance(named := _named(name), str):
            photos.append((name, named, Path()))
        else:
            photos += ((str(path), error or path, place) for path, place, error in _search(named))
    for start in range(0, len(photos), _BATCH):
        batch = photos[start : start + _BATCH]
        readable = [photo for _, photo, _ in batch if not isinstance(photo, ImageError)]
        captions = iter(captioner.caption_each(readable, options))
        for path, photo, place in batch:
            if isinstance(photo, ImageError):
                results.fail(path, photo)
            elif isinstance(caption := next(captions), ImageError):
                results.fail(path, caption)
            else:
                results.add(path, photo, place, caption, f"{path}\t{caption.text}")
    return results.exit_code


def _score(arguments: argparse.Namespace, _: DecodingOptions) -> int:
    """Print how likely each word of a caption is."""
    if arguments.heatmaps:
        _check_maps_folder(arguments.heatmaps)
    from captioner.inference.captioner import Captioner

    captioner = Captioner.load(
        arguments.checkpoint, arguments.encoder_weights, device=arguments.device
    )
    results = _Results(arguments)
    path = arguments.photo
    photo = _standard_input() if path == "-" else _named(path)
    try:
        if isinstance(photo, ImageError):
            raise photo
        caption = captioner.score(photo, arguments.text)
    except ImageError as error:
        results.fail(path, error)
        return results.exit_code
    lines = [
        f"{word.text}\t{word.probability:.3g}{'' if word.known else ' (unknown word)'}"
        for word in (*caption.words, caption.beams[0].end)
    ]
    lines.append(f"log probability\t{caption.log_probability:.4f}")
    place = Path("stdin" if path == "-" else Path(path).name)
    results.add(path, photo, place, caption, "\n".join(lines))
    return results.exit_code


def _caption_table(arguments: argparse.Namespace, options: DecodingOptions) -> int:
    """Caption into a table; count on standard error what is left out of it."""
    for name in arguments.paths:
        if name == "-" or isinstance(_named(name), str):
            raise ConfigError(f"--output takes files and folders, not {name}: save it first")
    if arguments.max_length is None:
        from captioner.inference.captioner import SHIPPED_CHECKPOINT
        from captioner.model import checkpoint as checkpoints

        checkpoint = checkpoints.load(arguments.checkpoint or SHIPPED_CHECKPOINT)
        options = dataclasses.replace(options, max_length=checkpoint.max_length)
    arguments.paths = [Path(name) for name in arguments.paths]
    return _caption_all(arguments, options) or _report_left_out(arguments.paths)


def _caption_all(arguments: argparse.Namespace, options: DecodingOptions) -> int:
    """Write the captions of any number of photos to a table; print how many there are."""
    if bool(arguments.paths) == bool(arguments.data):
        raise ConfigError("--output takes either PATHs or --data: give one of them")
    if arguments.json or arguments.heatmaps:
        raise ConfigError("--output writes no maps: leave --json and --heatmaps away")
    from captioner.inference import bulk
    from captioner.inference.captioner import Captioner
    from captioner.model.encoder import choose_device

    if arguments.engine == "ray":  # its workers may stand in another folder
        for name in ("data", "checkpoint", "encoder_weights", "output"):
            value = getattr(arguments, name)
            if value is not None and (name == "output" or Path(value).exists()):
                setattr(arguments, name, type(value)(Path(value).resolve()))
        arguments.paths = [path.absolute() for path in arguments.paths]
    source = ""
    if arguments.data:
        from captioner.data.sources import split_name, stream_photos

        photos = stream_photos(arguments.data, arguments.split)
        place = Path(arguments.data)
        source = f"{place.resolve() if place.exists() else place} {split_name(arguments.split)}"
    else:
        # Walked once before, so that a folder that holds no photo is told at the start.
        for named in arguments.paths:
            next(_photos_in(named))
        photos = bulk.from_paths(
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
    from captioner.images import SUFFIXES

    # Before minutes of work.
    for file in (arguments.json, arguments.sheet):
        if file and os.path.isdir(file):  # noqa: PTH112 -- Path raises where a name is too long
            raise ConfigError(f"{file} is a folder: give a file")
    if arguments.sheet and arguments.sheet.suffix.lower() in SUFFIXES - {".png"}:
        raise ConfigError(f"--sheet is a PNG: call it {arguments.sheet.with_suffix('.png')}")
    from captioner.inference.captioner import SHIPPED_CHECKPOINT
    from captioner.model import checkpoint as checkpoints
    from captioner.training.evaluation import evaluate_checkpoint

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
        text = _to_json(result.to_dict(), indent=1, ensure_ascii=False)
        _write(arguments.json, text.encode())
    if arguments.sheet:
        from captioner.inference.render import comparison

        shown = [result.photos.photo(row) for row in result.rows[:20]]
        _write(arguments.sheet, comparison(shown, result.captions, result.references))
    return 0


def _export(arguments: argparse.Namespace, _: DecodingOptions) -> int:
    """Write a Space's folder, upload a checkpoint, or both."""
    if not arguments.space and not arguments.hub:
        raise ConfigError("give --space DIR, --hub USER/NAME, or both")
    from captioner.inference import hub as export
    from captioner.inference.captioner import SHIPPED_CHECKPOINT

    checkpoint = arguments.checkpoint or SHIPPED_CHECKPOINT
    if arguments.space:
        export.write_space(arguments.space, checkpoint)
        print(
            f"{arguments.space} is ready: hf upload USER/NAME {arguments.space} --repo-type space"
        )
    if arguments.hub:
        print(export.push_to_hub(checkpoint, arguments.hub, private=arguments.private))
    return 0


def _options(parsed: argparse.Namespace) -> DecodingOptions:
    """Return the decoding that the command line asks for."""
    if "beam_size" not in parsed:
        return DecodingOptions()
    options = DecodingOptions.plain_greedy() if parsed.no_bans else DecodingOptions()
    given = {
        name: value for name in _DECODING if (value := getattr(parsed, name, None)) is not None
    }
    for name in ("top_p", "samples"):
        if name in given and not given.get("temperature"):
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} needs --temperature above 0: beam search samples nothing")
    return dataclasses.replace(options, beam_size=parsed.beam_size, **given)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file's name may be no valid text; it is printed all the same.
        sys.stdout.reconfigure(errors="backslashreplace")
    parsed = build_parser().parse_args(arguments)
    try:
        with logging_to_stderr("captioner: "):
            return int(parsed.run(parsed, _options(parsed)))
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
