"""The processes of one run: how they start together, agree, and end together.

`join` starts JAX on all of them, after a roll-call that names who is missing or differs; within
it a `Cluster` is what a process knows of the others. A run of one process has a `Cluster` of one,
so code that uses it reads the same for both.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.config import ClusterConfig, ConfigError
from dsv3_jax.parallel.roll_call import Coordinator, Member, end_error

__all__ = ["Cluster", "join"]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ENVIRONMENT = {
    "address": "JAX_COORDINATOR_ADDRESS",
    "count": "JAX_NUM_PROCESSES",
    "index": "JAX_PROCESS_ID",
}
_DETECTED = ("slurm", "gketpu", "gcetpu")  # JAX's names of what it can read itself

# What ends the command line with 2.
_BAD_INPUT = (ConfigError, FileNotFoundError, IsADirectoryError, NotADirectoryError)

T = TypeVar("T")


class Cluster:
    """What a process knows of the processes of its run.

    Attributes:
      is_main: whether this is the one that writes metrics, prints and reports.
      count: the number of processes.
    """

    def __init__(self, member: Member | None = None) -> None:
        self._member = member
        self.count = 1 if member is None else len(member.hosts)
        self.is_main = member is None or jax.process_index() == 0

    def gather(self, topic: str, value: Any) -> list[Any]:
        """The JSON values that all processes give, by index; all must call it alike.

        Raises:
          PeerError, ConfigError: another process ended meanwhile.
        """
        return [value] if self._member is None else self._member.gather(topic, value)

    def require_same(self, what: str, value: Any, why: str) -> None:
        """Checks that all processes see the same.

        Raises:
          ConfigError: they do not; the message says what, `why` it must be, and names two that
            differ.
        """
        values = self.gather(what, value)
        for index, other in enumerate(values):
            if other != values[0]:
                raise ConfigError(
                    f"{what} is {values[0]} on {self._name(0)} and {other} on "
                    f"{self._name(index)}: {why}"
                )

    def in_turn(self, topic: str, make: Callable[[], T]) -> T:
        """`make()`, so that the first call may leave files for the others.

        Process 0 calls it first, then one process of every other host, whose disk may be its own,
        then the rest.
        """
        if self._member is None:
            return make()
        hosts, index = self._member.hosts, self._member.index
        turn = 0 if index == 0 else 1 if hosts.index(hosts[index]) == index else 2
        made = []
        for number in range(3):
            if turn == number:
                made.append(make())
            self.gather(f"{topic}, turn {number}", None)
        return made[0]

    def largest(self, value: int) -> int:
        """The largest of the integers that the processes give; all must call it alike.

        It goes through their devices, in well under the time of a step.
        """
        if self._member is None:
            return value
        return int(np.max(multihost_utils.process_allgather(np.int32(value))))

    def _name(self, index: int) -> str:
        host = platform.node() if self._member is None else self._member.hosts[index]
        return f"process {index} ({host})"


@contextlib.contextmanager
def join(config: ClusterConfig, facts: dict[str, Any]) -> Iterator[Cluster]:
    """Meets the other processes of the run, starts JAX on them, and ends with them.

    Must come before anything that asks JAX for devices. When a process fails inside, all others
    end too: with its exit code, and one line that names it.

    Args:
      config: who they are.
      facts: nested dictionaries of JSON values that must be the same in all of them, such as the
        run's configuration. Package versions and a hash of this library's code are added.

    Raises:
      ConfigError: a process did not come, or they differ in something.
      PeerError: another process failed, or is gone.
    """
    place = _find_place(config)
    if place is None or place.count == 1:
        yield Cluster()
        return
    host, _, port = place.address.rpartition(":")
    limits = float(config.join_timeout_s), float(config.silence_timeout_s)
    coordinator = None
    if place.index == 0:
        coordinator = Coordinator(int(port), place.count, *limits)
    facts = {"number of processes": place.count, **_versions(), **_flat(facts)}
    member = Member(place.address, place.index, facts, *limits)
    try:
        _start_jax(place, f"{host}:{int(port) + 1}", config)
        cluster = Cluster(member)
        here = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
        cluster.require_same("the devices", here, "every process must have the same")
        if not cluster.is_main:
            for package in ("dsv3_jax", "pallas_kernels"):
                logging.getLogger(package).setLevel(logging.WARNING)
        yield cluster
        member.gather("the end", None)
        jax.distributed.shutdown()
        member.leave()
        if coordinator is not None:
            coordinator.wait_left(5.0)
    except BaseException as error:
        code = 2 if isinstance(error, _BAD_INPUT) else 1
        text = " ".join(str(error).split()) or type(error).__name__
        cause, code = member.fail(text, code)
        if cause.endswith(text):  # this process's own, or the same found by all
            raise
        raise end_error(cause, code) from error


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where this process stands; `devices` are the only local devices it may use, or None."""

    address: str
    count: int
    index: int
    devices: list[int] | None = None


def _find_place(config: ClusterConfig) -> _Place | None:
    """From the configuration, else the environment, else what JAX detects; None: alone."""
    if config.address is None:
        given = {name: os.environ.get(variable) for name, variable in _ENVIRONMENT.items()}
        if any(given.values()):
            config = _from_environment(config, given)
    if config.address is not None and config.count is not None and config.index is not None:
        return _Place(config.address, config.count, config.index)
    return _detect(config.join_timeout_s)


def _from_environment(config: ClusterConfig, given: dict[str, str | None]) -> ClusterConfig:
    names = ", ".join(_ENVIRONMENT.values())
    try:
        count, index = (None if not given[n] else int(given[n] or "") for n in ("count", "index"))
        return dataclasses.replace(config, address=given["address"], count=count, index=index)
    except ValueError as error:  # ConfigError is one
        raise ConfigError(f"{error} (environment: {names})") from error


def _detect(timeout_s: int) -> _Place | None:
    # Not public, but what jax.distributed.initialize itself would find; we need it before.
    from jax._src.clusters import ClusterEnv

    known = [env for env in ClusterEnv._cluster_types if env.name in _DETECTED]
    env = next((env for env in known if env.is_env_present()), None)
    if env is None or env.get_process_count() == 1:
        return None
    port = os.environ.get("JAX_COORDINATOR_PORT")
    try:
        address = env.get_coordinator_address(
            timeout_secs=timeout_s, override_coordinator_port=port
        )
    except RuntimeError as error:
        raise ConfigError(f"{error} ({env.name})") from error
    name, _, port = address.rpartition(":")
    address = f"{name}:{min(int(port), 65534)}"  # the next one is JAX's
    devices = None
    if env.name == "slurm" and not re.fullmatch(
        r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    ):
        devices = [env.get_local_process_id() or 0]  # several tasks a node: a GPU each
    return _Place(address, env.get_process_count(), env.get_process_id(), devices)


def _start_jax(place: _Place, address: str, config: ClusterConfig) -> None:
    # The loop lets all processes agree on when to stop; JAX's own service would take SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _delay_aborts()
    jax.distributed.initialize(
        address,
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=config.join_timeout_s,
        heartbeat_timeout_seconds=config.silence_timeout_s,
    )


def _delay_aborts() -> None:
    """Lets the roll-call end this process, by name and with 1, before JAX's runtime aborts it.

    When process 0 is gone the runtime calls `abort`, in a thread of its own and at once.
    """
    _LIBC.signal(signal.SIGABRT, _abort_a_second_later)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _abort_a_second_later(number: int) -> None:
    time.sleep(1.0)
    _LIBC.signal(number, None)  # SIG_DFL
    os.kill(os.getpid(), number)


_LIBC = ctypes.CDLL(None)


def _versions() -> dict[str, str]:
    """Versions of what computes, and a hash of this library's sources."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for folder in ("dsv3_jax", "pallas_kernels"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return {**found, "the code of dsv3_jax": digest.hexdigest()[:12]}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.vocab_size": ...} of nested dictionaries."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat
