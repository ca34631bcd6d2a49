# SPDX-License-Identifier: Apache-2.0
"""Reads the images of a request: fetches what is elsewhere, decodes, and keeps to the limits, or gives up with one error.

Runs on the worker's event loop; decoding and files are read on threads of its own. Resource handling: whatever ends a request, error,
deadline or cancellation, ends its connections at once; a thread that still decodes then finishes its one image for nobody.
"""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from prometheus_client import Counter

from tandem_protocol.errors import RequestError
from tandem_worker.images.config import ImageSettings
from tandem_worker.images.decode import ReadImage, decode
from tandem_worker.images.fetch import Charge, Fetcher
from tandem_worker.images.sources import Inline, Local, Remote, Source, local_path, parse_source, too_large

T = TypeVar("T")

READ = Counter("tandem_images_read", "Images of requests that were decoded", ["source"])
REFUSED = Counter("tandem_images_refused", "Requests that failed by their images")


class Allowance:
    """What one request may still use of bytes or pixels."""

    def __init__(self, amount: int, refusal: RequestError) -> None:
        self._left = amount
        self._refusal = refusal
        self._lock = threading.Lock()

    def charge(self, amount: int) -> None:
        """Raises RequestError when it is used up. Thread-safe."""
        with self._lock:
            self._left -= amount
            left = self._left
        if left < 0:
            raise self._refusal


class ImageReader:
    """Reads images until `close`."""

    def __init__(self, settings: ImageSettings | None = None, fetcher: Fetcher | None = None) -> None:
        self.settings = settings or ImageSettings()
        self._fetcher = fetcher or Fetcher(self.settings)
        self._turns = asyncio.Semaphore(self.settings.image_concurrency)

    async def read(self, items: Sequence[bytes]) -> tuple[ReadImage, ...]:
        """In the order of `items`. Raises RequestError."""
        try:
            return await self._read_all(items)
        except RequestError:
            REFUSED.inc()
            raise

    def close(self) -> None:
        """Ends the threads once they are done."""
        if "_threads" in self.__dict__:
            self._threads.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.settings.image_concurrency, "tandem-image")

    async def _read_all(self, items: Sequence[bytes]) -> tuple[ReadImage, ...]:
        settings = self.settings
        if len(items) > settings.image_max_count:
            raise RequestError(f"the request has {len(items)} images, {settings.image_max_count} is the most (TANDEM_IMAGE_MAX_COUNT)")
        file_bytes = Allowance(settings.image_max_bytes, too_large(settings.image_max_bytes))
        pixels = Allowance(settings.image_max_pixels, RequestError(
            f"the images of this request have more than {settings.image_max_pixels} pixels (TANDEM_IMAGE_MAX_PIXELS): scale them down"))
        try:
            async with asyncio.timeout(settings.image_timeout_s), asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._read(item, file_bytes.charge, pixels.charge)) for item in items]
        except TimeoutError as exc:
            raise RequestError(f"the images did not arrive within {settings.image_timeout_s:g} s (TANDEM_IMAGE_TIMEOUT_S)") from exc
        except ExceptionGroup as exc:
            raise exc.exceptions[0] from exc
        return tuple(task.result() for task in tasks)

    async def _read(self, item: bytes, charge_bytes: Charge, charge_pixels: Charge) -> ReadImage:
        async with self._turns:
            source = parse_source(item, self.settings.image_max_bytes)
            data = await self._load(source, charge_bytes)
            image = await self._on_thread(partial(decode, data, charge_pixels))
        READ.labels(type(source).__name__.lower()).inc()
        return image

    async def _load(self, source: Source, charge: Charge) -> bytes:
        match source:
            case Remote():
                return await self._fetcher.fetch(source, charge)
            case Local():
                return await self._on_thread(partial(_read_file, source, self.settings.image_root, charge))
            case Inline():
                charge(len(source.data))
                return source.data

    async def _on_thread(self, call: "partial[T]") -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _read_file(source: Local, root: str, charge: Charge) -> bytes:
    path: Path = local_path(source, root)
    try:
        charge(path.stat().st_size)
        return path.read_bytes()
    except OSError as exc:
        raise RequestError(f"an image file can't be read: {exc.strerror}") from exc
