# SPDX-License-Identifier: Apache-2.0
"""Looks whether a cluster can take the chart with the chosen values: kubectl and server, StorageClass, GPUs and their operator, the kinds
that are needed, quota, secrets, a dry run on the server, and with --pull the images. Exit code 1 if something fails.

Nothing is changed, but for the pod of --pull, which is removed again.
"""

import argparse
from pathlib import Path

from tandem_cli.check_cluster.checks import examine
from tandem_cli.check_cluster.kubectl import Kubectl
from tandem_cli.check_cluster.probes import gather
from tandem_cli.check_cluster.rendering import Chosen
from tandem_cli.doctor.command import is_healthy, plain_table
from tandem_cli.serve.layout import source_root
from tandem_cli.turn import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("-f", "--values", action="append", default=[], metavar="FILE", help="values file, as for helm; may be repeated")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one value, as for helm; may be repeated")
    parser.add_argument("-n", "--namespace", default="default", help="namespace of the install (default: default)")
    parser.add_argument("--release", default="tandem", help="name of the release (default: tandem)")
    parser.add_argument("--context", default="", help="kubectl context (default: the current one)")
    parser.add_argument("--chart", default="", metavar="FOLDER", help="chart folder or package (default: helm/tandem beside this program)")
    parser.add_argument("--pull", action="store_true", help="also pull the images, by a pod that is removed again")
    parser.add_argument("--pull-timeout", type=float, default=900.0, metavar="S", help="seconds for that (default: 900)")
    parser.add_argument("--timeout", type=float, default=15.0, metavar="S", help="seconds that one question may take (default: 15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    chart = Path(args.chart) if args.chart else source_root() / "helm" / "tandem"
    chosen = Chosen(chart, args.namespace, args.release, tuple(args.values), tuple(args.set))
    kubectl = Kubectl(args.namespace, args.context, args.timeout)
    findings = examine(gather(kubectl, chosen, args.pull_timeout if args.pull else 0.0))
    if args.json:
        rows = [{"check": name, "verdict": one.verdict, "says": one.says, "fix": one.fix or None} for name, one in findings.items()]
        print_json({"healthy": is_healthy(findings), "checks": rows})
    else:
        print(plain_table(findings))
    return 0 if is_healthy(findings) else 1
