from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.generation.documents.token_spans import find_token_spans
from tests import small_tokenizers as small
from tools import long_documents


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    folder = tmp_path / "tokenizer"
    small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(small.CHATML)
    return str(folder)


def package(pattern: str) -> object:
    """apt, offering one package with two pages and a copyright file."""

    def run(*command: str, folder: Path | None = None) -> str:
        if command[0] == "apt-cache":
            return (
                "x-doc-9 - old\nx-doc-10 - new\ny-doc - other\n" if "x-doc" in command[-1] else ""
            )
        assert folder is not None
        if command[0] == "apt-get":
            assert command[-1] in ("x-doc-10", "y-doc")
            (folder / "package.deb").write_text("")
            return ""
        pages = folder / "root/usr/share/doc/x-doc-10"
        pages.mkdir(parents=True)
        (pages / "copyright").write_text("Files: *\nLicense: GPL-2+\n\nLicense: GFDL-1.3\n")
        paragraphs = "".join(f"## Part {n}\n\n{'word ' * 300}{n}\n\n" for n in range(9))
        (pages / "long.md").write_text("# Long\n\n" + paragraphs)
        (pages / "short.md").write_text("# Short\n")
        return ""

    return run


def test_corpus(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_documents, "_run", package("x-doc"))
    monkeypatch.setattr(
        long_documents, "PACKAGES", {"x": ("x-doc-[0-9]+", "usr/share/doc/x-doc-*/*.md")}
    )
    modules = long_documents.standard_library_files(10_000, 13_000)[:12]
    monkeypatch.setattr(long_documents, "standard_library_files", lambda *_: modules)
    arguments = ["python-stdlib", "x", "--held-out", "x", "--min-tokens", "3000"]
    arguments = [str(tmp_path / "out"), "--tokenizer", tokenizer, "--sources", *arguments]
    arguments += ["--max-tokens", "5000", "--max-mb", "0.1"]
    lines: list[list[dict[str, object]]] = []
    contents = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["long_documents", *arguments])
        long_documents.main()
        for name in ("documents", "held_out"):
            content = (tmp_path / "out" / f"{name}.jsonl.gz").read_bytes()
            contents.append(content)
            lines.append([json.loads(line) for line in gzip.decompress(content).splitlines()])
    assert contents[:2] == contents[2:]
    documents, held_out = lines[:2]
    assert len(documents) > 3
    assert sum(len(str(d["text"]).encode()) for d in documents) <= 100_000
    assert {(d["source"], d["license"]) for d in documents} == {("python-stdlib", "PSF-2.0")}
    assert [(d["file"], d["license"]) for d in held_out] == [
        (f"x-doc-10-long.md#{n}", "GPL-2+, GFDL-1.3") for n in (1, 2)
    ]
    assert all(3000 <= int(str(d["num_tokens"])) <= 5000 for d in documents + held_out)


def test_short_files_are_joined(tmp_path: Path, tokenizer: str) -> None:
    tokens = load_tokenizer(tokenizer)
    files = {"a": "one " * 40, "b": "two " * 400, "c": "six\n" * 60, "d": "ten " * 10}
    lengths = {name: len(find_token_spans(text, tokens.spans)) for name, text in files.items()}
    least = lengths["a"] + lengths["c"]
    assert lengths["b"] > least > max(lengths["a"], lengths["c"])
    texts = [(f"{name}.txt", name, text) for name, text in files.items()]
    joined = list(long_documents.join_short(texts, tokens, least))
    # The long one as it is; the first and third together; the last one is too short alone.
    assert joined == [texts[1], ("a.txt+1", "a", files["a"] + "\n\n" + files["c"].strip())]


def test_sources_that_are_not_offered(
    tmp_path: Path,
    tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt
    arguments = [str(tmp_path / "out"), "--tokenizer", tokenizer, "--sources", "vim-doc"]
    monkeypatch.setattr(sys, "argv", ["long_documents", *arguments])
    long_documents.main()
    assert capsys.readouterr().err == "vim-doc: not offered here, left out\n"
    assert not list((tmp_path / "out").iterdir())
