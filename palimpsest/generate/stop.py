"""Where a text ends: at a stop string, however it is cut into pieces."""

from collections.abc import Iterable


class StopScan:
    """Pieces of text in, the text before the first stop string out.

    A piece is held back while its end could be the beginning of a stop string; nothing of a stop string gets out.

    Args:
        stop: the strings that end the text; the first to be complete counts, neither it nor what follows is returned.

    Raises:
        ValueError: a stop string is empty, which every text contains.

    >>> scan = StopScan(["END"])
    >>> scan.push("one E"), scan.push("N two E"), scan.push("ND three"), scan.found
    ('one ', 'EN two ', '', 'END')
    """

    def __init__(self, stop: Iterable[str]):
        self._stop = [stop] if isinstance(stop, str) else list(stop)
        for string in self._stop:
            if not isinstance(string, str) or not string:
                raise ValueError(f"stop contains {string!r}; each stop string must be text of at least one character")
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that can go out now. After a stop string was found it is always empty."""
        if self.found is not None:
            return ""
        text = self._held + piece
        # The first to be complete wins, of two that end together the longer: so the cuts between pieces do not matter.
        hits = [(text.find(s) + len(s), text.find(s), s) for s in self._stop if s in text]
        if hits:
            _, start, self.found = min(hits)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
