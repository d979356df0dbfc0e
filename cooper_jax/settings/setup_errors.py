"""Setup errors: a config, a file or weights that cannot be used.

Every message has one form:

    FIELD or FILE: the problem, with the numbers, and the flag that fixes it

`Problems` collects what several checks find, so that all errors of a config are reported at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator


class SetupError(ValueError):
    """A config, a file or weights that cannot be used; each message names the field and the fix.

    problems: the messages, one for each problem; str() joins them by line breaks.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


@contextlib.contextmanager
def setup_errors(what: str) -> Iterator[None]:
    """Context that turns the errors of reading settings and files into a SetupError with one message.

    what: the field, flag or file that is being set up; the message begins with it.  A SetupError passes as it is.
    """
    try:
        yield
    except SetupError:
        raise
    except ImportError as error:
        text = " ".join(str(error).split())  # transformers' messages have several lines
        raise SetupError(
            f"{what}: a package is missing or broken: {text} (requirements.txt lists all that is needed)"
        ) from error
    except (ValueError, KeyError, OSError) as error:
        raise SetupError(f"{what}: {error}") from error


@dataclasses.dataclass
class Problems:
    """The setup errors that several checks have found so far."""

    found: list[str] = dataclasses.field(default_factory=list)

    def need(self, ok: bool, message: str) -> None:
        """Add the message unless `ok`."""
        if not ok:
            self.found.append(message)

    @contextlib.contextmanager
    def collect(self, what: str) -> Iterator[None]:
        """Add the errors of a check instead of raising them; what: as for `setup_errors`."""
        try:
            with setup_errors(what):
                yield
        except SetupError as error:
            self.found += error.problems

    def raise_if_any(self) -> None:
        """Raise SetupError with everything that was found, each message once."""
        if self.found:
            raise SetupError(*dict.fromkeys(self.found))
