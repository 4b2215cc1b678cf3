"""Runs a training command again when it fails, up to a number of times.

    python scripts/restart.py --times 10 python scripts/train.py CONFIG --out DIR --resume

It starts again after exit code 1 and after a death by signal; not after 0 (done, or stopped by a
signal after saving), 2 (bad input: it would fail again) or 130. SIGTERM and SIGINT go to the
command, which is then not started again. The exit code is that of the last run, 128 + n for a
death by signal n.
"""

import argparse
import signal
import subprocess
import sys
import time

from dsv3_jax.cli import OneLineParser, run
from dsv3_jax.config import ConfigError


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="restart.py")
    parser.add_argument("--times", type=int, required=True, help="restarts at most")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before a restart")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    if "--resume" not in options.command:
        raise ConfigError("the command must have --resume, to continue where it failed")
    received: list[int] = []
    running: list[subprocess.Popen] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        for process in running:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    for restarts in range(options.times + 1):
        running[:] = [subprocess.Popen(options.command)]
        for number in received:  # one that came while it started
            running[0].send_signal(number)
        code = running[0].wait()
        code = 128 - code if code < 0 else code
        if received or code in (0, 2, 130) or restarts == options.times:
            break
        print(f"exit code {code}: restart {restarts + 1} of {options.times}", file=sys.stderr)
        time.sleep(options.pause)
        if received:
            break
    return code


if __name__ == "__main__":
    run(main)
