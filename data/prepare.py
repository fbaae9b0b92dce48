"""From sources to documents: read, convert, tokenize into the cache, apply the policy for long documents.

Tokenization is where the time goes, so it gets all cores: texts are encoded in batches by the `tokenizers` library, in a
thread beside this one, which meanwhile reads, parses and renders the next batch. Masks need the tokens at the ends of a
span only, so the library is asked for those two instead of turning every token's offsets into Python objects.

The cache is keyed by content: the bytes of the files, the format and everything it depends on, the tokenizer. The limit on
length is not in the key: it is applied to the index, so that trying another one costs nothing. Nor is the limit on records that
are wrong, where these are left out: what was left out is kept with the tokens.

Files and templates may be a stranger's, and there are too many ways for a template to ask for memory to bound each. So all of this
works under a limit on what the process may have beside what it has (`_bounded_memory`): beyond it, Python raises MemoryError.
"""

from __future__ import annotations

import hashlib
import json
import re
import resource
import sys
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tqdm import tqdm

from data import formats
from data.config import DataConfig, SourceConfig
from data.documents import Documents, Origin
from data.sample import TRAINED, BadRecord, Sample, Tokens
from data.sources import Bad, find_files, read_records, refuse
from data.store import Writer, find_or_make
from data.tokenizer import Tokenizer
from runtime.errors import DataError, ModelError
from runtime.files import open_regular

CODE_VERSION = 1  # of everything between a file's bytes and its tokens: raise it when that changes, and caches are made anew
_BATCH_CHARACTERS = 1 << 20
_BATCH_RECORDS = 4096
_FIRST_BAD, _BAD_KINDS = 5, 20  # of records that were left out: how many are named, how many kinds of reasons are told apart
MEMORY = 4 << 30  # bytes that reading may take, and several times the size of a file that is held in memory, at least in parts
_IN_PARTS = (".json", ".parquet")
_MANY_SPANS = 16  # above, offsets of all tokens are cheaper than searching for each span


def prepare(
    cfg: DataConfig, sources: tuple[SourceConfig, ...], tokenizer: Tokenizer, cache: Path, seed: int, progress: bool = True
) -> Documents:
    """Tokenizes what is not in the cache yet and returns the documents of `sources`.

    Several processes may call it with the same arguments: one works, the others wait for its cache.

    Args:
        seed: decides which documents a fractional weight takes in an epoch.
        progress: show a bar on stderr.

    Raises:
        DataError: a file, a record or a template is wrong, or there is nothing to train on.
    """
    origins = []
    for source, name in zip(sources, _names(sources)):
        files = find_files(source)
        with _bounded_memory(MEMORY):
            form = formats.build(cfg, source, tokenizer)
        key = _key(files, form.key, tokenizer, cfg.on_bad)
        bar = tqdm(
            total=sum(file.stat().st_size for file in files),
            desc=f"tokenizing {name}",
            unit="B",
            unit_scale=True,
            disable=not progress,
            delay=1,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        ends = frozenset(tokenizer.special_texts.values()) | set(tokenizer.eos_ids)
        with bar, _bounded_memory(MEMORY + 8 * max((f.stat().st_size for f in files if f.suffix in _IN_PARTS), default=0)):
            work = lambda writer: _tokenize(files, form, tokenizer, writer, bar, cfg.on_bad)  # noqa: E731, B023 (called at once)
            store = find_or_make(cache, key, ends, work)
        _check_bad(store.bad, store.meta["documents"], cfg.max_bad, files)
        origins.append(Origin(name, source.weight, source.path, tuple(files), store))
    return Documents.of(origins, cfg.longest, cfg.overflow, tokenizer.pad_id, seed)


@contextmanager
def _bounded_memory(nbytes: int) -> Iterator[None]:
    """What the process may have of private memory until this is left: what it has, and `nbytes`. Linux only, elsewhere no limit."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = nbytes + 1024 * int(status.partition("VmData:")[2].split()[0])
    limit = min(one for one in (limit, soft, hard) if one != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _names(sources: tuple[SourceConfig, ...]) -> list[str]:
    """A name for each source: its own, or one made of its path; equal ones are numbered."""
    names: list[str] = []
    for source in sources:
        parts = [part for part in Path(source.path).parts if "*" not in part] or ["data"]
        name = base = source.name or Path(parts[-1]).stem
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


class _LeftOut:
    """Keeps account of records that are wrong and left out."""

    def __init__(self, files: list[Path]):
        self.count, self.reasons, self.first = 0, {}, []
        self._number = {path: i for i, path in enumerate(files)}

    def __call__(self, error: DataError) -> None:
        self.count += 1
        kind = re.sub(r"\d+", "N", error.message)  # columns and counts do not make another reason
        kind = kind if kind in self.reasons or len(self.reasons) < _BAD_KINDS else "other reasons"
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        self.first = sorted([*self.first, [self._number[error.path], error.line, error.message]])[:_FIRST_BAD]

    def account(self) -> dict[str, object]:
        """As `Store.bad` has it, the most frequent reason first."""
        reasons = dict(sorted(self.reasons.items(), key=lambda item: (-item[1], item[0])))
        return {"count": self.count, "reasons": reasons, "first": self.first}


def _check_bad(bad: dict, documents: int, most: float, files: list[Path]) -> None:
    if bad["count"] > most * (bad["count"] + documents):
        file, line, reason = bad["first"][0]
        told = f"{bad['count']:,} of {bad['count'] + documents:,} records are wrong, more than data.max_bad={most:g} of them allows"
        raise DataError(f"{reason}; {told}", files[file], line)


def _key(files: list[Path], form: object, tokenizer: Tokenizer, on_bad: str) -> str:
    contents = []
    for path in files:
        digest = hashlib.blake2b(digest_size=16)
        try:
            with open_regular(path) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", path) from None
        contents.append([path.suffix, digest.hexdigest()])
    skips = [on_bad] if on_bad == "skip" else []
    facts = json.dumps([CODE_VERSION, tokenizers.__version__, tokenizer.fingerprint, form, contents, *skips])
    return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


class _Item(NamedTuple):
    file: int
    line: int
    size: int
    sample: Sample | Tokens


def _tokenize(files: list[Path], form: formats.Format, tokenizer: Tokenizer, writer: Writer, bar: tqdm, on_bad: str) -> None:
    """Writes every record of `files`, in order."""
    surround, left_out = _Surround(tokenizer), _LeftOut(files)
    bad = left_out if on_bad == "skip" else refuse
    begun = 0

    def finish(batch: list[_Item], encoded: Future) -> None:
        nonlocal begun
        encodings = iter(encoded.result())
        for item in batch:
            while begun <= item.file:
                writer.begin_file()
                begun += 1
            encoding = None if isinstance(item.sample, np.ndarray) else next(encodings)
            if isinstance(encoding, DataError):
                bad(encoding)
                continue
            document = item.sample if encoding is None else surround.tokens(item.sample, encoding)
            if not len(document):
                bad(DataError("gives no tokens", files[item.file], item.line))
                continue
            writer.add(document, item.line)
        bar.update(sum(item.size for item in batch))

    waiting: deque[tuple[list[_Item], Future]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for batch in _batches(files, form, bad):
                waiting.append((batch, pool.submit(_encode, batch, files, tokenizer)))
                if len(waiting) > 2:
                    finish(*waiting.popleft())
            while waiting:
                finish(*waiting.popleft())
        finally:
            for _, encoded in waiting:
                encoded.cancel()
    if left_out.count:
        writer.bad = left_out.account()
        if not writer.tokens:
            _check_bad(writer.bad, 0, 0.0, files)
    if not begun:
        raise DataError("there are no records", files[0] if len(files) == 1 else files[0].parent)


def _batches(files: list[Path], form: formats.Format, bad: Bad) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    characters = 0
    for number, path in enumerate(files):
        for record in read_records(path, bad):
            try:
                sample = form.convert(record.value)
            except BadRecord as error:
                bad(DataError(str(error), path, record.line))
                continue
            batch.append(_Item(number, record.line, record.size, sample))
            characters += len(sample if isinstance(sample, np.ndarray) else sample.text)
            if characters > _BATCH_CHARACTERS or len(batch) >= _BATCH_RECORDS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _encode(batch: list[_Item], files: list[Path], tokenizer: Tokenizer) -> list[tokenizers.Encoding | DataError]:
    """The encodings of the batch's texts, in order; what is wrong with those that are not text."""
    items = [item for item in batch if isinstance(item.sample, Sample)]
    try:
        return tokenizer.encode_batch([item.sample.text for item in items])
    except (TypeError, UnicodeEncodeError):
        faults = [_half_pair(item.sample.text) for item in items]
        if not any(faults):
            raise
        encodings = iter(tokenizer.encode_batch([item.sample.text for item, fault in zip(items, faults) if not fault]))
        return [DataError(fault, files[item.file], item.line) if fault else next(encodings) for item, fault in zip(items, faults)]


def _half_pair(text: str) -> str | None:
    """What is wrong with a string that JSON can write but that is not text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has {ascii(error.object[error.start])[1:-1]}, half of a surrogate pair, which is not text"
    return None


class _Surround:
    """Makes a document's tokens of its text's encoding."""

    def __init__(self, tokenizer: Tokenizer):
        self._prefix = tokenizer.prefix_ids
        self._suffix = tokenizer.suffix_ids
        self._eos_id = tokenizer.eos_id
        if self._eos_id is not None and self._eos_id not in self._suffix[-1:]:
            self._suffix = (*self._suffix, self._eos_id)

    def tokens(self, sample: Sample, encoding: tokenizers.Encoding) -> Tokens:
        if sample.eos and self._eos_id is None:
            raise ModelError("the tokenizer has no eos_token to end documents with; name one in tokenizer_config.json")
        before = self._prefix if sample.bos else ()
        after = self._suffix if sample.eos else ()
        ids = array("I", encoding.ids)  # several times faster than numpy at lists
        if before or after:
            ids = array("I", before) + ids + array("I", after)
        tokens = np.frombuffer(ids, np.uint32)
        first, last = len(before), len(tokens) - len(after)
        if sample.spans is None:
            tokens[first:] |= TRAINED
            return tokens
        for begin, end in token_ranges(encoding, sample.spans, len(sample.text)):
            tokens[first + begin : first + end] |= TRAINED
        if after and sample.spans and sample.spans[-1][1] == len(sample.text):
            tokens[last:] |= TRAINED  # what ends a trained text is trained with it
        return tokens


def token_ranges(encoding: tokenizers.Encoding, spans: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """For each character range, the range of tokens that overlap it. `length`: characters of the text."""
    if len(spans) > _MANY_SPANS:
        return token_ranges_ref(encoding, spans)
    ranges = []
    for begin, end in spans:
        first = encoding.char_to_token(begin)
        last = len(encoding) if end >= length else encoding.char_to_token(end)
        if first is None or last is None:  # a character that no token covers: a normalizer dropped it
            return token_ranges_ref(encoding, spans)
        while last < len(encoding) and encoding.token_to_chars(last)[0] < end:
            last += 1  # it covers the border
        ranges.append((first, last))
    return ranges


def token_ranges_ref(encoding: tokenizers.Encoding, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same from the offsets of all tokens; both ends of offsets never decrease."""
    offsets = np.array(encoding.offsets).reshape(-1, 2)
    spans = np.array(spans).reshape(-1, 2)
    first = np.searchsorted(offsets[:, 1], spans[:, 0], "right")
    last = np.searchsorted(offsets[:, 0], spans[:, 1], "left")
    return list(zip(first.tolist(), np.maximum(first, last).tolist()))
