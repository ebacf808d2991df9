"""What is in a file: inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..inspect import TEMPLATE, Report, plain, plane_statistics
from ..inspect import inspect as inspect_file
from ..terminal import Sort, print_histograms, print_report, print_tensors, print_text
from .common import reporter


def inspect(
    file: Annotated[Path, typer.Argument(help="A GGUF file; of a split one, any part.")],
    tensors: Annotated[
        bool, typer.Option("--tensors", "-T", help="List every tensor; of trit planes, zeros and scales too.")
    ] = False,
    sort: Annotated[Sort, typer.Option(help="Order of --tensors.")] = Sort.FILE,
    histograms: Annotated[
        bool, typer.Option("--histograms", "-H", help="Count digits and scales of trit planes; draw them.")
    ] = False,
    every_key: Annotated[bool, typer.Option("--kvs", "-K", help="List all metadata; with --json, uncut.")] = False,
    key: Annotated[str | None, typer.Option("--kv", metavar="KEY", help="Print one metadata value, whole.")] = None,
    template: Annotated[bool, typer.Option("--template", help="Print the chat template, whole.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything, as JSON; digits and scales with --histograms or --tensors.")
    ] = False,
) -> None:
    """Show what a file holds: sizes by role and type, tokenizer, metadata, and what was used to make it.

    Examples:

      ptqtp-gguf inspect model.gguf --tensors --sort zeros

      ptqtp-gguf inspect model.gguf --histograms

      ptqtp-gguf inspect model.gguf --json | jq .bpw
    """
    report = inspect_file(file)
    if key is not None or template:
        _print_value(report, TEMPLATE if key is None else key, as_json)
        return
    planes = None
    if tensors or histograms:
        with reporter(False, False) as progress:
            planes = plane_statistics(file, progress)
    if as_json:
        counted = {} if planes is None else {"planes": planes.as_dict()}
        print(json.dumps(report.as_dict(every_key) | counted, indent=1, allow_nan=False, default=str))
        return
    print_report(report, every_key)
    if planes and tensors:
        print_tensors(report, planes, sort)
    if planes and histograms:
        print_histograms(planes)


def _print_value(report: Report, key: str, as_json: bool) -> None:
    """One value of the metadata. Raises InputError if there is none."""
    if key not in report.metadata:
        what = "chat template" if key == TEMPLATE else f"metadata key {key}"
        raise InputError(f"{report.path}: no {what} in it; inspect --kvs lists the metadata")
    if as_json:
        print(json.dumps(plain(report.metadata[key]), allow_nan=False))
    else:
        print_text(report.metadata[key])
