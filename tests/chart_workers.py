# SPDX-License-Identifier: Apache-2.0
"""The chart's worker containers as the image's entry point and the launcher take them."""

import argparse
import os
import subprocess
from pathlib import Path

from charts import NAME, ROOT, Document, container, environment, pod
from tandem_cli.serve import options as serve_options
from tandem_cli.serve.options import ServeOptions


def worker_of(documents: list[Document], owner: str = "aggregated") -> Document:
    """The worker's container."""
    return container(pod(documents, f"{NAME}-{owner}"), "worker")


def launched(one: Document, tmp_path: Path, index: str = "1") -> list[str]:
    """What the image's own entry point makes of a container: the command that it would become."""
    (tmp_path / "tandem").write_text('#!/bin/sh\nprintf "%s\\n" tandem "$@"\n')
    (tmp_path / "tandem").chmod(0o755)
    variables = {**environment(one), "PATH": f"{tmp_path}:{os.environ['PATH']}", "TANDEM_HOME": str(tmp_path), "LWS_WORKER_INDEX": index}
    # Kubernetes' command replaces the entry point, which is tini and this script; its arguments follow either.
    script = str(ROOT / "container" / "entrypoint.sh")
    command = [part.replace("/opt/tandem/container/entrypoint.sh", script) for part in one.get("command", ["tini", "--", script])]
    arguments = [argument.replace("$(LWS_LEADER_ADDRESS)", "leader.example") for argument in one["args"]]
    assert command[:2] == ["tini", "--"]
    done = subprocess.run([*command[2:], *arguments], env=variables, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def parsed(command: list[str]) -> ServeOptions:
    """As `tandem serve` parses them."""
    assert command[:2] == ["tandem", "serve"]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    serve_options.add_arguments(parser)
    args, args_passthrough = parser.parse_known_args(command[2:])
    args.passthrough = args_passthrough
    return serve_options.parse_options(args)
