"""What every section of the configuration checks its values with."""

import difflib
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A configuration value breaks a rule; the message names value, rule and place."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require(condition: bool, message: str, place: str) -> None:
    if not condition:
        raise ConfigError(f"{message} ({place})")


def check_type(key: str, value: Any, annotation: Any, place: str) -> None:
    """Refuses a JSON value of the wrong kind before arithmetic on it can raise something vague."""
    if annotation is int or annotation == (int | None):
        fits = isinstance(value, int) and not isinstance(value, bool)
        fits = fits or (value is None and annotation is not int)
        require(fits, f"{key}={value!r} must be an integer", place)
    elif annotation is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(fits, f"{key}={value!r} must be a number", place)
    elif annotation is bool:
        require(isinstance(value, bool), f"{key}={value!r} must be true or false", place)
