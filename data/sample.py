"""What a format makes of a record, before and after tokenization."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORE = -100  # label of a slot where nothing is learned
TRAINED = np.uint32(1 << 31)  # set on a token that is a target; ids use the bits below it


class BadRecord(Exception):
    """A record is wrong: one line that says how. Whoever knows the file and the line adds them."""


@dataclass(slots=True)
class Sample:
    """One document as text.

    spans: what is trained, as [begin, end) character ranges in order; None: everything. A token that overlaps a span is
    trained (a token is the smallest thing that can be, and " Hello" has to be learned where "Hello" is).
    bos, eos: surround the text as the tokenizer surrounds a text, and end it with eos. Formats whose text already has them
    (a chat template writes its own) set neither.
    """

    text: str
    spans: list[tuple[int, int]] | None
    bos: bool = False
    eos: bool = False


Tokens = np.ndarray  # uint32 [n]: token id, with TRAINED set where it is a target
