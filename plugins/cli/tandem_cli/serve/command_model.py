# SPDX-License-Identifier: Apache-2.0
"""Prints the folder of the embedded model, converting it first when needed."""

import argparse

from tandem_cli.serve.embedded_model import embedded_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`tandem model` has no options."""
    del parser


def run(args: argparse.Namespace) -> int:
    """Runs `tandem model`."""
    del args
    print(embedded_model())
    return 0
