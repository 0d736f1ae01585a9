"""Chat templates with the structure of six public model families, and tokenizers like theirs.

Shorter than the originals: tool calls are left out. What decides where an answer stands is kept:
default system prompts, the date, thinking that is taken out of earlier answers, markers that are
plain text or special tokens, spaces before answers, where the system prompt goes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from megatron_longpo.data.text.hf_tokenizer import HuggingFaceTokenizer
from tests import small_tokenizers as small

_CHATML_TURNS = (
    "{%- for message in messages %}"
    "{%- if loop.first and message.role != 'system' %}"
    "{{- '<|im_start|>system\n' + default_system + '<|im_end|>\n' }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN25 = (
    "{%- set default_system = 'You are Qwen, created by Alibaba Cloud. You are a helpful "
    "assistant.' %}" + _CHATML_TURNS
)
SMOLLM2 = (
    "{%- set default_system = 'You are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face' %}" + _CHATML_TURNS
)
QWEN3 = r"""
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
  {%- set index = messages|length - 1 - loop.index0 %}
  {%- if ns.searching and message.role == 'user' and not (
      message.content.startswith('<tool_response>')
      and message.content.endswith('</tool_response>')) %}
    {%- set ns.searching = false %}
    {%- set ns.last_query = index %}
  {%- endif %}
{%- endfor %}
{%- for message in messages %}
  {%- set content = message.content %}
  {%- if message.role == 'assistant' %}
    {%- set thinking = '' %}
    {%- if '</think>' in content %}
      {%- set thinking = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
      {%- set thinking = thinking.lstrip('\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if loop.index0 > ns.last_query and (loop.last or thinking) %}
      {{- '<|im_start|>assistant\n<think>\n' + thinking.strip('\n') + '\n</think>\n\n' }}
      {{- content.lstrip('\n') }}
    {%- else %}
      {{- '<|im_start|>assistant\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
  {%- else %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\n\n</think>\n\n' }}
  {%- endif %}
{%- endif %}
"""
LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA32 = r"""
{{- bos_token }}
{%- if not date_string is defined %}
  {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
  {%- set system_message = messages[0]['content'] | trim %}
  {%- set messages = messages[1:] %}
{%- else %}
  {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{{- 'Cutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + date_string + '\n\n' }}
{{- system_message }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
  {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
_MISTRAL_ORDER = (
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user/assistant') }}{%- endif %}"
)
_MISTRAL_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}"
)
MISTRAL_V02_FIRST = (
    "{{ bos_token }}{% for m in messages %}" + _MISTRAL_ORDER + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token}}{% endif %}"
    "{% endfor %}"
)
"""As v0.1 and v0.2 came out: no system prompt, no space before an answer."""
MISTRAL_V02 = (
    _MISTRAL_SYSTEM + "{{- bos_token }}{%- for m in rest %}" + _MISTRAL_ORDER + ""
    "{%- if m['role'] == 'user' %}"
    "{%- if loop.first and system_message is defined %}"
    "{{- ' [INST] ' + system_message + '\n\n' + m['content'] + ' [/INST]' }}"
    "{%- else %}{{- ' [INST] ' + m['content'] + ' [/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
"""v0.2 of later: the system prompt goes before the first question."""
MISTRAL_V03 = (
    _MISTRAL_SYSTEM + "{{- bos_token }}{%- for m in rest %}" + _MISTRAL_ORDER + ""
    "{%- if m['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + m['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
)
"""v0.3 and Nemo: the system prompt is in the last message, and only if that is the user's."""

R1_DISTILL_STOCK = (
    "{%- set ns = namespace(system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{%- set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<\uff5cAssistant\uff5c>' + content + '<\uff5cend▁of▁sentence\uff5c>' }}"
    "{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"
)
R1_DISTILL = R1_DISTILL_STOCK.replace("<think>\\n", "")
"""As R1's distilled models came out, before the generation prompt opened the thinking."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _CONTRACTIONS
    + r"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,{digits}}}"
    + r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen (one digit) and Llama 3 (three) cut a text into words; line ends stay together."""


def _qwen() -> Any:
    tokenizer = _with_words(tuple(small.CHATML_SPECIAL), eos="<|im_end|>", bos=None, digits=1)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    markup = ("<think>", "</think>", "<tool_response>", "</tool_response>")
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in markup])
    return tokenizer


def _llama3() -> Any:
    special = tuple(small.LLAMA3_SPECIAL)
    return _with_words(special, eos="<|eot_id|>", bos="<|begin_of_text|>", digits=3)


def _r1_distill() -> Any:
    names = ("User", "Assistant", "end▁of▁sentence", "begin▁of▁sentence")
    special = tuple(f"<\uff5c{name}\uff5c>" for name in names)
    tokenizer = _with_words(special, eos=special[2], bos=special[3], digits=3)
    markup = ("<think>", "</think>")
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in markup])
    return tokenizer


def _with_words(special: tuple[str, ...], *, eos: str, bos: str | None, digits: int) -> Any:
    tokenizer = copy.deepcopy(small.byte_level(special, eos, bos))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _smollm2() -> Any:
    tokenizer = copy.deepcopy(small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicTemplate:
    """One family's template and tokenizer."""

    template: str
    make_backend: Callable[[], Any]
    end: str
    """What ends an answer."""
    lead: str = ""
    """White space before an answer that belongs to its first token."""
    has_system: bool = True
    rewrites_history: bool = False
    """Whether earlier turns look otherwise once there is a later one."""

    def tokenizer(self, name: str) -> HuggingFaceTokenizer:
        return HuggingFaceTokenizer(self.backend(), name=name, chat_template=self.template)

    def backend(self) -> Any:
        """The stock tokenizer; padding is the end of turn, as many recipes have it."""
        backend = self.make_backend()
        backend.pad_token = backend.eos_token
        return backend


PUBLIC = {
    "mistral-v0.2-first": PublicTemplate(
        template=MISTRAL_V02_FIRST, make_backend=small.space_prefixing, end="</s>", has_system=False
    ),
    "mistral-v0.2": PublicTemplate(
        template=MISTRAL_V02, make_backend=small.space_prefixing, end="</s>", lead=" "
    ),
    "mistral-v0.3": PublicTemplate(
        template=MISTRAL_V03,
        make_backend=lambda: small.space_prefixing(("[INST]", "[/INST]"), at_start_only=True),
        end="</s>",
        lead=" ",
    ),
    "qwen2.5": PublicTemplate(template=QWEN25, make_backend=_qwen, end="<|im_end|>"),
    "qwen3": PublicTemplate(
        template=QWEN3, make_backend=_qwen, end="<|im_end|>", rewrites_history=True
    ),
    "llama-3": PublicTemplate(template=LLAMA3, make_backend=_llama3, end="<|eot_id|>"),
    "llama-3.2": PublicTemplate(template=LLAMA32, make_backend=_llama3, end="<|eot_id|>"),
    "smollm2": PublicTemplate(template=SMOLLM2, make_backend=_smollm2, end="<|im_end|>"),
    "r1-distill": PublicTemplate(
        template=R1_DISTILL, make_backend=_r1_distill, end="<\uff5cend▁of▁sentence\uff5c>"
    ),
}
