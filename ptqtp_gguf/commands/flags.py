"""A command's options from the fields of dataclasses: each option is written once, beside its field (plan/flags.py)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from ..plan import PANELS, Calibration, Options, flags_of
from .common import parse_size


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `Options` and `Calibration` in the place of its parameter `options`."""
    shown = {p: i for i, p in enumerate(PANELS)}
    made = [(shown[panel], p) for panel, p in [*_parameters(Options), *_parameters(Calibration)]]
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "options"]
    at = next(i for i, p in enumerate(own) if p.default is not inspect.Parameter.empty)
    listed = [*own[:at], *(p for _, p in sorted(made, key=lambda item: item[0])), *own[at:]]

    def run(**given: Any) -> None:
        calibration = Calibration(**_taken(Calibration, given))
        command(options=Options(calibration=calibration, **_taken(Options, given)), **given)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = signature.replace(parameters=listed)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in listed}
    return run


def _parameters(of: type) -> list[tuple[str, inspect.Parameter]]:
    """(panel, parameter) of each flag of a dataclass."""
    hints, defaults = get_type_hints(of), {f.name: f.default for f in fields(of)}
    made = []
    for name, flag in flags_of(of):
        kind, default = hints[name], defaults[name]
        if isinstance(default, tuple):
            kind, default = list[str] | None, None
        elif flag.size:
            kind, default = str | None, None
        option = typer.Option(
            *filter(None, (flag.name, flag.short)),
            help=flag.help,
            rich_help_panel=flag.panel,
            min=flag.low,
            max=flag.high,
        )
        parameter = inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[kind, option]
        )
        made.append((flag.panel, parameter))
    return made


def _taken(of: type, given: dict[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's flags, taken out of what typer gave. Raises typer.BadParameter."""
    values = {}
    for name, flag in flags_of(of):
        value = given.pop(name)
        if flag.size:
            value = parse_size(value) if value else 0
        elif value is None or isinstance(value, list):
            value = tuple(value or ()) if isinstance(getattr(of, name), tuple) else None
        values[name] = value
    return values
