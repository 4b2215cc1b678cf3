"""How an operation picks its implementation: by name, or the first that runs here, logged once."""

import functools
import logging
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)


@functools.cache
def _log_once(operation: str, name: str) -> None:
    logger.info("%s: using the %s implementation", operation, name)


def choose(operation: str, implementations: Mapping[str, Callable], name: str | None) -> Callable:
    """The implementation called `name`, or the first of `implementations` when it is None.

    Raises:
      ValueError: no implementation of that name.
    """
    if name is None:
        name = next(iter(implementations))
    if name not in implementations:
        known = ", ".join(implementations)
        raise ValueError(f"implementation={name!r} must be one of: {known} ({operation})")
    _log_once(operation, name)
    return implementations[name]
