"""A forked child: what is clean in it, how it ends, and what it cannot do to its parent."""

from __future__ import annotations

import asyncio
import contextvars
import fcntl
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import aiopidfd
from aiopidfd import afork, notify_ready, wait

from ..conftest import LoopFactory, open_descriptors, run_on
from ..helpers.children import one_held

# To CPython, io_uring's workers are threads, and uvloop has one now and then: threads.count_threads.
beside_uring_worker = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


async def ask(look: Callable[[], Any]) -> Any:
    """Run `look` in an aforked child and return its result, as JSON."""
    read, write = os.pipe()

    def tell() -> None:
        os.write(write, json.dumps(look()).encode())

    child = await afork(tell)
    os.close(write)
    answer = await asyncio.get_running_loop().run_in_executor(None, os.read, read, 65536)
    os.close(read)
    assert await child.wait() == 0
    return json.loads(answer)


def signal_masks() -> dict[str, int]:
    """What the kernel says of this process's signals."""
    with open("/proc/self/status", encoding="ascii") as status:
        fields = dict(line.split(":", 1) for line in status)
    return {name: int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")}


def bit(sig: int) -> int:
    return 1 << (sig - 1)


async def test_handled_signals_are_at_their_default_and_ignored_ones_stay_ignored() -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: None)
    old = signal.signal(signal.SIGUSR1, lambda *args: None), signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        masks = await ask(signal_masks)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGUSR1, old[0])
        signal.signal(signal.SIGUSR2, old[1])
    # What C libraries handle stays, faulthandler's among it: test_child_signals.py.
    assert masks["SigCgt"] & bit(signal.SIGINT)
    assert not masks["SigCgt"] & (bit(signal.SIGTERM) | bit(signal.SIGUSR1))
    assert masks["SigIgn"] & bit(signal.SIGUSR2)
    assert not masks["SigIgn"] & (bit(signal.SIGTERM) | bit(signal.SIGUSR1))


async def test_sigint_is_left_ignored_if_it_was() -> None:
    """As for a program that was started with nohup's kin."""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert (await ask(signal_masks))["SigIgn"] & bit(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, old)


async def test_ignored_sigchld_is_reset() -> None:
    old = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        child = await afork(lambda: signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL)
        await child.wait()
    finally:
        signal.signal(signal.SIGCHLD, old)
    assert child.exit_status is not None
    if child.exit_status.source != "lost":  # SIGCHLD ignored: the kernel reaps, and tells since Linux 6.15
        assert child.returncode == 1


async def test_mask_is_what_it_was_before_the_fork() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        masks = await ask(signal_masks)
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert masks["SigBlk"] == bit(signal.SIGUSR1)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


async def test_there_is_no_loop_no_task_no_wakeup_descriptor() -> None:
    loop = asyncio.get_running_loop()

    def look() -> list[Any]:
        return [asyncio._get_running_loop() is None, asyncio.current_task(loop) is None, signal.set_wakeup_fd(-1)]

    assert await ask(look) == [True, True, -1]


async def test_context_is_a_copy() -> None:
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(5)
    assert await ask(variable.get) == 5


async def test_inherited_epolls_and_pidfds_are_gone() -> None:
    def look() -> list[str]:
        return sorted(
            what
            for what in open_descriptors().values()
            if "eventpoll" in what or what.startswith(("pidfd:", "anon_inode:[pidfd]"))
        )

    with one_held() as other:
        aiopidfd.PidfdWatcher().add_child_handler(other.pid, print)
        assert await ask(look) == []
        aiopidfd.PidfdWatcher().close()


@pytest.mark.parametrize("lowest", [3, 200, 5000])
async def test_inherited_epolls_are_replaced_whatever_their_numbers(lowest: int) -> None:
    """Low numbers are looked at one by one; from far ones on /proc lists them."""
    with select.epoll() as epoll:
        copy = fcntl.fcntl(epoll, fcntl.F_DUPFD_CLOEXEC, lowest)
        try:
            assert (
                await ask(lambda: [os.readlink(f"/proc/self/fd/{fd}") for fd in (epoll.fileno(), copy)]) == ["/dev/null"] * 2
            )
        finally:
            os.close(copy)


@beside_uring_worker
async def test_handles_of_the_parent_do_not_hang_in_a_child() -> None:
    """Another thread holds a lock of ours at the fork: in the child no thread will release it."""
    is_held, may_go = threading.Event(), threading.Event()

    def hold(lock: threading.RLock) -> None:
        with lock:
            is_held.set()
            may_go.wait()

    async with await afork(signal.pause) as sibling:
        thread = threading.Thread(target=hold, args=[sibling._registry._lock])
        thread.start()
        is_held.wait()
        pid = os.fork()
        if pid == 0:
            code = 2
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(10)
                sibling.kill()  # it is not this process's child, nor to be reached by it
                code = 0 if sibling.fileno() == -1 else 1
            finally:
                os._exit(code)
        may_go.set()
        thread.join()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert sibling.returncode is None


@beside_uring_worker
async def test_plain_fork_holds_no_pidfd_of_ours_and_disturbs_nothing() -> None:
    with one_held() as watched:
        waiting = asyncio.ensure_future(wait(watched.pid))
        await asyncio.sleep(0)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            names = [what for what in open_descriptors().values() if what.startswith(("pidfd:", "anon_inode:"))]
            os.write(write, json.dumps(names).encode())
            os._exit(0)
        kept = json.loads(os.read(read, 4096))
        assert not [what for what in kept if "pidfd" in what]
        epolls = [what for what in open_descriptors().values() if "[eventpoll]" in what]
        assert kept.count("anon_inode:[eventpoll]") == len(epolls) - 1  # the loop's own is not ours to close
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
        watched.end(3)
        assert (await waiting).returncode == 3


@beside_uring_worker
async def test_multiprocessing_disturbs_nothing() -> None:
    with one_held() as watched:
        waiting = asyncio.ensure_future(wait(watched.pid))
        await asyncio.sleep(0)
        process = multiprocessing.get_context("fork").Process(target=os.getpid)
        process.start()
        assert process.pid is not None
        assert (await wait(process.pid, reap=False)).returncode == 0
        process.join()
        process.close()
        watched.end(4)
        assert (await waiting).returncode == 4


async def test_parents_readers_survive_a_child_that_removes_them() -> None:
    """The epoll is shared by fork: without care, what a child removes is removed from its parent, too."""
    loop = asyncio.get_running_loop()
    read, write = os.pipe()
    os.set_blocking(read, False)
    got: asyncio.Future[bytes] = loop.create_future()
    loop.add_reader(read, lambda: got.set_result(os.read(read, 10)))

    def do_the_worst() -> None:
        loop.remove_reader(read)
        loop.stop()
        for fd in open_descriptors():
            if fd > 2:
                os.close(fd)

    child = await afork(do_the_worst)
    assert await child.wait() == 0
    os.write(write, b"alive")
    assert await got == b"alive"
    loop.remove_reader(read)
    os.close(read)
    os.close(write)


async def test_loops_of_every_kind_work_inside(loop_factory: LoopFactory) -> None:
    def child() -> int:
        async def main() -> int:
            inner = await afork(lambda: 21)
            process = await asyncio.create_subprocess_exec("/bin/true")
            return await inner.wait() * 2 + await process.wait()

        code: int = run_on(loop_factory, main())
        return code

    assert await (await afork(child)).wait() == 42


async def test_asyncio_run_works_inside() -> None:
    async def main() -> int:
        await asyncio.sleep(0)
        return 17

    assert await (await afork(lambda: asyncio.run(main()))).wait() == 17


class Odd(BaseException):
    """Neither an Exception nor one that the interpreter knows."""


def raise_(exc: BaseException) -> Any:
    raise exc


def exit_in_thread() -> None:
    thread = threading.Thread(target=sys.exit, args=(9,))
    thread.start()
    thread.join()


def suicide_by(sig: int) -> None:
    os.kill(os.getpid(), sig)


def interrupt_with_handler() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("child_func", "returncode", "stderr"),
    [
        (lambda: None, 0, ""),
        (lambda: 0, 0, ""),
        (lambda: 255, 255, ""),
        (lambda: True, 1, ""),
        (lambda: 256, 1, "TypeError"),
        (lambda: -1, 1, "TypeError"),
        (lambda: "text", 1, "TypeError"),
        (lambda: 1.0, 1, "TypeError"),
        (sys.exit, 0, ""),
        (lambda: sys.exit(3), 3, ""),
        (lambda: sys.exit(259), 3, ""),
        (lambda: sys.exit("goodbye"), 1, "goodbye\n"),
        (lambda: raise_(ValueError("why")), 1, "ValueError: why"),
        (lambda: raise_(Odd("odd")), 1, "Odd: odd"),
        (lambda: raise_(KeyboardInterrupt()), -signal.SIGINT, ""),
        (lambda: raise_(asyncio.CancelledError()), 1, "CancelledError"),
        (lambda: raise_(GeneratorExit()), 1, "GeneratorExit"),
        (lambda: raise_(StopIteration()), 1, "StopIteration"),
        (interrupt_with_handler, -signal.SIGINT, ""),
        (lambda: suicide_by(signal.SIGTERM), -signal.SIGTERM, ""),
        (lambda: suicide_by(signal.SIGKILL), -signal.SIGKILL, ""),
        (lambda: suicide_by(64), -64, ""),
        (exit_in_thread, 0, ""),
        (lambda: os._exit(200), 200, ""),
    ],
)
async def test_end_of_the_child_is_told_as_it_was(
    child_func: Callable[[], Any], returncode: int, stderr: str, capfd: pytest.CaptureFixture[str]
) -> None:
    child = await afork(child_func)
    assert await child.wait() == returncode
    printed = capfd.readouterr().err
    assert stderr in printed
    assert ("Traceback" in printed) is (stderr not in ("", "goodbye\n"))


async def test_32_children_end_each_in_its_own_way() -> None:
    """Half of them catch SIGINT as KeyboardInterrupt, half of them know nothing of SIGTERM."""

    def catch() -> int:
        try:
            notify_ready()
            while True:
                time.sleep(0.1)  # not pause(): a signal just before it would be heeded only after it
        except KeyboardInterrupt:
            return 101

    for _ in range(int(os.environ.get("AIOPIDFD_TEST_ROUNDS", "3"))):
        catching = await asyncio.gather(*[afork(catch, ready="manual") for _ in range(16)])
        knowing_nothing = await asyncio.gather(*[afork(signal.pause) for _ in range(16)])
        for child in catching:
            child.send_signal(signal.SIGINT)
        for child in knowing_nothing:
            child.terminate()
        assert [await child.wait() for child in catching] == [101] * 16
        assert [await child.wait() for child in knowing_nothing] == [-signal.SIGTERM] * 16


def test_output_is_written_once(tmp_path: Any) -> None:
    """Into a file, where Python buffers: neither lost in the child nor written a second time by it."""
    code = (
        "import asyncio, aiopidfd\n"
        "async def main():\n"
        "    print('parent')\n"
        "    child = await aiopidfd.afork(lambda: print('child'))\n"
        "    await child.wait()\n"
        "asyncio.run(main())\n"
    )
    with open(tmp_path / "out", "w+", encoding="ascii") as out:
        buffering = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, env=buffering)
        out.seek(0)
        assert out.read() == "parent\nchild\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_closed_or_missing_streams_do_not_matter(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, stream, None)
    assert await (await afork(lambda: 5)).wait() == 5


async def test_atexit_of_the_parent_does_not_run_in_the_child(tmp_path: Any) -> None:
    code = (
        "import asyncio, aiopidfd, atexit\n"
        "atexit.register(print, 'at exit')\n"
        "async def main():\n"
        "    await (await aiopidfd.afork(lambda: None)).wait()\n"
        "asyncio.run(main())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "at exit\n"


async def test_threads_of_the_child_are_waited_for() -> None:
    def child() -> None:
        def late() -> None:
            threading.Event().wait(0.05)
            os._exit(33)

        threading.Thread(target=late).start()

    assert await (await afork(child)).wait() == 33
