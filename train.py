"""Train a caption decoder: arguments in, a run's folder out. See ``python train.py --help``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from captioner.config import DEFAULT_SOURCE, FEATURES_FOLDER, RECIPES, TrainConfig
from captioner.errors import CaptionerError, ConfigError, logging_to_stderr
from captioner.files import user_path
from captioner.training.loop import Stopped, fit

# Fields of TrainConfig that can be set one by one, over the recipe's own.
_NUMBERS = {
    "batch-size": (int, "photos a step"),
    "epochs": (int, "at most so many epochs"),
    "patience": (int, "epochs without a better score before it stops"),
    "learning-rate": (float, "the highest of the schedule"),
    "reward-epochs": (int, "at most so many of self-critical training afterwards"),
    "min-count": (int, "words seen less often become <unk>"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Train the attention decoder on photos with captions.",
        epilog="The best checkpoint lands in OUT/checkpoint; caption with it by "
        "python app.py --checkpoint OUT/checkpoint.",
    )
    parser.add_argument(
        "--data",
        default=DEFAULT_SOURCE,
        help="a Hub id, a folder of Parquet (image, alt_text), or a folder of photos with "
        "captions.csv (image,caption); default %(default)s",
    )
    parser.add_argument(
        "--encoder",
        default="resnet50",
        help="resnet50, efficientnet_lite2 or timm:<name>; default %(default)s",
    )
    parser.add_argument(
        "--encoder-weights", metavar="FILE", help="the encoder's weights, instead of a download"
    )
    parser.add_argument(
        "--recipe",
        choices=list(RECIPES),
        default="seed",
        help="seed: as the original report; best: what pays; default %(default)s",
    )
    parser.add_argument(
        "--text",
        metavar="FOLDER",
        help="Parquet files with more captions (alt_text) and no photos, to be read first",
    )
    parser.add_argument(
        "--out", type=user_path, default=Path("runs/train"), help="default %(default)s"
    )
    parser.add_argument("--limit", type=int, default=0, help="at most so many photos a split")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument(
        "--cache", type=user_path, default=FEATURES_FOLDER, help="features; default %(default)s"
    )
    for name, (kind, text) in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=kind, help=f"{text}; default: the recipe's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="any other field of TrainConfig, or, as model.NAME, of ModelConfig (see "
        "captioner/config.py), as in --set label_smoothing=0 --set model.dropout=0.5",
    )
    return parser


def _setting(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE; a value that is no JSON is taken as it stands."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def config_of(options: dict[str, Any]) -> TrainConfig:
    """Return the settings that the parsed arguments stand for; those of ``--set`` come last."""
    changes = {
        name: value
        for name, value in options.items()
        if value is not None and name not in ("recipe", "set", "out", "resume", "cache")
    }
    recipe = options["recipe"]
    model = dict(TrainConfig.from_recipe(recipe).model)
    for name, value in options["set"]:
        if name == "recipe":
            raise ConfigError("--set does not change the recipe: choose it with --recipe")
        if name.startswith("model."):
            model[name.removeprefix("model.")] = value
        else:
            changes[name] = value
    return TrainConfig.from_recipe(recipe, **{"model": model, **changes})


def _stop(signum: int, _: object) -> None:
    """Stop while the features are made: what there is of them stays."""
    raise Stopped("stopped; the features so far are kept", signum)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    options = vars(build_parser().parse_args(arguments))
    # Once the training loop runs, it takes signals itself and saves where it stands.
    handler = signal.signal(signal.SIGTERM, _stop)
    try:
        out, resume, cache = (options[name] for name in ("out", "resume", "cache"))
        with logging_to_stderr():
            fit(config_of(options), out, resume=resume, cache=cache)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except CaptionerError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"train.py: {error.strerror or error} ({error.filename})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; cached features are kept", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
