#!/usr/bin/env python3
"""The accuracy table: our files and stock ones of several models, all against the 16-bit original's own predictions.

    accuracy.py --model NAME=REF.gguf[:CHECKPOINT] ... --text WIKI.txt --text CODE.txt --calib C4.txt --out DIR
                [--ours [NAME/]LABEL=FILE.gguf ...] [--make '[NAME/]LABEL=--calib {calib} --tune' ...]
    accuracy.py --out DIR --render-only [--page docs/results/accuracy.md]

A loop over models and texts around what `ptqtp-gguf compare` and `eval` do: stock types made by llama-quantize from
the reference, without and with an importance matrix of the calibration text; our files as given, or made with the
options of --make. DIR/results.json keeps a row as soon as it is measured: the same command continues where it was
stopped (Ctrl-C, or `timeout`), also elsewhere with DIR's results.json and files/ copied there; --merge adds the rows of
another results.json. Exit status 1: some rows failed; 3: not finished, call again.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import accuracy_page
import typer

from ptqtp_gguf import __version__
from ptqtp_gguf.commands.common import Quiet
from ptqtp_gguf.commands.flags import with_options
from ptqtp_gguf.compare import candidates
from ptqtp_gguf.compare.candidates import Item, Made, Store, Workshop, block_of
from ptqtp_gguf.compare.document import SCHEMA, Document, Machine, Text, as_json
from ptqtp_gguf.compare.rows import model_of, row_of
from ptqtp_gguf.errors import InputError, PtqtpError
from ptqtp_gguf.files import file_sha256, parse_json, read_whole, write_text
from ptqtp_gguf.inspect import inspect
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.measure import Evaluation, Quality, evaluate, evaluate_by_tool, load_text, machine
from ptqtp_gguf.plan import Options, Request
from ptqtp_gguf.progress import Progress
from ptqtp_gguf.terminal import Bar

UsageError: Any = typer.BadParameter.__mro__[1]  # of click, or of what typer has in its place
REPO = Path(__file__).resolve().parents[2]
TYPES = "Q8_0,Q4_K_M,Q4_K_S,Q4_0,IQ4_NL,IQ4_XS,Q3_K_M,Q3_K_S,IQ3_M,IQ3_S,IQ3_XXS,TQ1_0"
IGNORES_IMATRIX = {"Q8_0"}  # the same tensors with and without
SCORERS = {"own": evaluate, "llama-perplexity": evaluate_by_tool}
UNFINISHED = 3  # exit status
MAX_RESULTS = 1 << 30  # bytes


@dataclass(frozen=True)
class Wanted:
    """A row of the table. imatrix: made with one; options: of ours; words: the same as they were given."""

    item: Item
    imatrix: bool = False
    options: Options = field(default_factory=Options)
    words: str = ""


@dataclass(frozen=True)
class Subject:
    """A model and the rows that are wanted of it."""

    name: str
    reference: Path
    checkpoint: Path | None
    wanted: list[Wanted] = field(default_factory=list)


class Results:
    """DIR/results.json: entries by key, and the runs; written after each row. Raises InputError for an older one."""

    def __init__(self, path: Path) -> None:
        held = parse_json(read_whole(path, MAX_RESULTS)) if path.exists() else {}
        self.path, self.runs = path, list(held.get("runs", []))
        self.rows: dict[str, accuracy_page.Entry] = dict(held.get("rows", {}))
        if not all("settings" in row for row in self.rows.values()):
            raise InputError(f"{path}: of an older version of this tool; measure again into another --out")

    def save(self) -> None:
        write_text(self.path, json.dumps({"runs": self.runs, "rows": self.rows}, indent=1) + "\n")

    def add(self, key: str, entry: accuracy_page.Entry) -> None:
        self.rows.pop(key, None)  # the last row of a label counts
        self.rows[key] = entry
        self.save()

    def done(self, key: str) -> bool:
        return "error" not in self.rows.get(key, {"error": "missing"})

    def merge(self, other: Results) -> None:
        self.rows |= {k: v for k, v in other.rows.items() if k not in self.rows or other.done(k)}
        self.runs += [run for run in other.runs if run not in self.runs]
        self.save()


class Measuring:
    """One model: its files made, some at a time, measured on each text, and deleted. failed: rows."""

    def __init__(self, args: argparse.Namespace, results: Results, subject: Subject, progress: Progress) -> None:
        self.args, self.results, self.subject, self.progress = args, results, subject, progress
        store, options = Store(args.out / "files"), Options()
        reference, sha = candidates.reference_of(subject.reference, store, progress)
        self.model = replace(model_of(subject.reference, reference), name=subject.name)
        self.shop = Workshop(subject.checkpoint or reference, reference, sha, store, options, None, "", progress)
        self.failed = 0

    @cached_property
    def imatrix(self) -> tuple[Path, str]:
        """The importance matrix and its SHA-256; made when it is first needed."""
        a, s = self.args, self.shop
        texts, chunks = [str(a.calib)], a.calib_chunks
        return candidates.imatrix_of(texts, s.reference, s.reference_sha, s.store, a.threads, s.progress, chunks)

    def of(self, wanted: Wanted) -> dict[str, object]:
        """What decides the bytes of a file, known before an importance matrix is made."""
        a, weighed = self.args, wanted.imatrix
        calib = f"{file_sha256(a.calib)} {a.calib_chunks}" if weighed else ""
        imatrix = a.calib if weighed else None
        return replace(self.shop, options=wanted.options, imatrix=imatrix, imatrix_sha=calib).key(wanted.item)

    def about(self, wanted: Wanted, text: Path) -> accuracy_page.Entry:
        """What every entry has; `settings` must be equal within one table."""
        a = self.args
        settings = [self.shop.reference_sha, file_sha256(text), a.chunks, a.ctx, a.scorer]
        return {"model": self.subject.name, "text": text.name, "label": wanted.item.label, "settings": settings}

    def key(self, wanted: Wanted, text: Path) -> str:
        """What an entry is kept under: nothing of where files lie, or of how fast the machine is."""
        how = json.dumps([self.about(wanted, text), self.of(wanted)], sort_keys=True)
        return f"{self.subject.name} {wanted.item.label} {text.name} {hashlib.sha256(how.encode()).hexdigest()[:32]}"

    def lacking(self, wanted: Wanted) -> list[Path]:
        return [text for text in self.args.text if not self.results.done(self.key(wanted, text))]

    def run(self) -> None:
        """All that is not yet done. Failed rows are kept as such, and counted."""
        n, todo = self.args.together, [w for w in self.subject.wanted if self.lacking(w)]
        note(f"{self.subject.name}: {len(todo)} of {len(self.subject.wanted)} files to measure")
        for at in range(0, len(todo), n):
            made = [(w, m) for w in todo[at : at + n] if (m := self.make(w))]
            for text in self.args.text:
                self.score(text, [(w, m) for w, m in made if text in self.lacking(w)])
            for w, m in made:
                if not (w.item.path or self.args.keep):
                    shutil.rmtree(m.path.parent)
        for logits in (self.args.out / "eval").glob("*.logits"):
            logits.unlink()

    def make(self, wanted: Wanted) -> Made | None:
        """The file; None where it cannot be made."""
        try:
            path, sha = self.imatrix if wanted.imatrix else (None, "")
            options = replace(wanted.options, threads=self.args.threads)
            made = replace(self.shop, options=options, imatrix=path, imatrix_sha=sha).make(wanted.item)
            return replace(made, made=f"ptqtp-gguf convert {wanted.words}") if wanted.words else made
        except PtqtpError as e:
            for text in self.lacking(wanted):
                self.fail(wanted, text, e)
            return None

    def score(self, text: Path, made: list[tuple[Wanted, Made]]) -> None:
        """Measure files together; each alone where one of them fails."""
        if not made:
            return
        a, shop, paths = self.args, self.shop, [m.path for _, m in made]
        how = {"ctx": a.ctx, "windows": a.chunks, "threads": a.threads, "state": a.out / "eval"}
        try:
            done = SCORERS[a.scorer](shop.reference, paths, text=text, **how, progress=self.progress)
        except PtqtpError as e:
            for one in made if len(made) > 1 else []:
                self.score(text, [one])
            if len(made) == 1:
                self.fail(made[0][0], text, e)
            return
        whole = Made("reference", "reference", shop.reference, shop.reference_sha)
        self.add(Wanted(Item("reference", "stock", path=shop.reference)), whole, text, done, done.reference)
        for (wanted, file), quality in zip(made, done.quality, strict=True):
            self.add(wanted, file, text, done, quality)
            note(f"{self.subject.name} {file.label} {text.name}: KLD {quality.kld}")

    def add(self, wanted: Wanted, made: Made, text: Path, done: Evaluation, quality: Quality | None) -> None:
        report, row = inspect(made.path), row_of(made, self.model.weights or 0)
        kinds, row.quality = {t.name: t.type_name for t in report.tensors}, quality
        document = Document(
            schema=SCHEMA,
            model=self.model,
            created=f"{datetime.date.today()}",
            versions={"ptqtp_gguf": __version__, "runtime": install.version(), "commit": commit()},
            machine=Machine(**machine.describe().as_dict()),
            text=Text(**done.text.as_dict()),
            warnings=done.warnings,
            rows=[row],
        )
        entry: accuracy_page.Entry = {
            **self.about(wanted, text),
            "embedding": kinds.get("token_embd.weight", "none"),
            "head": kinds.get("output.weight", "tied"),
            "fell_back": report.fell_back(block_of(wanted.item.type)) if made.kind == "stock" else 0.0,
            "document": as_json(document),
        }
        self.results.add(self.key(wanted, text), entry)

    def fail(self, wanted: Wanted, text: Path, why: PtqtpError) -> None:
        self.failed += 1
        note(f"{self.subject.name} {wanted.item.label}: {why}")
        self.results.add(self.key(wanted, text), {**self.about(wanted, text), "error": str(why)})


# ---- the command line ----


def subject_of(given: str) -> Subject:
    """--model. Raises InputError."""
    name, sep, rest = given.partition("=")
    path, colon, folder = rest.rpartition(":")
    if not (colon and Path(folder).is_dir()):
        path, folder = rest, ""
    if not sep or not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"--model {given}: want NAME=REFERENCE.gguf[:CHECKPOINT]")
    return Subject(name, existing(f"--model {name}", path), Path(folder) if folder else None)


def once(names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{twice[0]} is named twice; give names of their own")


def existing(option: str, path: str) -> Path:
    if not Path(path).is_file():
        raise InputError(f"{option}: {path}: no such file")
    return Path(path)


def owner(option: str, given: str, subjects: list[Subject]) -> tuple[list[Subject], str, str]:
    """[NAME/]LABEL=VALUE -> the models meant, label, value. Raises InputError."""
    label, sep, value = given.partition("=")
    if not label or not sep:
        raise InputError(f"{option} {given}: want [NAME/]LABEL=...")
    name, slash, rest = label.partition("/")
    named = [s for s in subjects if slash and s.name == name]
    return (named, rest, value) if named else (subjects, label, value)


def options_of(label: str, words: str, calib: Path | None, subjects: list[Subject]) -> Wanted:
    """--make: options of `convert`, by its own parser. Raises InputError, RecipeError, QuantizeError."""
    if unknown := set(re.findall(r"\{(.*?)\}", words)) - {"calib", "imatrix"}:
        raise InputError(f"--make {label}: unknown {{{min(unknown)}}}; known are {{calib}} and {{imatrix}}")
    if "{" in words and not calib:
        raise InputError(f"--make {label}: it names the calibration text; give --calib FILE")
    found: list[Options] = []

    @with_options
    def keep(options: Options, quiet: Quiet = False) -> None:
        found.append(options)

    app = typer.Typer(add_completion=False)
    app.command()(keep)
    try:
        typer.main.get_command(app).main(shlex.split(words.format(calib=calib, imatrix=calib)), standalone_mode=False)
    except UsageError as e:
        raise InputError(f"--make {label}: {e.format_message()}") from None
    Request.of(found[0])
    if lacking := [s.name for s in subjects if found[0].calibration.wanted and not s.checkpoint]:
        raise InputError(f"--make {label}: {lacking[0]} has no checkpoint; give --model {lacking[0]}=REF.gguf:FOLDER")
    return Wanted(Item(label, "ours", found[0].type), bool(found[0].imatrix), found[0], words)


def subjects_of(args: argparse.Namespace) -> list[Subject]:
    """The models with all rows that are wanted: ours, then the peers. Raises InputError, RecipeError."""
    subjects = [subject_of(given) for given in args.model]
    for given in args.ours:
        chosen, label, value = owner("--ours", given, subjects)
        if len(chosen) > 1:
            raise InputError(f"--ours {given}: of which model? want NAME/{label}=FILE.gguf")
        chosen[0].wanted.append(Wanted(Item(label, "ours", path=existing(f"--ours {label}", value))))
    for given in args.make:
        chosen, label, value = owner("--make", given, subjects)
        wanted = options_of(label, value, args.calib, chosen)
        for s in chosen:
            s.wanted.append(wanted)
    peers = peers_of(candidates.parse_items(t for t in args.types.split(",") if t), bool(args.calib))
    for s in subjects:
        s.wanted.extend(peers)
        once(["reference", *(w.item.label for w in s.wanted)])
    once([s.name for s in subjects])
    once([text.name for text in args.text])
    return subjects


def peers_of(items: list[Item], weighed: bool) -> list[Wanted]:
    """Stock types without an importance matrix, and with one where there is one, as far as each makes sense."""
    plain = [Wanted(i) for i in items if i.type not in candidates.WANTS_IMATRIX]
    with_one = [i for i in items if weighed and i.type not in IGNORES_IMATRIX]
    return plain + [Wanted(replace(i, label=f"{i.label} imatrix"), True) for i in with_one]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", action="append", default=[], metavar="NAME=REF.gguf[:CHECKPOINT]")
    p.add_argument("--text", type=Path, action="append", default=[], help="text to score; repeatable")
    p.add_argument("--calib", type=Path, help="text for importance matrices; without it no peer has one")
    p.add_argument("--calib-chunks", type=int, default=128, help="windows of it")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="results.json, and files on the way")
    p.add_argument("--ours", action="append", default=[], metavar="[NAME/]LABEL=FILE.gguf")
    given = "options of ptqtp-gguf convert; {calib}: the calibration text, {imatrix}: its importance matrix"
    p.add_argument("--make", action="append", default=[], metavar="[NAME/]LABEL=OPTIONS", help=given)
    p.add_argument("--types", default=TYPES, help=f"stock types: {TYPES}")
    p.add_argument("--scorer", choices=SCORERS, default="own", help="what measures")
    p.add_argument("--chunks", type=int, default=32, help="windows of the text to score")
    p.add_argument("--ctx", type=int, default=512, help="tokens a window; the second half of each is scored")
    p.add_argument("--together", type=int, default=4, help="files that are made and measured at a time")
    p.add_argument("--threads", type=int, default=0, help="0 = all cores")
    p.add_argument("--keep", action="store_true", help="keep the files made")
    p.add_argument("--merge", type=Path, action="append", default=[], metavar="RESULTS.json")
    p.add_argument("--render-only", action="store_true")
    p.add_argument("--page", type=Path, default=REPO / "docs" / "results" / "accuracy.md")
    return p


def work_through(args: argparse.Namespace, results: Results, argv: list[str]) -> int:
    """Measure all; the number of rows that failed."""
    if not args.model or not args.text:
        raise InputError("nothing to measure; give --model NAME=REFERENCE.gguf and --text FILE, or --render-only")
    for scored in [load_text(text) for text in args.text]:
        if args.calib:
            candidates.check_apart(load_text(args.calib).text, args.calib.name, scored.text, scored.name)
    subjects, here, failed = subjects_of(args), machine.describe(), 0
    run = {"date": f"{datetime.date.today()}", "commit": commit(), "machine": f"{here.cores} cores of {here.cpu}"}
    run["command"] = shown(argv)
    results.runs += [run] if run not in results.runs else []
    results.save()
    with Bar(False) as bar:
        for subject in subjects:
            one = Measuring(args, results, subject, bar)
            one.run()
            failed += one.failed
    return failed


def note(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def commit() -> str:
    """PTQTP_COMMIT, or git's, where there is one."""
    given, git = os.environ.get("PTQTP_COMMIT"), shutil.which("git")
    words = [git or "git", "-C", str(REPO), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(words, capture_output=True, text=True, check=False).stdout if git and not given else ""
    return given or found.strip() or "unknown"


def shown(argv: list[str]) -> str:
    """The command line, paths by their last part: a page is no place for a machine's folders."""
    words = [re.sub(r"(?<![\w{])(?:/[^\s:=]+)?/([^\s/:=]+)", r"\1", word) for word in argv]
    return shlex.join(["python", "tools/accuracy/accuracy.py", *words])


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        results = Results(args.out / "results.json")
        for path in args.merge:
            results.merge(Results(path))
        if args.render_only:
            print(*accuracy_page.write(args.page, list(results.rows.values()), results.runs), sep="\n")
            return 0
        failed, entries = work_through(args, results, argv), list(results.rows.values())
        print("\n\n".join(accuracy_page.section(entries, model) for model in accuracy_page.models(entries)))
        return 1 if failed else 0
    except PtqtpError as e:
        print(f"accuracy: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("accuracy: stopped; the same command continues from here", file=sys.stderr)
        return UNFINISHED
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
