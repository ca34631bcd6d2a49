# SPDX-License-Identifier: Apache-2.0
"""The record by which the routers of one fleet find each other."""

from typing import ClassVar

from tandem_protocol.records import Record


class RouterRecord(Record, frozen=True, kw_only=True):
    """One router that shares its books: its sockets, to connect to."""

    collection: ClassVar[str] = "routers"
    model: str
    """Routers of another model place on other workers."""
    events_endpoint: str
    """ZMQ PUB: every change of its books, numbered."""
    state_endpoint: str
    """ZMQ ROUTER that answers with its books as they are."""
