"""Token ids made elsewhere.

    {"input_ids": [1, 5, 7, 2], "labels": [-100, -100, 7, 2]}      labels as transformers has them: not shifted, -100 is not
    {"input_ids": [1, 5, 7, 2], "mask": [0, 0, 1, 1]}              trained, any other must be the id at the same place
    {"input_ids": [1, 5, 7, 2]}                                    every token is trained

Nothing is added: no bos, no eos.
"""

from __future__ import annotations

import numpy as np

from data.config import DataConfig, SourceConfig
from data.formats import Format, as_object, get
from data.sample import IGNORE, TRAINED, BadRecord, Tokens
from data.tokenizer import Tokenizer


def build(cfg: DataConfig, source: SourceConfig, tokenizer: Tokenizer) -> Format:
    names = source.field_names()

    def convert(record: object) -> Tokens:
        record = as_object(record)
        ids = _integers(record, names["input_ids"])
        if len(ids) == 0:
            raise BadRecord(f"field {names['input_ids']!r} is empty")
        if ids.min() < 0 or ids.max() >= TRAINED:
            raise BadRecord(f"field {names['input_ids']!r} has an id outside 0 to 2^31 - 1")
        given = [name for name in (names["labels"], names["mask"]) if record.get(name) is not None]
        if len(given) == 2:
            raise BadRecord(f"has both {given[0]!r} and {given[1]!r}; keep one of them")
        trained = np.ones(len(ids), bool)
        if given:
            values = _integers(record, given[0])
            if len(values) != len(ids):
                raise BadRecord(f"field {given[0]!r} has {len(values)} entries for {len(ids)} ids")
            trained = values != (IGNORE if given[0] == names["labels"] else 0)
            allowed = ids if given[0] == names["labels"] else 1
            if (wrong := np.flatnonzero(trained & (values != allowed))).size:
                i = wrong[0]
                expected = f"{ids[i]} or {IGNORE}" if given[0] == names["labels"] else "0 or 1"
                raise BadRecord(f"field {given[0]!r} has {values[i]} at {i}, where {expected} is expected")
        if record.get("attention_mask") is not None and not _integers(record, "attention_mask").all():
            raise BadRecord("its attention_mask has zeros: remove the padding")
        return ids.astype(np.uint32) | np.where(trained, TRAINED, np.uint32(0))

    return Format(convert, ["tokenized", names])


def _integers(record: dict, name: str) -> np.ndarray:
    values = get(record, name, list)
    if not set(map(type, values)) <= {int}:
        raise BadRecord(f"field {name!r} must be a list of integers")
    try:
        return np.array(values, np.int64)
    except OverflowError:
        raise BadRecord(f"field {name!r} has an integer beyond 64 bits") from None
