"""`python -m aiopidfd` prints the features. `python -m aiopidfd demo` runs a server and kills and replaces its workers."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ._backends.features import Features, features
from ._fork.afork import ChildStartError

_DEMO = """\
Run an HTTP server on 127.0.0.1 with 4 workers made by afork(), on uvloop if it is
installed, and send requests to it. Each second one worker gets SIGKILL, SIGSEGV, SIGUSR1
(it exits with code 3) or SIGTERM, in turn, and is replaced. Every exit is printed."""

_EXIT_CODES = """exit codes:
  0     success; for the demo: no exit was lost, and the server answered after every kill
  1     the demo failed
  2     invalid arguments
  130   stopped by Ctrl-C (143: by SIGTERM)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    arguments = _parse(argv)
    try:
        if arguments.command == "demo":
            # Imported here, since it imports uvloop.
            from ._demo.server import run_demo  # noqa: PLC0415

            return run_demo(arguments.kills)
        print(format_features(features()), flush=True)
    except KeyboardInterrupt:  # before the demo has installed its handler of SIGINT
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of stdout has exited, as in `| head`
        # Or the interpreter would flush stdout again at exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ChildStartError, OSError) as exc:
        print(f"aiopidfd: {exc}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m aiopidfd",
        description="Print what this kernel, this sandbox and this process allow, and which backend follows from it.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"aiopidfd {version('aiopidfd')}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="run an HTTP server whose workers are killed and replaced, and print every exit",
        description=_DEMO,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--kills", type=_parse_count, default=8, metavar="N", help="how many workers to kill, one a second (default: 8)"
    )
    return parser.parse_args(argv)


def _parse_count(text: str) -> int:
    count = int(text)  # argparse reports the ValueError
    if count < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return count


def format_features(found: Features) -> str:
    """Return the features as an aligned table, with what each of them means."""
    rows = [
        ("", "here", "used"),
        ("pidfd_open", found.pidfd_open, "to watch a process (Linux 5.3)"),
        ("waitid(P_PIDFD)", found.waitid_pidfd, "to reap a child (Linux 5.4)"),
        ("pidfd_send_signal", found.pidfd_send_signal, "to signal a process, and no other one (Linux 5.1)"),
        ("clone(CLONE_PIDFD)", found.clone_pidfd, "to start a program and get its pidfd in one call (Linux 5.2)"),
        ("PIDFD_INFO_EXIT", found.recover_exit, "to recover the status of a child that other code has reaped (Linux 6.15)"),
        ("SIGCHLD", found.sigchld, _explain_sigchld(found)),
        ("/proc", found.proc, _explain_proc(found)),
        ("RLIMIT_NOFILE", str(found.nofile), f"one descriptor for each watched child; can be raised to {found.nofile_max}"),
        ("programs by", found.spawn, "clone: in C, at half the cost, and no status is lost; Popen: by subprocess.Popen"),
        ("backend", found.backend, found.reason),
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:<{widths[0]}}  {here:<{widths[1]}}  {meaning}" for name, here, meaning in rows]
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return "\n".join([f"aiopidfd {version('aiopidfd')}, {python}, Linux {found.kernel}", "", *lines])


def _explain_sigchld(found: Features) -> str:
    if found.sigchld.startswith("SIG_IGN"):
        return "the kernel reaps each child at once: " + (
            "statuses are recovered" if found.recover_exit == "yes" else "statuses are lost"
        )
    return "not needed with pidfds" if found.backend == "pidfd" else "to notice exits without pidfds"


def _explain_proc(found: Features) -> str:
    need = "to wait for processes that are not children, without pidfds"
    return need if found.backend == "sigchld" else f"{need}: not needed"


if __name__ == "__main__":
    sys.exit(main())
