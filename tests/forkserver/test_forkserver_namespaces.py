"""ForkServer where the server is in another PID namespace than this process: its numbers are not ours."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from aiopidfd._backends.backend import probe_pidfd
from aiopidfd._kernel import proc, syscalls

from ..helpers.children import undebugged_environment

PREPARE = """
import asyncio, contextlib, ctypes, os, signal, socket, sys, time
import aiopidfd
from aiopidfd import ForkServer
from aiopidfd._kernel import syscalls

NEWPID = 0x20000000
libc = ctypes.CDLL(None, use_errno=True)
own = os.open("/proc/self/ns/pid", os.O_RDONLY)

def enter_new_namespace():
    '''Have the next children of this process born in a PID namespace of their own, the first of which is a sleeper.'''
    assert libc.setns(own, NEWPID) == 0 and libc.unshare(NEWPID) == 0, os.strerror(ctypes.get_errno())
    inits.append(os.posix_spawn("/bin/sleep", ["sleep", "100"], os.environ))

inits = []

def wait_for_signal():
    while True:
        time.sleep(0.02)

def seen_inside(pid):
    with open(f"/proc/{pid}/status") as status:
        return int(next(line for line in status if line.startswith("NSpid:")).split()[-1])

def run(main, *args):
    loop = aiopidfd.UvloopEventLoop if "uvloop" in sys.argv else aiopidfd.SelectorEventLoop
    try:
        aiopidfd.run(asyncio.wait_for(main(*args), 20), loop_factory=loop)
    except BaseException:
        for pid in inits:
            os.kill(pid, signal.SIGKILL)  # and with it all in its namespace, which it waits for
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitid(os.P_ALL, 0, os.WEXITED | 0x40000000)
        raise
    for pid in inits:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | 0x40000000)
    except ChildProcessError:
        print("nothing left")
"""

TWO_SERVERS = """
async def main(method):
    async with contextlib.AsyncExitStack() as stack:
        workers = []
        for _ in range(2):
            enter_new_namespace()
            server = await stack.enter_async_context(ForkServer(start_method=method))
            workers.append([await server.afork(wait_for_signal) for _ in range(3)])
        (first, *_), (second, *rest) = workers
        assert seen_inside(first.pid) == seen_inside(second.pid)
        assert len({worker.pid for group in workers for worker in group}) == 6
        first.send_signal(signal.SIGUSR1)
        assert await first.wait() == -signal.SIGUSR1
        os.kill(workers[0][1].pid, signal.SIGTERM)
        assert await workers[0][1].wait() == -signal.SIGTERM
        assert [worker.returncode for worker in (workers[0][2], second, *rest)] == [None] * 4
        for worker in (workers[0][2], second, *rest):
            assert os.path.exists(f"/proc/{worker.pid}")
            assert await worker.stop() == -signal.SIGTERM

run(main, sys.argv[2])
"""

LOST_REPLIES = """
def swallow(*args):
    reply = recv_fds(*args)
    if not reply[0]:
        return reply
    for fd in reply[1]:
        os.close(fd)
    if not keeping_pidfds:
        replies.append(reply)
        raise BlockingIOError
    return reply[0], [], reply[2], reply[3]

recv_fds, replies, keeping_pidfds = socket.recv_fds, [], False

async def main():
    global keeping_pidfds
    enter_new_namespace()
    async with ForkServer() as server:
        socket.recv_fds = swallow
        first = await server.afork(wait_for_signal)  # the idle worker since the start
        starting = asyncio.ensure_future(server.afork(wait_for_signal))
        while len(replies) < 2:
            await asyncio.sleep(0.01)
        os.kill(server.pid, signal.SIGKILL)
        worker = await starting
        assert worker.pid != seen_inside(worker.pid)
        assert await worker.stop() == await first.stop() == -signal.SIGTERM
    keeping_pidfds = True
    socket.recv_fds = recv_fds
    async with ForkServer() as server:
        first = await server.afork(wait_for_signal)
        socket.recv_fds = swallow  # without the pidfd, as at the limit of descriptors
        spare = await server.afork(wait_for_signal)
        worker = await server.afork(wait_for_signal)
        assert worker.pid != seen_inside(worker.pid)
        assert await worker.stop() == await spare.stop() == await first.stop() == -signal.SIGTERM

run(main)
"""

UNKNOWN = """
syscalls.get_pid = lambda pidfd: 0  # before Linux 6.13, without a /proc of this namespace

async def main():
    enter_new_namespace()
    before = set(os.listdir("/proc/self/fd"))
    try:
        async with ForkServer():
            pass
    except OSError as exc:
        print(exc.errno, exc)
    async with ForkServer(fallback=True) as server:
        assert server.features.made_by == "none", server.features

run(main)
"""

in_namespaces = pytest.mark.skipif(
    os.geteuid() != 0
    or probe_pidfd() is not None
    or subprocess.run(["unshare", "--pid", "true"], check=False).returncode != 0,
    reason="it takes root and pidfds to make PID namespaces with fork servers in them",
)


def run_program(program: str, *args: str) -> str:
    """Run a program of Python's, and return what it prints."""
    command = [sys.executable, "-W", "error", "-c", PREPARE + program, *args]
    # A process whose children are born in another PID namespace can have no new thread, nor worker of io_uring: libuv
    # aborts where a change to its epoll needs one.
    environment = {**undebugged_environment(), "UV_USE_IO_URING": "0"}
    ran = subprocess.run(command, capture_output=True, timeout=60, check=False, text=True, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


@in_namespaces
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_servers_in_two_namespaces_have_workers_of_the_same_number_and_each_is_itself(loop: str, method: str) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    assert run_program(TWO_SERVERS, loop, method) == "nothing left\n"


@in_namespaces
def test_worker_in_another_namespace_is_found_without_the_reply_or_its_pidfd() -> None:
    assert run_program(LOST_REPLIES) == "nothing left\n"


@in_namespaces
def test_worker_whose_number_cannot_be_learnt_has_no_handle_and_ends() -> None:
    printed = run_program(UNKNOWN)
    assert "another PID namespace" in printed
    assert "Linux 6.13" in printed
    assert printed.endswith("nothing left\n")


def test_pid_of_a_pidfd_is_read_from_proc_where_the_kernel_does_not_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if probe_pidfd() is not None:
        pytest.skip("pidfds are forbidden here")
    pidfd = syscalls.open_pidfd(os.getpid())
    try:
        assert syscalls.get_pid(pidfd) == os.getpid()

        class OlderKernel:
            @staticmethod
            def ap_pidfd_get_pid(pidfd: int) -> int:
                return -25  # ENOTTY

        with monkeypatch.context() as patch:
            patch.setattr(syscalls, "lib", OlderKernel)
            assert syscalls.get_pid(pidfd) == os.getpid()
            patch.setattr(proc, "_find_mismatch", lambda: "is that of another PID namespace")
            assert syscalls.get_pid(pidfd) is None
    finally:
        os.close(pidfd)
