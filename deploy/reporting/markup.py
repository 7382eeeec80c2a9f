"""Markup that escapes by construction: a plain string can only become text, never a tag."""

import unicodedata
from collections.abc import Iterable
from html import escape

_VOID = frozenset({"meta", "br", "rect", "line", "circle", "path"})


class Markup(str):
    """A string that is already markup."""

    __slots__ = ()


Child = str | Iterable[str | None] | None


def el(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """`<name ...>children</name>`; `class_` and `data_label` become `class` and `data-label`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(clean(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID and not children:
        return Markup(f"<{name}{written}/>" if name not in ("meta", "br") else f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Children one after another: markup as it is, plain strings escaped, None left out."""
    return Markup("".join(_one(child) for child in children))


def _one(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return str(child)
    if isinstance(child, str):
        return escape(clean(child))
    return join(*child)


def clean(text: str) -> str:
    """`text` in one line, without control characters and direction overrides, which could disguise a name."""
    return "".join(mark if _harmless(mark) else "\ufffd" for mark in " ".join(text.splitlines()))


def _harmless(mark: str) -> bool:
    # Joiners shape emoji and several scripts; other formatting marks can reorder what is read.
    return mark.isprintable() or mark in "\t\u200c\u200d" or unicodedata.category(mark) == "Zs"
