#!/usr/bin/env python3
"""The accuracy table: our files and stock ones of the same models, all against the 16-bit original's own predictions.

    accuracy.py --model NAME=REF.gguf[:CHECKPOINT] ... --text WIKI.txt [--text2 CODE.txt] --calib C4.txt --out DIR
                [--ours [NAME/]LABEL=FILE.gguf ...] [--make '[NAME/]LABEL=convert {reference} {out} ...' ...]
    accuracy.py --out DIR --render-only [--page docs/results/accuracy.md]

For each model: the reference's logits on each text by llama-perplexity, an importance matrix by llama-imatrix from the
calibration text, stock peers by llama-quantize from that same reference (without and with the matrix), our files as
given or made by the command lines of --make; then perplexity and KL divergence of each. DIR/results.json keeps each
finished row at once: the same command goes on where it was stopped, also elsewhere with DIR's results.json and
*.imatrix.gguf copied there (--merge adds the rows of another results.json). Exit status 3: not finished, call again.

Needs llama.cpp's tools in --bin (stock types) and --bin-ours (ours; both by default those of the installed runtime),
numpy, and gguf-py; matplotlib for the figures of --render-only. Runs without the package installed too, with PYTHONPATH
naming the repository.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import re
import shlex
import shutil
import signal
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import accuracy_page
from accuracy_base import (
    PRINTED,
    REPO,
    OutOfTime,
    Results,
    Row,
    Stop,
    Tools,
    block_of,
    commit,
    facts,
    is_whole,
    machine,
    parse,
    sha256,
)

from ptqtp_gguf.compare.candidates import check_apart
from ptqtp_gguf.errors import PtqtpError
from ptqtp_gguf.files.gguf import Reader

TYPES = "Q8_0 Q4_K_M Q4_K_S Q4_0 IQ4_NL IQ4_XS Q3_K_M Q3_K_S IQ3_M IQ3_S IQ3_XXS TQ1_0".split()
ONLY_WITH_IMATRIX = {"IQ3_XXS"}  # llama-quantize would make it without, but nobody publishes such files
WORDS = {"reference", "checkpoint", "out", "calib", "imatrix", "threads"}  # of --make
UNFINISHED = 3  # exit status
RETRIES = 5  # where nothing could be done against lost output, see accuracy_base.LINGER


# ---- one measurement ----


@dataclass(frozen=True)
class Item:
    """A file to measure: the reference itself, a peer to be made, one of ours."""

    label: str
    kind: str  # reference, stock, ours
    type: str = ""  # llama-quantize's, for peers
    imatrix: Path | None = None
    path: Path | None = None
    make: str = ""  # a command line of ours

    @property
    def identity(self) -> str:
        """What tells it from others of the model, whatever it is called."""
        return self.type or (f"{self.make}@{commit()}" if self.make else sha256(self.path) if self.path else "")


@dataclass
class Model:
    name: str
    reference: Path
    checkpoint: Path | None
    weights: int = 0
    items: list[Item] = field(default_factory=list)


class Work:
    """The measurements of one run."""

    def __init__(self, args: argparse.Namespace, results: Results, tools: Tools) -> None:
        self.args, self.results, self.tools = args, results, tools
        self.out: Path = args.out
        self.texts: list[Path] = [t for t in (args.text, args.text2) if t]
        self.by_data: dict[tuple[str, Path], threading.Lock] = {}
        self.failed = 0

    def program(self, name: str, ours: bool = False) -> Path:
        folder: Path = self.args.bin_ours if ours else self.args.bin
        path = folder / name
        if not path.is_file():
            raise Stop(f"{'--bin-ours' if ours else '--bin'} {folder} holds no {name}; name the folder of the tools")
        return path

    def stem(self, model: Model) -> str:
        return f"{model.name}-{sha256(model.reference)[:8]}"

    def logits(self, model: Model, text: Path) -> Path:
        return self.out / f"{self.stem(model)}-{sha256(text)[:8]}-{self.args.chunks}x{self.args.ctx}.logits"

    def imatrix(self, model: Model) -> Path:
        a = self.args
        return self.out / f"{self.stem(model)}-{sha256(a.calib)[:8]}-{a.calib_chunks}x{a.ctx}.imatrix.gguf"

    def key(self, model: Model, item: Item, text: Path) -> str:
        """What a finished row stands under: nothing of where files lie or how fast the machine is."""
        imatrix = sha256(item.imatrix)[:16] if item.imatrix else "-"
        where = [sha256(model.reference)[:16], item.kind, item.identity, imatrix, sha256(text)[:16]]
        return " ".join([model.name, *where, str(self.args.chunks), str(self.args.ctx)])

    def note(self, text: str) -> None:
        print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)

    def make_imatrix(self, model: Model) -> None:
        a, path = self.args, self.imatrix(model)
        if not path.exists():
            self.note(f"{model.name}: importance matrix from {a.calib_chunks} windows of {a.calib.name}")
            part = path.with_suffix(".partial.gguf")
            self.tools.run(
                self.program("llama-imatrix"),
                "-m",
                model.reference,
                "-f",
                a.calib,
                "-o",
                part,
                "-c",
                a.ctx,
                "-b",
                a.ctx,
                "--chunks",
                a.calib_chunks,
                "-t",
                a.jobs * a.threads,
            )
            part.replace(path)

    def make_logits(self, model: Model, text: Path) -> None:
        a, path = self.args, self.logits(model, text)
        if not path.exists():
            self.note(f"{model.name}: the reference's logits on {text.name}")
            part = path.with_suffix(".partial")
            self.tools.run(
                self.program("llama-perplexity"),
                "-m",
                model.reference,
                "-f",
                text,
                "-c",
                a.ctx,
                "-b",
                a.ctx,
                "--chunks",
                a.chunks,
                "-t",
                a.jobs * a.threads,
                "--kl-divergence-base",
                part,
            )
            with open(part, "rb") as f:
                head = f.read(20)
            windows = struct.unpack("<8sIII", head)[3] if len(head) == 20 else 0
            if windows != a.chunks:
                raise Stop(f"{text.name} has {windows} windows of {a.ctx} tokens, not {a.chunks}; lower --chunks")
            part.replace(path)

    def file(self, model: Model, item: Item) -> Path:
        if item.path:
            return item.path
        which = hashlib.sha256(f"{item.identity} {item.imatrix and sha256(item.imatrix)}".encode()).hexdigest()[:8]
        return self.out / f"{self.stem(model)}-{re.sub('[^A-Za-z0-9_.-]+', '_', item.label)}-{which}.gguf"

    def make_file(self, model: Model, item: Item) -> Path:
        """The item's file: there already, or made in DIR."""
        path = self.file(model, item)
        part = path.with_suffix(".partial.gguf")
        if path.exists():  # given, or kept
            return path
        if item.type:
            given = ["--imatrix", item.imatrix] if item.imatrix else []
            self.tools.run(self.program("llama-quantize"), *given, model.reference, part, item.type, self.args.threads)
        else:
            words = {
                "reference": model.reference,
                "checkpoint": model.checkpoint,
                "out": part,
                "imatrix": item.imatrix,
                "calib": self.args.calib,
                "threads": self.args.threads,
            }
            command = [word.format(**words) for word in shlex.split(item.make)]
            safe = ["-P"] if sys.version_info >= (3, 11) else []  # not the package of the folder that we stand in
            self.tools.run(sys.executable, *safe, "-m", "ptqtp_gguf", *command)
        part.replace(path)
        return path

    def measure(self, model: Model, item: Item) -> None:
        """Make the file, measure it on the texts that have no row yet, and delete it unless it was given or is kept."""
        missing = [t for t in self.texts if not self.results.done(self.key(model, item, t))]
        base: dict[str, str | None] = {"model": model.name, "label": item.label, "kind": item.kind}
        base |= {"type": item.type, "make": item.make}
        base |= {"imatrix": sha256(item.imatrix) if item.imatrix else None, "commit": commit(), "machine": machine()}
        try:
            path = self.make_file(model, item)
            held = facts(path, block_of(item.type) if item.type else 32, model.weights)
            for text in missing:
                with self.tools.lock:
                    one = self.by_data.setdefault((held["data"], text), threading.Lock())
                with one:  # a file of the same tensors waits and takes over the figures
                    row = base | held | self.score(model, item, path, held["data"], text)
                    self.results.add(self.key(model, item, text), row)
                same = f" (as {row['same_as']})" if "same_as" in row else ""
                self.note(f"{model.name} {item.label} {text.name}: {row['bpw']:.3f} bpw, KLD {row['kld']}{same}")
        except (Stop, PtqtpError) as e:
            self.failed += 1
            self.note(f"{model.name} {item.label}: {e}")
            for text in missing:
                if not self.results.done(self.key(model, item, text)):
                    about = self.about(text) | {"reference": sha256(model.reference)}
                    self.results.add(self.key(model, item, text), base | about | {"error": str(e)})
        finally:
            if not item.path and not self.args.keep:
                for leftover in self.out.glob(f"{self.file(model, item).stem}.*"):
                    leftover.unlink()

    def about(self, text: Path) -> Row:
        which = "text" if text == self.args.text else "text2"
        return {
            "role": which,
            "text": sha256(text),
            "text_name": text.name,
            "chunks": self.args.chunks,
            "ctx": self.args.ctx,
        }

    def score(self, model: Model, item: Item, path: Path, data: str, text: Path) -> Row:
        """The figures of one file on one text, measured or taken from a file of the very same tensors."""
        about = self.about(text) | {"reference": sha256(model.reference)}
        like = about | {"data": data, "kind": item.kind}
        if row := self.results.find(like):
            names = [name for pair in PRINTED.values() for name in pair if name]
            other = row.get("same_as", row["label"])
            return about | {name: row[name] for name in names} | ({"same_as": other} if other != item.label else {})
        command = [
            self.program("llama-perplexity", ours=item.kind == "ours"),
            "-m",
            path,
            "-c",
            self.args.ctx,
            "-b",
            self.args.ctx,
            "--chunks",
            self.args.chunks,
            "-t",
            self.args.threads,
            "--kl-divergence-base",
            self.logits(model, text),
            "--kl-divergence",
        ]
        for _ in range(RETRIES):
            out = self.tools.run(*command, linger=True)
            if is_whole(out):
                break
            self.note(f"{model.name} {item.label}: llama-perplexity lost the end of its output; once more")
        return about | parse(out)

    def check_disk(self, model: Model) -> None:
        """Raises Stop where the logits and the files of all jobs do not fit into DIR."""
        with Reader(model.reference) as r:
            vocabulary = r.by_name["token_embd.weight"].shape[1]
            largest = int(0.6 * r.size)  # Q8_0
        logits = len(self.texts) * self.args.chunks * (self.args.ctx // 2) * 2 * (vocabulary + 8)
        need, free = logits + self.args.jobs * largest, shutil.disk_usage(self.out).free
        if need > free:
            raise Stop(
                f"--out {self.out}: {model.name} needs {need / 1e9:.1f} GB for logits and files, {free / 1e9:.1f} GB "
                f"are free; lower --chunks or --jobs"
            )

    def run(self, model: Model) -> None:
        """All of a model that is not yet done."""
        with Reader(model.reference) as r:
            model.weights = sum(t.n_weights for t in r.tensors)
        if self.args.calib and any(i.imatrix for i in model.items):
            self.make_imatrix(model)
        todo = [i for i in model.items if not all(self.results.done(self.key(model, i, t)) for t in self.texts)]
        self.note(f"{model.name}: {len(todo)} of {len(model.items)} files to measure")
        if todo:
            self.check_disk(model)
        needed = [t for t in self.texts if any(not self.results.done(self.key(model, i, t)) for i in todo)]
        for text in needed:
            self.make_logits(model, text)
        _ = self.tools.environment  # made once, before the threads
        with ThreadPoolExecutor(self.args.jobs) as pool:
            futures = [pool.submit(self.measure, model, item) for item in todo]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.tools.halt()
                pool.shutdown(cancel_futures=True)
                raise
        if not self.args.keep:
            for text in self.texts:
                self.logits(model, text).unlink(missing_ok=True)


# ---- the command line ----


def models_of(args: argparse.Namespace) -> list[Model]:
    """The models and what is to be measured of each, without anything read but names. Raises Stop."""
    models = []
    for given in args.model:
        name, sep, rest = given.partition("=")
        path, colon, folder = rest.rpartition(":")
        if not (colon and Path(folder).is_dir()):
            path, folder = rest, ""
        if not sep or not name or not re.fullmatch(r"[\w.-]+", name):
            raise Stop(f"--model {given}: want NAME=REFERENCE.gguf[:CHECKPOINT]")
        if not Path(path).is_file():
            raise Stop(f"--model {name}: {path}: no such file")
        models.append(Model(name, Path(path), Path(folder) if folder else None))
    if len({m.name for m in models}) < len(models):
        raise Stop("--model: a name stands twice")
    return models


def owner(option: str, given: str, models: list[Model]) -> tuple[list[Model], str, str]:
    """[NAME/]LABEL=VALUE -> the models meant, label, value."""
    label, sep, value = given.partition("=")
    if not sep or not label or not value:
        raise Stop(f"{option} {given}: want [NAME/]LABEL=...")
    name, slash, rest = label.partition("/")
    if slash and any(m.name == name for m in models):
        return [m for m in models if m.name == name], rest, value
    return models, label, value


def items_of(work: Work, models: list[Model]) -> None:
    """Fill in each model's items: the reference, ours, then the peers."""
    args = work.args
    for m in models:
        m.items.append(Item("reference", "reference", path=m.reference))
    for given in args.ours:
        chosen, label, value = owner("--ours", given, models)
        if len(chosen) > 1:
            raise Stop(f"--ours {given}: of which model? want NAME/{label}=FILE.gguf")
        if not Path(value).is_file():
            raise Stop(f"--ours {label}: {value}: no such file")
        chosen[0].items.append(Item(label, "ours", path=Path(value)))
    for given in args.make:
        chosen, label, value = owner("--make", given, models)
        if "{out}" not in value:
            raise Stop(f"--make {given}: the command line has no {{out}}")
        if unknown := set(re.findall(r"\{(.*?)\}", value)) - WORDS:
            raise Stop(f"--make {label}: unknown {{{min(unknown)}}}; known are {', '.join(sorted(WORDS))}")
        for m in chosen:
            if "{checkpoint}" in value and not m.checkpoint:
                raise Stop(f"--make {label}: {m.name} has no checkpoint; give --model {m.name}=REF.gguf:FOLDER")
            if re.search(r"\{(imatrix|calib)\}", value) and not args.calib:
                raise Stop(f"--make {label}: it names the calibration text; give --calib FILE")
            m.items.append(Item(label, "ours", make=value, imatrix=work.imatrix(m) if "{imatrix}" in value else None))
    for kind in args.types:
        block_of(kind)
    for m in models:
        m.items += [Item(kind, "stock", kind) for kind in args.types if kind not in ONLY_WITH_IMATRIX]
        if args.calib:
            m.items += [Item(f"{kind} imatrix", "stock", kind, work.imatrix(m)) for kind in args.types]


def shown(argv: list[str]) -> str:
    """The command line, paths by their last part: a page is no place for a machine's folders."""
    words = [re.sub(r"(?<![\w{])(?:/[^\s:=]+)?/([^\s/:=]+)", r"\1", word) for word in argv]
    return shlex.join(["python", "tools/accuracy/accuracy.py", *words])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", action="append", default=[], metavar="NAME=REF.gguf[:CHECKPOINT]")
    p.add_argument("--text", type=Path, help="text to score")
    p.add_argument("--text2", type=Path, help="second text to score, of another kind: code")
    p.add_argument("--calib", type=Path, help="text for importance matrices; without it no peer has one")
    p.add_argument("--calib-chunks", type=int, default=128)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="results.json, logits and files on the way")
    p.add_argument("--ours", action="append", default=[], metavar="[NAME/]LABEL=FILE.gguf")
    p.add_argument(
        "--make",
        action="append",
        default=[],
        metavar="[NAME/]LABEL=ARGS",
        help="ptqtp-gguf ARGS, with {reference}, {checkpoint}, {out}, {calib}, {imatrix}, {threads}",
    )
    p.add_argument("--types", type=lambda s: [t for t in s.split(",") if t], default=TYPES, help=",".join(TYPES))
    p.add_argument("--chunks", type=int, default=32, help="windows of the text to score")
    p.add_argument("--ctx", type=int, default=512, help="tokens a window; the second half of each is scored")
    p.add_argument("--jobs", type=int, default=1, help="measurements at a time")
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each")
    p.add_argument("--bin", type=Path, help="folder of llama.cpp's tools for stock types")
    p.add_argument("--bin-ours", type=Path, help="folder of the patched build's tools")
    p.add_argument("--minutes", type=float, help="stop then; what is finished is kept")
    p.add_argument("--keep", action="store_true", help="keep the files made and the logits")
    p.add_argument("--merge", type=Path, action="append", default=[], metavar="RESULTS.json")
    p.add_argument("--render-only", action="store_true")
    p.add_argument("--page", type=Path, default=REPO / "docs" / "results" / "accuracy.md")
    p.add_argument("--figure", choices=("svg", "png"), default="svg")
    return p


def default_tools() -> Path:
    from ptqtp_gguf.llamacpp import install

    return install.tool("llama-perplexity").parent


def work_through(args: argparse.Namespace, results: Results, argv: list[str]) -> int:
    if not args.model or not args.text:
        raise Stop("nothing to measure; give --model NAME=REFERENCE.gguf and --text FILE, or --render-only")
    for path in (args.text, args.text2, args.calib):
        if path and not path.is_file():
            raise Stop(f"{path}: no such file")
    if args.calib:
        for text in filter(None, (args.text, args.text2)):
            learned, scored = (p.read_text(errors="replace") for p in (args.calib, text))
            check_apart(learned, args.calib.name, scored, text.name)
    args.bin = args.bin or default_tools()
    args.bin_ours = args.bin_ours or (default_tools() if args.ours or args.make else args.bin)
    tools = Tools(args.minutes)
    work = Work(args, results, tools)
    models = models_of(args)
    items_of(work, models)
    this = {"command": shown(argv), "commit": commit(), "machine": machine(), "date": f"{datetime.date.today()}"}
    if this not in results.runs:
        results.runs.append(this)
    results.save()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(UNFINISHED))  # what was started goes down too
    try:
        for m in models:
            work.run(m)
    except OutOfTime:
        print(f"accuracy: {args.minutes:g} minutes are over; the same command goes on from here", file=sys.stderr)
        return UNFINISHED
    finally:
        tools.halt()
        signal.signal(signal.SIGTERM, before)
    return 1 if work.failed else 0


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        results = Results(args.out / "results.json")
        for path in args.merge:
            results.merge(path)
        if args.merge:
            results.save()
        code = 0 if args.render_only else work_through(args, results, argv)
        rows = list(results.rows.values())
        if args.render_only:
            for path in accuracy_page.write(args.page, rows, results.runs, args.figure):
                print(path)
        else:
            print(accuracy_page.tables(rows))
        return code
    except (Stop, PtqtpError, accuracy_page.Missing) as e:
        print(f"accuracy: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("accuracy: stopped; the same command goes on from here", file=sys.stderr)
        return UNFINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
