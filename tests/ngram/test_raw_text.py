import numpy as np
import pytest

from hf_crouter.ngram.archive import Archive
from hf_crouter.ngram.raw_text import RawText

from .reference import slow_raw


@pytest.mark.parametrize("seed", range(40))
def test_the_longest_match_is_that_of_the_reference(seed):
    rng = np.random.default_rng(seed)
    kinds = int(rng.choice([2, 3, 6]))
    stop_ids = (0,) if rng.random() < 0.5 else ()
    parts = [rng.integers(0, kinds, int(rng.integers(0, 90))) for _ in range(int(rng.integers(0, 4)))]
    window = rng.integers(0, kinds, int(rng.integers(1, 120)))
    raw, archive = RawText(parts, window), Archive.empty(kinds, stop_ids)
    for end in rng.integers(1, len(window) + 1, 5).tolist():
        suffix = window[max(0, end - 64) : end]
        if rng.random() < 0.3:
            suffix = rng.integers(0, kinds, 20)
        found = raw.match(archive.pattern(suffix, 64), end)
        wanted = slow_raw([*parts, window[:end]], suffix, stop_ids)
        assert (found.length, found.token, found.occurrences) == wanted[:3]
        assert found.share == pytest.approx(wanted[3])
        known = raw.upto(end)
        assert [i for i in known.tolist() if i >= 0] == [int(i) for part in [*parts, window[:end]] for i in part]


def test_no_match_reaches_over_a_seam():
    raw = RawText([np.array([1, 2, 3]), np.array([4, 5])], np.array([6, 7]))
    for end, last in ((2, 3), (1, 5), (2, 7)):
        assert raw.match(np.array([last]), end).length == 0  # each ends its part
    assert raw.match(np.array([4, 3]), 2).length == 1  # 4 alone: 3 stands in the part before
    assert raw.match(np.array([2, 1]), 2).token == 3 and raw.match(np.array([6]), 2).token == 7
    assert raw.match(np.array([6]), 1).length == 0  # what followed is not known yet
    assert raw.match(np.empty(0, np.int64), 2).length == 0
