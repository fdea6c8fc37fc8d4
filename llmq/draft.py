"""Prompt lookup: where a text repeats itself, what followed the first time is a guess at what follows now.

No second model: a reply that edits, quotes or sums up its prompt copies runs of tokens from it (Saxena, "Prompt Lookup
Decoding", 2023, apoorvumang/prompt-lookup-decoding on GitHub). The model then judges all guessed tokens in one batch.
"""

N_GRAMS = 3, 2, 1  # longer ones find hardly more: a copy that has begun goes on without them
SHORT, LONG = 3, 7  # with the token before them batches of 4 and 8 rows: the engine takes rows by fours


class Lookup:
    """Guesses the next tokens of a growing text; each token costs a few dictionary accesses, however long the text is.

    A guess goes on copying where the text has agreed with an earlier part of itself so far. Where it has not, or for
    fewer than three tokens, it copies from the latest place where the last three tokens stood, or the last two, or the
    last one if that has stood only once.
    """

    def __init__(self, ids: list[int]) -> None:
        """`ids`: the text, to which the caller appends."""
        self._ids = ids
        self._known = 0  # how many of them have been looked at
        # n-gram: the position after its latest earlier occurrence, or None for a single token that has had several
        self._after: dict[tuple[int, ...], int | None] = {}
        self._source = 0  # where the next token is copied from
        self._agreed = 0  # how many tokens before `_source` are those at the end

    def draft(self, limit: int) -> list[int]:
        """Up to `limit` tokens that may follow; none where nothing fits.

        A short draft first, and also after a wrong guess; a long one where more has agreed than a short one holds. For
        a batch takes longer with more rows, and the longer two parts have been the same, the longer they stay so.
        """
        while self._known < len(self._ids):
            self._look_at(self._known)
        if self._agreed == 0:
            return []
        n = min(LONG if self._agreed > SHORT else SHORT, limit)
        period = len(self._ids) - self._source  # a copy may run into itself
        return [self._ids[self._source + i % period] for i in range(n)]

    def _look_at(self, at: int) -> None:
        ids = self._ids
        agrees = self._agreed > 0 and ids[self._source] == ids[at]
        self._source, self._agreed = (self._source + 1, self._agreed + 1) if agrees else (0, 0)
        for n in N_GRAMS:
            if n <= at:
                gram = tuple(ids[at - n : at])
                self._after[gram] = None if n == 1 and gram in self._after else at
        self._known = end = at + 1
        for n in N_GRAMS:
            if self._agreed < n <= end and (source := self._after.get(tuple(ids[end - n : end]))) is not None:
                self._source, self._agreed = source, n
