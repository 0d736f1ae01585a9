"""Where messages stand, told by marks and by probes: both must agree, whatever texts hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.data.text import renderings
from megatron_longpo.data.text.chat_tokenizer import Message
from megatron_longpo.data.text.renderings import Renderings, TemplateChangesText
from tests.public_templates import PUBLIC

TOKENIZERS = {name: PUBLIC[name].tokenizer(name) for name in PUBLIC}
FRAGMENTS = (
    *("[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "</s>", "<think>", "</think>"),
    *(
        "<tool_response>",
        "</tool_response>",
        "\ue0000\ue001",
        "x",
        "y",
        "\u00e9",
        "user",
        ".",
        " ",
        "\n",
    ),
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map(lambda parts: f"A{''.join(parts)}B")


def conversation(texts: list[str]) -> list[Message]:
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@pytest.mark.parametrize("name", PUBLIC)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_marks_and_probes_agree(name: str, texts: list[str]) -> None:
    rendered = Renderings(TOKENIZERS[name], conversation(texts))
    for upto in range(1, len(texts) + 1):
        generation_prompt = upto % 2 == 1
        text = rendered.text(upto, generation_prompt=generation_prompt)
        by_marks = rendered._spans_by_marks(upto, generation_prompt)
        for index in range(upto):
            try:
                span = rendered._span_by_probes(index, upto, generation_prompt)
            except TemplateChangesText:
                continue
            assert text[span[0] : span[1]] == texts[index]
            assert by_marks.get(index, span) == span
            assert rendered.span(index, upto=upto, generation_prompt=generation_prompt) == span


@pytest.mark.parametrize("name", PUBLIC)
def test_plain_texts_need_no_probes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderings, "_PROBES", ())
    rendered = Renderings(TOKENIZERS[name], conversation(["What?", "x", "And?"]))
    text = rendered.text(3, generation_prompt=True)
    starts = []
    for index, content in enumerate(["What?", "x", "And?"]):
        start, end = rendered.span(index, upto=3, generation_prompt=True)
        assert text[start:end] == content
        starts.append(start)
    assert starts == sorted(starts)


def test_text_that_a_template_goes_by_is_found_by_probes() -> None:
    """Qwen3 takes the question for a tool's answer, and leaves its own thinking out elsewhere."""
    messages = conversation(["What?", "Seven.", "<tool_response>7</tool_response>"])
    rendered = Renderings(TOKENIZERS["qwen3"], messages)
    start, end = rendered.span(0, upto=3, generation_prompt=True)
    assert rendered.text(3, generation_prompt=True)[start:end] == "What?"
