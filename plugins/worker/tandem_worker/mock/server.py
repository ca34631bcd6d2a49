# SPDX-License-Identifier: Apache-2.0
"""The mock process: N mock workers behind one KServe gRPC port and one admin port, registered in discovery.

Prints one JSON line when it is ready (addresses, workers' names and event endpoints), and ends on SIGTERM or SIGINT.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import grpc
import msgspec
from tritonclient.grpc import service_pb2_grpc

from tandem_protocol import kv_events
from tandem_protocol.discovery import open_discovery
from tandem_protocol.errors import ConfigError
from tandem_protocol.workers import WorkerRecord
from tandem_worker.mock.admin import AdminServer
from tandem_worker.mock.fleet import Fleet
from tandem_worker.mock.options import MockOptions
from tandem_worker.mock.service import InferenceService

_STOP_GRACE_S = 1.0
_CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0))


class Ready(msgspec.Struct, frozen=True):
    """The line that says where everything is."""

    grpc: str
    admin: str
    workers: tuple[WorkerRecord, ...]


@contextlib.asynccontextmanager
async def serving(options: MockOptions) -> AsyncIterator[tuple[Fleet, Ready]]:
    """Runs the workers while the context is open. Raises ConfigError for ports that are taken or discovery that is wrong."""
    kv_events.warm_up()
    fleet = Fleet(options)
    async with contextlib.AsyncExitStack() as stack:
        admin = AdminServer(fleet)
        stack.push_async_callback(admin.stop)
        fleet.admin_address = f"{options.host}:{await admin.start(options.host, options.admin_port)}"
        fleet.start()
        stack.push_async_callback(fleet.close)
        address = await _listen(fleet, stack)
        if options.discovery:
            discovery = open_discovery(options.discovery)
            stack.push_async_callback(discovery.close)
            await fleet.register(discovery, address)
        yield fleet, Ready(address, fleet.admin_address, tuple(fleet.record(worker, address) for worker in fleet))


async def _listen(fleet: Fleet, stack: contextlib.AsyncExitStack) -> str:
    options = fleet.options
    server = grpc.aio.server(options=_CHANNEL_OPTIONS)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceService(fleet), server)
    wanted = f"{options.host}:{options.grpc_port}"
    try:
        port = server.add_insecure_port(wanted)
    except RuntimeError as exc:
        raise ConfigError(f"gRPC port {wanted} can't be opened: choose another --grpc-port, 0 for any") from exc
    await server.start()
    stack.push_async_callback(server.stop, _STOP_GRACE_S)
    return f"{options.host}:{port}"


async def run(options: MockOptions) -> None:
    """Serves until a signal comes."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(options) as (_, ready):
        print(msgspec.json.encode(ready).decode(), flush=True)  # noqa: T201 - whoever started us reads it
        await stop.wait()
