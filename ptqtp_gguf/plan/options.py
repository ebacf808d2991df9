"""How to convert: everything that a user may choose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ..codec import DEFAULT, TYPES
from ..errors import QuantizeError
from ..files import open_regular, sha256_of
from ..quantize import Settings, methods
from ..source import Imatrix
from .recipe import Recipe, block_type, load
from .tuning import TuneSettings

AUTO, CALIBRATED, TUNED = "auto", "calibrated", "tuned"
TOKENS_GPU, TOKENS_CPU = 1 << 18, 1 << 15
METHOD_NAMES = (AUTO, *methods.METHODS, CALIBRATED, TUNED)


@dataclass(frozen=True)
class Calibration:
    """Calibration and tuning.

    texts        what --calib names: files, builtin, self, data sets of the hub
    tokens       for calibration, 0 = TOKENS_GPU or TOKENS_CPU; tune_tokens: for tuning, at most
    tune_texts   what to tune on, () = texts; tune_planes: train the levels too, not only their scales
    window       tokens a window
    hessians     folder of second moments, made or taken; None = in order, nothing kept
    fisher       weigh tokens by how much an error in them matters (sensitivity.py); in order only
    """

    texts: tuple[str, ...] = ()
    tokens: int = 0
    window: int = 1024
    hessians: Path | None = None
    fisher: bool = True
    tune: bool = False
    tune_tokens: int = 1 << 22
    tune_steps: int = 1000
    tune_texts: tuple[str, ...] = ()
    tune_planes: bool = True
    settings: Settings = field(default_factory=Settings)

    @property
    def wanted(self) -> bool:
        return bool(self.texts or self.hessians)

    @property
    def tuning(self) -> TuneSettings:
        return TuneSettings(steps=self.tune_steps, train_planes=self.tune_planes, every=max(50, self.tune_steps // 20))

    def decisive(self) -> dict[str, object]:
        """What decides the planes, by the name that the command line has for it; a file by its checksum."""
        if not self.wanted:
            return {}
        found = {
            "--calib": [_identity(t) for t in self.texts],
            "--calib-tokens": self.tokens,
            "--calib-window": self.window,
            "--hessians": str(self.hessians) if self.hessians else "none",
            "--fisher": self.fisher,
            "--tune": self.tune,
        }
        tuned = {
            "--tune-tokens": self.tune_tokens,
            "--tune-steps": self.tune_steps,
            "--tune-planes": self.tune_planes,
            "--tune-text": [_identity(t) for t in self.tune_texts],
        }
        return found | (tuned if self.tune else {})

    def described(self) -> str:
        """One line for the file's metadata."""
        if not self.texts:
            return "second moments of an earlier calibration"
        names = _shown(self.texts)
        how = "second moments" if self.hessians else "in order, Fisher-weighted" if self.fisher else "in order"
        of = f" of {_shown(self.tune_texts)}" if self.tune_texts else ""
        what = "" if self.tune_planes else ", planes as they were,"
        tuned = f"; tuned{what} on at most {self.tune_tokens} tokens{of}, {self.tune_steps} steps" if self.tune else ""
        most = f"at most {self.tokens} tokens" if self.tokens else "tokens"
        return f"{names}: {most} in windows of {self.window}, {how}{tuned}"


def _shown(texts: tuple[str, ...]) -> str:
    return ", ".join(Path(t).name if Path(t).is_file() else t for t in texts)


def _identity(text: str) -> str:
    path = Path(text)
    if not path.is_file():
        return text
    with open_regular(path) as f:
        return f"{path.name} (SHA-256 {sha256_of(f, text)})"


@dataclass(frozen=True)
class Options:
    """How to convert. What decides the bytes is in `decisive`; the rest may change when a job is taken up again.

    method          auto, or a name of METHOD_NAMES
    type            type that recipes call {type}: TP2_1 or TP2_0
    recipe          name of a recipe, or path of one
    tensor_types    REGEX=TYPE, before the recipe's rules
    imatrix         importance matrix, GGUF or .dat, or None; its content and name decide
    target_bpw      bits per weight of the whole file to stay under, or None
    overrides       KEY=TYPE:VALUE for the metadata
    split_max_size  bytes a file, 0 = one file
    threads         0 = all cores
    device          cpu, cuda or auto
    max_memory      bytes, 0 = no limit
    restart         begin anew where an unfinished conversion lies beside the target
    trust_code      run Python code that a checkpoint brings; without, one that needs it is refused
    """

    method: str = AUTO
    type: str = DEFAULT.name
    recipe: str = "default"
    tensor_types: tuple[str, ...] = ()
    imatrix: Path | None = None
    calibration: Calibration = field(default_factory=Calibration)
    target_bpw: float | None = None
    overrides: tuple[str, ...] = ()
    split_max_size: int = 0
    revision: str | None = None
    keep_bf16: Path | None = None
    threads: int = 0
    device: str = "auto"
    max_memory: int = 0
    force: bool = False
    restart: bool = False
    trust_code: bool = False
    use_reference: bool = False


def decisive(options: Options, recipe: Recipe, imatrix: Imatrix | None = None) -> dict[str, object]:
    """What of the options decides the bytes, by the name that the command line has for it; a file by its checksum."""
    return {
        "--method": options.method,
        "--type": options.type.upper(),
        "--recipe": recipe.canonical(),
        "--imatrix": f"{imatrix.name} (SHA-256 {imatrix.sha256})" if imatrix else "none",
        "--target-bpw": options.target_bpw,
        "--override-kv": list(options.overrides),
        "--split-max-size": options.split_max_size,
        **options.calibration.decisive(),
        **({"--trust-remote-code": True} if options.trust_code else {}),
    }


def resolved(options: Options) -> Options:
    """The options with one of METHODS as the method, for what calibration leaves, and tuning in its place.

    Raises QuantizeError where method, text and type do not go together.
    """
    how, method = options.calibration, options.method
    if method in (AUTO, CALIBRATED, TUNED):
        if method != AUTO and not how.wanted:
            raise QuantizeError(f"--method {method} learns from text; give --calib FILE, builtin or self")
        options = replace(options, method="search")
        if method == TUNED:
            how = replace(how, tune=True)
    else:
        methods.find(method)
        if how.wanted:
            raise QuantizeError(f"--method {method} takes no calibration; leave out --calib, or --method")
    if how.tune_texts and not how.tune:
        raise QuantizeError("--tune-text says what to tune on; give --tune too")
    if how.tune and not how.texts:
        raise QuantizeError("--tune learns from text; give --calib FILE, builtin or self")
    if how.wanted and not block_type(options.type).calibratable:
        made = ", ".join(t.name for t in TYPES.values() if t.calibratable)
        raise QuantizeError(f"--calib makes {made}, not {options.type.upper()}; leave out --type")
    return replace(options, calibration=how)


def method_name(options: Options) -> str:
    """The method by the name that users have for it."""
    how = options.calibration
    return TUNED if how.tune else CALIBRATED if how.wanted else options.method


def recipe_of(options: Options) -> Recipe:
    """The recipe with the user's types in it. Raises RecipeError or QuantizeError where they do not go together."""
    kind = block_type(options.type)
    method = methods.find(options.method)
    methods.require(method, kind)
    if options.imatrix and not method.takes_importance:
        takes = ", ".join(m.name for m in methods.METHODS.values() if m.takes_importance)
        raise QuantizeError(
            f"--imatrix: method {method.name} takes no importance; leave it out, or use --method {takes}"
        )
    return load(options.recipe).bind(kind.name).with_overrides(options.tensor_types)


def described(options: Options, recipe: Recipe) -> str:
    """The recipe in a line: its name, and what the user has put on top."""
    budget = [] if options.target_bpw is None else [f"--target-bpw {options.target_bpw:g}"]
    return ", ".join([recipe.name, *budget, *(f"--tensor-type {t}" for t in options.tensor_types)])
