"""The page of `longpo inspect --html` in a headless Chromium, with hostile texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config.inspect import InspectConfig
from megatron_longpo.config.tokenize import TokenizeConfig
from megatron_longpo.data.inspect.run import run_inspect
from megatron_longpo.data.text.tokenize import run_tokenize
from tests import small_tokenizers as small

pytestmark = pytest.mark.browser

HOSTILE = (
    "</script><script>window.forged = 1</script><img src=x onerror='window.forged = 2'>"
    "<!-- {{ data }} {{ title }} & &lt; ]]> \u2028 \x1b[31m"
)
CHUNK = "Twelve barrels were landed, and none of them was paid for."


def example(number: int) -> dict[str, Any]:
    document = f"Document {number}. {HOSTILE}\n" + "Nothing. " * 120 + CHUNK + " Nothing." * 120
    turn = {"question": f"How many, {number}?", "chosen": f"Twelve {number}.", "rejected": HOSTILE}
    return {"id": f"doc-{number}", "document": document, "turns": [{"chunk": CHUNK, **turn}]}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    model = folder / "model"
    small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>").save_pretrained(model)
    (model / "chat_template.jinja").write_text(small.CHATML)
    examples = folder / "e.jsonl"
    examples.write_text("".join(json.dumps(example(number)) + "\n" for number in range(5)))
    rows = str(folder / "rows.jsonl")
    run_tokenize(TokenizeConfig(examples=str(examples), output=rows, tokenizer=str(model)))
    made = {"rows": folder / "rows.html", "examples": folder / "examples.html"}
    run_inspect(InspectConfig(rows=rows, tokenizer=str(model), html=str(made["rows"])))
    run_inspect(InspectConfig(rows=str(examples), row=2, html=str(made["examples"])))
    return made


@pytest.fixture
def page(browser: Any) -> Any:
    """A page that fails the test where it logs an error or asks for anything from outside."""
    opened = browser.new_page(color_scheme="light", viewport={"width": 1100, "height": 900})
    faults: list[str] = []
    opened.on("console", lambda message: message.type == "error" and faults.append(message.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on(
        "request",
        lambda request: request.url.startswith(("file:", "data:")) or faults.append(request.url),
    )
    yield opened
    opened.close()
    assert faults == []


@pytest.mark.parametrize("kind", ["rows", "examples"])
def test_samples_can_be_picked(kind: str, pages: dict[str, Path], page: Any) -> None:
    page.goto(pages[kind].as_uri())
    first = 0 if kind == "rows" else 2
    sample = page.locator("#sample")
    assert sample.locator("h2").inner_text() == f"id doc-{first}"
    page.select_option("#picker", index=3)
    assert sample.locator("h2").inner_text() == "id doc-3"
    assert "Twelve 3." in sample.inner_text()
    page.click("#next")
    assert sample.locator("h2").inner_text() == "id doc-4"
    assert page.locator("#next").is_disabled()
    page.click("#previous")
    assert "How many, 3?" in sample.inner_text()


@pytest.mark.parametrize("kind", ["rows", "examples"])
def test_hostile_text_is_text(kind: str, pages: dict[str, Path], page: Any) -> None:
    page.goto(pages[kind].as_uri())
    shown = page.locator("#sample").text_content()
    for part in ("</script><script>window.forged = 1</script>", "{{ data }} {{ title }} & &lt;"):
        assert part in shown
    assert page.evaluate("window.forged") is None
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("kind", ["rows", "examples"])
def test_long_texts_unfold_and_marks_are_there(
    kind: str, pages: dict[str, Path], page: Any
) -> None:
    page.goto(pages[kind].as_uri())
    document = page.locator("#sample .segment").first
    assert document.locator("mark.chunk").inner_text() == CHUNK
    answers = page.locator("#sample mark.answer").all_inner_texts()
    assert any("Twelve" in text for text in answers)
    folds = document.locator("button.fold")
    before, length = folds.count(), len(document.inner_text())
    assert before >= 1
    folds.first.click()
    assert folds.count() == before - 1 and len(document.inner_text()) > length


def test_statistics_and_theme(pages: dict[str, Path], page: Any) -> None:
    page.goto(pages["rows"].as_uri())
    assert page.locator("#read").inner_text() == "5 of 5 rows"
    cards = page.locator(".card")
    assert cards.count() == 7 and cards.locator("svg rect").count() == 7 * 24
    notes = page.locator("#notes").inner_text()
    assert "sharing the prefix saves" in notes and "duplicates: none" in notes
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) != light
    page.emulate_media(color_scheme="dark")
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == "dark"
