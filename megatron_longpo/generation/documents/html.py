"""HTML to Markdown, so that headings and code keep their marks."""

from __future__ import annotations

import re

from megatron_longpo.data.progress import Dropped
from megatron_longpo.errors import UserError

_NO_TEXT = re.compile(r"<\?xml.*?>|<(script|style|nav|head)\b.*?</\1\s*>", re.S | re.I)


def require_markdownify() -> None:
    """Raises `UserError` if the library is missing."""
    try:
        import markdownify  # noqa: F401
    except ImportError as error:
        raise UserError(
            "html (extract): needs markdownify; pip install 'megatron_longpo[html]', "
            "or set html: drop"
        ) from error


def html_to_markdown(page: str) -> str:
    """Converts a page to Markdown, without links, pictures and menus."""
    require_markdownify()
    from markdownify import ATX, markdownify

    try:
        text = markdownify(
            _NO_TEXT.sub("", page),
            heading_style=ATX,
            strip=["a", "img"],
            escape_misc=False,
            escape_underscores=False,
            escape_asterisks=False,
        )
    except RecursionError:
        raise Dropped("HTML page nested too deep") from None
    lines = (line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
