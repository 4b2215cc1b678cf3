"""Processes that prepare at the same time and then measure one after another."""

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any


def take_turns(
    work: Callable[..., Iterator[Any]], tasks: list[tuple], processes: int
) -> Iterator[tuple[Any, Any]]:
    """What `work(*task)` yields, twice, for each of `tasks`, in order; None if its process died.

    Up to `processes` tasks run to their first yield at the same time. The rest of each is run
    alone, when all of those are there. Work is forked: it knows what this process knows, which must
    not have touched a GPU.
    """
    context = multiprocessing.get_context("fork")
    for first in range(0, len(tasks), processes):
        started = []
        for task in tasks[first : first + processes]:
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(work, task, theirs))
            process.start()
            theirs.close()
            started.append((process, ours))
        prepared = [_receive(pipe) for _, pipe in started]
        for (process, pipe), early in zip(started, prepared, strict=True):
            late = None
            if early is not None:
                pipe.send("your turn")
                late = _receive(pipe)
            process.join()
            yield early, late


def _run(work: Callable[..., Iterator[Any]], task: tuple, pipe: Connection) -> None:
    results = work(*task)
    pipe.send(next(results))
    pipe.recv()
    pipe.send(next(results))


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None
