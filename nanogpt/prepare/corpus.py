"""Prepare a dataset folder (train.bin, val.bin, tokenizer.json, meta.json) from text, in constant memory.

One pipeline for a poem and for 100 GB: find the files (`text_files.find`), inspect the first documents,
collect or train the vocabulary if needed, then encode piece by piece in worker processes and append the
results in input order (`readers`, `pool`, `encode`, `shards`). The bytes written do not depend on the
number of processes or of interruptions.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanogpt import INSTALLED, files, quoted
from nanogpt.data.token_files import FORMAT
from nanogpt.errors import Stopped, UserError
from nanogpt.prepare import analyze, encode, formats, pool, readers, shards, text_files
from nanogpt.prepare.analyze import Options, counted
from nanogpt.prepare.encode import Counts, Job, Split
from nanogpt.prepare.shards import SPLITS
from nanogpt.prepare.text_files import Source, Texts, find
from nanogpt.tokenizer import tokenizer
from nanogpt.tokenizer.gpt2 import load_gpt2
from nanogpt.tokenizer.vocabulary import END_OF_TEXT

NAMES = ("train.bin", "val.bin", "meta.json", "tokenizer.json")  # train.bin is published last
LARGE_ALPHABET = 20_000  # distinct characters from which --tokenizer=auto uses bytes
LARGE_TEXT = 1 << 25  # bytes of input from which several processes are used
RECORD_S = 5.0  # seconds between records of progress
PART = re.compile(r"(?P<before>.*?)(?P<number>\d+)-of-(?P<total>\d+)(?P<after>\..*)")
SHOWN_BAD = 3  # number of skipped rows to report
SPLIT_NAMES = dict.fromkeys(("test", "testing"), "test") | dict.fromkeys(("train", "training"), "train")
SPLIT_NAMES |= dict.fromkeys(("val", "valid", "validation", "dev", "eval", "heldout", "holdout"), "val")
OTHERS = 0.01  # share of bytes up to which files not named as splits are left out, beside named ones
SHOWN = 10  # number of files to report


@dataclass(frozen=True)
class Summary:
    """Result of `prepare`; `lines` describes it, `remarks` only what may be unexpected."""

    out: Path
    texts: Texts
    split: Split
    tokenizer: tokenizer.Tokenizer
    meta: dict[str, Any]
    counts: Counts
    alphabet: str  # distinct characters, sorted by code point; empty if they were not counted
    bytes_by_default: bool  # --tokenizer=auto chose bytes because the alphabet is large
    in_both: int  # val documents that are also in train
    resumed: bool
    notes: list[str]

    @property
    def option(self) -> str:
        """The --dataset option for train.py."""
        return quoted(f"--dataset={self.out}")

    def lines(self) -> list[str]:
        train, val = self.meta["splits"]["train"], self.meta["splits"]["val"]
        tokens = train["tokens"] + val["tokens"]
        lines = [
            f"{counted(len(self.texts.sources), 'file')}, {counted(self.meta['documents'], 'document')}",
            f"length of dataset in characters: {self.counts.characters:,}",
            f"tokenizer: {self.tokenizer.kind}, vocab size: {self.tokenizer.vocab_size:,}",
            f"train has {train['tokens']:,} tokens",
            f"val has {val['tokens']:,} tokens",
            f"split: {self._split()}",
            f"bytes per token: {(train['text_bytes'] + val['text_bytes']) / tokens:.2f}",
        ]
        if self.meta["documents"] > (2 if self.split.val_from >= 0 else 1):  # else nothing ends them
            end = self.tokenizer.end_of_text
            named = "a newline" if end is None else tokenizer.decode(self.tokenizer, [end])
            line = f"each document ends with {named}"
            if end is None and "\n" in self.counts.lost:
                line = "nothing separates documents: the tokenizer has no end of text and drops newlines"
            lines.append(line)
        if "mask" in train:
            lines.append("loss on responses only (train.mask.bin, val.mask.bin)")
        return lines + self.remarks()

    def remarks(self) -> list[str]:
        lines, pairs = [], "mask" in self.meta["splits"]["train"]
        if self.resumed:
            lines.append("resumed an interrupted run")
        if self.bytes_by_default:
            lines.append("using byte tokens: too many distinct characters (--tokenizer=char overrides)")
        others = sorted({source.encoding for source in self.texts.sources} - {"utf-8"})
        if others:
            lines.append(f"encodings besides utf-8: {', '.join(others)}")
        if self.counts.newlines_changed or any(s.newlines_changed for s in self.texts.sources):
            lines.append("newlines normalized to \\n")
        noted = [f"{source.name}: {source.note}" for source in self.texts.sources if source.note]
        lines += noted[:SHOWN] + ([f"and so in {len(noted) - SHOWN:,} more files"] if noted[SHOWN:] else [])
        if self.counts.lost:
            lines.append(f"the tokenizer loses or adds {_lost(self.counts)}")
        long = any(source.kind == "text" and source.bytes > encode.PIECE for source in self.texts.sources)
        where = "between prompt and response" if pairs else "at each megabyte of a text"
        if (long or pairs) and (joined := _joined(self.tokenizer)):
            lines.append(f"{where}, the tokenizer makes {joined}")
        if self.counts.empty_rows:
            lines.append(f"skipped {counted(self.counts.empty_rows, 'empty row')}")
        if self.counts.bad_rows:
            shown = "; ".join(self.counts.bad_shown)
            lines.append(f"skipped {counted(self.counts.bad_rows, 'broken row')}: {shown}")
        return lines + self.notes + _skipped(self.texts)

    def _split(self) -> str:
        if self.split.val_from >= 0:
            sources, first = self.texts.sources, self.split.val_from
            text = f"train is {_names(sources[:first])}, val is {_names(sources[first:])}"
            return text + (
                f"; {counted(self.in_both, 'document')} of val also in train" if self.in_both else ""
            )
        if self.split.few:
            text = f"the first {1 - self.split.val_fraction:.4g} of each document is train, the rest val"
            repeated = f"; {self.in_both:,} documents occur more than once" if self.in_both else ""
            return text + repeated
        train, val = (self.counts.documents[split] for split in SPLITS)
        return (
            f"{train:,} train and {val:,} val documents, by a hash of the content; "
            f"{self.in_both:,} of val also in train (ignoring case, blanks and punctuation)"
        )


def _joined(tokens: tokenizer.Tokenizer) -> str:
    """Return what a tokenizer makes of two texts encoded one by one, if it is not their concatenation."""
    if getattr(tokens, "lossless", True):
        return ""
    joined = tokenizer.decode(tokens, 2 * tokens.encode("a").tolist())
    return "" if joined == "aa" else f"{joined!r} of 'a' and 'a'"


def own_folder(program: str) -> Path:
    """Return the folder that the prepare.py at `program` writes to: its own, or data/NAME in the current
    folder if the package is installed."""
    folder = Path(program).resolve().parent
    return Path("data", folder.name) if INSTALLED else folder


def prepare(
    paths: Sequence[Path], out: Path, *, keep: Callable[[Path], bool] = lambda file: True, **options: Any
) -> Summary:
    """Write the dataset folder `out` from files, folders, glob patterns and a hub dataset; return a Summary.

    `options` are the fields of `Options`; `keep` filters the files of folders. Raise UserError for unusable
    text or options, OSError if the disk fails. A failure leaves nothing that could be mistaken for a dataset,
    but a long run can be resumed by the same call.
    """
    wanted = Options(**options)
    given = _given_tokenizer(wanted, out)
    texts, val_from, notes = _splits(_find(paths, out, keep, wanted), wanted, out)
    split, several = analyze.look(texts, wanted, val_from)
    large = wanted.hub or sum(source.bytes for source in texts.sources) >= LARGE_TEXT
    workers = wanted.workers or (pool.cores() if large else 0)
    job = Job("", tuple(texts.sources), split, several, wanted.text_key)
    alphabet, by_default = "", False
    if given is None and wanted.kind.startswith("bpe:"):
        given = analyze.learnt(int(wanted.kind[4:]), texts, job, wanted)
    elif given is None:
        alphabet = analyze.alphabet(texts, job, wanted, workers)
        by_default = wanted.kind == "auto" and len(alphabet) >= LARGE_ALPHABET
        given = tokenizer.ByteTokenizer()
        if not by_default:
            given = tokenizer.CharTokenizer(sorted({*alphabet, *("\n" if several else "")}))
    if given.kind == "hf" and not wanted.kind.startswith("bpe:"):
        workers = max(workers, 1)  # a fault in a foreign tokenizer must not end this process
    _refuse_idle({source.kind for source in texts.sources}, given.kind, wanted)
    if wanted.pairs and not wanted.lossy and (joined := _joined(given)):
        problem = f"between prompt and response, it makes {joined}"
        raise UserError(f"--tokenizer={wanted.kind}: {problem}; give another or pass --lossy")
    job = replace(job, tokenizer=tokenizer.to_text(given))
    meta, counts, in_both, resumed = _write(texts, job, given, out, wanted, workers)
    return Summary(out, texts, split, given, meta, counts, alphabet, by_default, in_both, resumed, notes)


def _refuse_idle(kinds: set[str], tokenizer_kind: str, wanted: Options) -> None:
    """Raise UserError for an option that has no effect on sources of these kinds."""
    idle = {
        "encoding": wanted.encoding and not kinds - {"table", "hub"},
        "on_undecodable": wanted.on_undecodable != "refuse" and not kinds & {"text", "marked", "json", "csv"},
        "skip_bad": wanted.skip_bad and not kinds - {"text", "marked"},
        "lossy": wanted.lossy and tokenizer_kind != "hf",
        "val_fraction": wanted.val and wanted.val_fraction != Options.val_fraction,
    }
    for name in filter(idle.get, idle):
        raise UserError(f"--{name} has no effect on these texts with the other options; omit it")


def _splits(texts: Texts, wanted: Options, out: Path) -> tuple[Texts, int, list[str]]:
    """Return the sources, those of val last, the index of the first of val (-1: no splits given), and notes.

    With --val its files are val, else those named valid or val, if there are others. Files named test are
    never used beside others. With --split_at, text files hold several documents.
    """
    notes, val_from = [], -1
    named = list(zip(texts.sources, _roles(texts.sources), strict=True))
    sizes = Counter[str]()
    for source, role in named:
        sizes[role] += source.bytes
    unused = {"test": "named as test data"} if set(sizes) > {"test"} else {}
    # A README or a list of words beside named splits is not a training text.
    if len(set(sizes) - {""}) > 1 and "train" in sizes and sizes[""] <= OTHERS * sizes.total():
        unused[""] = "not named as a split, as others are"
    for role, why in unused.items():
        if left_out := [source for source, its in named if its == role]:
            notes.append(f"not used, because {why}: {_names(left_out)}")
    named = [(source, role) for source, role in named if role not in unused]
    held = [source for source, role in named if role == "val"]
    if wanted.val or len(held) == len(named):
        held = []
    train = [source for source, role in named if role != "val" or not held]
    if wanted.val:
        val = _find([Path(wanted.val)], out, lambda file: True, wanted)
        known = {source.sha256 for source in train}
        if both := [source.name for source in val.sources if source.sha256 in known]:
            raise UserError(f"--val={wanted.val}: {both[0]} is also a training text; give another")
        held, texts = val.sources, Texts([], texts.skipped + val.skipped)
    val_from = len(train) if held else -1
    texts = Texts(train + held, texts.skipped)
    if wanted.text_key != "text":
        notes.append(f"documents are the fields --text_key={wanted.text_key} of rows")
    notes += _missing_parts(texts.sources)
    plain = [source for source in texts.sources if source.kind == "text"]
    if wanted.split_at:
        if not plain:
            raise UserError(f"--split_at={wanted.split_at} is for text files, and there are none; omit it")
        marked = [replace(s, kind="marked", document=None) if s in plain else s for s in texts.sources]
        texts = Texts(marked, texts.skipped)
    for source in [] if wanted.split_at else plain:
        start = next(text_files.decoded(source, lambda count: None), "")
        if END_OF_TEXT in start:
            notes.append(
                f"note: {source.name} contains {END_OF_TEXT}, which is read as part of the text; "
                f"--split_at='{END_OF_TEXT}' makes it the end of a document"
            )
        first = start.partition("\n")[0].rstrip()
        if first.startswith('{"') and first.endswith("}"):
            notes.append(
                f"note: {source.name} looks like rows of JSON without `{wanted.text_key}` and is read as "
                "text; --text_key=NAME reads a field"
            )
    return texts, val_from, notes


def _roles(sources: list[Source]) -> list[str]:
    """Return the split after which each file, or else the nearest folder in which they differ, is named:
    train, val, test or "". Names are those of wiki.train.tokens, c4-validation.00000, test_1.txt or dev/."""
    folders = [os.path.dirname(os.path.abspath(source.path)) for source in sources if source.kind != "hub"]
    root = os.path.commonpath(folders) if folders else ""
    splits = []
    for source in sources:
        path = "train" if source.kind == "hub" else os.path.relpath(os.path.abspath(source.path), root)
        role = ""
        for part in re.sub("(held|hold)[-_ ]out", "heldout", path.lower()).split(os.sep):
            names = [name.split() for name in re.split("[^a-z ]+", part)]  # first and last words count
            words = {word for name in names for word in (*name[:1], *name[-1:])}
            words |= {word.removesuffix("set") for word in words}
            roles = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
            role = next((role for role in ("test", "val", "train") if role in roles), role)
        splits.append(role)
    return splits


def _names(sources: list[Source]) -> str:
    shown = ", ".join(source.name for source in sources[:3])
    return shown + (f" and {len(sources) - 3:,} more" if len(sources) > 3 else "")


def _given_tokenizer(wanted: Options, out: Path) -> tokenizer.Tokenizer | None:
    """Check the options; return the tokenizer, or None if it depends on the text."""
    if not 0 < wanted.val_fraction < 1:
        raise UserError(f"--val_fraction={wanted.val_fraction} must lie between 0 and 1; 0.1 is usual")
    if wanted.pairs and wanted.shard_tokens:
        raise UserError("--shard_tokens is not supported with prompts and responses; omit it")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; give a new or existing folder")
    if wanted.kind.startswith("bpe:"):
        size = wanted.kind[4:]
        if not (size.isascii() and size.isdigit() and 257 < int(size) <= 1 << 24):
            raise UserError(f"--tokenizer={wanted.kind}: the size must be a number above 257, as in bpe:8192")
        return None
    if wanted.kind in ("auto", "char"):
        return None
    if wanted.kind == "byte":
        return tokenizer.ByteTokenizer()
    if wanted.kind == "gpt2":
        return load_gpt2(wanted.gpt2_bpe)
    if not Path(wanted.kind).exists():
        raise UserError(
            f"--tokenizer={wanted.kind} must be auto, char, byte, gpt2, bpe:SIZE (such as bpe:8192) "
            "or the path of a tokenizer.json"
        )
    return tokenizer.from_file(Path(wanted.kind))


def _find(paths: Sequence[Path], out: Path, keep: Callable[[Path], bool], wanted: Options) -> Texts:
    target = os.path.realpath(out)

    def not_ours(file: Path) -> bool:  # excludes output of earlier runs
        name = file.name.split(files.TEMPORARY)[0]
        ours = name in (*NAMES, "train.mask.bin", "val.mask.bin")
        ours = ours or name.startswith(("tokens_train_", "tokens_val_"))
        return keep(file) and not (ours and os.path.realpath(file.parent) == target)

    with analyze.progress("checking") as bar:
        texts = find(paths, wanted.encoding, not_ours, bar.update, wanted.text_key, wanted.on_undecodable)
    readers.check_columns(texts.sources, wanted.text_key)
    if wanted.hub:
        texts.sources.append(readers.hub(wanted.hub, wanted.text_key, wanted.instead))
    plain = [source for source in texts.sources if source.kind == "text"]
    if wanted.text_key != "text" and plain and (wanted.pairs or len(plain) == len(texts.sources)):
        raise UserError(
            f"--text_key={wanted.text_key}: {plain[0].name} is plain text without fields; give files of rows "
            "only (JSON, CSV, Parquet, Arrow), or omit the option"
        )
    if not texts.sources:
        raise UserError("; ".join([f"no text found in {', '.join(map(str, paths))}", *_skipped(texts)[:1]]))
    return texts


# ----------------------------------------------------------------------------- encoding and writing


def _write(
    texts: Texts, job: Job, encoder: tokenizer.Tokenizer, out: Path, wanted: Options, workers: int
) -> tuple[dict[str, Any], Counts, int, bool]:
    """Write the files of `out`. Return the contents of meta.json, the counts, the number of val documents
    also in train, and whether an earlier run was resumed.
    """
    created = not out.exists()
    writer = shards.Writer(out, encode.dtype_of(encoder.vocab_size), wanted.shard_tokens)
    complete = False
    try:
        progress = writer.begin(_sameness(texts, encoder, job, wanted))
        counts = _encode(texts, job, writer, wanted, workers, progress)
        complete = True
        for split in SPLITS:
            if not writer.tokens[split]:
                if job.split.val_from >= 0:
                    raise UserError(f"the {split} texts are empty; --val=PATH names validation texts")
                raise analyze.empty_split(split, wanted, sum(counts.documents.values()), counts.characters)
        done = writer.finish()
        in_both = shards.duplicates(writer.folded, one_split=job.split.few)
        meta = _meta(texts, encoder, counts, done)
        if wanted.pairs:
            for split in SPLITS:
                mask = writer.scored(split)
                meta["splits"][split]["mask"] = {"name": mask.name, "sha256": files.sha256(mask)}
        drafts = {name: writer.folder / name for name in ("tokenizer.json", "meta.json")}
        drafts["meta.json"].write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8", newline="\n")
        drafts["tokenizer.json"].write_text(tokenizer.to_text(encoder), encoding="utf-8", newline="\n")
        if wanted.pairs:
            drafts |= {writer.scored(split).name: writer.scored(split) for split in SPLITS}
        for split in reversed(SPLITS):
            drafts |= {name: path for name, path, _ in done[split]}
        shards.publish(out, drafts)
    except BaseException as error:
        keep = isinstance(error, shards.InUse) or (writer.recorded and not complete)
        writer.give_up(keep)
        if created:
            with contextlib.suppress(OSError):
                out.rmdir()
        if keep and isinstance(error, KeyboardInterrupt):
            raise Stopped("interrupted; run the same command again to resume") from None
        raise
    writer.give_up(keep=False)
    return meta, counts, in_both, bool(progress)


def _encode(
    texts: Texts, job: Job, writer: shards.Writer, wanted: Options, workers: int, progress: dict[str, Any]
) -> Counts:
    counts = Counts(**progress.get("counts", {}))
    start = tuple(progress.get("next", (0, None)))
    recorded = time.monotonic()
    done = sum(source.bytes for source in texts.sources[: start[0]])
    with analyze.progress("encoding", texts, done) as bar:
        pieces = readers.pieces(texts.sources, analyze.reading(wanted), (start[0], start[1]), bar.update)
        for encoded in pool.ordered(encode.encode, pieces, workers, encode.start, (job,)):
            named = analyze.refuse_bad(encoded, texts, wanted)
            if encoded.lost and not wanted.lossy:
                name = texts.sources[encoded.source].path
                raise UserError(
                    f"{name}: the tokenizer loses or adds {_lost(encoded)}; train one on this text "
                    "(--tokenizer=bpe:8192) or pass --lossy"
                )
            counts.bad_rows += len(named)
            counts.bad_shown += named[: SHOWN_BAD - len(counts.bad_shown)]
            counts.add(encoded)
            for split in SPLITS:
                writer.add(split, encoded.ids[split])
                if wanted.pairs:
                    writer.add_scored(split, encoded.scored[split])
            writer.add_folded(encoded.folded)
            bar.set_postfix_str(f"{sum(writer.tokens.values()) / 1e6:,.1f}M tokens", refresh=False)
            if time.monotonic() - recorded >= RECORD_S:
                place = [encoded.source, encoded.place]
                writer.record({"next": place, "counts": asdict(counts)})
                recorded = time.monotonic()
    return counts


def _sameness(texts: Texts, encoder: tokenizer.Tokenizer, job: Job, wanted: Options) -> dict[str, Any]:
    """Return the properties that must be equal for a run to resume another's work."""
    return {
        "tokenizer": tokenizer.fingerprint(encoder),
        "split": asdict(job.split),
        "shard_tokens": wanted.shard_tokens,
        "text_key": wanted.text_key,
        "split_at": wanted.split_at,
        "cuts": [encode.PIECE, formats.BLOCK],
        "sources": [[s.name, s.kind, s.encoding, s.undecodable, s.bytes, s.sha256] for s in texts.sources],
    }


def _meta(
    texts: Texts, encoder: tokenizer.Tokenizer, counts: Counts, done: dict[str, list[tuple[str, Path, int]]]
) -> dict[str, Any]:
    hashes = "".join(source.sha256 + "\n" for source in texts.sources)
    splits = {
        split: {
            "tokens": sum(tokens for _, _, tokens in done[split]),
            "text_bytes": counts.text_bytes[split],
            "files": [
                {"name": name, "tokens": tokens, "sha256": files.sha256(path)}
                for name, path, tokens in done[split]
            ],
        }
        for split in SPLITS
    }
    return {
        "format": FORMAT,
        "dtype": encode.dtype_of(encoder.vocab_size),
        "vocab_size": encoder.vocab_size,
        "tokenizer": {"type": encoder.kind, "sha256": tokenizer.fingerprint(encoder)},
        "splits": splits,
        "documents": sum(counts.documents.values()),
        "source": [
            {"name": source.name, "bytes": source.bytes, "sha256": source.sha256}
            for source in texts.sources[:100]
        ],
        "source_files": len(texts.sources),
        "source_sha256": hashlib.sha256(hashes.encode()).hexdigest(),  # over all, one hash per line
    }


# ----------------------------------------------------------------------------- messages


def _lost(counts: Counts) -> str:
    examples = sorted(counts.lost, key=lambda character: -counts.lost[character])[:5]
    shown = " ".join(map(repr, examples))
    return f"{sum(counts.lost.values()):,} of {counts.tried:,} characters ({shown})"


def _missing_parts(sources: list[Source]) -> list[str]:
    """Return a note for every dataset of files such as train-00000-of-00080.parquet that is incomplete."""
    parts: dict[tuple[str, ...], set[int]] = {}
    for source in sources:
        if match := PART.fullmatch(source.name):
            parts.setdefault(match.group("before", "total", "after"), set()).add(int(match["number"]))
    return [
        f"note: {len(found):,} of {int(total):,} files {before}*-of-{total}{after} are here; "
        "the others are not part of this dataset"
        for (before, total, after), found in parts.items()
        if len(found) < int(total)
    ]


def _skipped(texts: Texts) -> list[str]:
    lines = [f"skipped {name}: {reason}" for name, reason in texts.skipped[:SHOWN]]
    if len(texts.skipped) > SHOWN:
        lines.append(f"skipped {counted(len(texts.skipped) - SHOWN, 'more file')}")
    return lines
