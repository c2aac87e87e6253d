"""Strangers' text made fit for a terminal, a log line or an error message."""


def printable(text: str) -> str:
    """Escape what is not printable: no line can be forged, no terminal told anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fit(text: str, limit: int) -> str:
    """Return `text` printable and at most `limit` bytes of UTF-8 long, an ellipsis in place of what was cut."""
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text
    # Cut before escaping too: the text may be megabytes long.
    shown = printable(text[: limit + 1]).encode()
    return shown.decode() if len(shown) <= limit else shown[: limit - 3].decode(errors="ignore") + "…"
