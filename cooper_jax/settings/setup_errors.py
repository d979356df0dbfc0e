"""Setup errors: a config, a file or weights that cannot be used.

Every message has the form

    FIELD or FILE: the problem, with the numbers, and the flag that fixes it

`ErrorCollector` collects the messages of several checks, so that all errors of a config are reported at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator


class SetupError(ValueError):
    """Error for a config, a file or weights that cannot be used.

    messages: one for each error; str() joins them by line breaks.
    """

    def __init__(self, *messages: str):
        super().__init__("\n".join(messages))
        self.messages = messages


@contextlib.contextmanager
def setup_errors(what: str) -> Iterator[None]:
    """Context that converts the errors of reading settings and files to a SetupError with one message.

    what: the field, flag or file that is being set up; the message begins with it.

    A SetupError passes unchanged.  Errors of other classes are defects of the program and pass too.
    """
    try:
        yield
    # SetupError is a ValueError, so it must come first.
    except SetupError:
        raise
    except ImportError as error:
        # Messages of transformers have several lines; ours have one.
        text = " ".join(str(error).split())
        raise SetupError(
            f"{what}: a package is missing or broken: {text} (requirements.txt lists all that is needed)"
        ) from error
    # The classes that file systems, parsers and loaders raise for a bad input.
    except (ValueError, OSError) as error:
        raise SetupError(f"{what}: {error}") from error
    except KeyError as error:
        # Its text would be its argument in quotes.
        raise SetupError(f"{what}: {error.args[0] if error.args else 'KeyError'}") from error


@dataclasses.dataclass
class ErrorCollector:
    """The error messages of several checks."""

    messages: list[str] = dataclasses.field(default_factory=list)

    def require(self, ok: bool, message: str) -> None:
        """Add the message unless `ok`."""
        if not ok:
            self.messages.append(message)

    @contextlib.contextmanager
    def collect(self, what: str) -> Iterator[None]:
        """Add the errors of a check instead of raising them; what: as for `setup_errors`."""
        try:
            with setup_errors(what):
                yield
        except SetupError as error:
            self.messages += error.messages

    def raise_if_any(self) -> None:
        """Raise SetupError with all messages that were added, without duplicates."""
        # A dict keeps the order, unlike a set.
        if self.messages:
            raise SetupError(*dict.fromkeys(self.messages))
