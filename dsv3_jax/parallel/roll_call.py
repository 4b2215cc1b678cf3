"""The roll-call: the processes of a run meet, compare notes, and hear of each other's end.

JAX ends a process whose peers do not come, or go, with a C++ stack and no names, or lets it wait.
So every process first connects to process 0, by plain TCP, and says who it is and what it is
about to run. The connections stay open: a process that dies closes its own at once, a lost host is
noticed by TCP's keep-alive, and all others are told by name.

Messages are lines of JSON. From a process: {"hello": index, "host", "facts"}, {"topic", "value"},
{"failed": message, "code"}, {"bye"}. From process 0: {"hosts"} once all are there,
{"topic", "values"}, and {"end": message, "code"}.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dsv3_jax.config import ConfigError

# After a first failure, how long to hear of others before the cause is named: a death and the
# errors that it brings to others arrive at about the same time.
_COLLECT_S = 0.5
_RETRY_S = 0.2
_LINE_BYTES = 1 << 24


class PeerError(RuntimeError):
    """Another process of the run failed or is gone; the message names it."""


@dataclasses.dataclass
class _Guest:
    """A process as process 0 sees it."""

    host: str
    facts: dict[str, Any]
    writer: asyncio.StreamWriter
    left: bool = False


class Coordinator:
    """Process 0's part: a thread that serves the connections of all, its own included."""

    def __init__(self, port: int, count: int, timeout_s: float, silence_s: float) -> None:
        """Listens on `port` of every interface and waits `timeout_s` for all `count` processes.

        Raises:
          ConfigError: the port is taken.
        """
        self._count, self._timeout_s, self._silence_s = count, timeout_s, silence_s
        self._guests: dict[int, _Guest] = {}
        self._begun = self._ended = False
        self._topics: dict[str, dict[int, Any]] = {}
        self._causes: list[tuple[bool, str, int]] = []  # (died, message, exit code)
        self._all_left = threading.Event()
        try:
            self._socket = (
                socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
                )
                if socket.has_dualstack_ipv6()
                else socket.create_server(("", port), backlog=1024)
            )
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot listen on port {port}: {os.strerror(error.errno or 0)} "
                "(cluster.address)"
            ) from error
        threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True).start()

    def wait_left(self, seconds: float) -> None:
        """Returns when every process has said goodbye, or after `seconds`."""
        self._all_left.wait(seconds)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.call_later(self._timeout_s, self._too_late)
        server = await asyncio.start_server(self._serve, sock=self._socket, limit=_LINE_BYTES)
        async with server:
            await server.serve_forever()

    def _name(self, index: int) -> str:
        return f"process {index} ({self._guests[index].host})"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        index = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            index = self._admit(json.loads(await reader.readline()), writer)
        if index is None:  # not one of ours, or too late for this run: it will try again
            writer.close()
            return
        keep_alive(writer.get_extra_info("socket"), self._silence_s)
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                self._hear(index, json.loads(line))
        if not self._begun:  # it may come again, and another may have come in its place
            if index in self._guests and self._guests[index].writer is writer:
                del self._guests[index]
        elif not self._guests[index].left:
            self._note(True, f"{self._name(index)} is gone: killed, or its host lost", 1)
        writer.close()

    def _admit(self, hello: dict[str, Any], writer: asyncio.StreamWriter) -> int | None:
        index, guest = int(hello["hello"]), _Guest(str(hello["host"]), hello["facts"], writer)
        if self._begun or self._ended:
            return None
        if index in self._guests:
            hosts = f"{self._guests[index].host} and {guest.host}"
            self._guests[-1] = guest  # it must hear the answer too
            self._end(f"two processes have cluster.index={index}, on {hosts}", 2)
            return index
        self._guests[index] = guest
        if len(self._guests) == self._count:
            self._begin()
        return index

    def _begin(self) -> None:
        guests = [self._guests[index] for index in sorted(self._guests)]
        if difference := _first_difference([guest.facts for guest in guests], self._name):
            self._end(difference, 2)
            return
        self._begun = True
        self._tell({"hosts": [guest.host for guest in guests]})

    def _hear(self, index: int, message: dict[str, Any]) -> None:
        if "topic" in message:
            values = self._topics.setdefault(message["topic"], {})
            values[index] = message["value"]
            if len(values) == self._count:
                del self._topics[message["topic"]]
                self._tell(
                    {"topic": message["topic"], "values": [values[i] for i in range(self._count)]}
                )
        elif "failed" in message:
            self._guests[index].left = True
            self._note(False, f"{self._name(index)}: {message['failed']}", message["code"])
        elif "bye" in message:
            self._guests[index].left = True
            if all(guest.left for guest in self._guests.values()):
                self._all_left.set()

    def _note(self, died: bool, message: str, code: int) -> None:
        self._causes.append((died, message, code))
        if len(self._causes) == 1:
            self._loop.call_later(_COLLECT_S, self._name_cause)

    def _name_cause(self) -> None:
        # Errors that a death brings to others may be heard before the death itself.
        died = [cause for cause in self._causes if cause[0]]
        _, message, code = (died or self._causes)[0]
        self._end(message, code)

    def _too_late(self) -> None:
        missing = [str(i) for i in range(self._count) if i not in self._guests]
        if missing and not self._begun:
            which = "process" if len(missing) == 1 else "processes"
            self._end(
                f"{which} {', '.join(missing)} of {self._count} did not come within "
                f"{self._timeout_s:g} s (cluster.join_timeout_s); is it running, and can it reach "
                "process 0?",
                2,
            )

    def _end(self, message: str, code: int) -> None:
        if not self._ended:
            self._ended = True
            self._tell({"end": message, "code": code})

    def _tell(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        # This process last: it may end, and this thread with it, as soon as it hears.
        for index in sorted(self._guests, reverse=True):
            if index == 0 and "end" in message:
                self._loop.call_later(0.2, self._guests[0].writer.write, line)
            else:
                self._guests[index].writer.write(line)


class Member:
    """A process's connection to process 0, which has answered: all are there and agree.

    Attributes:
      index: of this process. hosts: the host of every process, by index.
    """

    def __init__(
        self, address: str, index: int, facts: dict[str, Any], timeout_s: float, silence_s: float
    ) -> None:
        """Connects to process 0 and waits for all others.

        Args:
          address: host:port of process 0.
          facts: JSON values that must be the same in every process.
          timeout_s: process 0 waits so long for the others.
          silence_s: after so long without an answer process 0 is taken for lost.

        Raises:
          ConfigError: a process did not come in time, or the processes differ; one line names it.
        """
        self.index = index
        self._ended: tuple[str, int] | None = None
        # The main thread waits here, or is about to end: it need not be ended.
        self._waiting = self._leaving = False
        self._values: dict[str, list[Any]] = {}
        self._changed = threading.Condition()
        deadline = time.monotonic() + timeout_s
        hello = {"hello": index, "host": socket.gethostname(), "facts": facts}
        while (answer := self._try_to_join(address, hello, deadline, silence_s)) is None:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"process 0 did not answer at {address} within {timeout_s:g} s "
                    "(cluster.address, cluster.join_timeout_s)"
                )
            time.sleep(_RETRY_S)
        if "end" in answer:
            raise ConfigError(answer["end"])
        self.hosts: list[str] = answer["hosts"]
        threading.Thread(target=self._listen, daemon=True).start()

    def _try_to_join(
        self, address: str, hello: dict[str, Any], deadline: float, silence_s: float
    ) -> dict[str, Any] | None:
        """Process 0's answer to all; None where it is not there, or busy with an earlier run."""
        host, _, port = address.rpartition(":")
        left = max(deadline - time.monotonic(), 1.0)
        try:
            self._socket = socket.create_connection((host.strip("[]"), int(port)), timeout=left)
            self._socket.settimeout(None)
            keep_alive(self._socket, silence_s)
            self._send(hello)
            self._messages = _read_lines(self._socket)
            return next(self._messages, None)
        except OSError:
            return None

    def gather(self, topic: str, value: Any) -> list[Any]:
        """What every process gives under `topic`, by index. All must call it in the same order.

        Raises:
          PeerError, ConfigError: another process ended meanwhile.
        """
        self._send({"topic": topic, "value": value})
        with self._changed:
            self._waiting = True
            self._changed.wait_for(lambda: topic in self._values or self._ended)
            self._waiting = False
            if topic in self._values:
                return self._values.pop(topic)
            assert self._ended is not None
            self._leaving = True
            raise end_error(*self._ended)

    def fail(self, message: str, code: int) -> tuple[str, int]:
        """Tells all others that this process ends; returns the cause as process 0 sees it."""
        with self._changed:
            self._leaving = True
            if self._ended is None:
                self._send({"failed": message, "code": code})
                self._changed.wait_for(lambda: self._ended, timeout=_COLLECT_S + 5.0)
            return self._ended or (message, code)

    def leave(self) -> None:
        """Says goodbye: the end of this process is no failure."""
        self._leaving = True
        self._send({"bye": True})

    def _send(self, message: dict[str, Any]) -> None:
        # A broken connection is the reading thread's to report.
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        for message in self._messages:
            with self._changed:
                if "topic" in message:
                    self._values[message["topic"]] = message["values"]
                    self._changed.notify_all()
            if "end" in message:
                self._hear_end(message["end"], message["code"])
        self._hear_end(f"process 0 ({self.hosts[0]}) is gone: killed, or its host lost", 1)

    def _hear_end(self, message: str, code: int) -> None:
        """Ends this process, unless its main thread is about to: that may wait for ever."""
        with self._changed:
            self._ended = self._ended or (message, code)
            self._changed.notify_all()
            if self._leaving or self._waiting:
                return
            print(f"error: {message}", file=sys.stderr, flush=True)
            os._exit(code)


def end_error(message: str, code: int) -> PeerError | ConfigError:
    """What another process's end is here; bad input stays bad input."""
    return ConfigError(message) if code == 2 else PeerError(message)


def keep_alive(connection: socket.socket, silence_s: float) -> None:
    """Lets TCP break `connection` when the other host has not answered for `silence_s`."""
    probes = 4
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        every = max(1, round(silence_s / (probes + 1)))
        for option, value in (
            (socket.TCP_KEEPIDLE, every),
            (socket.TCP_KEEPINTVL, every),
            (socket.TCP_KEEPCNT, probes),
            (socket.TCP_USER_TIMEOUT, round(silence_s * 1000)),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _read_lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Messages until the connection ends."""
    with connection.makefile("rb") as file, contextlib.suppress(OSError, ValueError):
        while line := file.readline(_LINE_BYTES):
            yield json.loads(line)


def _first_difference(facts: Sequence[dict[str, Any]], name: Callable[[int], str]) -> str | None:
    """A line that says which fact differs first, and where; None if none does."""
    for key in {key: None for each in facts for key in each}:
        for index, each in enumerate(facts):
            ours, theirs = facts[0].get(key, "unknown"), each.get(key, "unknown")
            if ours != theirs:
                return (
                    f"{key} is {ours} on {name(0)} and {theirs} on {name(index)}: it must be the "
                    "same on every process"
                )
    return None
