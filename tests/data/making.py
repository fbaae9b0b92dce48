"""Tiny tokenizers, chat templates of the kinds models have, and data files for the tests of data/."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Pipeline

from data.chat import Chat
from data.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello there, how are you today? I am fine, thank you!",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3\n",
    "Grüße aus Köln, ça va? 東京は日本の首都です。 Привет, мир! 😀🎉 naïve café",
    'user assistant system model {"name": "get_weather", "arguments": {"city": "Paris"}}\n\n\n',
] * 4

# Templates, each of a kind that is in use. BOS / EOS are the tokenizer's; {{ X }} of special tokens is written out.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{- bos_token }}\n"
        "{%- set today = strftime_now('%d %b %Y') %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system = messages[0]['content'] | trim %}\n"
        "    {%- set messages = messages[1:] %}\n"
        "{%- else %}\n"
        "    {%- set system = '' %}\n"
        "{%- endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\n' + 'Today Date: ' + today + '\n\n' + system + '<|eot_id|>' }}\n"
        "{%- for m in messages %}\n"
        "    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}\n"
    ),
    "mistral": (
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
        "{%- else %}{%- set turns = messages %}{%- endif %}"
        "{{- bos_token }}"
        "{%- for m in turns %}"
        "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{- raise_exception('Conversation roles must alternate user/assistant') }}{%- endif %}"
        "{%- if m['role'] == 'user' %}"
        "{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
        "{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}"
        "{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}"
        "{%- endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    ),
    "thinking": (  # reasoning of turns before the last question is dropped; an empty block stands for none in the last turn
        "{%- set ns = namespace(last=-1) %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        "{%- if m.reasoning_content is string %}{%- set r = m.reasoning_content %}{%- set c = m.content %}"
        "{%- elif '</think>' in m.content %}{%- set r = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- set c = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{%- else %}{%- set r = '' %}{%- set c = m.content %}{%- endif %}"
        "{{- '<|im_start|>assistant\n' }}"
        "{%- if loop.index0 > ns.last %}{{- '<think>\n' + r.strip('\n') + '\n</think>\n\n' + c.lstrip('\n') }}"
        "{%- else %}{{- c }}{%- endif %}"
        "{%- if m.tool_calls %}{%- for t in m.tool_calls %}"
        "{{- '\n<tool_call>\n{\"name\": \"' + t.function.name + '\", ' }}"
        "{{- '\"arguments\": ' + (t.function.arguments | tojson) + '}\n</tool_call>' }}"
        "{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "channels": (  # the reply's head is longer than the generation prompt; the last turn ends with another token than earlier ones
        "{% for m in messages %}<|start|>{{ m.role }}"
        "{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "open": (  # no token ends a turn; the next header does
        "[gMASK]{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "plain": (  # no special token at all
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n###\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}
SPECIAL = [
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
    *("<start_of_turn>", "<end_of_turn>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    *("[gMASK]", "<|user|>", "<|assistant|>", "<|system|>"),
]


@cache
def _pipeline(kind: str, bos: bool) -> str:
    """A trained tokenizer as JSON: "bytes" (byte-level BPE, GPT-2's way) or "pieces" (▁ and byte fallback, Llama 2's way)."""
    if kind == "bytes":
        pipeline = Pipeline(models.BPE())
        split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+(?!\S)|\s+"), "isolated")
        pipeline.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        pipeline.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    else:
        pipeline = Pipeline(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        pipeline.decoder = decoders.Sequence(steps)
        tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=tokens, limit_alphabet=60, show_progress=False)
    pipeline.train_from_iterator(CORPUS, trainer)
    pipeline.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    pipeline.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
    )
    if bos:
        pipeline.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", pipeline.token_to_id("<s>"))])
    elif kind == "bytes":
        pipeline.post_processor = processors.ByteLevel(trim_offsets=True)
    return pipeline.to_str()


def write_tokenizer(
    folder: Path,
    template: str | None = None,
    kind: str = "bytes",
    bos: bool = False,
    eos: str = "</s>",
    stop: tuple[str, ...] = (),
    **config,
) -> Path:
    """A tokenizer in a model folder. `stop`: further tokens that generation_config.json names as eos."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _pipeline(kind, bos)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": eos, "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast", **config}
    if template is not None:
        config["chat_template"] = TEMPLATES.get(template, template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if stop:
        ids = [Pipeline.from_str(text).token_to_id(token) for token in (eos, *stop)]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


def tokenizer_for(folder: Path, template: str | None = None, **how) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(folder, template, **how))


def chat_for(folder: Path, template: str, **how) -> Chat:
    return Chat(tokenizer_for(folder, template, **how))


def bracketed(text: str, spans: list[tuple[int, int]]) -> str:
    """The text with ⟦ ⟧ around spans."""
    for begin, end in reversed(spans):
        text = f"{text[:begin]}⟦{text[begin:end]}⟧{text[end:]}"
    return text


def turns(*texts: str, system: str | None = None) -> list[dict]:
    """A conversation that alternates user and assistant."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


def write_jsonl(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
