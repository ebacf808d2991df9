"""How to convert: everything that a user may choose, and how the command line says it (flags.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..codec import DEFAULT, TYPES
from ..quantize import SecondOrder, Settings, methods
from . import flags
from .flags import INPUT, MACHINE, OUTPUT, flag
from .recipe import SHIPPED
from .tuning import TuneSettings

AUTO = "auto"  # the method that the other options ask for
TOKENS_GPU, TOKENS_CPU = 1 << 18, 1 << 15  # of a calibration in order
TOKENS_OF = {"quick": 1 << 12, "normal": 1 << 14, "best": 1 << 16}  # of one by the runtime
NO_EFFORT, DEFAULT_EFFORT = "none", "normal"
EFFORTS = (NO_EFFORT, *TOKENS_OF)
METHOD_NAMES = (AUTO, *methods.METHODS)
_TYPE_NAMES = ", ".join(sorted((t.name for t in TYPES.values()), reverse=True))


@dataclass(frozen=True)
class Calibration:
    """Calibration and tuning. `texts` and `tune_texts` are files, "builtin", "self", or data sets of the hub.

    effort        "" = as the environment says; `Request` puts in what is meant
    tokens        0 = as `effort` says
    hessians      None = second moments are not kept
    tune_texts    () = texts
    by_default    nobody asked for it: where it cannot be done, the conversion goes on without
    settings      of GPTQ in order; second_order: of the calibration by the runtime's moments
    """

    texts: tuple[str, ...] = flag(
        (),
        "--calib",
        flags.CALIBRATION,
        "Calibrate on this text: a file, 'builtin', 'self', or a data set's hub id. Repeatable.",
        decides=True,
        files=True,
    )
    tokens: int = flag(
        0,
        "--calib-tokens",
        flags.CALIBRATION,
        f"Tokens to calibrate on, at most; 0: {TOKENS_OF['normal']}, or as --effort says; {TOKENS_GPU} on a GPU.",
        low=0,
        decides=True,
    )
    window: int = flag(
        0,
        "--calib-window",
        flags.CALIBRATION,
        "Tokens a window of calibration and tuning; 0: 512, in order 1024.",
        low=0,
        decides=True,
    )
    hessians: Path | None = flag(
        None,
        "--hessians",
        flags.CALIBRATION,
        "Folder of second moments: made from --calib, or taken as they are.",
        decides=True,
        files=True,
    )
    fisher: bool = flag(
        True,
        "--fisher/--no-fisher",
        flags.CALIBRATION,
        "In order (GPU, best): weigh tokens by their effect on the output.",
        decides=True,
    )
    tune: bool = flag(
        False, "--tune", flags.TUNING, "Tune trits, scales and norms on the text, end to end.", decides=True
    )
    tune_tokens: int = flag(1 << 22, "--tune-tokens", flags.TUNING, "Tokens to tune on, at most.", low=2, decides=True)
    tune_steps: int = flag(1000, "--tune-steps", flags.TUNING, "Steps of tuning, at most.", low=1, decides=True)
    tune_planes: bool = flag(
        True,
        "--tune-planes/--no-tune-planes",
        flags.TUNING,
        "Tune the trits too: better, and twice the memory.",
        decides=True,
    )
    tune_texts: tuple[str, ...] = flag(
        (),
        "--tune-text",
        flags.TUNING,
        "Tune on this text, not on that of --calib. Repeatable.",
        decides=True,
        files=True,
    )
    effort: str = flag(
        "",
        "--effort",
        flags.CALIBRATION,
        f"How long to calibrate: {', '.join(EFFORTS)}; none: no text is looked at. Default: PTQTP_EFFORT, or "
        f"{DEFAULT_EFFORT}.",
        decides=True,
    )
    by_default: bool = False
    settings: Settings = field(default_factory=Settings)
    second_order: SecondOrder = field(default_factory=SecondOrder)

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
        tuned = flags.decisive(self, (flags.TUNING,)) if self.tune else {"--tune": False}
        return flags.decisive(self, (flags.CALIBRATION,)) | tuned

    def described(self) -> str:
        """One line for the file's metadata."""
        if not self.texts:
            return "second moments of an earlier calibration"
        names = _shown(self.texts)
        how = f"effort {self.effort or DEFAULT_EFFORT}"
        of = f" of {_shown(self.tune_texts)}" if self.tune_texts else ""
        what = "" if self.tune_planes else ", planes as they were,"
        tuned = f"; tuned{what} on at most {self.tune_tokens} tokens{of}, {self.tune_steps} steps" if self.tune else ""
        many = [f"at most {self.tokens} tokens"] if self.tokens else []
        many += [f"windows of {self.window}"] if self.window else []
        return f"{names}: {', '.join([*many, how])}{tuned}"


def _shown(texts: tuple[str, ...]) -> str:
    return ", ".join(Path(t).name if Path(t).exists() else t for t in texts)


@dataclass(frozen=True)
class Options:
    """How to convert, in the words of the command line. `Request` (request.py) checks them.

    overrides       KEY=TYPE:VALUE for the metadata
    split_max_size  bytes a file, 0 = one file
    max_memory      bytes, 0 = no limit
    use_reference   the numpy reference in the native core's place; slow
    """

    method: str = flag(
        AUTO,
        "--method",
        flags.TYPES,
        f"One of: {', '.join(METHOD_NAMES)}; auto: calibrated, search where that cannot be.",
        short="-m",
    )
    type: str = flag(DEFAULT.name, "--type", flags.TYPES, f"Type of the block matrices: {_TYPE_NAMES}.", short="-t")
    recipe: str = flag(
        "default",
        "--recipe",
        flags.TYPES,
        f"Which tensor gets which type: {', '.join(SHIPPED)}, or a file.",
        short="-r",
    )
    tensor_types: tuple[str, ...] = flag(
        (), "--tensor-type", flags.TYPES, "REGEX=TYPE: tensors whose name it finds get the type. Repeatable."
    )
    imatrix: Path | None = flag(
        None,
        "--imatrix",
        flags.CALIBRATION,
        "Importance matrix of llama-imatrix: weigh errors by what the inputs count.",
    )
    calibration: Calibration = field(default_factory=Calibration)
    target_bpw: float | None = flag(
        None,
        "--target-bpw",
        flags.TYPES,
        "Choose types by what errors do to the output, within these bits per weight.",
        low=0.1,
        high=32,
        decides=True,
    )
    target_size: int = flag(
        0,
        "--target-size",
        flags.TYPES,
        "Choose types likewise, within this size of the file: 800M.",
        size=True,
        decides=True,
    )
    as_good_as: str = flag(
        "",
        "--as-good-as",
        flags.TYPES,
        "Choose types for the smallest file as near to the original as this type of llama-quantize: Q4_K_M.",
        decides=True,
    )
    overrides: tuple[str, ...] = flag(
        (),
        "--override-kv",
        OUTPUT,
        "KEY=TYPE:VALUE in the metadata (int, float, bool, str). Repeatable.",
        decides=True,
    )
    split_max_size: int = flag(
        0, "--split-max-size", OUTPUT, "Split the output into files of at most this: 2G.", size=True, decides=True
    )
    revision: str | None = flag(None, "--revision", INPUT, "Branch, tag or commit of a model on the hub.")
    keep_bf16: Path | None = flag(None, "--keep-bf16", OUTPUT, "Keep the intermediate bf16 GGUF under this name.")
    threads: int = flag(0, "--threads", MACHINE, "Threads; 0 = all cores.", short="-j", low=0)
    device: str = flag("auto", "--device", MACHINE, "cpu, cuda or auto: the same bytes.")
    max_memory: int = flag(
        0, "--max-memory", MACHINE, "Stay below this: 2G. Smaller pieces, the same bytes.", size=True
    )
    force: bool = flag(False, "--force", OUTPUT, "Replace an existing output.", short="-f")
    restart: bool = flag(False, "--restart", OUTPUT, "Throw away what an earlier run left unfinished.")
    pre_tokenizer: str = flag(
        "", "--pre-tokenizer", INPUT, "Pre-tokenizer of a byte-level BPE, by llama.cpp's name; left out, it is found."
    )
    trust_code: bool = flag(
        False,
        "--trust-remote-code",
        INPUT,
        "Run Python code that the checkpoint brings; without, one that needs it is refused.",
    )
    load_check: bool = flag(
        True,
        "--load-check/--no-load-check",
        OUTPUT,
        "First let the runtime read the header of the output, and refuse what it does not load.",
    )
    use_reference: bool = False

    @property
    def has_target(self) -> bool:
        """Whether the user says how large or how near the file is to be."""
        return bool(self.target_bpw or self.target_size or self.as_good_as)
