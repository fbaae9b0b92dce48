"""What may differ between a checkpoint and the run that resumes it. No torch.

Differences are found key by key, in fingerprints (what the model, the data and the optimizer are) and in the config, and
each falls into one of three classes:

    forbidden   it would be another run (the shape of the model, the tokenizer, the optimizer's kind)
    allow       the result changes, and the user may want that (the data list, the batch): checkpoint.allow_change=true
    free        the result does not change (logging, where things are written)

The caller owns the table of rules; the first pattern that matches a key decides. Fingerprints that no rule names are
forbidden, config keys that no rule names are free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from runtime.errors import ConfigError, redact

Class = Literal["forbidden", "allow", "free"]
Rule = tuple[str, Class]  # pattern of dotted keys, as for fnmatch; "identity.<key>" for fingerprints
_ABSENT = object()


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ -> (saved, now). Both are JSON values; tables and lists of tables are compared inside."""
    a, b = _flat(saved), _flat(now)
    pairs = {key: (a.get(key, _ABSENT), b.get(key, _ABSENT)) for key in sorted(a.keys() | b.keys())}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check(
    where: str,
    saved: Mapping[str, Mapping[str, Any]],
    now: Mapping[str, Mapping[str, Any]],
    rules: Sequence[Rule],
    allow_change: bool,
) -> list[str]:
    """Compares `identity` and `config` of a checkpoint with those of this run; returns the differences to tell the user.

    Args:
        where: the checkpoint, for messages.
        saved, now: {"identity": {...}, "config": {...}}.

    Raises:
        ConfigError: a forbidden difference, or one that needs checkpoint.allow_change.
    """
    found: dict[str, list[str]] = {"forbidden": [], "allow": [], "free": []}
    for part, default in (("identity", "forbidden"), ("config", "free")):
        for key, (old, new) in differences(saved[part], now[part]).items():
            name = f"identity.{key}" if part == "identity" else key
            verdict = next((verdict for pattern, verdict in rules if fnmatchcase(name, pattern)), default)
            what = f"fingerprint of {key}" if part == "identity" else key
            found[verdict].append(f"{what} was {_short(old)}, now {_short(new)}")
    if found["forbidden"]:
        raise ConfigError(
            f"{where} is of another run: {'; '.join(found['forbidden'] + found['allow'])}. "
            "Restore these, choose another output.path, or start anew with checkpoint.resume=never"
        )
    if found["allow"] and not allow_change:
        raise ConfigError(
            f"{where} was written with other settings that decide the result: {'; '.join(found['allow'])}. "
            "Restore them, or go on with --checkpoint.allow_change=true"
        )
    return found["allow"] + found["free"]


def _short(value: Any) -> str:
    text = "absent" if value is _ABSENT else redact(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
