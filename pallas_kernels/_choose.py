"""How an operation picks its implementation: by name, or by the chip, logged once."""

import contextlib
import contextvars
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

logger = logging.getLogger(__name__)

# Without a GPU to ask, lowering elsewhere: the SXM parts of the H100 and the H200.
_HOPPER_MULTIPROCESSORS = 132


_only_shapes = contextvars.ContextVar("only_shapes", default=False)


@contextlib.contextmanager
def only_shapes() -> Iterator[None]:
    """Tracing for shapes alone: nothing will be computed by what is chosen, so nothing is logged.

    What is traced afterwards is logged as if it were the first.
    """
    token = _only_shapes.set(True)
    try:
        yield
    finally:
        _only_shapes.reset(token)


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
    if not _only_shapes.get():
        _log_once(operation, name)
    return implementations[name]


def _device():
    """The device traced for: that of the mesh set with `jax.set_mesh`, or the default device."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described
    default = jax.config.jax_default_device  # pyrefly: ignore[missing-attribute]
    return jax.devices(default)[0] if default is None or isinstance(default, str) else default


def device_kind() -> str:
    """Name of the chip traced for, such as "NVIDIA H200"."""
    return _device().device_kind


def is_hopper() -> bool:
    """Whether we trace for an H100, an H200 or one of their like (compute capability 9)."""
    return re.match(r"NVIDIA G?H\d", device_kind()) is not None


def multiprocessors() -> int:
    """Streaming multiprocessors of the Hopper GPU traced for."""
    if not is_hopper():
        return _HOPPER_MULTIPROCESSORS
    device = _device()
    return getattr(device, "core_count", None) or device.num_cores


# The platform is known for certain only when a traced program is lowered: an identity that lowers
# on one platform carries the message for the others.
_only_on_cuda = Primitive("only_on_cuda")
_only_on_cuda.def_abstract_eval(lambda x, *, what: x)


def only_on_cuda(x: jax.Array, what: str) -> jax.Array:
    """`x`; lowering for another platform than CUDA raises ValueError: `what`, and the platform."""
    return _only_on_cuda.bind(x, what=what)


def _refuse(context, x, *, what):
    platforms = ", ".join(context.module_context.platforms)
    raise ValueError(f"{what} runs on CUDA, not on {platforms}")


mlir.register_lowering(_only_on_cuda, _refuse)
mlir.register_lowering(_only_on_cuda, lambda context, x, *, what: [x], platform="cuda")
