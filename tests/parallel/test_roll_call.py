"""The roll-call by itself: who is missing, who differs, who is gone, each in one line."""

import queue
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.roll_call import Coordinator, Member, PeerError

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def meet(facts: list[dict], *, come: list[int] | None = None, timeout_s: float = 10.0) -> list:
    """What each process that comes gets: its `Member`, or the error."""
    port = free_port()
    coordinator = Coordinator(port, len(facts), timeout_s, 10.0)
    come = list(range(len(facts))) if come is None else come
    results: queue.Queue = queue.Queue()

    def join(index: int) -> None:
        try:
            member = Member(f"127.0.0.1:{port}", index, facts[index], timeout_s, 10.0)
            results.put((index, member))
        except ConfigError as error:
            results.put((index, error))

    for index in come:
        threading.Thread(target=join, args=(index,), daemon=True).start()
    found = dict(results.get(timeout=timeout_s + 5) for _ in come)
    assert coordinator is not None
    return [found[index] for index in come]


def in_threads(members: list[Member], call) -> list:
    results: queue.Queue = queue.Queue()

    def one(member: Member) -> None:
        try:
            results.put((member.index, call(member)))
        except RuntimeError as error:
            results.put((member.index, error))

    for member in members:
        threading.Thread(target=one, args=(member,), daemon=True).start()
    return [value for _, value in sorted(results.get(timeout=10) for _ in members)]


def test_all_meet_gather_and_part():
    members = meet([{"jax": "1"}] * 3)
    assert [member.hosts for member in members] == [[socket.gethostname()] * 3] * 3
    for topic in ("a", "b", "a"):  # a topic may come again
        gathered = in_threads(members, lambda m, t=topic: m.gather(t, [t, m.index]))
        assert gathered == [[[topic, 0], [topic, 1], [topic, 2]]] * 3
    for member in members:
        member.leave()


def test_missing_processes_are_named():
    errors = meet([{}] * 4, come=[0, 2], timeout_s=0.5)
    assert {str(error) for error in errors} == {
        "processes 1, 3 of 4 did not come within 0.5 s (cluster.join_timeout_s); is it running, "
        "and can it reach process 0?"
    }


def test_a_missing_process_0_is_named():
    port = free_port()
    with pytest.raises(ConfigError, match=rf"process 0 did not answer at 127.0.0.1:{port} within"):
        Member(f"127.0.0.1:{port}", 1, {}, 0.3, 10.0)


def test_a_difference_is_named_on_every_process():
    facts = [{"jax": "1", "a.b": 2}, {"jax": "1", "a.b": 2}, {"jax": "1", "a.b": 3}]
    host = socket.gethostname()
    assert {str(error) for error in meet(facts)} == {
        f"a.b is 2 on process 0 ({host}) and 3 on process 2 ({host}): it must be the same on every "
        "process"
    }
    (error, _) = meet([{"jax": "1"}, {}])
    assert "jax is 1 on process 0" in str(error) and "unknown on process 1" in str(error)


def test_two_processes_of_one_index():
    port = free_port()
    Coordinator(port, 3, 5.0, 10.0)
    results: queue.Queue = queue.Queue()

    def join() -> None:
        with pytest.raises(ConfigError) as caught:
            Member(f"127.0.0.1:{port}", 1, {}, 5.0, 10.0)
        results.put(str(caught.value))

    for _ in range(2):
        threading.Thread(target=join, daemon=True).start()
    assert "two processes have cluster.index=1" in results.get(timeout=5)


def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on port {port}: Address already"):
            Coordinator(port, 2, 1.0, 10.0)


def test_strangers_and_early_leavers_do_not_count():
    port = free_port()
    Coordinator(port, 2, 10.0, 10.0)
    for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b'{"hello": "x"}\n'):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(greeting)
    with socket.create_connection(("127.0.0.1", port)) as early:  # comes, and dies before the start
        early.sendall(b'{"hello": 1, "host": "x", "facts": {}}\n')
        time.sleep(0.1)
    time.sleep(0.1)
    results: queue.Queue = queue.Queue()
    for index in range(2):
        threading.Thread(
            target=lambda i=index: results.put(Member(f"127.0.0.1:{port}", i, {}, 10.0, 10.0)),
            daemon=True,
        ).start()
    assert {results.get(timeout=10).index for _ in range(2)} == {0, 1}


@pytest.mark.parametrize(("code", "kind"), [(1, PeerError), (2, ConfigError)])
def test_a_failure_reaches_those_who_wait_with_its_exit_code(code, kind):
    members = meet([{}] * 2)
    caught: queue.Queue = queue.Queue()

    def wait():
        try:
            members[0].gather("never", None)
        except (PeerError, ConfigError) as error:
            caught.put(error)

    threading.Thread(target=wait, daemon=True).start()
    time.sleep(0.2)
    cause, found = members[1].fail("disk full", code)
    error = caught.get(timeout=5)
    assert isinstance(error, kind) and found == code
    assert str(error) == cause == f"process 1 ({socket.gethostname()}): disk full"


# A process that joins, then works without looking up; argv: port, index.
_WORKER = """
import sys, time
from dsv3_jax.parallel.roll_call import Coordinator, Member
port, index = int(sys.argv[1]), int(sys.argv[2])
if index == 0:
    Coordinator(port, 3, 20.0, 10.0)
member = Member(f"127.0.0.1:{port}", index, {}, 20.0, 10.0)
member.gather("ready", None)
print("ready", flush=True)
if index == 2:
    sys.stdin.readline()  # a collective that fails because another process is gone
    print(member.fail("connection reset", 1), flush=True)
else:
    time.sleep(60)
"""


@pytest.fixture
def workers():
    """Three processes that have met."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(port), str(index)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    for worker in started:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    yield started
    for worker in started:
        worker.kill()
        worker.communicate()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_by_name(workers, victim):
    workers[victim].kill()
    start = time.monotonic()
    _, err = workers[1 - victim].communicate(timeout=20)
    gone = f"process {victim} ({socket.gethostname()}) is gone: killed, or its host lost"
    assert (workers[1 - victim].returncode, err) == (1, f"error: {gone}\n")
    assert time.monotonic() - start < 10


def test_a_death_is_named_though_its_consequence_was_heard_first(workers):
    workers[1].kill()
    workers[2].stdin.write("\n")
    workers[2].stdin.flush()
    gone = f"process 1 ({socket.gethostname()}) is gone: killed, or its host lost"
    assert workers[2].stdout.readline() == f"({gone!r}, 1)\n"
