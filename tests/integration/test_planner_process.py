# SPDX-License-Identifier: Apache-2.0
"""`python -m tandem_planner` as a process: it outlives what it depends on, and ends in peace."""

from pathlib import Path

import pytest

from etcds import BINARY, Etcd
from planner_process import planner
from servers import free_ports, get_json, wait_for
from tandem_planner.state_file import read_state
from tandem_protocol.discovery.etcd import connect, parse_address, read_all

WAIT_S = 40.0
PREFIX = "v1/dynamo/planner/"


@pytest.mark.slow
@pytest.mark.skipif(BINARY is None, reason="there is no etcd")
def test_it_outlives_prometheus_and_etcd_and_ends_in_peace(tmp_path: Path) -> None:
    """Its decisions are in etcd; without etcd it looks on, and with it again, it goes on; there is no Prometheus at all."""
    etcd = Etcd(tmp_path)
    etcd.start()
    flags = ("--mode", "disagg", "--connector", "virtual", "--virtual-store", etcd.url, "--load-interval", "0.2", "--start-delay-s", "0",
             "--scale-check-s", "0.1", "--prometheus-endpoint", f"http://127.0.0.1:{free_ports(1)}")  # fmt: skip
    try:
        with planner(tmp_path, *flags) as one:
            board = connect(parse_address(etcd.url.removeprefix("etcd:")))

            def done(decision: int) -> bool:
                """Acknowledges what was decided; whether it was as much as `decision`."""
                decided = int(read_all(board, PREFIX).values.get(f"{PREFIX}decision_id", b"-1"))
                board.put(f"{PREFIX}scaled_decision_id", str(decided))
                return decided >= decision

            wait_for(lambda: done(1), WAIT_S, "the fewest workers of both pools are decided")
            keys = {name: value for name, value in read_all(board, PREFIX).values.items() if "num_" in name}
            assert keys == {f"{PREFIX}num_prefill_workers": b"1", f"{PREFIX}num_decode_workers": b"1"}
            wait_for(lambda: one.metric('tandem_planner_changes_total{outcome="done",role="decode"}') == 1, WAIT_S, "the acknowledgement")
            assert one.health()["status"] == "ready"
            assert any("TANDEM_DISCOVERY" in sentence for sentence in one.health()["missing"])
            etcd.kill()
            wait_for(lambda: one.health()["status"] == "unwell", WAIT_S, "etcd's loss is noticed")
            etcd.start()
            wait_for(lambda: one.health()["status"] == "ready", WAIT_S, "it goes on")
            assert get_json(f"{one.url}/decision")["decision"]["target"] == {"prefill": 1, "decode": 1}
            assert one.metric('tandem_planner_failures_total{what="connector"}') >= 5
            one.stop()
            assert read_state(tmp_path / "planner.state") is not None
    finally:
        etcd.kill()
