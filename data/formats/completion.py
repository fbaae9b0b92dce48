"""Plain text: every token is trained, from bos (if the tokenizer uses one) to eos."""

from __future__ import annotations

from data.config import DataConfig, SourceConfig
from data.formats import Format, as_object, get
from data.sample import BadRecord, Sample
from data.tokenizer import Tokenizer


def build(cfg: DataConfig, source: SourceConfig, tokenizer: Tokenizer) -> Format:
    field = source.field_names()["text"]

    def convert(record: object) -> Sample:
        text = get(as_object(record), field, str)
        if not text:
            raise BadRecord(f"field {field!r} is empty")
        return Sample(text, None, bos=True, eos=True)

    return Format(convert, ["completion", field])
