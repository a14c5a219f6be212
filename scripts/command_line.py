"""The command lines of all scripts: a dataclass says what can be set, and what it means.

The configuration that results is printed, and saved in the run's folder as SCRIPT.json, from which
`--config FILE` reads it back. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from on_ranks import is_first_rank, run_on_ranks

import metaopt as mo
from metaopt.extras import extra

with extra("scripts/"):
    import tyro

C = TypeVar("C")

FAILED, USAGE, INTERRUPTED = 1, 2, 130
# What may differ between a run and its resumption: where it is, and what does not change numbers.
NOT_OF_A_RUN = {"out", "resume", "threads"}


def run(
    main: Callable[[Any], object],
    config: type | Mapping[str, type],
    about: str | None = None,
    *,
    shares: bool = True,
    has_checkpoints: bool = True,
) -> NoReturn:
    """Read the arguments, save the configuration, call `main` with it, and leave.

    Args:
        main: does the work.
        config: a dataclass; or several by the name of a subcommand.
        about: text for `--help`; by default the docstring of the dataclass.
        shares: whether several processes share its work, see `run_on_ranks`.
        has_checkpoints: whether it leaves some in its folder. The folder of one that leaves none
            may be that of a training, whose checkpoints do not concern it.
    """
    found = parse(config, sys.argv[1:], about)
    if has_checkpoints:
        _require_fresh(found)
    if is_first_rank():
        show(found)
    try:
        run_on_ranks(main, found, shares=shares)
    except KeyboardInterrupt as stop:
        print(f"Interrupted. {stop}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (mo.CheckpointError, mo.NonFiniteError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(FAILED)
    sys.exit(0)


def parse(
    config: type[C] | Mapping[str, type[C]], arguments: Sequence[str], about: str | None = None
) -> C:
    """Return the configuration that arguments ask for; wrong ones end the program with 2."""
    arguments, program = [*arguments], Path(sys.argv[0]).name
    if isinstance(config, Mapping):
        if not arguments or arguments[0] not in config:
            print(f"{about or ''}\nUsage: {program} {{{','.join(config)}}} [--help]")
            sys.exit(0 if {"-h", "--help"} & {*arguments} else USAGE)
        name = arguments.pop(0)
        config, program = config[name], f"{program} {name}"
    text = inspect.cleandoc(about or config.__doc__ or "")
    text += "\n\n--config FILE begins with a configuration that a run saved."
    options: dict[str, Any] = {"description": text, "prog": program}
    file = _take_file(arguments)
    if file is not None:
        try:
            saved = read_arguments(file, config)
        except ValueError as error:
            print(f"{program}: {error}", file=sys.stderr)
            sys.exit(USAGE)
        options["default"] = tyro.cli(config, args=saved, **options)
    return tyro.cli(config, args=arguments, **options)


def _take_file(arguments: list[str]) -> Path | None:
    """Return the file after `--config`, and take both out of the arguments."""
    for place, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return Path(arguments.pop(place).split("=", 1)[1])
        if argument == "--config" and place + 1 < len(arguments):
            del arguments[place]
            return Path(arguments.pop(place))
    return None


def read_arguments(file: Path, config: type) -> list[str]:
    """Return the arguments that stand for a file of JSON.

    Raises:
        ValueError: it cannot be read, or is no object whose names are fields of the dataclass.
    """
    kinds = typing.get_type_hints(config, include_extras=True)
    known = [field.name for field in dataclasses.fields(config)]
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        unknown = values.keys() - {*known}
        if unknown:
            raise ValueError(f"it has {sorted(unknown)[:9]}; known are {known}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"--config must name a configuration that this script saved, got {file}: {error}"
        ) from error
    positional, options = [], []
    for name, value in values.items():
        option, texts = f"--{name.replace('_', '-')}", _write(value)
        if typing.get_origin(kinds[name]) is typing.Annotated:
            positional += texts
        elif kinds[name] is bool and isinstance(value, bool):
            options.append(option if value else f"--no-{option[2:]}")
        elif len(texts) == 1 and not isinstance(value, list):
            options.append(f"{option}={texts[0]}")
        else:
            options += [option, *texts]
    return [*positional, *options]


def _write(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _require_fresh(config: Any) -> None:
    """End the program if there are checkpoints in the run's folder that nobody wants to use."""
    folder = config.out / "checkpoints"
    if getattr(config, "resume", True) or not any(folder.rglob("step-*.safetensors")):
        return
    text = f"--out {config.out} has checkpoints. Add --resume to go on, or give another folder."
    print(text, file=sys.stderr)
    sys.exit(USAGE)


def show(config: Any) -> None:
    """Print a configuration, and save it in the folder of the run."""
    values = dataclasses.asdict(config)
    print("\n".join(f"  {name} = {value}" for name, value in values.items()), flush=True)
    file = config.out / f"{Path(sys.argv[0]).stem}.json"
    if not (values.get("resume") and file.exists()):  # a run that goes on has one
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values, default=str, indent=2))


def saved(config: Any, part: str = "") -> dict[str, Any]:
    """Return the arguments of a `Trainer` that make it save in the folder of a run, and go on.

    Args:
        config: of the run; all of it but `NOT_OF_A_RUN` must be the same when it goes on.
        part: of a run that trains several things, the name of this one.
    """
    values = dataclasses.asdict(config)
    kept = {name: value for name, value in values.items() if name not in NOT_OF_A_RUN}
    folder = config.out / "checkpoints" / part
    return {"checkpoint": mo.Checkpoints(folder, config=kept), "resume": config.resume}
