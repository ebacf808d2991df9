"""How to convert: everything that a user may choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..codec import DEFAULT
from ..files import open_regular, sha256_of
from ..quantize import Settings, methods
from .tuning import TuneSettings

AUTO = "auto"  # the method that the other options ask for
TOKENS_GPU, TOKENS_CPU = 1 << 18, 1 << 15
METHOD_NAMES = (AUTO, *methods.METHODS)


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
    """How to convert, in the words of the command line. `Request` (request.py) checks them.

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
