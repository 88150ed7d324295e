"""subprocess_exec and subprocess_shell: methods for a loop. They start a program and watch it by the loop's registry."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from typing import Any

from .._backends.backend import logger
from .._kernel.syscalls import OUT_OF_DESCRIPTORS
from .._watch.registries import registry_of
from .lifecycle import cancel_program, prepare_program
from .shortage import free_descriptors
from .spawn import start
from .transport import SubprocessTransport

ProtocolFactory = Callable[[], asyncio.SubprocessProtocol]
Transported = tuple[SubprocessTransport, asyncio.SubprocessProtocol]
# What Popen accepts as a program or an argument.
StrOrPath = Any


async def subprocess_exec(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: ProtocolFactory,
    program: StrOrPath,
    *args: StrOrPath,
    stdin: Any = subprocess.PIPE,
    stdout: Any = subprocess.PIPE,
    stderr: Any = subprocess.PIPE,
    shell: bool = False,
    **kwargs: Any,
) -> Transported:
    """Do what `loop.subprocess_exec` does, through the registry of `loop`."""
    if shell:
        raise ValueError("shell must be False")
    return await _start(loop, protocol_factory, (program, *args), (stdin, stdout, stderr), kwargs)


async def subprocess_shell(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: ProtocolFactory,
    cmd: str | bytes,
    *,
    stdin: Any = subprocess.PIPE,
    stdout: Any = subprocess.PIPE,
    stderr: Any = subprocess.PIPE,
    shell: bool = True,
    **kwargs: Any,
) -> Transported:
    """Do what `loop.subprocess_shell` does, through the registry of `loop`."""
    if not isinstance(cmd, (bytes, str)):
        raise ValueError("cmd must be a string")
    if not shell:
        raise ValueError("shell must be True")
    return await _start(loop, protocol_factory, cmd, (stdin, stdout, stderr), {"shell": True, **kwargs})


# Keywords of Popen that asyncio refuses, each with the one value that it allows.
_FIXED = {"universal_newlines": False, "bufsize": 0, "text": False, "encoding": None, "errors": None}


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    """Raise asyncio's ValueError for a keyword that asyncio refuses. Remove those with the allowed value."""
    for name, allowed in _FIXED.items():
        if name in kwargs:
            value = kwargs.pop(name)
            if value != allowed and not (name == "text" and value is None):
                raise ValueError(f"{name} must be {allowed}")


async def _start(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: ProtocolFactory,
    args: Any,
    streams: tuple[Any, Any, Any],
    kwargs: dict[str, Any],
) -> Transported:
    """Start a program and connect its pipes and its protocol.

    All of that is one step without an await, so a cancellation finds either nothing or a complete transport. Then the loop
    runs once: other callbacks have waited for the start, and asyncio's callers can cancel here.
    """
    if kwargs:
        _refuse_unsupported(kwargs)
    protocol = protocol_factory()
    registry = registry_of(loop)  # first: it may fail, and there is no process yet
    program = prepare_program(registry)
    process = transport = None
    try:
        try:
            process = start(program, args, *streams, **kwargs)
        except OSError as exc:
            if exc.errno not in OUT_OF_DESCRIPTORS or program.pid or not free_descriptors(registry):
                raise
            process = start(program, args, *streams, **kwargs)
        transport = SubprocessTransport(loop, registry, protocol, process, program)
        transport._connect()
        if loop.get_debug():
            logger.debug("process %r created: %r", args[0] if isinstance(args, tuple) else args, transport)
        await asyncio.sleep(0)
        return transport, protocol
    except GeneratorExit:
        raise
    except asyncio.CancelledError:
        if transport is not None and transport._kill_and_close():
            await transport._wait_uncancellable()
        raise
    except BaseException:
        # The kill comes first: a program may exit by itself when its pipes are closed.
        if transport is None:
            cancel_program(registry, program)
        else:
            transport._protocol = None  # connection_made() may have failed, so nothing else is called
            transport._discard()
        if process is not None:
            _close_pipes(process)
        raise


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
