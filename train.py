"""Train a caption decoder: arguments in, a run's folder out. See ``python train.py --help``."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from captioner.config import DATA_FIELDS, FEATURES_FOLDER, RECIPES, ModelConfig, TrainConfig
from captioner.errors import CaptionerError, ConfigError, logging_to_stderr, report
from captioner.files import user_path
from captioner.options import OptionParser, add_options, show

try:
    from captioner.training.loop import Stopped, fit
except ModuleNotFoundError as error:
    sys.exit(report("train.py", error))


def build_parser() -> argparse.ArgumentParser:
    """Return the command line: an option for every field of ``TrainConfig`` and its model."""
    parser = OptionParser(
        prog="train.py",
        usage="python train.py [--recipe {seed,best}] [OPTION VALUE ...]",
        description="Train the attention decoder on photos with captions.",
        epilog="The best checkpoint is written to OUT/checkpoint; use it with "
        "python app.py --checkpoint OUT/checkpoint.",
    )
    run = parser.add_argument_group("the run")
    add_options(run, TrainConfig, {"recipe": "seed"})
    run.add_argument(
        "--out",
        type=user_path,
        default=Path("runs/train"),
        help="Folder of the run. Default: %(default)s.",
    )
    run.add_argument("--resume", action="store_true", help="Resume the run in OUT.")
    run.add_argument(
        "--cache",
        type=user_path,
        default=FEATURES_FOLDER,
        help="Folder for the cached encoder features. Default: %(default)s.",
    )
    run.add_argument("--set", action=_ReplacedOption, help=argparse.SUPPRESS)
    recipes = {name: TrainConfig.from_recipe(name) for name in RECIPES}
    add_options(
        parser.add_argument_group("settings"),
        TrainConfig,
        _defaults(TrainConfig, {name: vars(config) for name, config in recipes.items()}),
    )
    add_options(
        parser.add_argument_group("settings of the model"),
        ModelConfig,
        _defaults(ModelConfig, {name: config.model for name, config in recipes.items()}),
        prefix="model.",
    )
    return parser


def _defaults(settings: Any, recipes: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the fields that have options, and their defaults in all recipes."""
    defaults = {}
    for field in dataclasses.fields(settings):
        # The last two are no settings of a recipe.
        if field.name in (*DATA_FIELDS, "recipe", "model"):
            continue
        values = {
            name: show(values.get(field.name, field.default)) for name, values in recipes.items()
        }
        seed = values.pop("seed")
        defaults[field.name] = seed + "".join(
            f" ({name}: {value})" for name, value in values.items() if value != seed
        )
    return defaults


class _ReplacedOption(argparse.Action):
    """``--set NAME=VALUE`` of earlier versions."""

    def __call__(self, _: object, __: object, value: Any, ___: object = None) -> NoReturn:
        """Name the option that replaces it."""
        name, _, setting = value.partition("=")
        raise ConfigError(
            f"--set was replaced by an option per setting: write --{name.replace('_', '-')} "
            f"{setting} instead of --set {value}"
        )


def config_of(options: dict[str, Any]) -> TrainConfig:
    """Return the recipe's settings, changed by the parsed arguments."""
    given = {name: value for name, value in options.items() if value is not None}
    recipe = given.pop("recipe", "seed")
    model = dict(TrainConfig.from_recipe(recipe).model)
    model |= {
        name.removeprefix("model."): value
        for name, value in given.items()
        if name.startswith("model.")
    }
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    changes = {name: value for name, value in given.items() if name in fields}
    return TrainConfig.from_recipe(recipe, model=model, **changes)


def _stop(signum: int, _: object) -> NoReturn:
    """Stop while the features are computed; those that are finished stay cached."""
    raise Stopped("stopped; the features so far are kept", signum)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    # Once the training loop runs, it handles signals itself and saves its state.
    handler = signal.signal(signal.SIGTERM, _stop)
    try:
        options = vars(build_parser().parse_args(arguments))
        with logging_to_stderr():
            fit(
                config_of(options), options["out"], resume=options["resume"], cache=options["cache"]
            )
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except CaptionerError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        return report("train.py", error)
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
