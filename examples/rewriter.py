"""An assistant of your own for countdown: it exchanges one operator, so that the target is missed.

python launch/train.py --config=examples/countdown.py --config.assistant.kind=examples/rewriter.py:Rewriter
"""

import random
import re


class Rewriter:
    """Writes the negatives of pairs.  The run checks each one: the verifier must find it wrong."""

    def rewrite(self, requests):
        """One wrong solution per request, or None where there is nothing to change."""
        return [self._exchange_operator(request) for request in requests]

    def _exchange_operator(self, request):
        # The seed makes the choice the same in a resumed run.
        rng = random.Random(request.seed)
        places = [match.start() for match in re.finditer(r"[-+*]", request.positive)]
        if not places:
            return None
        place = rng.choice(places)
        others = [sign for sign in "+-*" if sign != request.positive[place]]
        return request.positive[:place] + rng.choice(others) + request.positive[place + 1 :]
