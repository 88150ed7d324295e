"""Programs in unusual environments: without /proc, close_range, /dev/null, descriptors 0 to 2, or directories of PATH."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..helpers.seccomp import NESTED, compile_c
from ..helpers.subprocesses import needs_root, needs_uvloop

LOOPS = ["SelectorEventLoop", pytest.param("UvloopEventLoop", marks=needs_uvloop)]

PROGRAM = """
import asyncio, errno, os, subprocess, sys, textwrap, aiopidfd
from aiopidfd._programs import spawn
PIPE = subprocess.PIPE
async def main():
{body}
aiopidfd.run(main(), loop_factory=aiopidfd.{loop})
"""


def run_in(command: list[str], loop: str, body: str, **keywords: Any) -> str:
    """Run the body of a coroutine by a command that makes an environment. Return what it prints."""
    body = "\n".join("    " + line for line in body.strip().splitlines())
    program = PROGRAM.format(body=body, loop=loop)
    result = subprocess.run(
        [*command, sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60, **keywords
    )
    # The last one is in a chroot, whose root is no mount point.
    refusals = "unshare failed", "Operation not permitted", "cannot change root filesystem propagation"
    if any(refusal in result.stderr for refusal in refusals):
        pytest.skip(f"no such namespace can be made here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stdout + result.stderr
    return str(result.stdout)


def in_namespace(*options: str, do: str) -> list[str]:
    """A command that runs another one in new namespaces, after a shell command there."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1)")
    return ["unshare", "--mount", *options, "sh", "-c", f'{do} && exec "$@"', "sh"]


def without_close_range() -> list[str]:
    if NESTED in os.environ:
        pytest.skip("a filter is over the suite already")
    return [str(compile_c("nopidfd.c")), "close_range"]


EMPTY_PROC = "mount -t tmpfs none /proc"

CLOSES_OTHERS = '''
opened = [os.open("/", os.O_RDONLY) for _ in range(40)]
for fd in opened:
    os.set_inheritable(fd, True)
keep = opened[7], opened[20]
LOOK = """
import os
for fd in range(3, 2000):
    try:
        os.fstat(fd)
    except OSError:
        continue
    print(fd)
"""
look = [sys.executable, "-S", "-c", textwrap.dedent(LOOK)]
for pass_fds in ((), keep):
    process = await asyncio.create_subprocess_exec(*look, stdout=PIPE, pass_fds=pass_fds)
    output, _ = await process.communicate()
    assert process.returncode == 0
    print([int(fd) for fd in output.split()] == list(pass_fds))
print("in C" if spawn._clone_errno == 0 else "by Popen")
'''


@needs_root
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("world", ["plain", "no close_range", "no /proc", "neither", "/proc of the parent's namespace"])
def test_child_closes_all_but_what_it_is_passed(world: str, loop: str) -> None:
    command: list[str] = []
    if world in {"no /proc", "neither"}:
        command += in_namespace(do=EMPTY_PROC)
    if world == "/proc of the parent's namespace":
        command += in_namespace("--pid", "--fork", do="true")
        command += without_close_range()
    if world in {"no close_range", "neither"}:
        command += without_close_range()
    assert run_in(command, loop, CLOSES_OTHERS).split("\n")[:3] == ["True", "True", "in C"]


@needs_root
@pytest.mark.parametrize("loop", LOOPS)
def test_descriptors_above_a_limit_that_was_lowered_are_closed_without_close_range(loop: str) -> None:
    """All numbers below the limit are open, so /proc cannot be read before some of them are closed."""
    body = """
import resource
held = os.dup2(os.open("/", os.O_RDONLY), 300)
os.set_inheritable(held, True)
await (await asyncio.create_subprocess_exec("/bin/true")).wait()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))
try:
    while True:
        os.set_inheritable(os.dup(0), True)
except OSError:
    pass
os.set_inheritable(300, True)
look = "import os, sys; sys.exit(any(os.path.exists(f'/proc/self/fd/{fd}') for fd in [300, *range(10, 64)]))"
process = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", look)
print(await process.wait())
"""
    assert run_in(without_close_range(), loop, body) == "0\n"


ALL_KINDS = """
pipes = dict.fromkeys(("stdin", "stdout", "stderr"), PIPE)
process = await asyncio.create_subprocess_exec("sh", "-c", "read x; echo $x; echo err >&2; exit 3", **pipes)
print(await process.communicate(b"in\\n"), process.returncode)
for keywords in ({}, {"preexec_fn": int}):
    process = await asyncio.create_subprocess_exec("sleep", "1000", **keywords)
    process.terminate()
    print(await process.wait())
    try:
        await asyncio.create_subprocess_exec("no-such-program", **keywords)
    except FileNotFoundError:
        print("not found")
processes = [await asyncio.create_subprocess_shell(f"exit {n}") for n in range(20)]
print([await process.wait() for process in processes] == list(range(20)))
"""
ALL_KINDS_OUTPUT = "(b'in\\n', b'err\\n') 3\n-15\nnot found\n-15\nnot found\nTrue\n"

WORLDS = {
    "no /proc": lambda: in_namespace(do=EMPTY_PROC),
    "neither /proc nor close_range": lambda: in_namespace(do=EMPTY_PROC) + without_close_range(),
    "/proc of another PID namespace": lambda: in_namespace("--pid", "--fork", do="true"),
    "a PID namespace of its own": lambda: in_namespace("--pid", "--fork", "--mount-proc", do="true"),
    "hidepid=2": lambda: in_namespace(do="mount -t proc -o hidepid=2 none /proc"),
    "no /dev": lambda: in_namespace(do="mount -t tmpfs none /dev"),
}


@needs_root
@pytest.mark.parametrize("backend", ["pidfd", "sigchld"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("world", WORLDS)
def test_programs_of_all_kinds_run_in(world: str, loop: str, backend: str) -> None:
    if world.startswith("neither") and backend == "sigchld" and sys.version_info >= (3, 13):
        pytest.skip("Popen cannot start a program there: the C library's posix_spawn needs one of them")
    assert run_in(WORLDS[world](), loop, ALL_KINDS) == ALL_KINDS_OUTPUT


@needs_root
@pytest.mark.parametrize("loop", LOOPS)
def test_programs_run_in_a_chroot_with_nothing_but_a_program(loop: str, tmp_path: Path) -> None:
    tiny = compile_c("tiny.c", "-O1", "-static", "-nostdlib", "-fno-stack-protector")
    shutil.copy(tiny, tmp_path / "tiny")
    body = f"""
before = os.listdir("/proc/self/fd")
await (await asyncio.create_subprocess_exec("/bin/true")).wait()
import resource
os.chroot({str(tmp_path)!r})
os.chdir("/")
process = await asyncio.create_subprocess_exec("/tiny", stdin=PIPE, stdout=PIPE)
process.kill()
print(await process.wait())
for keywords in ({{}}, {{"stdout": subprocess.DEVNULL}}):
    try:
        await asyncio.create_subprocess_exec("/bin/true", **keywords)
    except FileNotFoundError as exc:
        print(exc.filename)
"""
    assert run_in([], loop, body) == "-9\n/bin/true\n/dev/null\n"


@needs_root
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("keywords", ["", "preexec_fn=int"])
def test_devnull_where_there_is_none_is_refused_as_popen_refuses_it(loop: str, keywords: str) -> None:
    body = f"""
await (await asyncio.create_subprocess_exec("/bin/true")).wait()
def error(exc): return type(exc).__name__, exc.errno, exc.filename
before = os.listdir("/proc/self/fd")
for stream in ("stdin", "stdout", "stderr"):
    others = dict.fromkeys({{"stdin", "stdout", "stderr"}} - {{stream}}, PIPE)
    try:
        subprocess.Popen("/bin/true", **{{stream: subprocess.DEVNULL}})
    except OSError as exc:
        expected = error(exc)
    try:
        await asyncio.create_subprocess_exec("/bin/true", **{{stream: subprocess.DEVNULL}}, **others, {keywords})
    except OSError as exc:
        print(error(exc) == expected, error(exc))
print(os.listdir("/proc/self/fd") == before)
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("no child")
"""
    output = run_in(in_namespace(do="mount -t tmpfs none /dev"), loop, body)
    assert output == f"True ('FileNotFoundError', {errno.ENOENT}, '/dev/null')\n" * 3 + "True\nno child\n"


# They must be as with Popen.
STDIO = """
import itertools
COMMAND = "sh", "-c", "cat; echo out; echo err >&2"
async def with_ours(**streams):
    return await (await asyncio.create_subprocess_exec(*COMMAND, **streams)).wait()
async def with_popen(**streams):
    return subprocess.Popen(COMMAND, **streams).wait()
async def run(start, order):
    (data, data_write), (out, out_write), (err, err_write) = (map(high, os.pipe()) for _ in range(3))
    os.write(data_write, b"in")
    os.close(data_write)
    for fd in range(3):
        os.close(fd)
    for fd, number in zip((data, out_write, err_write), order):
        os.dup2(fd, number)
        os.close(fd)
    code = await start(stdin=order[0], stdout=order[1], stderr=order[2])
    for number in order:
        os.close(number)
    for fd in range(3):
        os.dup2(saved[fd], fd)
    read = [os.read(fd, 100) for fd in (out, err)]
    os.close(out)
    os.close(err)
    return code, read
def high(fd, numbers=itertools.count(100)):
    number = os.dup2(fd, next(numbers))
    os.close(fd)
    return number
await (await asyncio.create_subprocess_exec("/bin/true")).wait()
saved = [os.dup2(fd, 80 + fd) for fd in range(3)]
for order in itertools.permutations((0, 1, 2, 50, 51), 3):
    seen = [await run(start, order) for start in (with_popen, with_ours)]
    if seen != [(0, [b"inout\\n", b"err\\n"])] * 2:
        print(order, seen)
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_standard_streams_that_stand_in_one_anothers_place(loop: str) -> None:
    """All choices of three of the descriptors 0, 1, 2 and two higher ones. The other low ones are closed."""
    assert run_in([], loop, STDIO) == ""


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1", "0 2", "1 2", "0 1 2"])
def test_streams_go_to_the_child_although_the_parent_has_closed_its_own(loop: str, closed: str, tmp_path: Path) -> None:
    """The pipes get these numbers then."""
    path = tmp_path / "result"
    body = f"""
await (await asyncio.create_subprocess_exec("/bin/true")).wait()
for fd in {[int(fd) for fd in closed.split()]}:
    os.close(fd)
process = await asyncio.create_subprocess_exec("sh", "-c", "cat; echo err >&2; exit 5", stdin=PIPE, stdout=PIPE, stderr=PIPE)
output = await process.communicate(b"in")
inherits = await asyncio.create_subprocess_exec("sh", "-c", "exit 6")
with open({str(path)!r}, "w") as file:
    print(output, process.returncode, await inherits.wait(), file=file)
"""
    run_in([], loop, body)
    assert path.read_text() == "(b'in', b'err\\n') 5 6\n"


PATHS = """
def error(exc): return type(exc).__name__, exc.errno, exc.filename
async def outcome(start, path):
    os.environ["PATH"] = path
    try:
        return await start()
    except OSError as exc:
        return error(exc)
async def ours(): return await (await asyncio.create_subprocess_exec("program")).wait()
async def popen(): return subprocess.Popen(["program"]).wait()
for path in {paths}:
    got, expected = await outcome(ours, path), await outcome(popen, path)
    print(got if got == expected else (path, got, expected))
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_folders_of_the_path_that_are_none_are_passed_over_as_popen_does(loop: str, tmp_path: Path) -> None:
    """ENOTDIR counts as ENOENT: the search continues. An EACCES in a later directory is reported before both."""
    (tmp_path / "file").write_text("no folder")
    for name, mode in (("good", 0o755), ("locked", 0o644)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "program").write_text("#!/bin/sh\nexit 4\n")
        (tmp_path / name / "program").chmod(mode)
    file, missing, good, locked = (str(tmp_path / name) for name in ("file", "missing", "good", "locked"))
    paths = [f"{file}:{good}", f"{missing}:{file}:{good}", f"{file}:{locked}:{missing}", f"{locked}:{file}", file, missing]
    paths.append(f"{missing}:{file}")
    permission = f"('PermissionError', {errno.EACCES}, 'program')\n"
    expected = "4\n4\n" + permission * 2
    expected += f"('NotADirectoryError', {errno.ENOTDIR}, 'program')\n('FileNotFoundError', {errno.ENOENT}, 'program')\n"
    expected += f"('NotADirectoryError', {errno.ENOTDIR}, 'program')\n"
    assert run_in([], loop, PATHS.format(paths=paths)) == expected
