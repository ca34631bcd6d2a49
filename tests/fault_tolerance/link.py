# SPDX-License-Identifier: Apache-2.0
"""`python link.py PORT TARGET_PORT`: passes TCP on within this host, so that a test can cut two processes apart.

Stopped (SIGSTOP) it is a network that drops everything: connections stay, nothing arrives, new ones are not answered.
"""

import asyncio
import sys

_CHUNK = 65536


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    try:
        while chunk := await source.read(_CHUNK):
            target.write(chunk)
            await target.drain()
    except OSError:
        pass  # one side broke off, which the other is told by the close
    finally:
        target.close()


async def serve(port: int, target: int) -> None:
    """Until it is killed."""

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pass_on(reader, far_writer), _pass_on(far_reader, writer))

    async with await asyncio.start_server(join, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
