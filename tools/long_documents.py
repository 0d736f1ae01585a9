"""Makes a corpus of long real documents out of what a Debian or Python installation offers.

    python -m tools.long_documents outputs/corpus --tokenizer models/smollm2 [--held-out git-doc]

Sources are Python's own standard library and documentation packages of Debian, which are downloaded
and unpacked into a temporary folder, without root and without being installed; where there is no
apt, the standard library alone is used. Documents over --max-tokens are divided at their sections;
with --join, files under --min-tokens are put together first, as chapters of a manual are in a book.

Writes documents.jsonl.gz, and held_out.jsonl.gz with the documents of the held-out sources, to be
read by `longpo generate --documents`. Every line has `text`, `source`, `file`, `license` and
`num_tokens`. The texts have their own licences and are no part of this project: keep them local.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

from megatron_longpo.data.jsonl import write_packed_jsonl
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.generation.documents.chunking import chunk_document
from megatron_longpo.generation.documents.kinds import find_kind
from megatron_longpo.generation.documents.reading import DocumentSet
from megatron_longpo.generation.documents.token_spans import find_token_spans
from tools.standard_library import standard_library_files

STANDARD_LIBRARY = "python-stdlib"
PACKAGES = {
    # Source: package names as a pattern, files within the newest such package.
    "anarchism": (r"anarchism", "usr/share/doc/anarchism/markdown/*"),
    "debian-policy": (r"debian-policy", "usr/share/doc/debian-policy/**/_sources/*"),
    "developers-reference": (r"developers-reference", "usr/share/developers-reference/_sources/*"),
    "git-doc": (r"git-doc", "usr/share/doc/git-doc/**/*.txt"),
    "postgresql-doc": (r"postgresql-doc-[0-9]+", "usr/share/doc/postgresql-doc-*/html/*.html"),
    "python-doc": (r"python3\.[0-9]+-doc", "usr/share/doc/python3.*[0-9]/html/_sources/**/*.txt"),
    "r-doc": (r"r-doc-html", "usr/share/R/doc/manual/*.html"),
    "vim-doc": (r"vim-doc", "usr/share/doc/vim/html/*.html"),
}
APT_SECONDS = 300
LEAST_JOINED_BYTES = 2048
"""Smaller files are mostly tables of contents and stubs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongDocument:
    """A line of the corpus."""

    text: str
    source: str
    file: str
    license: str
    num_tokens: int


def copy_standard_library(folder: Path, min_bytes: int) -> str:
    """Copies its modules, and returns their licence."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in standard_library_files(min_bytes, sys.maxsize):
        shutil.copy(path, folder / "-".join(path.relative_to(library).parts))
    return "PSF-2.0"


def unpack_package(source: str, folder: Path, min_bytes: int) -> str | None:
    """Copies a package's files, and returns the licences it names; None where it is not offered."""
    pattern, files = PACKAGES[source]
    found = _run("apt-cache", "search", "--names-only", f"^{pattern}$").split("\n")
    names = sorted((line.split(" ")[0] for line in found if line), key=_version)
    with tempfile.TemporaryDirectory() as temporary:
        if not names or not _download(names[-1], Path(temporary)):
            return None
        root = Path(temporary, "root")
        for path in sorted(root.glob(files)):
            # A token is at least a byte, so smaller files are too short.
            if path.is_file() and (path.suffix == ".gz" or path.stat().st_size >= min_bytes):
                shutil.copy(path, folder / "-".join(path.relative_to(root).parts[3:]))
        copyright_file = root / "usr/share/doc" / names[-1] / "copyright"
        text = copyright_file.read_text("utf-8", "replace") if copyright_file.exists() else ""
    # Debian's machine-readable form; other files speak in sentences.
    named = dict.fromkeys(
        re.findall(r"^License: *([\w.+-]+(?: (?:and|or) [\w.+-]+)*)$", text, re.M)
    )
    return ", ".join(named) or f"see the copyright file of {names[-1]}"


def _version(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _download(package: str, folder: Path) -> bool:
    _run("apt-get", "download", package, folder=folder)
    archives = list(folder.glob("*.deb"))
    if archives:
        _run("dpkg-deb", "-x", str(archives[0]), "root", folder=folder)
    return (folder / "root").is_dir()


def _run(*command: str, folder: Path | None = None) -> str:
    """What a command prints; nothing where it fails."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=APT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def long_documents(
    source: str, tokenizer: ChatTokenizer, min_tokens: int, max_tokens: int, *, join: bool
) -> Iterator[LongDocument]:
    """The documents of a source that are long enough, in parts where they are too long."""
    min_bytes = LEAST_JOINED_BYTES if join else min_tokens
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if source == STANDARD_LIBRARY:
            license_name: str | None = copy_standard_library(folder, min_bytes)
        else:
            license_name = unpack_package(source, folder, min_bytes)
        if license_name is None or not any(folder.iterdir()):
            print(f"{source}: not offered here, left out", file=sys.stderr)
            return
        documents = DocumentSet(str(folder), html="extract", near_duplicates=0.8)
        texts = (
            (Path(document.source).name, document.name.removesuffix(".txt"), document.text)
            for document in documents
        )
        for file, name, text in join_short(texts, tokenizer, min_tokens) if join else texts:
            parts = chunk_document(
                text,
                tokens=find_token_spans(text, tokenizer.spans),
                kind=find_kind(text, name),
                min_tokens=min_tokens,
                max_tokens=max_tokens,
            )
            for number, part in enumerate(parts, start=1):
                yield LongDocument(
                    text=part.text,
                    source=source,
                    file=file if len(parts) == 1 else f"{file}#{number}",
                    license=license_name,
                    num_tokens=part.num_tokens,
                )
        for reason, count in documents.dropped.items():
            print(f"{source}: {count} x {reason}, for one {documents.first_dropped[reason]}")


def join_short(
    texts: Iterable[tuple[str, str, str]], tokenizer: ChatTokenizer, min_tokens: int
) -> Iterator[tuple[str, str, str]]:
    """Files (file, name, text) as they are where they are long enough; else joined with those that
    follow until they are, under the first one's names. What is left at the end is dropped."""
    waiting: list[tuple[str, str, str]] = []
    num_tokens = 0
    for item in texts:
        length = len(find_token_spans(item[2], tokenizer.spans))
        if length >= min_tokens:
            yield item
            continue
        waiting.append(item)
        num_tokens += length
        if num_tokens >= min_tokens:
            file, name, _ = waiting[0]
            joined = "\n\n".join(text.strip("\n") for *_, text in waiting)
            yield f"{file}+{len(waiting) - 1}", name, joined
            waiting, num_tokens = [], 0


def choose(by_source: dict[str, list[LongDocument]], max_bytes: int) -> Iterator[LongDocument]:
    """Documents of all sources in turn, as far as the bound allows."""
    total = 0
    for documents in zip_longest(*by_source.values()):
        for document in documents:
            if document is not None and total + len(document.text.encode()) <= max_bytes:
                total += len(document.text.encode())
                yield document


def write_corpus(path: Path, documents: list[LongDocument]) -> None:
    """Writes a file that is there when it is whole; the same documents give the same bytes."""
    write_packed_jsonl(path, map(asdict, documents))
    sources = Counter(document.source for document in documents)
    print(f"{path}: {len(documents)} documents, {path.stat().st_size / 1e6:.1f} MB")
    print("  by source: " + ", ".join(f"{name} {number}" for name, number in sources.items()))
    edges = [0, *(1 << power for power in range(12, 18))]
    for low, high in zip(edges, [*edges[1:], sys.maxsize], strict=True):
        number = sum(low <= document.num_tokens < high for document in documents)
        if number:
            print(f"  from {low:>6} tokens: {number}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="a folder outside the repository's files")
    parser.add_argument("--tokenizer", required=True, help="what tokens are counted with")
    parser.add_argument("--min-tokens", type=int, default=8192)
    parser.add_argument("--max-tokens", type=int, default=65536)
    parser.add_argument("--join", action="store_true", help="put files under --min-tokens together")
    parser.add_argument("--max-mb", type=float, default=60.0, help="most MB of text in each file")
    names = [STANDARD_LIBRARY, *PACKAGES]
    parser.add_argument("--sources", nargs="+", choices=names, default=names, metavar="SOURCE")
    parser.add_argument("--held-out", nargs="*", choices=names, default=[], metavar="SOURCE")
    arguments = parser.parse_args()
    try:
        tokenizer = load_tokenizer(arguments.tokenizer)
        found = {
            source: list(
                long_documents(
                    source,
                    tokenizer,
                    arguments.min_tokens,
                    arguments.max_tokens,
                    join=arguments.join,
                )
            )
            for source in arguments.sources
        }
    except UserError as error:
        sys.exit(f"error: {error}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, is_held_out in (("documents", False), ("held_out", True)):
        chosen = {s: d for s, d in found.items() if (s in arguments.held_out) == is_held_out}
        if any(chosen.values()):
            documents = list(choose(chosen, int(arguments.max_mb * 1e6)))
            write_corpus(arguments.output / f"{name}.jsonl.gz", documents)


if __name__ == "__main__":
    main()
