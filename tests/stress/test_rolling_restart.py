"""A server with eight workers on one socket. They are replaced one by one under load, and no request fails."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys

from aiopidfd import afork, notify_ready

from ..conftest import LoopFactory

WORKERS = 8

# Sends requests until it reads a line, eight at a time, one connection each. Prints the number of answers and the failures.
_CLIENT = """
import asyncio, json, sys

async def main(port):
    answered, failures, going = 0, [], True

    async def ask():
        nonlocal answered
        while going:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"ping\\n")
                reply = await reader.read()
                writer.close()
                await writer.wait_closed()
                if reply != b"pong\\n":
                    raise ValueError(f"reply {reply!r}")
            except (OSError, ValueError) as exc:
                failures.append(repr(exc))
            else:
                answered += 1

    asking = [asyncio.ensure_future(ask()) for _ in range(8)]
    print("asking", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    going = False
    await asyncio.gather(*asking)
    print(json.dumps([answered, failures]))

asyncio.run(main(int(sys.argv[1])))
"""


def serve(loop_factory: LoopFactory, listener: socket.socket) -> int:
    """Be a worker: answer until SIGTERM, then finish the open requests and exit with 0."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stopping.set)
        busy: set[asyncio.Task[None]] = set()

        async def answer(connection: socket.socket) -> None:
            with connection:
                await loop.sock_recv(connection, 100)
                await loop.sock_sendall(connection, b"pong\n")

        def accept() -> None:
            try:
                connection, _ = listener.accept()
            except BlockingIOError:  # another worker was faster
                return
            connection.setblocking(False)
            task = loop.create_task(answer(connection))
            busy.add(task)
            task.add_done_callback(busy.discard)

        loop.add_reader(listener.fileno(), accept)
        notify_ready()
        await stopping.wait()
        loop.remove_reader(listener.fileno())
        await asyncio.gather(*busy)

    loop = loop_factory()
    loop.run_until_complete(main())
    loop.close()
    return 0


async def test_rolling_restart_under_load_fails_no_request_and_loses_no_exit(loop_factory: LoopFactory) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        listener.setblocking(False)
        workers = [await afork(lambda: serve(loop_factory, listener), ready="manual") for _ in range(WORKERS)]
        command = [sys.executable, "-c", _CLIENT, str(listener.getsockname()[1])]
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert client.stdout is not None
        assert client.stdout.readline() == "asking\n"

        ended = []
        for place, old in enumerate(tuple(workers)):
            new = await afork(lambda: serve(loop_factory, listener), ready="manual")
            ended.append(await old.stop())
            workers[place] = new

        # The workers answer until the client ends.
        output, _ = await asyncio.get_running_loop().run_in_executor(None, client.communicate, "enough\n")
        answered, failures = json.loads(output)
        ended += [await worker.stop() for worker in workers]
    assert ended == [0] * (2 * WORKERS)
    assert failures == []
    assert answered > 2 * WORKERS
