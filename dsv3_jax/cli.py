"""The command line: configuration files, overrides, and errors as one line and an exit code.

Exit codes: 0 done; 1 failed; 2 bad input; 130 interrupted.
"""

import argparse
import contextlib
import dataclasses
import glob
import importlib.util
import io
import logging
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dsv3_jax.config import ConfigError, TrainConfig, nearest_name

_BAD_INPUT = (ConfigError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
_SWITCHES = frozenset({"out", "resume", "help", "h"})

_TRAIN_USAGE = """\
usage: train.py CONFIG --out DIR [--resume] [--SECTION.FIELD VALUE ...]

  CONFIG    a file such as configs/tiny.py, whose get_config() returns a TrainConfig
  --out     directory of the run: metrics, plots and checkpoints
  --resume  continue from the newest checkpoint in DIR

A new run starts from weights with --init-from PATH: a Hugging Face folder, a converted one, a run.
Every field can be overridden, as in --optimizer.peak-lr 3e-4 --model.q-lora-rank None:
"""


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs `main` on the command line's arguments and ends the process with its exit code.

    Errors are one line on stderr; `DSV3_TRACEBACK=1` in the environment shows where they arose.
    Exceptions that are neither bad input nor failures (`RuntimeError`, `OSError`) are bugs and
    keep their traceback.
    """
    _skip_absent_accelerators()
    logging.basicConfig(format="%(message)s")
    for package in ("dsv3_jax", "pallas_kernels"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has left: not an error, and nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _end(130)
    except (*_BAD_INPUT, RuntimeError, OSError) as error:
        if os.environ.get("DSV3_TRACEBACK", "0") not in ("", "0"):
            if not _is_one_of_several():
                raise
            traceback.print_exc()
        bad_input = isinstance(error, _BAD_INPUT)
        hint = "" if bad_input else " (DSV3_TRACEBACK=1 shows the traceback)"
        print(f"error: {_describe(error)}{hint}", file=sys.stderr)
        _end(2 if bad_input else 1)
    except Exception:
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        _end(1)
    sys.exit(code)


_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")


def _skip_absent_accelerators() -> None:
    """Where no accelerator is, lets JAX use the CPU without libtpu's complaints of a missing TPU.

    Where one is, or JAX_PLATFORMS is set, a failure to start it stays an error.
    """
    if not any(glob.glob(pattern) for pattern in _ACCELERATORS):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _is_one_of_several() -> bool:
    """Whether JAX runs on several processes, of which this is one."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _end(code: int) -> NoReturn:
    """Ends the process; one of several without JAX's exit handlers, which wait for the others."""
    if _is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose complaints are a `ConfigError` instead of a usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def load_config(path: str | Path) -> TrainConfig:
    """The `TrainConfig` that `get_config()` of a Python file returns.

    Raises:
      ConfigError: no such file (with the nearest existing one), an error in it, no
        `get_config`, or another kind of result.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}{_nearest_file(path)}")
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} must be a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{path} has no get_config()")
        config = module.get_config()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} raised {type(error).__name__}: {_describe(error)}") from error
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"get_config() must return a TrainConfig, not {config!r} ({path})")
    return config


def parse_train_args(argv: Sequence[str]) -> tuple[TrainConfig, Path, bool]:
    """Reads `CONFIG --out DIR [--resume] [--section.field value ...]`.

    Names may be spelled with - or _, values follow a space or `=`; of equal options the last
    counts. The fields of a section that the file leaves at None (`--model.rope-scaling.factor 8`)
    start from the section's defaults, and `--model.rope-scaling None` removes the section.

    Returns:
      The configuration with its overrides, the run's directory, and whether to resume.

    Raises:
      ConfigError: one line that names the option.
      SystemExit: `--help`, after printing it.
    """
    fields = dict(_fields(TrainConfig))
    options, positional = _split(argv, fields, _SWITCHES)
    if {"help", "h"} & options.keys():
        _print_help(load_config(positional[0]) if positional else TrainConfig())
    config = _configured(options, positional, fields)
    if not options.get("out"):
        raise ConfigError("no output directory given (--out DIR)")
    return config, Path(options["out"]), "resume" in options


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Reads `CONFIG [--section.field value ...]`, as `parse_train_args` does.

    Raises:
      ConfigError: one line that names the option.
    """
    fields = dict(_fields(TrainConfig))
    return _configured(*_split(argv, fields, frozenset()), fields)


def _configured(
    options: dict[str, str], positional: list[str], fields: dict[str, Any]
) -> TrainConfig:
    """The one configuration file named, with the overrides among `options`."""
    if len(positional) > 1:
        raise ConfigError(f"unexpected argument {positional[1]!r}: only one CONFIG is read")
    if not positional:
        raise ConfigError("no configuration file given (such as configs/tiny.py)")
    changes: dict[str, Any] = {}
    for name, text in options.items():
        if name not in _SWITCHES:
            # A section's own name only takes None: its values are set one by one.
            hint = None if _section_class(fields[name]) else fields[name]
            changes[name] = _convert(name, hint, text)
    return _override(load_config(positional[0]), changes)


def _split(
    argv: Sequence[str], fields: dict[str, Any], switches: frozenset[str]
) -> tuple[dict[str, str], list[str]]:
    """({option in underscores: value}, positional arguments)."""
    known = switches | {name for name in fields if not _is_required_section(fields[name])}
    options: dict[str, str] = {}
    positional: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-"):
            positional.append(token)
            continue
        spelled, equals, value = token.partition("=")
        name = spelled.lstrip("-").replace("-", "_")
        if name not in known:
            hint = nearest_name(spelled, map(_spell, known))
            raise ConfigError(f"unknown option {spelled}{hint}")
        if not equals and (name == "out" or name not in switches):
            if not rest:
                raise ConfigError(f"{spelled} needs a value")
            value = rest.pop(0)
        options[name] = value
    return options, positional


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every value and section of a configuration class."""
    for name, hint in typing.get_type_hints(cls).items():
        yield prefix + name, hint
        if section := _section_class(hint):
            yield from _fields(section, f"{prefix}{name}.")


def _section_class(hint: Any) -> type | None:
    """The dataclass in a type such as `ModelConfig` or `RopeScaling | None`."""
    options = typing.get_args(hint) or (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _is_required_section(hint: Any) -> bool:
    return _section_class(hint) is hint


def _spell(name: str) -> str:
    return "--" + name.replace("_", "-")


def _convert(name: str, hint: Any, text: str) -> Any:
    """A value of type `hint` from its spelling on the command line, by tyro's rules."""
    import tyro  # slow to import, and a wrong option name needs none of it

    box = dataclasses.make_dataclass("box", [("value", hint)])
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(
                box, args=[f"--value={text}"], config=(tyro.conf.FlagConversionOff,)
            ).value
    except SystemExit:
        raise ConfigError(f"{_spell(name)} {text!r} must be {_wanted(hint)}") from None


def _wanted(hint: Any) -> str:
    """A type in words."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if options := typing.get_args(hint):
        return " or ".join(map(_wanted, options))
    words = {int: "an integer", float: "a number", bool: "True or False", str: "text"}
    return words.get(hint, "None")


def _override(config: Any, changes: dict[str, Any]) -> Any:
    """`config` with {dotted name: value} applied, each section rebuilt once so that its rules see
    all changes together."""
    values = {name: value for name, value in changes.items() if "." not in name}
    for section in {name.split(".")[0] for name in changes if "." in name}:
        inner = {
            name.removeprefix(f"{section}."): value
            for name, value in changes.items()
            if name.startswith(f"{section}.")
        }
        cls = _section_class(typing.get_type_hints(type(config))[section])
        before = getattr(config, section)
        values[section] = _override(cls() if cls and before is None else before, inner)
    return dataclasses.replace(config, **values) if values else config


def _print_help(config: TrainConfig) -> NoReturn:
    import tyro

    print(_TRAIN_USAGE)
    tyro.cli(
        tyro.conf.AvoidSubcommands[TrainConfig],
        default=config,
        args=["--help"],
        prog="train.py CONFIG --out DIR",
        config=(tyro.conf.FlagConversionOff,),
    )
    raise SystemExit(0)


def _nearest_file(path: Path) -> str:
    """A hint at an existing configuration file, for a path that does not exist."""
    folders = [path.parent, Path("configs")]
    found = {str(file) for folder in folders if folder.is_dir() for file in folder.glob("*.py")}
    by_stem = {Path(file).stem: file for file in sorted(found)}
    hint = nearest_name(str(path), found)
    if not hint and (match := re.search(r"'(.+?)'", nearest_name(path.stem, by_stem))):
        hint = f" (did you mean {by_stem[match[1]]!r}?)"
    return hint


def _describe(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__
