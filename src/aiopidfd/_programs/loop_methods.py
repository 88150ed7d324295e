"""subprocess_exec and subprocess_shell: what a loop has as its methods, over the registry of that loop."""

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
# What Popen takes as a program or an argument.
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


# What asyncio refuses of Popen's keywords, each with the value that it allows.
_FIXED = {"universal_newlines": False, "bufsize": 0, "text": False, "encoding": None, "errors": None}


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    """Raise ValueError, in asyncio's words, for what asyncio refuses; drop what says nothing."""
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
    """Start a program and connect everything in one step, so that it cannot be cancelled half-made; then pass one round."""
    if kwargs:
        _refuse_unsupported(kwargs)
    protocol = protocol_factory()
    registry = registry_of(loop)  # fails before there is a process, if it must
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
        await asyncio.sleep(0)  # others have waited while we started it; and asyncio's callers can cancel it here
        return transport, protocol
    except GeneratorExit:
        raise
    except asyncio.CancelledError:
        if transport is not None and transport._kill_and_close():
            await transport._wait_uncancellable()
        raise
    except BaseException:
        # Killed before its pipes are closed, which it might take for a reason to end by itself.
        if transport is None:
            cancel_program(registry, program)
        else:
            transport._protocol = None  # it knows nothing of the process, and need not hear of its end
            transport._discard()
        if process is not None:
            _close_pipes(process)
        raise


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
