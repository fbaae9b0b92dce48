"""Instruction, optional input, output: one question and one answer.

With `prompt = "alpaca"` the text is the prompt of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca, the wording
that models and data of this kind share) followed by the output and eos; the output and eos are trained. With
`prompt = "chat"` the record becomes a conversation of two messages in the model's chat template.
"""

from __future__ import annotations

from data.config import DataConfig, SourceConfig
from data.formats import Format, as_object, get
from data.formats import chat as chat_format
from data.sample import BadRecord, Sample
from data.tokenizer import Tokenizer

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def build(cfg: DataConfig, source: SourceConfig, tokenizer: Tokenizer) -> Format:
    names = source.field_names()
    chat = chat_format.template_of(cfg, tokenizer) if source.prompt == "chat" else None

    def convert(record: object) -> Sample:
        record = as_object(record)
        instruction = get(record, names["instruction"], str)
        given = get(record, names["input"], str, required=False, default="")
        output = get(record, names["output"], str)
        if not output.strip():
            raise BadRecord(f"field {names['output']!r} is empty, so there is nothing to learn")
        if chat is not None:
            question = f"{instruction}\n\n{given}" if given else instruction
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
            if source.train_on == "all":
                return Sample(chat.render(messages), None)
            return Sample(*chat.spans(messages, None, [False, True]))
        # Not str.format on the result: an instruction may have braces of its own
        prompt = (ALPACA_INPUT if given else ALPACA).format(instruction=instruction, input=given)
        text = prompt + output
        return Sample(text, None if source.train_on == "all" else [(len(prompt), len(text))], bos=True, eos=True)

    key = ["instruct", names, source.prompt, source.train_on, chat_format.template_key(cfg, chat)]
    return Format(convert, key if chat else [*key, ALPACA, ALPACA_INPUT])
