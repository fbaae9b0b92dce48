"""Conversations to text by the model's own chat template, and which of its characters are trained.

A chat template is a jinja program that comes with the model, so it is a stranger's program. It runs in jinja's immutable
sandbox with the settings that transformers gives it (so the same text comes out), today's date replaced by a fixed one, and
bounds on what it may do (data/sandbox.py). (Memory is bounded for all of a run's reading, in data/prepare.py.)

Which characters are trained. A template is rendered once per conversation, on messages whose strings are `Text` (data/text.py): strings
in every respect, but each remembers which message it came from, through concatenation, slicing, stripping, splitting and the
like. So the rendered text itself says where every message's text went, whatever the template did with it. A trained
message then trains exactly what the model has to produce in its place:

  from   the end of the generation prompt: what the template writes when asked to open a reply, found once by a probe. Where
         that is not what precedes the message, or the template has none, from the message's own text (and the white space
         before it that is not the end of the question's turn: " Hello" after "[/INST]");
  to     the end of its turn, inclusive: the first token after its text that ends generation (eos, or another one that the
         generation config names); where there is none, what the template closes a reply with (its first special token, or
         plain text), found by a probe, too; else the first special token, which is then the only sign that the turn is over.

A template that has `{% generation %}` blocks says itself what the model produces, and those are taken as they are.

Nothing is guessed: each trained message must appear in one piece with its whole text (up to white space), and no other
message's text in between. A template that drops or rewrites part of it (the reasoning of earlier turns, say) is an error for
that record, with the way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.runtime import new_context

from data.sample import BadRecord
from data.sandbox import GENERATION, Environment, Raised
from data.text import join, mark
from data.tokenizer import Tokenizer, read_template
from runtime.errors import DataError, ModelError, clean

MAX_TEMPLATE = 1 << 20  # characters of a template
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which a message's reasoning is passed

Span = tuple[int, int]


# ---------------------------------------------------------------------------------------------------------------- template


class _Template:
    """One compiled template, and what a probe of it tells about its turns."""

    def __init__(self, source: str, today: date, variables: dict, special_texts: Sequence[str], stop_texts: Sequence[str]):
        self._template = Environment(today).from_string(source)
        self._globals = dict(self._template.globals)
        self._variables = self._globals | variables | {"documents": None}
        self.has_generation = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source))
        self.after_user, self.prompt, self.closing = self._probe()
        self._stop, self._special = _any_of(stop_texts), _any_of(special_texts)
        closer = self._special.search(self.closing)
        self._closer = _any_of([closer[0]] if closer else [])
        self._plain_closing = "" if closer else self.closing.rstrip()

    def render(self, messages: list[dict], tools: list | None, prompt: bool) -> str:
        """The text, a Text where messages are marked. Raises BadRecord with the template's own words."""
        variables = {**self._variables, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
        template = self._template
        template.environment.start()
        try:
            # template.new_context would merge the globals, a chain of dicts, anew for every conversation.
            template.environment.weigh([messages, tools])
            context = new_context(template.environment, template.name, template.blocks, variables, True, self._globals)
            return join(template.root_render_func(context))
        except Raised as error:
            raise BadRecord(f"the chat template refuses it: {_one_line(error)}") from None
        except MemoryError:
            raise BadRecord("the chat template needs too much memory") from None
        except (TemplateError, RecursionError) as error:
            raise BadRecord(f"the chat template fails: {_one_line(error)}") from None
        except Exception as error:  # a template is a program: whatever it does wrong is the data's or the template's fault
            raise BadRecord(f"the chat template fails: {type(error).__name__}: {_one_line(error)}") from None

    def _probe(self) -> tuple[str | None, str, str]:
        """What the template writes between a user's text and a reply, the part of it that opens the reply, and after a reply.

        A template that refuses such a small conversation tells nothing; then messages begin where their text does.
        """
        user = {"role": "user", "content": mark("x", 0)}
        reply = {"role": "assistant", "content": mark("y", 1)}
        try:
            after = _tail(self.render([user], None, True), 0)
            without = _tail(self.render([user], None, False), 0)
        except BadRecord:
            after = without = None
        try:
            closing = _tail(self.render([user, reply], None, False), 1)
        except BadRecord:
            closing = None
        prompt = ""
        if after is not None and without is not None:
            common = next((i for i, (a, b) in enumerate(zip(after, without)) if a != b), min(len(after), len(without)))
            prompt = after[common:]
        return after, prompt, closing or ""

    def begin_of(self, gap: str, follows_user: bool) -> int:
        """How much of `gap`, the text between a message's text and the one before, is not the message's to produce."""
        opened = self.prompt.strip() != ""
        if follows_user and self.after_user is not None and gap.startswith(self.after_user):
            own = gap[len(self.after_user) :]
            if opened or not own.strip():
                return len(gap) - len(own)
        at = gap.rfind(self.prompt) if opened else -1
        return len(gap) if at < 0 else at + len(self.prompt)

    def end_of(self, gap: str) -> int:
        """How much of `gap`, the text from a message's text to the next one, ends the message's turn."""
        if found := self._stop.search(gap) or self._closer.search(gap):
            return found.end()
        if self._plain_closing and gap.startswith(self._plain_closing):
            return len(self._plain_closing)
        found = self._special.search(gap)
        return found.end() if found else 0


def _tail(text: str, source: int) -> str | None:
    """What follows the last character from `source`."""
    ends = [end for _, end, s in getattr(text, "runs", ()) if s == source]
    return str.__getitem__(text, slice(max(ends), None)) if ends else None


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """Matches any of `texts`, longest first; nothing if there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(filter(None, texts), key=lambda t: (-len(t), t))) or r"(?!)")


def _one_line(error: Exception) -> str:
    return clean(error) or type(error).__name__


# -------------------------------------------------------------------------------------------------------------------- chat


class Chat:
    """A tokenizer's chat template, or another one in its place.

    Args:
        template: a file that replaces the model's template.
        variables: given to the template by name.
        today: what `strftime_now` tells.

    Raises:
        DataError, ModelError: there is no template, or it is not valid jinja.
    """

    def __init__(self, tokenizer: Tokenizer, template: Path | None = None, variables: dict | None = None, today: date = date(2024, 7, 26)):
        self.sources = {"default": read_template(template)} if template else tokenizer.templates
        if not self.sources:
            raise ModelError("the tokenizer has no chat template; set data.template to a file with one, or use another format")
        texts = {i: text for text, i in tokenizer.special_texts.items()}
        special = [text for i, text in texts.items() if i != tokenizer.bos_id or i in tokenizer.eos_ids]
        stop = [texts[i] for i in tokenizer.eos_ids if i in texts]
        names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
        known = {f"{name}_token": tokenizer.special[f"{name}_token"] for name in names if f"{name}_token" in tokenizer.special}
        self._templates = {}
        for name, source in self.sources.items():
            where = DataError if template else ModelError
            if len(source) > MAX_TEMPLATE:
                raise where(f"the chat template has {len(source):,} characters, more than {MAX_TEMPLATE:,}", template)
            try:
                self._templates[name] = _Template(source, today, known | (variables or {}), special, stop)
            except (TemplateSyntaxError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
                # jinja writes Python and has it compiled; some of what it lets pass is refused only there
                line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
                reason = "it needs too much memory" if isinstance(error, MemoryError) else f"{line}{_one_line(error)}"
                raise where(f"the chat template is not valid jinja: {reason}", template) from None

    def _choose(self, tools: list | None) -> _Template:
        """As transformers does: the template named tool_use for conversations with tools, if there is one."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise BadRecord(f"the tokenizer has no chat template named default, only {', '.join(self._templates)}")
        return self._templates[name]

    def render(self, messages: list[dict], tools: list | None = None, generation_prompt: bool = False) -> str:
        """The conversation as text; `generation_prompt` opens the model's next reply."""
        return str.__str__(self._choose(tools).render([_plain(message) for message in messages], tools, generation_prompt))

    def spans(self, messages: list[dict], tools: list | None, trained: Sequence[bool]) -> tuple[str, list[Span]]:
        """The conversation as text, and the character ranges to train for the messages that are `trained`, in order."""
        template = self._choose(tools)
        messages = [_plain(message) for message in messages]
        marked = [{k: v if k == "role" else mark(v, i) for k, v in message.items()} for i, message in enumerate(messages)]
        text = template.render(marked, tools, False)
        runs = sorted(getattr(text, "runs", ()))
        text = str.__str__(text)
        # Consecutive runs of one message are a block: (message, begin, end)
        blocks: list[tuple[int, int, int]] = []
        for begin, end, source in runs:
            if source == GENERATION:
                continue
            if blocks and blocks[-1][0] == source:
                _, first, last = blocks[-1]
                blocks[-1] = (source, first, max(last, end))
            else:
                blocks.append((source, begin, end))
        if template.has_generation:
            spans = _marked_spans(blocks, [(b, e) for b, e, s in runs if s == GENERATION], trained)
        else:
            spans = _turn_spans(template, text, blocks, messages, trained)
        shown: dict[int, list[str]] = {}
        for begin, end, i in spans:
            shown.setdefault(i, []).append(text[begin:end])
        for i, message in enumerate(messages):
            if trained[i]:
                _check_shown(message, i, shown.get(i, []))
        return text, [(begin, end) for begin, end, _ in spans]


def _turn_spans(template: _Template, text: str, blocks: list, messages: list[dict], trained: Sequence[bool]) -> list[tuple[int, int, int]]:
    """(begin, end, message) of every trained turn."""
    spans, seen = [], set()
    for n, (i, begin, end) in enumerate(blocks):
        if not trained[i]:
            continue
        if i in seen:
            raise BadRecord(f"{_named(messages[i], i)}: the chat template puts another message's text inside it")
        seen.add(i)
        before = blocks[n - 1][2] if n else 0
        follows_user = n > 0 and messages[blocks[n - 1][0]].get("role") == "user"
        after = blocks[n + 1][1] if n + 1 < len(blocks) else len(text)
        spans.append((before + template.begin_of(text[before:begin], follows_user), end + template.end_of(text[end:after]), i))
    return spans


def _marked_spans(blocks: list, generated: list[Span], trained: Sequence[bool]) -> list[tuple[int, int, int]]:
    """(begin, end, message) of the template's own {% generation %} blocks, for the messages that are trained."""
    spans, n = [], 0
    for begin, end in generated:
        while n < len(blocks) and blocks[n][1] < begin:
            n += 1
        owners = set()
        while n < len(blocks) and blocks[n][1] < end:
            owners.add(blocks[n][0])
            n += 1
        if len({trained[i] for i in owners}) != 1:
            raise BadRecord("a {% generation %} block of the chat template holds the text of no message, or of some to train and some not")
        if trained[i := min(owners)]:
            spans.append((begin, end, i))
    return spans


def _plain(message: dict) -> dict:
    """A message as templates expect it: absent instead of null, and reasoning under each of its usual names."""
    if None in message.values():
        message = {key: value for key, value in message.items() if value is not None}
    for key in _REASONING:
        if key in message:
            return {"thinking": message[key], **message, "reasoning_content": message[key]}
    return message


def _check_shown(message: dict, i: int, spans: list[str]) -> None:
    """All text of a trained message must be in what is trained for it, up to white space."""
    if not spans:
        raise BadRecord(f"{_named(message, i)}: the chat template does not show it as the model's, so it cannot be trained")
    content = message.get("content", "")
    wanted = [("content", part["text"]) for part in content] if isinstance(content, list) else [("content", content)]
    if "tool_calls" in message:
        wanted += [("tool_calls", call.get("function", call)["name"]) for call in message["tool_calls"]]
    if "reasoning_content" in message:
        wanted.append(("reasoning", message["reasoning_content"]))
    shown = "".join(spans)
    for field, value in wanted:
        if value.strip() not in shown and "".join(value.split()) not in "".join(shown.split()):
            raise BadRecord(
                f"{_named(message, i)}: the chat template leaves out or rewrites part of its {field} (as some do with the reasoning"
                ' of earlier turns), so it cannot be trained; set train_on = "last", or data.template'
            )


def _named(message: dict, i: int) -> str:
    return f"message {i + 1} ({message.get('role')})"
