"""The files of a comparison: the reference in 16 bits, stock types of it, ours; made when needed, and kept.

A file is kept in a folder whose name is the hash of all that decides its bytes: the reference's own hash, the type, the
importance matrix, the options, and the libraries that make it. What is there already is not made again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .. import __version__
from ..calibrate import texts
from ..codec import BY_NAME, DEFAULT, native
from ..conversion import FLOATS, make_bf16, pipeline
from ..errors import CalibrationError, InputError, OutputError, PtqtpError, RecipeError
from ..files import (
    TYPE_IDS,
    check_space,
    file_sha256,
    parse_json,
    partial_file,
    read_whole,
    type_block,
    type_name,
    write_text,
)
from ..llamacpp import install
from ..measure import whole
from ..plan import Options, Request, Role, role_of
from ..progress import Progress
from ..source import GgufSource, Imatrix, checkpoint, stem_of

WANTS_IMATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}  # as llama-quantize wants it, and IQ3_XXS
# mixtures whose name is not a type; that of Q4_K_M and the like begins with one
NOMINAL = {"IQ3_M": "IQ3_S", "IQ2_M": "IQ2_S"}
SHARED_LINES = 0.01  # of the calibration text's long lines; licence headers are shared by chance, articles are not
LONG_LINE = 60  # characters
MAX_NOTE = 1 << 24  # bytes
IMATRIX_CHUNKS = 128  # windows of 512 tokens


@dataclass(frozen=True)
class Item:
    """What is to be compared: a file that is there, or a type to be made."""

    label: str
    kind: Literal["ours", "stock"]
    type: str = ""
    path: Path | None = None


@dataclass(frozen=True)
class Made:
    """A file of the comparison. made: the command that makes it; empty for a file that was given."""

    label: str
    kind: Literal["reference", "ours", "stock"]
    path: Path
    sha256: str
    made: str = ""


def parse_items(names: Iterable[str]) -> list[Item]:
    """What --against and --ours name: types of llama-quantize, TP types, files, LABEL=FILE.

    Raises InputError, RecipeError; RuntimeMissing where the tools are not there.
    """
    known = stock_types()
    items: list[Item] = []
    for name in names:
        kind = name.strip().upper()
        if kind in BY_NAME:
            items.append(Item(kind, "ours", kind))
        elif kind in known:
            items.append(Item(kind, "stock", kind))
        else:
            label, _, path = name.rpartition("=")
            items.append(_given(label, Path(path), name, known))
    labels = [i.label for i in items]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise InputError(f"{twice} is named twice; give files names of their own: LABEL={twice}.gguf")
    return items


def _given(label: str, path: Path, name: str, known: Sequence[str]) -> Item:
    if not path.exists():
        raise RecipeError(
            f"{name}: neither a file nor a type of llama-quantize's; it makes {', '.join(known)}, "
            f"ptqtp-gguf {' and '.join(BY_NAME)}"
        )
    with GgufSource(path) as source:  # of a split file, any part names the whole
        ours = any(type_name(t.type) in BY_NAME for t in source.tensors)
        first = source.readers[0].path
    return Item(label or stem_of(first), "ours" if ours else "stock", "", first)


def stock_types() -> list[str]:
    """Types that the built llama-quantize makes, without ours and without plain copies. Raises RuntimeMissing."""
    page = install.run_tool("llama-quantize", "--help", codes=(0, 1))
    found = re.findall(r"^\s*\d+\s+or\s+(\w+)\s*:", page, re.MULTILINE)
    return [t for t in found if t not in (*BY_NAME, *FLOATS, "COPY")]


def block_of(name: str) -> int:
    """Weights a block of the type that one of llama-quantize's stands for: 256 for Q4_K_M, 32 for Q4_0.

    Raises RecipeError where no tensor type has such a name.
    """
    for kind in (name, NOMINAL.get(name, name), re.sub(r"_[SML]$", "", name)):
        if kind in TYPE_IDS:
            return type_block(TYPE_IDS[kind])
    raise RecipeError(f"{name}: no type of llama-quantize's that is known here")


def require_imatrix(items: Iterable[Item], has: bool) -> None:
    """Refuse types that are made with an importance matrix only. Raises RecipeError."""
    lacking = [i.type for i in items if i.type in WANTS_IMATRIX]
    if lacking and not has:
        raise RecipeError(f"{', '.join(lacking)}: made with an importance matrix only; give --calib TEXT or --imatrix")


# ---- the store ----


class Store:
    """Kept files. Raises OutputError where the folder cannot be written."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        """fresh: make everything again."""
        self.folder, self.fresh = folder, fresh

    def keep(self, key: dict[str, object], name: str, make: Callable[[Path], None]) -> tuple[Path, str]:
        """The file that `key` decides, made by make(path) unless it is there, and its SHA-256.

        make writes the file whole or not at all, or so that it resumes when it is called again.
        """
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        path = self.folder / digest[:16] / name
        note = path.with_suffix(".json")
        try:
            held = parse_json(read_whole(note, MAX_NOTE))
            if not self.fresh and held["key"] == digest and held["size"] == path.stat().st_size:
                return path, str(held["sha256"])
        except (PtqtpError, OSError, ValueError, KeyError, TypeError):
            pass
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            note.unlink(missing_ok=True)
        except OSError as e:
            raise OutputError(f"{path.parent}: cannot be written: {e.strerror}; choose another --cache") from None
        make(path)
        sha = file_sha256(path)
        write_text(
            note, json.dumps({"key": digest, "size": path.stat().st_size, "sha256": sha, "of": key}, default=str)
        )
        return path, sha


# ---- what is made ----


@dataclass(frozen=True)
class Workshop:
    """Makes the files of one comparison from one source.

    source  checkpoint folder or GGUF in 16 or 32 bits
    """

    source: Path
    reference: Path
    reference_sha: str
    store: Store
    options: Options
    imatrix: Path | None
    imatrix_sha: str
    progress: Progress

    @property
    def reference_size(self) -> int:
        """Bytes, of all parts. Raises OSError, InputError."""
        with GgufSource(self.reference) as source:
            return sum(size for _, size, _ in source.stamp)

    @property
    def name(self) -> str:
        return self.source.name if self.source.is_dir() else stem_of(self.source)

    def key(self, item: Item) -> dict[str, object]:
        """All that decides the bytes of an item's file, for JSON. Raises what `make` raises of options and files."""
        if item.path is not None:
            return {"file": _sha256(item.path)}
        if item.kind == "ours":
            how = self._options(item)
            imatrix = {"--imatrix": self.imatrix_sha if how.imatrix else "none"}
            return {
                "reference": self.reference_sha,
                "version": __version__,
                "library": file_sha256(native.library_path()),
                "options": {**Request.of(how).decisive(), **imatrix},
            }
        return {
            "reference": self.reference_sha,
            "type": item.type,
            "imatrix": self.imatrix_sha,
            "library": [file_sha256(p) for p in install.quantize_libraries()],
        }

    def make(self, item: Item) -> Made:
        """Raises what conversion.convert raises; RuntimeMissing where llama-quantize fails."""
        if item.path is not None:
            return Made(item.label, item.kind, item.path, _sha256(item.path))
        return self._ours(item) if item.kind == "ours" else self._stock(item)

    def _options(self, item: Item) -> Options:
        """Of ours: calibrated on text where there is some, else weighed by the importance matrix."""
        weighed = None if self.options.calibration.wanted else self.imatrix
        return replace(self.options, type=item.type, imatrix=weighed)

    def _ours(self, item: Item) -> Made:
        how = self._options(item)
        source = self.source if how.calibration.wanted else self.reference

        def make(path: Path) -> None:
            pipeline.convert(source, path, replace(how, force=True), self.progress)

        path, sha = self.store.keep(self.key(item), f"{self.name}-{item.type}.gguf", make)
        return Made(item.label, "ours", path, sha, f"ptqtp-gguf convert {source.name} {path.name}{_flags(how)}")

    def _stock(self, item: Item) -> Made:
        weighed = ["--imatrix", str(self.imatrix)] if self.imatrix else []

        def make(path: Path) -> None:
            check_space(path.parent, self.reference_size)
            with partial_file(path) as partial:
                partial.file.close()
                words = [*weighed, str(self.reference), str(partial.path), item.type]
                words += [str(self.options.threads)] if self.options.threads else []
                for line in install.stream_tool("llama-quantize", *words):
                    step = re.match(r"\[\s*(\d+)/\s*(\d+)\]\s*(\S+)", line)
                    if step:
                        self.progress(f"making {item.type}", int(step[1]), int(step[2]), step[3])
                partial.publish()

        path, sha = self.store.keep(self.key(item), f"{self.name}-{item.type}.gguf", make)
        flags = " ".join([*(["--imatrix", Path(weighed[1]).name] if weighed else []), ""])
        return Made(
            item.label, "stock", path, sha, f"llama-quantize {flags}{self.reference.name} {path.name} {item.type}"
        )


def _sha256(path: Path) -> str:
    """Of a file, or of all parts of a split one; of one that cannot be read, itself: who measures it says why."""
    try:
        return whole(path).sha256
    except InputError:
        return file_sha256(path)


def _flags(how: Options) -> str:
    words = [f" --type {how.type}"] if how.type != DEFAULT.name else []
    words += [f" --recipe {how.recipe}"] if how.recipe != "default" else []
    words += [f" --tensor-type {t}" for t in how.tensor_types]
    words += [f" --imatrix {how.imatrix.name}"] if how.imatrix else []
    words += [f" --calib {Path(t).name}" for t in how.calibration.texts]
    words += [" --tune"] if how.calibration.tune else []
    words += [" --trust-remote-code"] if how.trust_code else []
    return "".join(words)


def reference_of(source: Path, store: Store, progress: Progress, trust_code: bool = False) -> tuple[Path, str]:
    """The GGUF in 16 or 32 bits that all is measured against, and its SHA-256: the source itself, or made of it.

    Of a split GGUF the first part. Raises InputError where the source is quantized, or neither a GGUF nor a checkpoint;
    CheckpointError.
    """
    if checkpoint.is_gguf(source):
        with GgufSource(source) as s:
            kinds = sorted({t.type_name for t in s.tensors if role_of(t.name) is Role.BLOCK and len(t.shape) > 1})
        quantized = [k for k in kinds if k not in FLOATS]
        if quantized:
            raise InputError(
                f"{source}: is quantized ({', '.join(quantized)}); give the original, a checkpoint folder or a bf16 "
                "GGUF, and this file by --ours or --against"
            )
        found = whole(source)
        return found.path, found.sha256
    if not source.is_dir():
        raise InputError(f"{source}: neither a GGUF file nor a checkpoint folder with config.json")
    folder = checkpoint.check(source, trust_code)
    files = {name: file_sha256(source / name) for name, _, _ in checkpoint.stamp(source)}
    key: dict[str, object] = {"checkpoint": files, "converter": file_sha256(install.converter())}
    key |= {"trusted": True} if trust_code else {}
    return store.keep(key, f"{source.name}-bf16.gguf", lambda path: make_bf16(folder, path, progress))


def imatrix_of(
    specs: Sequence[str], reference: Path, sha: str, store: Store, threads: int, progress: Progress, chunks: int = 0
) -> tuple[Path, str]:
    """The importance matrix of texts, by llama-imatrix on the reference, and its SHA-256.

    specs   as --calib names them, but 'self'
    chunks  windows of 512 tokens, 0 = IMATRIX_CHUNKS
    Raises CalibrationError, OutputError, RuntimeMissing.
    """
    loaded = [texts.load(s) for s in specs]
    text = texts.BETWEEN.join(t.text for t in loaded if t.text is not None)
    if not text:
        raise CalibrationError("--calib self: llama-imatrix needs text; give a file or builtin beside it")
    digest, chunks = hashlib.sha256(text.encode()).hexdigest(), chunks or IMATRIX_CHUNKS
    key: dict[str, object] = {"imatrix of": sha, "text": digest, "chunks": chunks}

    def make(path: Path) -> None:
        progress("imatrix", 0, 0, "llama-imatrix on the calibration text")
        source = path.with_suffix(".txt")
        path.unlink(missing_ok=True)
        write_text(source, text)
        words = ["-m", str(reference), "-f", str(source), "-o", str(path), "--chunks", str(chunks), "-c", "512"]
        try:
            install.run_tool("llama-imatrix", *words, *(["-t", str(threads)] if threads else []))
            Imatrix(path).close()
        except (InputError, OSError):  # it does not look whether it could write
            path.unlink(missing_ok=True)
            raise OutputError(f"{path}: llama-imatrix has not written all of it; is the disk full?") from None
        finally:
            source.unlink()

    return store.keep(key, "imatrix.gguf", make)


def check_apart(calibrated: str, name: str, scored: str, scored_name: str) -> None:
    """Refuse to calibrate on what is scored. Raises CalibrationError.

    calibrated, scored  the texts; each with the name that errors have for it
    """
    if calibrated == scored:
        raise CalibrationError(f"--calib {name} is the scored text {scored_name}; calibrate on another one")
    learned = _long_lines(calibrated)
    shared = len(learned & _long_lines(scored)) / max(1, len(learned))
    if shared > SHARED_LINES:
        raise CalibrationError(
            f"--calib {name}: {100 * shared:.1f} % of its long lines stand in the scored text {scored_name}, "
            f"the limit is {100 * SHARED_LINES:.0f} %; calibrate on another text"
        )


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= LONG_LINE}
