"""The text of a reply that grows: what may be sent already, and where a stop text ends it.

Tokens do not end where characters do, and a stop text may begin in one piece and end in the next.  `ReplyText`
keeps back the end of the text that may still change: U+FFFD, which stands for a part of a character, and the
beginning of a stop text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_PARTIAL = "\ufffd"  # what a part of a character decodes to


class ReplyText:
    """The text of one reply."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), in_pieces: bool = True
    ):
        """Begin an empty reply.

        Args:
          decode: token ids -> text.
          stops: texts before the first of which the reply ends.
          in_pieces: False: nobody reads the text before the end, so that it is decoded once, if nothing stops it.
        """
        self._decode, self._stops = decode, stops
        self._decodes_pieces = in_pieces or bool(stops)
        self._tokens: list[int] = []
        self._sent = 0  # characters

        self.text = ""  # all of it, as far as it is known to stay
        self.stopped = False  # a stop text was found
        self.num_tokens = 0  # tokens of the reply: those up to the stop text's end, and the EOS

    def add(self, tokens: Sequence[int], is_last: bool, ends_with_eos: bool = False) -> str:
        """Add tokens; returns the text that may be sent now.

        is_last: no more tokens follow.  ends_with_eos: the last token is an EOS, which is no part of the text.
        """
        before = len(self._tokens)
        self._tokens += tokens[:-1] if ends_with_eos else tokens
        self.num_tokens += len(tokens)
        if not is_last and not self._decodes_pieces:
            return ""
        text = self._decode(self._tokens)
        cut = self._find_stop(text)
        if cut is not None:
            self.stopped = True
            self.num_tokens = self._count_until_stop(before)
            self.text = text[:cut]
        elif is_last:
            self.text = text
        else:
            self.text = text[: self._count_certain(text)]
        piece = self.text[self._sent :]
        self._sent = max(self._sent, len(self.text))
        return piece

    def _find_stop(self, text: str) -> int | None:
        """The position of the first stop text; None if there is none."""
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        return min(found) if found else None

    def _count_until_stop(self, before: int) -> int:
        """Count the tokens up to that which completes a stop text; it is not among the first `before`."""
        for count in range(before + 1, len(self._tokens)):
            if self._find_stop(self._decode(self._tokens[:count])) is not None:
                return count
        return len(self._tokens)

    def _count_certain(self, text: str) -> int:
        """Count the characters that no further token changes and that begin no stop text."""
        certain = len(text.rstrip(_PARTIAL))
        kept_back = 0
        for stop in self._stops:
            # The longest beginning of the stop text with which the text ends.
            for length in range(min(len(stop) - 1, certain), kept_back, -1):
                if text.endswith(stop[:length], 0, certain):
                    kept_back = length
                    break
        return certain - kept_back
