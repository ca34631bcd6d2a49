# SPDX-License-Identifier: Apache-2.0
"""The body of `/health`."""

import json

from tandem_protocol.roles import Role
from tandem_worker.status import WorkerState, WorkerStatus


def test_the_body_is_plain_json() -> None:
    """State and role by their names, the model beside them."""
    body = WorkerStatus(WorkerState.DRAINING, Role.PREFILL, 3, 2, 1, 0.25, 0.01).as_json("prefill_1")
    assert json.loads(json.dumps(body)) == {
        "status": "draining", "model": "prefill_1", "role": "prefill", "active": 3, "running": 2, "waiting": 1, "kv_usage": 0.25,
        "step_s": 0.01,
    }
