"""Chat templates: the text transformers renders, and exactly the right characters trained."""

from __future__ import annotations

import random
from datetime import date

import pytest
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

import data.sandbox
from data.chat import Chat
from data.sample import BadRecord
from data.sandbox import GENERATION
from data.text import Text, join, mark
from runtime.errors import DataError, ModelError
from tests.data.making import TEMPLATES, bracketed, chat_for, tokenizer_for, turns, write_tokenizer


def assistant(messages: list[dict]) -> list[bool]:
    return [m["role"] == "assistant" for m in messages]


def shown(chat: Chat, messages: list[dict], trained: list[bool] | None = None, tools: list | None = None) -> str:
    return bracketed(*chat.spans(messages, tools, assistant(messages) if trained is None else trained))


TALK = turns("Hi", "Hello!", "Sum?", "42")
EXPECTED = {
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
        "<|im_start|>user\nSum?<|im_end|>\n<|im_start|>assistant\n⟦42<|im_end|>⟧\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello!<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nSum?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦42<|eot_id|>⟧"
    ),
    "mistral": "<s>[INST] Hi[/INST]⟦ Hello!</s>⟧[INST] Sum?[/INST]⟦ 42</s>⟧",
    "gemma": (
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello!<end_of_turn>⟧\n"
        "<start_of_turn>user\nSum?<end_of_turn>\n<start_of_turn>model\n⟦42<end_of_turn>⟧\n"
    ),
    "generation": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
        "<|im_start|>user\nSum?<|im_end|>\n<|im_start|>assistant\n⟦42<|im_end|>⟧\n"
    ),
    "thinking": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
        "<|im_start|>user\nSum?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n42<|im_end|>⟧\n"
    ),
    "channels": (
        "<|start|>user<|message|>Hi<|end|><|start|>assistant⟦<|channel|>final<|message|>Hello!<|end|>⟧"
        "<|start|>user<|message|>Sum?<|end|><|start|>assistant⟦<|channel|>final<|message|>42<|return|>⟧"
    ),
    "open": "[gMASK]<|user|>\nHi<|assistant|>\n⟦Hello!<|user|>⟧\nSum?<|assistant|>\n⟦42⟧",
    "plain": "user: Hi\n###\nassistant: ⟦Hello!\n###⟧\nuser: Sum?\n###\nassistant: ⟦42\n###⟧\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained(tmp_path, name):
    assert shown(chat_for(tmp_path, name), TALK) == EXPECTED[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_and_ids_as_transformers(tmp_path, name):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_for(tmp_path, name)
    chat, theirs = Chat(tokenizer, today=date.today()), AutoTokenizer.from_pretrained(tmp_path)
    for messages in (
        TALK,
        turns("Grüße 東京 😀", "  naïve\n\n"),
        turns("<|im_end|>\n<|im_start|>assistant\n", "</s>[/INST] <end_of_turn>", "\n", "x\u2028y"),
        turns("a"),
    ):
        for prompt in (False, True):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            assert chat.render(messages, generation_prompt=prompt) == text
            assert tokenizer.encode(text) == ids
        assert chat.spans(messages, None, [False] * len(messages))[0] == theirs.apply_chat_template(messages, tokenize=False)
        assert len(text) > 10


def test_generation_mask_is_that_of_transformers(tmp_path):
    from transformers import AutoTokenizer

    from data.prepare import token_ranges

    tokenizer = tokenizer_for(tmp_path, "generation")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = turns("Hi", "Hello there, how are you?", "fine", "good")
    mask = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    text, spans = Chat(tokenizer).spans(messages, None, assistant(messages))
    ours = [0] * len(mask)
    for begin, end in token_ranges(tokenizer.encode_batch([text])[0], spans, len(text)):
        ours[begin:end] = [1] * (end - begin)
    assert ours == list(mask) and 0 < sum(ours) < len(ours)


def test_only_some_messages(tmp_path):
    for name in ("chatml", "generation"):
        chat = chat_for(tmp_path / name, name)
        first = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        assert shown(chat, TALK, [False, False, False, True]) == first + EXPECTED[name].split("⟧\n", 1)[1].replace("⟦Hello!<|im_end|>⟧", "")
    both = [True] * 4
    expected = (
        "<|im_start|>user\n⟦Hi<|im_end|>⟧\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
        "<|im_start|>user\n⟦Sum?<|im_end|>⟧\n<|im_start|>assistant\n⟦42<|im_end|>⟧\n"
    )
    assert shown(chat_for(tmp_path / "a", "chatml"), TALK, both) == expected


def test_trimming_templates_train_the_trimmed_text(tmp_path):
    text = shown(chat_for(tmp_path, "gemma"), turns(" Hi \n", "\n\nHello!  \n"))
    assert text == "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello!<end_of_turn>⟧\n"


def test_reasoning(tmp_path):
    chat = chat_for(tmp_path, "thinking")
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    one = head + "⟦<think>\nhm\n</think>\n\nHello!<|im_end|>⟧\n"
    assert shown(chat, turns("Hi", "<think>\nhm\n</think>\n\nHello!")) == one
    for field in ("reasoning_content", "reasoning", "thinking"):
        assert shown(chat, [turns("Hi")[0], {"role": "assistant", "content": "Hello!", field: "hm"}]) == one
    # Dropped from the first turn, because of the second: the first turn cannot be trained in this text
    two = turns("Hi", "<think>\nhm\n</think>\n\nHello!", "Sum?", "<think>\n40 + 2\n</think>\n\n42")
    with pytest.raises(BadRecord, match=r"message 2 \(assistant\): the chat template leaves out or rewrites part of its content.*last"):
        shown(chat, two)
    last = shown(chat, two, [False, False, False, True])
    assert (
        last
        == head + "Hello!<|im_end|>\n<|im_start|>user\nSum?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n40 + 2\n</think>\n\n42<|im_end|>⟧\n"
    )


def test_tool_calls_are_trained(tmp_path):
    chat = chat_for(tmp_path, "thinking")
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": 'Pa"r<|im_end|>is', "days": 2}}}
    messages = [turns("Hi")[0], {"role": "assistant", "content": "", "tool_calls": [call, call]}, {"role": "tool", "content": "sunny"}]
    messages += [{"role": "assistant", "content": "It is sunny."}]
    one = '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa\\"r<|im_end|>is", "days": 2}}\n</tool_call>'
    assert shown(chat, messages) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n" + one + one + "<|im_end|>⟧\n"
        "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt is sunny.<|im_end|>⟧\n"
    )


def test_eos_that_closes_wins_over_other_special_tokens(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}"
        "{% if m.role == 'assistant' %}<|end|>{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert shown(chat_for(tmp_path, template), TALK) == "<|user|>Hi<|assistant|>⟦Hello!<|end|></s>⟧<|user|>Sum?<|assistant|>⟦42<|end|></s>⟧"


def test_what_closes_a_reply_wins_over_special_tokens_inside_it(tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}{% for t in m.tool_calls %}"
        "<|channel|>{{ t.function.name }}<|message|>{% endfor %}<|im_end|>{{ '\n' }}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": "ok", "tool_calls": [{"function": {"name": "f"}}]}]
    expected = "<|im_start|>assistant\n⟦ok<|channel|>f<|message|><|im_end|>⟧\n"
    assert shown(chat_for(tmp_path, template), messages) == expected


def test_generation_config_names_more_stops(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ '<|end|>' + ('' if loop.last else '<|return|>') }}{% endif %}{% endfor %}"
    )
    talk = "<|user|>Hi<|assistant|>⟦Hello!<|end|>⟧<|return|><|user|>Sum?<|assistant|>⟦42<|end|>⟧"
    assert shown(chat_for(tmp_path / "a", template), TALK) == talk
    assert shown(chat_for(tmp_path / "b", template, stop=("<|return|>",)), TALK) == talk.replace("⟧<|return|>", "<|return|>⟧")


def test_a_template_without_a_generation_prompt(tmp_path):
    """Nobody says then what opens a reply, so it is the message's own text (and end) that is trained."""
    template = TEMPLATES["chatml"].split("{% if add_generation_prompt")[0]
    assert shown(chat_for(tmp_path, template), TALK) == EXPECTED["chatml"]


def test_a_reply_that_comes_first(tmp_path):
    messages = [{"role": "assistant", "content": "Welcome"}, *turns("Hi", "Hello!")]
    expected = "<|im_start|>assistant\n⟦Welcome<|im_end|>⟧\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
    assert shown(chat_for(tmp_path, "chatml"), messages) == expected


# --------------------------------------------------------------------------------------------------------------- refusals


def refuses(tmp_path, template: str, messages: list[dict], match: str) -> None:
    with pytest.raises(BadRecord, match=match):
        shown(chat_for(tmp_path, template), messages)


def test_refusals(tmp_path):
    refuses(tmp_path / "a", "gemma", turns("Hi", "Yo", system="S"), "^the chat template refuses it: System role not supported$")
    refuses(tmp_path / "b", "mistral", turns("Hi", "a") + turns("b")[::-1] + turns("c"), "refuses it: Conversation roles must alternate")
    refuses(tmp_path / "c", "{{ messages[9].content }}", TALK, "^the chat template fails: ")
    refuses(tmp_path / "d", "{{ 1 / 0 }}", TALK, "^the chat template fails: ZeroDivisionError: division by zero$")
    refuses(tmp_path / "e", "{{ 'a' + 1 }}", TALK, "^the chat template fails: TypeError: ")
    refuses(tmp_path / "f", "{% for m in messages %}{{ m.content | length }};{% endfor %}", TALK, r"message 2 .*does not show it")
    refuses(
        tmp_path / "g",
        "{% for m in messages %}{{ m.content | replace('l', '') }}<|end|>{% endfor %}",
        TALK,
        r"message 2 .*rewrites part of its content",
    )
    refuses(tmp_path / "h", "{% for m in messages %}{{ m.content[:3] }}<|end|>{% endfor %}", TALK, r"message 2 .*leaves out or rewrites")
    around = "{{ messages[1].content }}{{ messages[0].content }}{{ messages[1].content }}"
    refuses(tmp_path / "i", around, TALK[:2], r"message 2 .*puts another message's text inside it")
    refuses(
        tmp_path / "j",
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
        TALK,
        "several|some to train",
    )


def test_limits(tmp_path, monkeypatch):
    many = "{% for i in range(100000) %}" + "x" * 99 + "{% endfor %}"
    refuses(tmp_path / "a", many + many, TALK, "more than 16777216 characters")
    refuses(tmp_path / "b", "{{ 'x' * 999999999 }}", TALK, "more than 16777216 characters")
    refuses(tmp_path / "c", "{{ 9 ** 99 }}", TALK, "exponent")
    refuses(tmp_path / "d", "{% for i in range(1000000) %}{% endfor %}", TALK, "Range too big")
    refuses(tmp_path / "e", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", TALK, "recursion")
    squares = "{% set ns = namespace(x=3) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}"
    refuses(tmp_path / "f", squares, TALK, "an integer has more than 16384 bits")
    refuses(tmp_path / "g", "{{ (2 ** 64) ** 64 ** 9 }}", TALK, "an integer has more than")
    monkeypatch.setattr(data.sandbox, "MAX_SECONDS", 0.1)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    calls = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}"
    for name, endless in (("h", loops), ("i", calls)):
        refuses(tmp_path / name, endless, TALK, "works for more than 0.1 s")


@pytest.mark.parametrize("template", ["{% break %}", "{% continue %}", "{{ '\0' }}" + "{% if x %}" * 200, "{{ " + "(" * 5000])
def test_what_only_python_refuses_is_not_jinja_either(tmp_path, template):
    with pytest.raises(ModelError, match="not valid jinja"):
        chat_for(tmp_path, template)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].content.__class__.__init__.__globals__ }}",
        "{{ messages[0].content.strip.__func__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ lipsum(100) }}",
    ],
)
def test_the_sandbox_holds(tmp_path, attack):
    chat = chat_for(tmp_path, attack)
    try:
        text = chat.spans(TALK, None, [False] * 4)[0]
    except BadRecord:
        return
    assert text == ""  # an unsafe attribute is undefined, which prints as nothing


def test_no_template_and_no_jinja(tmp_path):
    with pytest.raises(ModelError, match=r"has no chat template; set data.template"):
        chat_for(tmp_path / "a", None)
    with pytest.raises(ModelError, match="the chat template is not valid jinja: line 2: "):
        chat_for(tmp_path / "b", "a\n{% if %}")
    tokenizer = tokenizer_for(tmp_path / "c")
    with pytest.raises(DataError, match=r"none.jinja: the chat template cannot be read: No such file"):
        Chat(tokenizer, tmp_path / "none.jinja")
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{{ word }}{% endfor %}", encoding="utf-8")
    chat = Chat(tokenizer, own, {"word": "!"})
    assert shown(chat, TALK[:2]) == "<|im_start|>Hi<|im_end|>!<|im_start|>⟦Hello!<|im_end|>⟧!"


def test_named_templates(tmp_path):
    named = [
        {"name": "default", "template": TEMPLATES["chatml"]},
        {"name": "tool_use", "template": "{{ tools | tojson }}" + TEMPLATES["chatml"]},
    ]
    write_tokenizer(tmp_path, chat_template=named)
    from data.tokenizer import Tokenizer

    chat = Chat(Tokenizer.load(tmp_path))
    assert chat.render(TALK) == EXPECTED["chatml"].replace("⟦", "").replace("⟧", "")
    assert chat.render(TALK, [{"name": "f"}]).startswith('[{"name": "f"}]<|im_start|>')
    assert chat.render(TALK, []).startswith("[]<|im_start|>")


# ----------------------------------------------------------------------------------------------------------------- fuzzing

PIECES = [
    *("<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "<|eot_id|>", "</s>", "<s>", "[INST]", "[/INST]", " [/INST]"),
    *("<start_of_turn>model\n", "<end_of_turn>", "<end_of_turn>\n", "{{ x }}", "{% raw %}", "⟦", "<think>", "\ue000", "\ufdd0"),
    *(
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "\u2028",
        "\u00a0",
        "\r\n",
        "é",
        "e\u0301",
        "東京",
        "😀",
        "👨‍👩‍👧",
        "\u200b",
        "\x00",
        "a",
        "word",
        " word",
        "1",
        "123",
        '"',
    ),
]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 8)))


def by_hand(name: str, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """What templates write and what is trained of it, built without jinja."""
    text, spans = "<s>" if name != "chatml" else "", []
    for m in messages:
        content = m["content"].strip() if name == "gemma" else m["content"]
        if name == "chatml":
            head, tail, end = f"<|im_start|>{m['role']}\n", "<|im_end|>", "\n"
        elif name == "gemma":
            head, tail, end = f"<start_of_turn>{'model' if m['role'] == 'assistant' else m['role']}\n", "<end_of_turn>", "\n"
        elif m["role"] == "user":
            head, tail, end = "[INST] ", "[/INST]", ""
        else:
            head, content, tail, end = "", " " + content, "</s>", ""
        if m["role"] == "assistant":
            begin = len(text) + len(head)
            spans.append((begin, begin + len(content) + len(tail)))
        text += head + content + tail + end
    return text, spans


@pytest.mark.parametrize("name", ["chatml", "gemma", "mistral"])
def test_random_conversations(tmp_path, name):
    """Contents full of what templates and tokenizers treat specially change nothing about what is trained."""
    chat = chat_for(tmp_path, name)
    rng = random.Random(name)
    trained = 0
    for _ in range(300):
        messages = turns(*(random_text(rng) for _ in range(rng.randint(1, 9))))
        expected = by_hand(name, messages)
        assert chat.spans(messages, None, assistant(messages)) == expected, messages
        trained += len(expected[1])
    assert trained > 300


class CallBlock(Extension):
    """{% generation %} as transformers writes it, a macro that is called: slow, and the reference for what a block may see and change."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller):
        text = caller()
        return Text(text, (*getattr(text, "runs", ()), (0, len(text), GENERATION)))


def test_shortcuts_change_nothing(tmp_path, monkeypatch):
    """Generation blocks as filters, keys of messages without the sandbox, messages of role and content alone."""
    from data.formats.chat import ROLES, _message

    templates = [
        TEMPLATES["generation"],
        TEMPLATES["thinking"],
        "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ loop.index ~ m.content ~ x }}{% endgeneration %}"
        "{{ x }}{% endfor %}",
        "{% macro f(m) %}{% generation %}{{ m.content }}{% endgeneration %}!{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
        "{% for m in messages %}{% generation %}{% for k in [1, 2, 3] %}{% if k == 2 %}{% break %}{% endif %}{{ k }}{% endfor %}"
        "{{ m['content'] }}{{ m.nope }}{% generation %}{{ m.items() | length }}{% endgeneration %}{% endgeneration %}{% endfor %}",
        "{% set g %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endset %}{{ g }}{% set ns = namespace(x=g) %}{{ ns.x }}",
    ]
    fast = [chat_for(tmp_path / str(i), template)._templates["default"] for i, template in enumerate(templates)]
    monkeypatch.setattr(data.sandbox, "_Generation", CallBlock)
    monkeypatch.setattr(data.sandbox.Environment, "getattr", ImmutableSandboxedEnvironment.getattr)
    slow = [chat_for(tmp_path / str(i), template)._templates["default"] for i, template in enumerate(templates)]
    rng = random.Random(0)
    generated = 0
    names = {"role": "from", "content": "value", "weight": "weight"}
    for _ in range(50):
        messages = turns(*(random_text(rng) for _ in range(rng.randint(1, 5))))
        marked = [{"role": m["role"], "content": mark(m["content"], i)} for i, m in enumerate(messages)]
        for ours, reference in zip(fast, slow):
            text, expected = ours.render(marked, None, False), reference.render(marked, None, False)
            assert text == expected and text.runs == expected.runs
            generated += sum(source == GENERATION for _, _, source in text.runs)
        for m in messages:
            given = {"from": m["role"], "value": m["content"]}
            assert _message(given, names, ROLES) == _message(given | {"weight": None}, names, ROLES) == (m, None)
    assert generated > 50


def test_a_generation_block_cannot_be_left(tmp_path):
    for i, leave in enumerate(("{% break %}", "{% for k in [] %}{% else %}{% continue %}{% endfor %}")):
        template = "{% for m in messages %}{% generation %}{{ m.content }}" + leave + "{% endgeneration %}{% endfor %}"
        with pytest.raises(ModelError, match="break and continue cannot leave a generation block"):
            chat_for(tmp_path / str(i), template)


# -------------------------------------------------------------------------------------------------------------------- Text


def test_text_is_the_string_and_knows_its_source():
    a, b = mark("  Héllo  ", 1), mark("wörld", 2)
    rng = random.Random(0)
    plain, text = "", join([])
    for _ in range(500):
        piece = rng.choice([a, b, "-", mark("", 3)])
        text, plain = (text + piece, plain + str.__str__(piece)) if rng.random() < 0.5 else (piece + text, str.__str__(piece) + plain)
        if rng.random() < 0.3:
            i, j = sorted(rng.choices(range(-3, len(plain) + 3), k=2))
            text, plain = text[i:j], plain[i:j]
        if rng.random() < 0.2:
            text, plain = text.strip(), plain.strip()
        assert text == plain and hash(text) == hash(plain)
        for begin, end, source in getattr(text, "runs", ()):
            assert 0 <= begin <= end <= len(plain)
            assert plain[begin:end] in {1: "  Héllo  ", 2: "wörld", 3: ""}[source]
    for whole in (a.lower(), a.replace("l", "LL"), *a.split("l"), a.removeprefix("  "), a[2]):
        assert whole.runs == ((0, len(whole), 1),)
    mixed = a + "-" + b
    assert type(mixed.upper()) is str and mixed.upper() == "  HÉLLO  -WÖRLD"
    assert isinstance(mixed, Text) and mixed.runs == ((0, 9, 1), (10, 15, 2))
