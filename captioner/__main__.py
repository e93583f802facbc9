"""``python -m captioner COMMAND``: runs the commands and prints their results."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import functools
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.arguments import build_parser, decoding_options
from captioner.config import DEFAULT_LANGUAGE, VERDICTS
from captioner.errors import (
    CaptionerError,
    ConfigError,
    ImageError,
    WriteError,
    first_line,
    logging_to_stderr,
    report,
)

if TYPE_CHECKING:
    from captioner.config import DecodingOptions
    from captioner.images import Photo
    from captioner.inference.caption import Caption, Word
    from captioner.inference.captioner import Captioner
    from captioner.inference.heatmaps import HeatmapFolder
    from captioner.model.steps import WordSteps
    from captioner.training.evaluation import Evaluation

_BATCH_SIZE = 16
_MAX_NAMED = 10  # photos left out of a table that are named one by one


class _Results:
    """Prints captions and errors, and writes maps; one photo's failure does not end the run."""

    def __init__(self, heatmaps: HeatmapFolder | None, *, as_json: bool) -> None:
        self.exit_code = 0
        self._heatmaps, self._as_json = heatmaps, as_json

    @property
    def has_maps(self) -> bool:
        """Whether a caption's maps are printed or written."""
        return self._as_json or self._heatmaps is not None

    def add(
        self, path: str, photo: Photo, name: Path, caption: Caption, text: str, **more: Any
    ) -> None:
        """Print a caption, as ``text`` or as JSON with ``more``, and write its maps."""
        record = {"path": path, **caption.to_dict(), **more}
        print(_to_json(record) if self._as_json else text, flush=True)
        if not self._heatmaps:
            return
        try:
            self._heatmaps.write(photo, name, caption)
        except (ImageError, WriteError) as error:  # the photo may have been removed meanwhile
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._report(path, error)

    def fail(self, path: str, error: ImageError) -> None:
        """Print why there is no caption of a photo."""
        message = self._report(path, error)
        if self._as_json:
            print(_to_json({"path": path, "error": message}), flush=True)

    def _report(self, path: str, error: CaptionerError) -> str:
        self.exit_code = 1
        message = str(error)
        if path == "-":
            message = message.replace("the photo", "standard input", 1)
        print(f"captioner: {message}", file=sys.stderr)
        return message


def _caption(arguments: argparse.Namespace, options: DecodingOptions) -> int:
    """Caption photos and folders; unreadable photos are reported and skipped."""
    if "" in arguments.paths:
        raise ConfigError("a PATH is empty: give a photo or a folder of photos")
    if arguments.output:
        return _write_table(arguments, options)
    if arguments.data or arguments.engine == "ray":
        option = "--data" if arguments.data else "--engine ray"
        raise ConfigError(f"{option} needs --output, a table such as captions.csv")
    if not arguments.paths:
        raise ConfigError("give a PATH: a photo or a folder of photos")
    captioner, results = _load(arguments)
    if arguments.max_length is None:
        options = dataclasses.replace(options, max_length=captioner.checkpoint.max_length)
    photos = list(_from_paths(arguments.paths))
    for start in range(0, len(photos), _BATCH_SIZE):
        batch = photos[start : start + _BATCH_SIZE]
        readable = [photo for _, photo, _ in batch if not isinstance(photo, ImageError)]
        captions = iter(captioner.caption_each(readable, options, with_evidence=results.has_maps))
        for path, photo, name in batch:
            if isinstance(photo, ImageError):
                results.fail(path, photo)
            elif isinstance(caption := next(captions), ImageError):
                results.fail(path, caption)
            else:
                results.add(path, photo, name, caption, f"{path}\t{caption.text}")
    return results.exit_code


def _score(arguments: argparse.Namespace, _: DecodingOptions) -> int:
    """Print the probability of each word of a caption."""
    captioner, results = _load(arguments)
    for path, photo, name in _from_paths([arguments.photo], folders=False):
        try:
            if isinstance(photo, ImageError):
                raise photo
            caption = captioner.score(photo, arguments.text)
        except ImageError as error:
            results.fail(path, error)
            continue
        lines = [
            f"{word.text}\t{word.probability:.3g}{'' if word.known else ' (unknown word)'}"
            for word in (*caption.words, caption.beams[0].end)
        ]
        lines.append(f"log probability\t{caption.log_probability:.4f}")
        results.add(path, photo, name, caption, "\n".join(lines))
    return results.exit_code


def _explain(arguments: argparse.Namespace, options: DecodingOptions) -> int:
    """Print where each word of a caption comes from, or the maps of one word."""
    captioner, results = _load(arguments)
    options = dataclasses.replace(options, max_length=captioner.checkpoint.max_length)
    for path, photo, name in _from_paths([arguments.photo], folders=False):
        try:
            if isinstance(photo, ImageError):
                raise photo
            encoded = captioner.encode(photo)
            if arguments.text is None:
                caption = captioner.caption(encoded, options)
            else:
                caption = captioner.score(encoded, arguments.text)
            caption = captioner.explain(encoded, caption)
        except ImageError as error:
            results.fail(path, error)
            continue
        if arguments.word is None:
            lines = [f"{path}\t{caption.text}", *map(_describe_word, _numbered_words(caption))]
            results.add(path, photo, name, caption, "\n".join(lines))
        else:
            number, word = _chosen_word(caption, arguments.word)
            words = [each.text for each in caption.words]
            steps = captioner.steps(encoded, words, number - 1)
            text = f"{_describe_maps(number, word)}\n\n{_describe_candidates(steps)}"
            results.add(path, photo, name, caption, text, steps=steps.to_dict())
    return results.exit_code


def _numbered_words(caption: Caption) -> list[tuple[int, Word]]:
    """Return the words of the best caption, counted from 1, and the end."""
    return list(enumerate([*caption.words, caption.beams[0].end], start=1))


def _chosen_word(caption: Caption, number: int) -> tuple[int, Word]:
    words = _numbered_words(caption)
    if not 1 <= number <= len(words):
        raise ConfigError(
            f"there is no word {number}: the caption has {len(words) - 1}, and {len(words)} is its "
            "end"
        )
    return words[number - 1]


def _describe_word(numbered: tuple[int, Word]) -> str:
    """Return number, word, probability, verdict and place in a line."""
    from captioner.inference.caption import percent, region_of

    number, word = numbered
    place = ""
    if word.verdict == VERDICTS[0]:
        place = f" ({region_of(word.maps['evidence'])})"
    return f"{number}\t{word.text}\t{percent(word.probability)}\t{word.verdict}{place}"


def _describe_maps(number: int, word: Word) -> str:
    """Return all maps of a word, a line per row of cells."""
    units = {
        "attended": "share of the attention, %",
        "evidence": "what the cell added to the word's logit, nats",
        "mattered": "how far the word's log-probability falls without the cell, nats",
        "shown": "probability that the cell shows the word, %",
    }
    lines = [_describe_word((number, word)), _describe_fall(word)]
    for name, unit in units.items():
        if name not in word.maps:
            continue
        scale = 100 if unit.endswith("%") else 1
        lines.append(f"\n{name}: {unit}")
        # Adding 0 makes 0 of -0.
        lines += [
            "".join(f"{round(scale * float(cell), 2) + 0:8.2f}" for cell in row)
            for row in word.maps[name]
        ]
    return "\n".join(lines)


def _describe_fall(word: Word) -> str:
    """Return what becomes of a word if no cell shows anything."""
    from captioner.inference.caption import percent

    assert word.fall is not None  # explained
    without = min(word.probability * math.exp(-word.fall), 1.0)
    return (
        f"with nothing to see in any cell its probability would be {percent(without)}: its "
        f"log-probability falls by {word.fall:.2f} nats"
    )


def _describe_candidates(steps: WordSteps) -> str:
    """Return the likeliest words and the chosen one: how their logits add up."""
    lines = ["logits: output layer + evidence + pointer = sum, and the probability that it gives"]
    lines += [
        f"{each.text:16}{each.output:8.2f}{each.evidence:+8.2f}{each.pointer:+8.2f}"
        f"{each.logit:8.2f}{each.probability:8.1%}"
        for each in steps.candidates
    ]
    return "\n".join(lines)


def _load(arguments: argparse.Namespace) -> tuple[Captioner, _Results]:
    """Load the model; the folder of the maps is checked before and made afterwards."""
    from captioner.inference.captioner import Captioner
    from captioner.inference.heatmaps import HeatmapFolder

    heatmaps = arguments.heatmaps and HeatmapFolder(arguments.heatmaps, arguments.format)
    captioner = Captioner.from_pretrained(
        arguments.checkpoint, encoder_weights=arguments.encoder_weights, device=arguments.device
    )
    if heatmaps:
        heatmaps.make()
    return captioner, _Results(heatmaps, as_json=arguments.json)


def _from_paths(
    paths: list[str], *, folders: bool = True
) -> Iterator[tuple[str, Photo | ImageError, Path]]:
    """Yield path, photo (or why it cannot be read) and the name of its maps."""
    from captioner.inference.photo_paths import search

    standard_input = _read_standard_input() if "-" in paths else b""
    for path in paths:
        if path == "-":
            yield path, standard_input, Path("stdin")
        elif _is_address(path) or not folders:
            yield path, path if _is_address(path) else Path(path), Path(Path(path).name)
        else:
            for photo, name, error in search(Path(path)):
                yield str(photo), error or photo, name


def _read_standard_input() -> bytes | ImageError:
    """Read a photo, but at most one byte more than the limit."""
    from captioner.images import MAX_BYTES

    try:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    except (AttributeError, OSError, ValueError) as error:  # closed, say
        return ImageError(f"cannot read standard input: {first_line(error)}")


def _is_address(path: str) -> bool:
    return "://" in path  # a Path would lose one of the slashes


def _to_json(record: dict[str, Any], **options: Any) -> str:
    """Return JSON; NaN and infinity, which it does not have, become null."""
    try:
        return json.dumps(record, allow_nan=False, **options)
    except ValueError:
        finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
        return json.dumps(finite, **options)


# Tables of captions


def _write_table(arguments: argparse.Namespace, options: DecodingOptions) -> int:
    """Write the captions of any number of photos to a table; print how many there are."""
    for path in arguments.paths:
        if path == "-" or _is_address(path):
            raise ConfigError(f"--output takes files and folders, not {path}: save it first")
    if bool(arguments.paths) == bool(arguments.data):
        raise ConfigError("--output takes either PATHs or --data: give one of them")
    if arguments.json or arguments.heatmaps:
        raise ConfigError("--output writes no maps: leave out --json and --heatmaps")
    from captioner.inference import bulk
    from captioner.inference.captioner import SHIPPED_CHECKPOINT, Captioner
    from captioner.model import checkpoint as checkpoints
    from captioner.model.encoder import choose_device

    if arguments.max_length is None:
        checkpoint = checkpoints.load(arguments.checkpoint or SHIPPED_CHECKPOINT)
        options = dataclasses.replace(options, max_length=checkpoint.max_length)
    if arguments.engine == "ray":
        _make_paths_absolute(arguments)
    photos, source = _table_source(arguments)
    rows, errors = bulk.caption_all(
        functools.partial(
            Captioner.from_pretrained,
            arguments.checkpoint,
            encoder_weights=arguments.encoder_weights,
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
    return 1 if errors else _report_left_out(arguments.paths)


def _make_paths_absolute(arguments: argparse.Namespace) -> None:
    """Make all paths absolute, because Ray's workers may run in another folder."""
    arguments.output = arguments.output.resolve()
    arguments.paths = [str(Path(path).absolute()) for path in arguments.paths]
    for name in ("data", "checkpoint", "encoder_weights"):
        value = getattr(arguments, name)
        if value is not None and Path(value).exists():  # else a Hub id
            setattr(arguments, name, str(Path(value).resolve()))


def _table_source(arguments: argparse.Namespace) -> tuple[Any, str]:
    """Return the photos of --data with a name for them, or those of the PATHs."""
    from captioner.data.columns import Columns
    from captioner.data.sources import split_name, stream_photos
    from captioner.inference import bulk
    from captioner.inference.photo_paths import readable_photos

    if arguments.data:
        columns = Columns(arguments.image_column)
        photos = stream_photos(arguments.data, arguments.split, columns)
        folder = Path(arguments.data)
        data = folder.resolve() if folder.exists() else folder
        return photos, f"{data} {split_name(arguments.split)}"
    paths = [Path(path) for path in arguments.paths]
    for path in paths:  # a folder without a photo is an error before any caption is written
        next(readable_photos(path))
    return bulk.from_paths(lambda: (photo for path in paths for photo in readable_photos(path))), ""


def _report_left_out(paths: list[str]) -> int:
    """Count and name the photos that are not in the table; return the exit code."""
    from captioner.inference.photo_paths import search

    errors = [error for path in paths for _, _, error in search(Path(path)) if error]
    for error in errors[:_MAX_NAMED]:
        print(f"captioner: {error}", file=sys.stderr)
    if errors:
        print(f"captioner: left out of the table: {len(errors)}", file=sys.stderr)
    return 1 if errors else 0


# Other commands


def _evaluate(arguments: argparse.Namespace, options: DecodingOptions) -> int:
    """Print the scores; write captions and sheet if asked to."""
    from captioner.images import SUFFIXES

    # Fail here, not after minutes of work.
    for file in (arguments.json, arguments.sheet):
        if file and os.path.isdir(file):  # noqa: PTH112 -- Path raises where a name is too long
            raise ConfigError(f"{file} is a folder: give a file")
    if arguments.sheet and arguments.sheet.suffix.lower() in SUFFIXES - {".png"}:
        raise ConfigError(f"--sheet is a PNG: call it {arguments.sheet.with_suffix('.png')}")
    from captioner.data.columns import Columns
    from captioner.inference.captioner import SHIPPED_CHECKPOINT
    from captioner.inference.heatmaps import write_file
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
        columns=Columns(arguments.image_column, tuple(arguments.caption_column or ())),
        cache=arguments.cache,
        device=arguments.device,
        maps=arguments.maps,
    )
    _print_scores(result, options)
    if arguments.json:
        if result.maps:
            from captioner.training.map_scores import plot

            write_file(arguments.json.with_suffix(".maps.png"), plot(result.maps))
        text = _to_json(result.to_dict(), indent=1, ensure_ascii=False)
        write_file(arguments.json, text.encode())
    if arguments.sheet:
        from captioner.inference.render import comparison

        photos = [result.photos.photo(row) for row in result.rows[:20]]
        language = checkpoint.recipe.get("language", DEFAULT_LANGUAGE)
        sheet = comparison(photos, result.captions, result.references, language)
        write_file(arguments.sheet, sheet)
    return 0


def _print_scores(result: Evaluation, options: DecodingOptions) -> None:
    conditions = result.conditions
    print(
        f"{conditions['photos']} photos of {conditions['data']} {conditions['split']}, "
        f"{conditions['references_per_photo']} references each; {conditions['tokenization']}"
    )
    print(f"cross-entropy {result.cross_entropy:.4f} nats per word, unsmoothed")
    search = f"beam {options.beam_size}" if options.beam_size > 1 else "greedy"
    search += ", bans" if options.ban_unknown else ", no bans"
    print(f"{'':18} {search:>16} {'greedy, no bans':>16}")
    for name, value in result.scores.items():
        digits = 4 if name in ("repetition", "distinct_captions") else 1
        print(f"{name:18} {value:16.{digits}f} {result.report_scores[name]:16.{digits}f}")
    if result.invented_people is not None:
        captions, photos = result.invented_people
        print(f"people in {captions} captions of the {photos} photos whose references mention none")
    if result.reliability is not None:
        print(result.reliability)
    if result.maps is not None:
        from captioner.training.map_scores import table

        print(table(result.maps))


def _export(arguments: argparse.Namespace, _: DecodingOptions) -> int:
    """Write a Space's folder or ONNX models, upload a checkpoint, or several of these."""
    if not (arguments.space or arguments.hub or arguments.onnx):
        raise ConfigError("give --space DIR, --hub USER/NAME, --onnx DIR, or several of them")
    from captioner.inference import hub
    from captioner.inference.captioner import SHIPPED_CHECKPOINT, Captioner
    from captioner.model import checkpoint as checkpoints

    checkpoint = arguments.checkpoint or SHIPPED_CHECKPOINT
    if arguments.space:
        hub.write_space(arguments.space, checkpoint)
        print(
            f"{arguments.space} is ready: hf upload USER/NAME {arguments.space} --repo-type space"
        )
    if arguments.hub:
        loaded = checkpoints.load(checkpoint)
        print(hub.push_to_hub(loaded, arguments.hub, private=arguments.private))
    if arguments.onnx:
        from captioner.inference import onnx_export

        captioner = Captioner.from_pretrained(checkpoint, encoder_weights=arguments.encoder_weights)
        onnx_export.write_onnx(arguments.onnx, captioner)
        print(f"{arguments.onnx} is ready: python {arguments.onnx / onnx_export.EXAMPLE} PHOTO")
    return 0


_COMMANDS = {
    "caption": _caption,
    "score": _score,
    "explain": _explain,
    "evaluate": _evaluate,
    "export": _export,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file's name may not be valid text; it is printed all the same.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        parsed = build_parser().parse_args(arguments)
        with logging_to_stderr("captioner: "):
            return _COMMANDS[parsed.command](parsed, decoding_options(parsed))
    except CaptionerError as error:
        print(f"captioner: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        return report("captioner", error)
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
