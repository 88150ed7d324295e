"""The output of the demo: a line for each exit, and a summary at the end."""

from __future__ import annotations

import asyncio
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

from aiopidfd import AbstractChildProcess

from .._backends.features import features
from .http import CLIENTS, FAILED, SERVED

_LINE: Final = "{:>6}  {:>8}  {:<7}  {:<11}  {:>9}  {:>11}  {:>12}"

_INTRODUCTION: Final = """\
aiopidfd {version}, {python}, {loop}, Linux {kernel}, backend {backend}
{workers} workers serve http://{host}:{port}/ to {clients} clients, which run in one more process.
Each second one worker is killed and replaced.

peak memory   includes the memory that a process shares with its parent
latency       from the signal that kills a process, or from its last line of Python if it exits by itself,
              until `await child.wait()` returns; this includes the time that the kernel needs for the exit
"""


@dataclass
class Record:
    """One child of the demo."""

    name: str
    child: AbstractChildProcess
    signalled_ns: int = 0  # when the terminating signal was sent, by time.monotonic_ns(); 0: not sent
    expected: int | None = None  # the returncode that the signal must give


class Report:
    """Counts children, exits and kills, and prints them."""

    def __init__(self, scoreboard: memoryview[int]) -> None:
        self._scoreboard = scoreboard
        self._since_ns = time.monotonic_ns()
        self._is_terminal = sys.stdout.isatty()
        self._started = 0
        self._seen = 0
        self._wrong = 0
        self._kills = 0
        self._answered_kills = 0

    def introduce(self, address: tuple[str, int], workers: int) -> None:
        """Print what the demo does, and what the columns mean."""
        found = features()
        introduction = _INTRODUCTION.format(
            version=version("aiopidfd"),
            python=f"{platform.python_implementation()} {platform.python_version()}",
            loop=_describe_loop(),
            kernel=found.kernel,
            backend=found.backend,
            workers=workers,
            host=address[0],
            port=address[1],
            clients=CLIENTS,
        )
        self._say(introduction)
        self._say(_LINE.format("after", "pid", "process", "exit", "CPU time", "peak memory", "latency"))

    def add_start(self) -> None:
        """Count a forked child."""
        self._started += 1

    def add_kill(self, *, is_answered: bool) -> None:
        """Count a kill, and whether a request that was sent after it was served."""
        self._kills += 1
        self._answered_kills += is_answered

    def add_exit(self, record: Record, exited_ns: int, reported_ns: int) -> None:
        """Count and print an exit. `exited_ns` is 0 if the time is unknown."""
        status = record.child.exit_status
        if status is None or status.source == "lost":
            self._say(_LINE.format(self._after(), record.child.pid, record.name, "unknown", "", "", ""))
            return
        self._seen += 1
        if record.expected is not None and status.returncode != record.expected:
            self._wrong += 1
        usage = status.rusage
        self._say(
            _LINE.format(
                self._after(),
                record.child.pid,
                record.name,
                _describe(status.returncode),
                f"{(usage.ru_utime + usage.ru_stime) * 1e3:.1f} ms" if usage else "-",
                f"{usage.ru_maxrss / 1024:.1f} MiB" if usage else "-",
                f"{(reported_ns - exited_ns) // 1000} us" if exited_ns else "-",
            )
        )

    def show_progress(self, workers: int) -> None:
        """On a terminal, replace the progress line."""
        if self._is_terminal:
            text = f"{self._after()}  {workers} workers, {self._requests()}; Ctrl-C stops"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]}\x1b[K", end="", flush=True)

    def sum_up(self) -> bool:
        """Print the summary. Return whether no exit was lost or wrong, and the server answered after every kill."""
        lost = self._started - self._seen
        self._say(f"\nrequests: {self._requests()} (a request whose worker is killed fails, and is not sent again)")
        self._say(f"kills: {self._kills}, the server answered after {self._answered_kills} of them")
        if self._wrong:
            self._say(f"exits with another status than the signal gives: {self._wrong}")
        self._say(f"exits: {self._seen} seen of {self._started}, {lost} lost")
        return lost == 0 and self._wrong == 0 and self._answered_kills == self._kills

    def _after(self) -> str:
        return f"{(time.monotonic_ns() - self._since_ns) / 1e9:.1f} s"

    def _requests(self) -> str:
        return f"{self._scoreboard[SERVED]} served, {self._scoreboard[FAILED]} failed"

    def _say(self, text: str) -> None:
        """Print lines that stay. The next progress line is printed below them."""
        print(f"\r\x1b[K{text}" if self._is_terminal else text, flush=True)


def _describe_loop() -> str:
    if isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop):
        return "asyncio's own loop (uvloop is not installed)"
    return f"uvloop {version('uvloop')}"


def _describe(returncode: int | None) -> str:
    if returncode is None or returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:  # a real-time signal has no name
        return f"signal {-returncode}"
