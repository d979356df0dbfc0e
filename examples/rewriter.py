"""An assistant of your own for countdown: it exchanges one digit or operator, so that a step is false.

Not always: 2+2=4 may become 2*2=4.  The run refuses such a rewrite, since the judge finds it correct.

python launch/train.py --config=examples/countdown.py --config.assistant.kind=examples/rewriter.py:Rewriter
"""

import random
import re


class Rewriter:
    """Writes the negatives of pairs.  The run checks each one: the verifier must find it wrong."""

    def rewrite(self, requests):
        """One wrong solution per request, or None where there is nothing to change."""
        return [self._exchange_sign(request) for request in requests]

    def _exchange_sign(self, request):
        # The seed makes the choice the same in a resumed run.
        rng = random.Random(request.seed)
        places = [match.start() for match in re.finditer(r"[-+*1-9]", request.positive)]
        if not places:
            return None
        place = rng.choice(places)
        signs = "123456789" if request.positive[place].isdigit() else "+-*"
        others = [sign for sign in signs if sign != request.positive[place]]
        return request.positive[:place] + rng.choice(others) + request.positive[place + 1 :]
