"""The tokens that end a turn, found from the end of its text."""

from collections.abc import Iterable


class EndTokens:
    """Tokens that may end a turn. A search from the end takes as long for a long answer as for a short one."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = frozenset(tokens) - {""}
        self._lengths = sorted({len(token) for token in self._tokens}, reverse=True)

    def find(self, said: str, after: int = 0) -> tuple[int, int] | None:
        """Return where the tokens that end a text start, and where the first run of them stops; None without any.

        White space may stand between the tokens and behind them; none of it is in a run. after: where to look from.
        """
        found: tuple[int, int] | None = None
        place = len(said)
        while True:
            stop = after + len(said[after:place].rstrip())
            sizes = (
                size for size in self._lengths if stop - size >= after and said[stop - size : stop] in self._tokens
            )
            if not (size := next(sizes, 0)):
                return found
            found = (stop - size, found[1] if found is not None and stop == place else stop)
            place = stop - size
