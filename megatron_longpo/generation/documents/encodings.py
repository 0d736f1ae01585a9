"""Bytes to text: encodings, binary files and HTML."""

from __future__ import annotations

import codecs
import re

from megatron_longpo.data.progress import Dropped

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE = 1 << 16
"""Bytes or characters that a guess looks at."""

_MOST_CONTROL = 0.01
"""Largest share of control characters in a text."""

_CONTROL = re.compile(r"[\0-\x06\x0e-\x1a\x1c-\x1f\x7f\ufffd]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_HTML_START = re.compile(
    r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype html|html)\b", re.S
)
_HTML_END_TAG = re.compile(r"</(?:a|b|code|div|em|h\d|i|li|p|pre|span|strong|td|tr|ul)>", re.I)
_CHARS_PER_END_TAG = 200


def decode_text(data: bytes, *, encoding: str | None = None) -> str:
    """Decodes a file's bytes.

    Without `encoding` they are UTF-8, or what a byte-order mark says, or what charset-normalizer
    finds in the lines that are not ASCII.

    Raises:
        Dropped: bytes that are no text, or not in `encoding`.
    """
    if encoding is not None:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            raise Dropped(f"file not in {encoding}") from None
    marked = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), None)
    if marked is None and b"\0" in data:
        raise Dropped("binary file")
    try:
        return data.decode(marked or "utf-8")
    except UnicodeDecodeError:
        if marked is not None:
            raise Dropped(f"file not in {marked}, as its byte-order mark says") from None
    found = _guess(data)
    if found is None:
        raise Dropped("file of unknown encoding")
    try:
        return data.decode(found)
    except UnicodeDecodeError:
        raise Dropped("file of unknown encoding") from None


def _guess(data: bytes) -> str | None:
    """Returns the encoding that fits the first lines that are not ASCII."""
    from charset_normalizer import from_bytes

    sample = bytearray()
    for line in re.finditer(rb"[^\n]+", data):
        if not line[0].isascii():
            sample += line[0][: _SAMPLE - len(sample)] + b"\n"
        if len(sample) >= _SAMPLE:
            break
    found = from_bytes(bytes(sample))
    best = found.best()
    if best is None:
        return None
    equal = [m.encoding for m in found if (m.chaos, m.coherence) == (best.chaos, best.coherence)]
    # Of encodings that fit equally well, the most frequent.
    return "cp1252" if "cp1252" in equal else best.encoding


def check_text(text: str) -> None:
    """Raises `Dropped` if a text is empty or binary."""
    if not text.strip():
        raise Dropped("empty document")
    sample = text[:_SAMPLE]
    if len(_CONTROL.findall(sample)) > _MOST_CONTROL * len(sample):
        raise Dropped("binary file")
    if _SURROGATE.search(text):
        raise Dropped("broken text (half of a surrogate pair)")


def is_html(text: str) -> bool:
    """Returns whether a text is a page of HTML: it begins like one, or has many end tags."""
    sample = text[:_SAMPLE]
    if _HTML_START.match(sample.lower()):
        return True
    return len(_HTML_END_TAG.findall(sample)) * _CHARS_PER_END_TAG > max(len(sample), 2000)
