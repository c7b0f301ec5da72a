"""A whole page: one HTML file with everything in it, that loads nothing and runs one known script.

The content security policy names that script by its hash, so markup that slipped through all
escaping would still not run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from feedback.page.components import Section, environment

__all__ = ["render_page"]

_FOLDER = Path(__file__).parent / "templates"


def render_page(
    *,
    title: str,
    sections: Sequence[Section],
    kicker: str = "",
    subtitle: str = "",
    facts: Sequence[tuple[str, str]] = (),
    footer: str = "",
) -> str:
    """Return the page as text.

    Args:
        title: heading and window title.
        sections: the body, in order.
        kicker: small line above the title.
        subtitle: one sentence under it.
        facts: name and value pairs: what was measured, when, from which files.
        footer: last line.
    """
    script = (_FOLDER / "browser.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            title=title,
            sections=sections,
            kicker=kicker,
            subtitle=subtitle,
            facts=facts,
            footer=footer,
            css=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=Markup(f"'sha256-{digest}'"),
        )
    )
