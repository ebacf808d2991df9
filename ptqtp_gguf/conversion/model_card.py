"""A Hugging Face model card (README.md) for a converted file: what it is, made from what and how, and how to run it.

Plain values in, text out; the same facts give the same text. Whatever comes from a file's metadata is escaped.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..codec import BY_NAME

WORST = 8  # tensors in the table of errors
MOST_FALLBACKS = 20
_REPO = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]{1,96}/[\w.-]{1,96})/?")


@dataclass(frozen=True)
class Origin:
    """What the source says of itself. base_model: "owner/name"; languages: ISO codes; all optional."""

    name: str | None = None
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class OutFile:
    """A written file: its name without a folder, bytes, SHA-256 in hex."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class TypeLine:
    """Tensors of one type in all files together; nbytes without padding."""

    type: str
    tensors: int
    weights: int
    nbytes: int


@dataclass(frozen=True)
class CardFacts:
    """All that the card tells. No dates, no paths: the same conversion gives the same card anywhere.

    files       the parts of one model, in order
    source      what it was made from, in words; source_sha256 of a single file
    source_type type of the source's weights ("BF16"), quantized_source if that was lossy
    recipe      name; recipe_text its canonical JSON
    calibration in words, or "none"
    errors      (tensor, relative squared error) of the quantized tensors
    fallbacks   (tensor, type, reason)
    notes       what the file does not carry of its source, what a method had to leave
    provenance  (key, value) in order: versions, hashes, options; whatever the conversion recorded
    q4_0_twin   whether export-q4_0 can write the lossless twin
    """

    files: Sequence[OutFile]
    types: Sequence[TypeLine]
    method: str
    recipe: str
    version: str
    source: str
    origin: Origin = field(default_factory=Origin)
    source_sha256: str | None = None
    source_type: str | None = None
    quantized_source: bool = False
    recipe_text: str | None = None
    recipe_description: str | None = None
    calibration: str = "none"
    errors: Sequence[tuple[str, float]] = ()
    fallbacks: Sequence[tuple[str, str, str]] = ()
    notes: Sequence[str] = ()
    provenance: Sequence[tuple[str, str]] = ()
    q4_0_twin: bool = True


def origin_of(metadata: Mapping[str, object]) -> Origin:
    """What a GGUF's metadata says of the model; values of a wrong kind count as absent."""

    def text(*keys: str) -> str | None:
        values = (metadata.get(key) for key in keys)
        return next((v.strip() for v in values if isinstance(v, str) and v.strip()), None)

    def texts(key: str) -> tuple[str, ...]:
        value = metadata.get(key)
        return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()

    # the checkpoint itself first; general.base_model.* is what it was tuned from
    repo = text("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url")
    found = _REPO.fullmatch(repo) if repo else None
    return Origin(
        name=text("general.name", "general.basename"),
        base_model=found[1] if found else None,
        license=text("general.license"),
        license_name=text("general.license.name"),
        license_link=text("general.license.link"),
        languages=texts("general.languages"),
        tags=texts("general.tags"),
    )


def card(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter, ending in a newline."""
    parts = [
        _front_matter(facts.origin, facts.files),
        _head(facts),
        _running(facts),
        _contents(facts),
        _errors(facts),
        _making(facts),
        _checksums(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(origin: Origin, files: Sequence[OutFile]) -> str:
    lines = ["---"]
    if origin.base_model and _REPO.fullmatch(origin.base_model):
        lines += [f"base_model: {_yaml(origin.base_model)}", "base_model_relation: quantized"]
    if origin.license:
        lines.append(f"license: {_yaml(origin.license.lower())}")
        if origin.license.lower() == "other":
            lines += [f"license_name: {_yaml(origin.license_name)}"] if origin.license_name else []
            lines += [f"license_link: {_yaml(origin.license_link)}"] if origin.license_link else []
    # the hub refuses a card with a language that is not a code
    languages = dict.fromkeys(code for code in origin.languages if re.fullmatch("[a-z]{2,3}", code))
    tags = dict.fromkeys(["gguf", "ptqtp", "quantized", *origin.tags])
    for key, values in (("language", languages), ("tags", tags)):
        if values:
            lines += [f"{key}:", *(f"- {_yaml(v)}" for v in values)]
    return "\n".join([*lines, "---"])


def _head(f: CardFacts) -> str:
    weights, nbytes = sum(t.weights for t in f.types), sum(x.nbytes for x in f.files)
    bpw = f", {8 * nbytes / weights:.3f} bits per weight, everything counted" if weights else ""
    lines = [f"# {_md(f.origin.name or f.files[0].name)}, {_md(_main_type(f.types))} GGUF", ""]
    base = f.origin.base_model
    made_from = f"[{_md(base)}](https://huggingface.co/{base})" if base and _REPO.fullmatch(base) else _md(f.source)
    lines.append(
        f"Made from {made_from} with ptqtp-gguf {_md(f.version)}, method {_code(f.method)}, recipe {_code(f.recipe)}: "
        f"{nbytes / 1e6:.1f} MB{bpw}."
    )
    if f.quantized_source:
        kind = f" ({_md(f.source_type)})" if f.source_type else ""
        lines += ["", f"**The source was already quantized{kind}; its error adds to the one below.**"]
    return "\n".join(lines)


def _running(f: CardFacts) -> str:
    name = _argument(f.files[0].name)
    ours = [t.type for t in f.types if t.type in BY_NAME]
    lines = ["## Run", "", _fence(f'ptqtp-gguf run {name} -p "The capital of France is" -n 32')]
    if ours:
        lines += [
            "",
            f"The tensor types {' and '.join(ours)} are ours: stock llama.cpp cannot read them. The patched "
            "llama.cpp of ptqtp-gguf can: Python bindings, `llama-cli`, `llama-server` and the rest.",
        ]
    if ours and f.q4_0_twin:
        twin = _argument(re.sub(r"(\.gguf)?$", "-Q4_0.gguf", f.files[0].name, count=1, flags=re.I))
        lines += [
            "",
            "For any other runtime (llama-server, LM Studio, Ollama), this writes a twin whose trit planes are Q4_0: "
            "the same weights bit for bit, at 4.5 bits in the place of 3.5; and beside it Ollama's Modelfile.",
            "",
            _fence(f"ptqtp-gguf export-q4_0 {name} {twin} --ollama"),
        ]
    return "\n".join(lines)


def _contents(f: CardFacts) -> str:
    rows = [
        (_md(t.type), str(t.tensors), f"{t.weights:,}", f"{t.nbytes:,}", f"{8 * t.nbytes / t.weights:.3f}")
        for t in f.types
        if t.weights
    ]
    text = "## Tensors\n\n" + _table(("type", "tensors", "weights", "bytes", "bits per weight"), rows, right=4)
    if f.fallbacks:
        shown = [(_code(n), _md(kind), _md(why)) for n, kind, why in f.fallbacks[:MOST_FALLBACKS]]
        text += "\n\nTensors that could not take the type that the recipe asks for:\n\n"
        text += _table(("tensor", "type", "reason"), shown)
        if len(f.fallbacks) > MOST_FALLBACKS:
            text += f"\n\n... and {len(f.fallbacks) - MOST_FALLBACKS} more."
    if f.notes:
        text += "\n\nTo be noted:\n\n" + "\n".join(f"- {_md(note)}" for note in f.notes)
    return text


def _errors(f: CardFacts) -> str:
    if not f.errors:
        return ""
    worst = sorted(f.errors, key=lambda e: (-e[1], e[0]))[:WORST]
    mean = sum(e for _, e in f.errors) / len(f.errors)
    text = (
        "## Error\n\nRelative squared error of the weights, |w - w'|^2 / |w|^2; it ranks tensors and methods, but says "
        f"little of the model's answers. Mean of {len(f.errors)} tensors {mean:.5f}; the worst:\n\n"
    )
    return text + _table(("tensor", "error"), [(_code(n), f"{e:.5f}") for n, e in worst], right=1)


def _making(f: CardFacts) -> str:
    about = f" ({_md(f.recipe_description)})" if f.recipe_description else ""
    lines = [
        "## Made how",
        "",
        f"- source: {_md(f.source)}" + (f", {_md(f.source_type)}" if f.source_type else ""),
        *([f"- source SHA-256: {_code(f.source_sha256)}"] if f.source_sha256 else []),
        f"- method: {_code(f.method)}",
        f"- recipe: {_code(f.recipe)}{about}",
        f"- calibration: {_md(f.calibration)}",
        f"- ptqtp-gguf: {_md(f.version)}",
        *(f"- {_md(key)}: {_code(value)}" for key, value in f.provenance),
    ]
    if f.recipe_text:
        lines += ["", "The recipe, as a file that `--recipe` takes:", "", _fence(_clean(f.recipe_text), "json")]
    return "\n".join(lines)


def _checksums(f: CardFacts) -> str:
    sums = "\n".join(f"{x.sha256}  {_clean(x.name)}" for x in f.files)
    return f"## SHA-256\n\nFor `sha256sum -c`:\n\n{_fence(sums)}"


def _main_type(types: Sequence[TypeLine]) -> str:
    """The type of most weights."""
    return max(types, key=lambda t: (t.weights, t.type)).type if types else ""


# ---- escaping ----


def _clean(text: str) -> str:
    """One line without control characters and lone surrogates."""
    one_line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\ufffd" for c in one_line)


def _argument(name: str) -> str:
    """A file's name as one word of a command line, and no option."""
    name = _clean(name)
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def _yaml(text: str) -> str:
    """A YAML double-quoted scalar that reads back as the text; lone surrogates, which no file can hold, as U+FFFD."""
    out = []
    for c in text:
        if c in '"\\':
            out.append("\\" + c)
        elif 0xD800 <= ord(c) < 0xE000:
            out.append("\\uFFFD")
        elif " " <= c <= "~" or (ord(c) > 0xA0 and c.isprintable()):
            out.append(c)
        else:
            out.append(f"\\U{ord(c):08X}")
    return '"' + "".join(out) + '"'


def _md(text: str) -> str:
    """Plain text in Markdown, safe in a table too. An underscore inside a word means nothing and stays bare."""
    return re.sub(r"([\\`*{}\[\]<>#|~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", _clean(text))


def _code(text: str) -> str:
    """A code span; plain text where a table could not hold the span."""
    text = _clean(text) or " "
    if "|" in text or "\\" in text:
        return _md(text)
    ticks = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fence(text: str, language: str = "") -> str:
    """A code block, fenced by more backticks than stand in it."""
    ticks = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> str:
    """A Markdown table whose last `right` columns are numbers."""
    rule = ["---"] * (len(head) - right) + ["---:"] * right
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))
