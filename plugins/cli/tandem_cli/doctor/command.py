# SPDX-License-Identifier: Apache-2.0
"""Looks whether this host can serve: hardware, limits, ports, tritonserver, packages, vllm-omni's environment, NIXL (by a real transfer),
discovery, Prometheus and the model's files. Exit code 1 if something fails; warnings and what was skipped don't count."""

import argparse
import os
import sys
from collections.abc import Mapping

from tandem_cli.doctor.checks import Finding, Verdict, examine
from tandem_cli.doctor.facts import Facts, NixlFacts
from tandem_cli.doctor.model_probe import probe_model
from tandem_cli.doctor.nixl_test import run_transfer
from tandem_cli.doctor.probes import probe_gpu, probe_host, probe_limits, probe_omni, probe_packages, probe_ports, probe_triton
from tandem_cli.doctor.service_probes import probe_discovery, probe_prometheus
from tandem_cli.serve.embedded_model import embedded_model
from tandem_cli.turn import print_json
from tandem_protocol.errors import ConfigError
from tandem_worker.arguments import REPLAY_PORT_OFFSET
from tandem_worker.config import WorkerSettings

_SIGNS = {Verdict.OK: "ok", Verdict.WARNING: "WARN", Verdict.FAILURE: "FAIL", Verdict.SKIPPED: "-"}
_COLOURS = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILURE: "bold red", Verdict.SKIPPED: "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--model", default="", help="model folder or hub id (default: the embedded model)")
    parser.add_argument("--discovery", default=os.environ.get("TANDEM_DISCOVERY", ""), help="discovery URL to look at, e.g. etcd://host:2379")
    parser.add_argument("--prometheus", default="", help="Prometheus to look at, e.g. http://host:9090")
    parser.add_argument("--http-port", type=int, default=8000, help="Triton's HTTP port; gRPC and metrics are the next two (default: 8000)")
    parser.add_argument("--omni-env", default="", help="vllm-omni's environment (default: TANDEM_OMNI_ENV, else build.sh's)")
    parser.add_argument("--no-nixl", action="store_true", help="leave out the transfer, which takes about half a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    findings = examine(gather(args))
    if args.json:
        rows = [{"check": name, "verdict": one.verdict, "says": one.says, "fix": one.fix or None} for name, one in findings.items()]
        print_json({"healthy": is_healthy(findings), "checks": rows})
    else:
        _show(findings)
    return 0 if is_healthy(findings) else 1


def gather(args: argparse.Namespace) -> Facts:
    """All facts; the slow ones last."""
    return Facts(
        host=probe_host(), gpu=probe_gpu(), limits=probe_limits(), busy_ports=probe_ports(_ports(args.http_port)), triton=probe_triton(),
        packages=probe_packages(), omni=probe_omni(args.omni_env),
        discovery=probe_discovery(args.discovery), prometheus=probe_prometheus(args.prometheus.rstrip("/")),
        model=probe_model(args.model or _embedded_model()), nixl=NixlFacts(skipped=True) if args.no_nixl else run_transfer(),
    )


def _embedded_model() -> str:
    try:
        return str(embedded_model())
    except ConfigError:
        return "the embedded model"  # its probe then says that there is no such folder


def _ports(http: int) -> list[tuple[int, str]]:
    worker = WorkerSettings()
    return [(http, "HTTP"), (http + 1, "gRPC"), (http + 2, "metrics"), (worker.admin_port, "admin"), (worker.kv_event_port, "KV events"),
            (worker.kv_event_port + REPLAY_PORT_OFFSET, "KV-event replay"), (worker.side_channel_port, "NIXL")]


def is_healthy(findings: Mapping[str, Finding]) -> bool:
    """Whether nothing fails."""
    return all(finding.verdict is not Verdict.FAILURE for finding in findings.values())


def _show(findings: Mapping[str, Finding]) -> None:
    if not sys.stdout.isatty():
        print(plain_table(findings))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "", "finding")
    for name, finding in findings.items():
        says = finding.says + (f"\n→ {finding.fix}" if finding.fix else "")
        table.add_row(name, Text(_SIGNS[finding.verdict], style=_COLOURS[finding.verdict]), Text(says))
    Console().print(table)


def plain_table(findings: Mapping[str, Finding]) -> str:
    """A line for each finding, and one for its fix."""
    width = max(map(len, findings))
    lines = []
    for name, finding in findings.items():
        lines.append(f"{name.ljust(width)}  {_SIGNS[finding.verdict].ljust(4)}  {finding.says}")
        if finding.fix:
            lines.append(f"{' ' * width}        fix: {finding.fix}")
    return "\n".join(lines)
