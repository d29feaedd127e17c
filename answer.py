"""The text of an answer as its tokens come, with what may begin a stop string held back.

It knows tokens, text and stop strings; whose answer it is, and what becomes of one that is stopped, is its user's
affair. The one idea: text is shown once nothing that follows can take it away again, so a reader never sees half a
character or the beginning of a stop string.
"""

from collections.abc import Sequence

from tokenizer import Tokenizer


class GrowingText:
    """A stop string ends the text and is not part of it.

    Where the text `continues` its prompt, it keeps the space that it may begin with.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, continues: bool = False) -> None:
        self.stop = stop
        self.stopped = False  # by a stop string; nothing follows
        self.shown = 0  # how many characters `push` has returned
        self.taken = 0  # how many tokens it was given, those after a stop string aside
        self._stream = tokenizer.stream(continues=continues)
        self._pieces: list[str] = []
        self._held = ""  # may begin a stop string

    @property
    def text(self) -> str:
        return "".join(self._pieces) + self._held

    @property
    def length(self) -> int:
        """Characters known so far, those held back among them."""
        return self.shown + len(self._held)

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The text that became certain with these tokens; after the last ones, all that is left."""
        shown = len(self._pieces)
        # One by one: which stop string is complete first must not depend on what comes together.
        for token in token_ids:
            if self.stopped:
                break
            self.taken += 1
            self._grow(self._stream.push(token))
        if last and not self.stopped:
            self._grow(self._stream.finish(), last=True)
        return "".join(self._pieces[shown:])

    def _grow(self, new: str, *, last: bool = False) -> None:
        if self.stop:
            new = self._cut(self._held + new, last=last)
        if new:
            self._pieces.append(new)
            self.shown += len(new)

    def _cut(self, text: str, *, last: bool) -> str:
        """`text` up to a stop string, or up to what may become one, which is held."""
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        certain = len(text) if last else len(text) - max(overlap(text, stop) for stop in self.stop)
        self._held = text[certain:]
        return text[:certain]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0
