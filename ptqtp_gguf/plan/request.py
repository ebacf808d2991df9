"""The user's options, checked once: which of them go together, and the method, type and recipe that they mean."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from ..codec import TYPES, TensorType
from ..errors import QuantizeError, RecipeError, RuntimeMissing
from ..llamacpp import install
from ..quantize import methods
from ..source import Imatrix
from . import flags
from .options import AUTO, DEFAULT_EFFORT, EFFORTS, NO_EFFORT, Calibration, Options
from .recipe import Recipe, block_type, load


@dataclass(frozen=True)
class Request:
    """What a conversion is asked to do.

    options      as they were given, but for the calibration's `tune`, which a method may set
    method       makes the planes; its name is what users read
    direct       the data-free method: `method` itself, or what quantizes the tensors that its stages leave
    kind         type of the block matrices
    recipe       with the user's types in it
    """

    options: Options
    method: methods.Method
    direct: methods.Method
    kind: TensorType
    recipe: Recipe

    @classmethod
    def of(cls, options: Options | None = None) -> Request:
        """Raises QuantizeError or RecipeError where method, text, type and recipe do not go together."""
        options = options or Options()
        method, how = _method(options)
        kind, direct = block_type(options.type), methods.direct(method)
        methods.require(direct, kind)
        if options.imatrix and not direct.takes_importance:
            takes = ", ".join(m.name for m in methods.METHODS.values() if m.takes_importance and not m.learns)
            raise QuantizeError(
                f"--imatrix: method {direct.name} takes no importance; leave it out, or use --method {takes}"
            )
        _check_target(options, method)
        recipe = load(options.recipe).bind(kind.name).with_overrides(options.tensor_types)
        return cls(replace(options, calibration=how), method, direct, kind, recipe)

    def without_text(self) -> Request:
        """The same, data-free."""
        how = Calibration(effort=NO_EFFORT)
        return Request.of(replace(self.options, calibration=how))

    @property
    def calibration(self) -> Calibration:
        return self.options.calibration

    def decisive(self, imatrix: Imatrix | None = None) -> dict[str, object]:
        """What of the options decides the bytes, by the command line's name for it; a file by its checksum."""
        o = self.options
        return {
            "--method": self.direct.name,
            "--type": self.kind.name,
            "--recipe": self.recipe.canonical(),
            "--imatrix": f"{imatrix.name} (SHA-256 {imatrix.sha256})" if imatrix else "none",
            **flags.decisive(o, (flags.TYPES, flags.OUTPUT)),
            **o.calibration.decisive(),
            **({"--trust-remote-code": True} if o.trust_code else {}),
            **({"method": self.method.name} if self.method.learns else {}),  # last: what differs first is told
        }

    def described(self) -> str:
        """The recipe in a line: its name, and what the user has put on top."""
        o = self.options
        budget = [] if o.target_bpw is None else [f"--target-bpw {o.target_bpw:g}"]
        budget += [f"--target-size {o.target_size}"] if o.target_size else []
        budget += [f"--as-good-as {o.as_good_as}"] if o.as_good_as else []
        return ", ".join([self.recipe.name, *budget, *(f"--tensor-type {t}" for t in o.tensor_types)])


def _method(options: Options) -> tuple[methods.Method, Calibration]:
    """The method that the options mean, and the calibration with its `tune` and `effort` set. Raises QuantizeError."""
    how = _with_effort(options.calibration)
    if options.method == AUTO:
        if _by_default(options, how):
            how = replace(how, texts=("builtin",), by_default=not options.calibration.effort)
        method = methods.METHODS["calibrated"] if how.wanted else methods.DEFAULT_METHOD
    else:
        method = methods.find(options.method)
        if method.learns and not how.wanted:
            raise QuantizeError(f"--method {method.name} learns from text; give --calib FILE, builtin or self")
        if how.wanted and not method.learns:
            raise QuantizeError(f"--method {method.name} takes no calibration; leave out --calib, or --method")
    if how.tune and method.learns and not method.tunes:
        if method is not methods.METHODS["calibrated"]:
            raise QuantizeError(f"--method {method.name} does not tune; leave out --tune, or use --method tuned")
        method = methods.METHODS["tuned"]
    how = replace(how, tune=how.tune or method.tunes)
    if how.tune_texts and not how.tune:
        raise QuantizeError("--tune-text says what to tune on; give --tune too")
    if how.tune and not how.texts:
        raise QuantizeError("--tune learns from text; give --calib FILE, builtin or self")
    kind = block_type(options.type)
    if method.learns and kind not in method.types:
        made = ", ".join(t.name for t in TYPES.values() if t.calibratable)
        raise QuantizeError(f"--calib makes {made}, not {options.type.upper()}; leave out --type")
    return method, how


def _check_target(options: Options, method: methods.Method) -> None:
    """Raises RecipeError where more than one thing is aimed at, or what is aimed at cannot be measured."""
    given = [
        name
        for name, value in (
            ("--target-bpw", options.target_bpw),
            ("--target-size", options.target_size),
            ("--as-good-as", options.as_good_as),
        )
        if value
    ]
    if len(given) > 1:
        raise RecipeError(f"{' and '.join(given)}: each decides the size; give one of them")
    if options.as_good_as and not method.learns:
        raise RecipeError(
            "--as-good-as looks at text; leave out --effort none and --imatrix, and use a type with levels"
        )


def _with_effort(how: Calibration) -> Calibration:
    """The calibration with its effort put in. Raises QuantizeError for one that is none."""
    effort, of = how.effort, "--effort"
    if not effort and not how.wanted:
        effort, of = os.environ.get("PTQTP_EFFORT", ""), "PTQTP_EFFORT"
    effort = effort or DEFAULT_EFFORT
    if effort not in EFFORTS:
        raise QuantizeError(f"{of} {effort}: is none of {', '.join(EFFORTS)}")
    if effort == NO_EFFORT and how.wanted:
        raise QuantizeError("--effort none looks at no text; leave it out, or --calib and --hessians")
    return replace(how, effort=effort)


def _by_default(options: Options, how: Calibration) -> bool:
    """Whether to calibrate though no text is given."""
    if how.wanted or how.tune or how.effort == NO_EFFORT or options.imatrix or options.use_reference:
        return False
    if not block_type(options.type).calibratable:
        return False
    try:
        install.version()
    except RuntimeMissing:
        if options.calibration.effort:
            raise
        return False
    return True
