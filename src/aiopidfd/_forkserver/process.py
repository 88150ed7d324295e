"""The process of the fork server. It forks a worker for each request, and does nothing else.

It has two kinds of sockets. None of them has a name.

* The control socket is a SOCK_SEQPACKET pair between the parent and the server. A request is a number, with the descriptors
  for the worker. The first of them is the worker's end of its own socket. A reply is the same number, the worker's pid, an
  errno or 0, and the pidfd. A reply with the number 0 answers no request. It says that the server has started, or has the
  traceback of why it has not.
* Each worker has a stream socket pair with the parent. It is the worker's start gate, and its data does not pass through the
  server. The parent sends the task (what the worker runs), however big it is, and RELEASE as soon as it holds the pidfd. The
  worker sends STARTED when it has unpickled the task, READY when it is ready, or FAILED with a traceback. Before RELEASE it
  runs nothing that can end it. The kernel adds the sender's pid to each message (SCM_CREDENTIALS). So the parent finds the
  worker even if the server dies before it replies.

Server and workers are in another PID namespace than the parent if the parent has called unshare(CLONE_NEWPID) or setns(2).
Then the pids that the server sees are not the pids that the parent sees. The server sends a pid only if it can see its
parent, which shows that both are in the same namespace.

The server has one thread, and blocks all signals. It exits when its parent exits, which closes the control socket.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # not in typeshed
import errno
import functools
import importlib
import os
import pickle
import socket
import struct
import traceback
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Final, NamedTuple

from .._fork import afork, child, child_exit
from .._fork.child import Options
from .._fork.child_signals import reset_signals
from .._kernel import inherited, syscalls, threads
from .._watch.start_gate import RELEASE

REQUEST: Final = struct.Struct("=Q")  # number
REPLY: Final = struct.Struct("=Qii")  # number, pid or 0, errno
# ready is "manual", start_new_session, process_group or -1, pdeathsig or 0, the count of the numbers in pass_fds that
# follow, and the size of the pickle of (function, args) after them. A struct costs fewer copied pages than a pickle (see
# child.py).
TASK: Final = struct.Struct("=??qiiQ")

STARTED: Final = b"s"
FAILED: Final = b"f"
FAILURE: Final = struct.Struct("=I")  # after FAILED: the size of the traceback that follows

MAX_FDS: Final = 253  # in one message: the kernel's SCM_MAX_FD
_MAX_TEXT: Final = 60_000  # fits into a socket's buffer


class Server(NamedTuple):
    """What the server and its workers need."""

    control: socket.socket
    mask: int


def pack_task(options: Options, pass_fds: Sequence[int], body_size: int) -> bytes:
    """Return what the parent sends to a worker before the pickle of (function, args)."""
    group = -1 if options.process_group is None else options.process_group
    manual, pdeathsig = options.ready == "manual", options.pdeathsig or 0
    head = TASK.pack(manual, options.start_new_session, group, pdeathsig, len(pass_fds), body_size)
    return head + struct.pack(f"={len(pass_fds)}i", *pass_fds)


def serve(control: socket.socket, preload: Sequence[str]) -> None:
    """Fork workers until the parent closes its end of the control socket."""
    server = Server(control, syscalls.set_signal_mask(syscalls.ALL_SIGNALS))
    try:
        if _handshake(server, preload):
            while _serve_one(server):
                pass
    except ConnectionError:  # the parent has exited before it read all messages
        pass


def _handshake(server: Server, preload: Sequence[str]) -> bool:
    """Import the modules, and send an empty text or a traceback. Return whether the imports succeeded."""
    try:
        for name in preload:
            importlib.import_module(name)
        if (threads.count_threads() or 1) > 1:
            raise RuntimeError("a preloaded module has started threads (a fork server must have one thread)")
    except BaseException:
        server.control.send(REPLY.pack(0, 0, 0) + _format_exception())
        return False
    # Reset the signal handlers and epolls of the imported modules. The rest was reset when the server was forked. Workers
    # must not share an epoll. An epoll that a fork hook makes in a worker belongs to that worker, and stays.
    reset_signals()
    syscalls.detach_all_epolls(server.control.fileno())
    child_exit.flush_streams()
    server.control.send(REPLY.pack(0, 0, 0))
    return True


def _serve_one(server: Server) -> bool:
    """Serve one request. Return False if the parent has closed the control socket."""
    request, fds, flags, _ = socket.recv_fds(server.control, REQUEST.size, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    if not request:
        return False
    (number,) = REQUEST.unpack(request)
    if flags & socket.MSG_CTRUNC:  # RLIMIT_NOFILE: the kernel has dropped some descriptors
        pid, pidfd, code = 0, -1, errno.EMFILE
    else:
        pid, pidfd, code = _fork_worker(server, fds)
    for fd in fds:
        os.close(fd)
    _reply(server, number, pid, pidfd, code)
    return True


def _fork_worker(server: Server, fds: list[int]) -> tuple[int, int, int]:
    """Fork a worker. Return its pid, its pidfd and 0, or 0, -1 and an errno."""
    child_main = functools.partial(child.run_child, functools.partial(_init_worker, server, fds))
    child_exit.mark_inherited_finalizers()
    try:
        pid, pidfd = syscalls.fork_sibling(child_main, server.mask)
    except OSError as exc:
        return 0, -1, exc.errno or errno.EIO
    return pid, pidfd, 0


def _reply(server: Server, number: int, pid: int, pidfd: int, code: int) -> None:
    reply = REPLY.pack(number, pid if os.getppid() else 0, code)  # 0: the parent is in another PID namespace
    try:
        if pidfd < 0:
            server.control.send(reply)
            return
        try:
            socket.send_fds(server.control, [reply], [pidfd])
        except OSError as exc:
            # ETOOMANYREFS: this user has too many descriptors in flight in sockets. The parent opens a pidfd itself.
            if exc.errno != errno.ETOOMANYREFS:
                raise
            server.control.send(reply)
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _init_worker(server: Server, fds: list[int], _: int, mask: int) -> Callable[[], object]:
    """Receive the task of this newly forked worker, wait for RELEASE, and return what the worker runs."""
    os.close(server.control.detach())
    child_exit.reset_exit_handlers()  # before the task arrives, so that it costs no time then
    os.set_inheritable(fds[0], False)  # socket.recv_fds() ignores its flags (seen up to Python 3.13)
    reader = _TaskReader(fds[0])
    manual, session, group, pdeathsig, count, body_size = TASK.unpack(reader.read(TASK.size))
    numbers = struct.unpack(f"={count}i", reader.read(4 * count)) if count else ()
    body = reader.read(body_size)
    _discard_signals()
    options = Options("manual" if manual else "auto", session, None if group < 0 else group, pdeathsig or None)
    try:
        if numbers:
            reader.fd = _move_out_of(numbers, reader.fd)
            _renumber(fds[1:], numbers)
        child.apply_options(options, reader.fd, mask)
        child_func, args = pickle.loads(body)
    except BaseException as exc:
        _send_failure(reader.fd)
        reader.read(len(RELEASE))
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            raise
        raise SystemExit(1) from None  # the parent has the traceback
    _write(reader.fd, STARTED)
    reader.read(len(RELEASE))
    if not manual:
        os.close(child.pop_ready_fd())
    return functools.partial(copy_context().run, _run, child_func, args)


def _discard_signals() -> None:
    """Discard signals that arrived while the worker was idle. Ctrl-C at the terminal reaches idle workers, too."""
    while pending := _signal.sigpending():
        _signal.sigtimedwait(pending, 0)


class _TaskReader:
    """The worker's end of its socket, with a read buffer."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._ahead = b""

    def read(self, size: int) -> bytes:
        """Read `size` bytes.

        If the parent has closed its end, send STARTED and raise SystemExit. The message shows the pid to a parent that has
        got no reply of the server.
        """
        parts, missing = [self._ahead], size - len(self._ahead)
        while missing > 0:
            # One call reads all of a small task, and often RELEASE.
            part = os.read(self.fd, min(max(missing, 4096), 1 << 20))
            if not part:
                _write(self.fd, STARTED)
                raise SystemExit(1)
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts)
        self._ahead = data[size:]
        return data[:size]


def _run(child_func: Callable[..., object], args: Sequence[object]) -> int:
    """Call `child_func`. If it raises before the worker is ready, send the traceback to the parent instead of stderr."""
    try:
        return child.to_exit_code(child_func(*args))
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException:
        fd = child.pop_ready_fd()
        if fd < 0:
            raise
        _send_failure(fd)
        raise SystemExit(1) from None


def _renumber(passed: Sequence[int], numbers: Sequence[int]) -> None:
    """Give each passed descriptor the number that it has in the parent."""
    movable = [_move_out_of(numbers, fd) for fd in passed]
    for fd, number in zip(movable, numbers):
        os.dup2(fd, number, inheritable=number <= 2)
        os.close(fd)


def _move_out_of(numbers: Sequence[int], fd: int) -> int:
    """Return `fd`, or a copy of it if `numbers` contains it. Then `fd` is closed."""
    tried = []
    while fd in numbers:
        tried.append(fd)
        fd = os.dup(fd)
    for other in tried:
        os.close(other)
    return fd


def _send_failure(fd: int) -> None:
    text = _format_exception()
    _write(fd, FAILED + FAILURE.pack(len(text)) + text)


def _format_exception() -> bytes:
    return traceback.format_exc().encode(errors="replace")[-_MAX_TEXT:]


def _write(fd: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except ConnectionError:  # the parent has closed its end
        pass


def main(control: int, preload: Sequence[str], main_module: dict[str, str]) -> None:
    """Run the fork server in a new interpreter. `control` is the descriptor of its control socket."""
    inherited.close_inherited(control)
    afork.install_fork_hook()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, control) as end:
        end.set_inheritable(False)
        if main_module:
            from multiprocessing import spawn  # noqa: PLC0415 - only for this

            spawn.prepare(main_module)
        serve(end, preload)
