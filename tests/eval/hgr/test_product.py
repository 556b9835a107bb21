"""What is measured is the product: every arm against `CompressedHistory.score` on the same text.

Arms that no modes make (a window longer by tokens that are no whole chunk, soft prompts of another text) are held
against the plain host, and against the package's own mixture.
"""

import numpy as np
import pytest
import torch

from eval.hgr.arms import ARMS, GREEDY, archive_of
from hf_crouter import CompressedHistory, Copy, Retrieve, SoftPrompts
from hf_crouter.ngram.archive import Archive
from hf_crouter.ngram.mixture import collect, mix

from ...tiny import VOCAB
from .tiny_rows import COUNTS, LAYOUT, make_gates, make_reader

NEVER = 1 << 30  # tokens: an arm chooses its chunks once, at the window's end
READINGS = {
    key: (name, archive, gate) for name, arm in ARMS.items() for key, archive, gate in [(name, "", ""), *arm.readings]
}
MADE = [key for key, (name, _, gate) in READINGS.items()
        if ARMS[name].soft in ("", "own") and not ARMS[name].longer and gate != "nine_weights"]  # fmt: skip
LONGER = [key for key, (name, archive, _) in READINGS.items() if ARMS[name].longer and archive]


def modes_of(key, reader, gates):
    """The modes that an arm is, from what its definition says."""
    name, archive, gate = READINGS[key]
    arm, modes = ARMS[name], []
    if arm.soft:
        modes.append(SoftPrompts(reader.projector))
    if arm.retrieve:
        modes.append(Retrieve(LAYOUT.retrieved, every=NEVER, scorer=reader.scorers[arm.retrieve]))
    if archive:
        modes.append(Copy("ids" if archive == "past" else archive, gate=gates[gate]))
    return modes


def rows_of(rows, count):
    """Rows `[D, T]` without their oldest chunks."""
    rows = torch.from_numpy(rows.astype(np.int64))
    return torch.cat([rows[:, : LAYOUT.prefix], rows[:, LAYOUT.old - count * LAYOUT.chunk :]], dim=1)


def score(reader, modes, rows):
    """Losses `[D]`, shares of greedy hits `[D]` and slots of a history."""
    history = CompressedHistory(reader.host, reader.crouter, modes=modes, window=LAYOUT.window, keep_first=4)
    try:
        losses, greedy = history.score(rows, last=LAYOUT.target, greedy=True)
        slots = history.report(measure=False).peak_slots
    finally:
        history.detach()
    return -losses.mean(1).numpy(), greedy.float().mean(1).numpy(), slots


@pytest.mark.parametrize("key", MADE)
def test_an_arm_is_what_the_history_scores(measured, key):
    reader, rows, found = measured
    arm = ARMS[READINGS[key][0]]
    for count in COUNTS:
        if not arm.exists(LAYOUT, count):
            continue
        losses, greedy, slots = score(reader, modes_of(key, reader, make_gates()), rows_of(rows, count))
        np.testing.assert_allclose(found[f"n{count}.{key}"], losses, atol=1e-4)
        assert slots == arm.slots(LAYOUT, count) + LAYOUT.target - 1
        if key in GREEDY and f"n{count}.{key}.right" in found:
            np.testing.assert_allclose(found[f"n{count}.{key}.right"], greedy)
    if key != "window":  # the test would notice
        without = READINGS[key][0] if READINGS[key][1] else "window"
        assert not np.allclose(found[f"n4.{key}"], found[f"n4.{without}"], atol=1e-3)


def test_the_plain_name_retrieves_by_the_default_scorer():
    default = Retrieve(LAYOUT.retrieved).bind(None).retriever
    assert type(make_reader().scorers[ARMS["retrieve2"].retrieve]) is type(default.scorer)


def test_full_history_is_a_history_that_compresses_nothing(measured):
    reader, rows, found = measured
    for count in COUNTS:
        history = CompressedHistory(reader.host, reader.crouter, modes=[], window=LAYOUT.length)
        losses = -history.score(rows_of(rows, count), last=LAYOUT.target).mean(1).numpy()
        history.detach()
        np.testing.assert_allclose(found[f"n{count}.full"], losses, atol=1e-4)


@pytest.mark.parametrize("key", LONGER)
def test_longer_windows_copy_by_the_packages_mixture(measured, key):
    reader, rows, found = measured
    name, archive, gate = READINGS[key]
    arm, gates = ARMS[name], make_gates()
    for row, loss in zip(rows.astype(np.int64), found[f"n4.{key}"], strict=True):
        past = LAYOUT.past(row, 4, LAYOUT.extra(archive_of(arm, archive), 4))
        index = Archive.empty(VOCAB, frozenset({0, 1, 2})).extended(past)
        matches = [index.match(row[max(0, end - 64) : end]) for end in range(LAYOUT.split, LAYOUT.length)]
        raw = np.concatenate([row[: LAYOUT.prefix], LAYOUT.raw(row, LAYOUT.extra(arm.longer, 4))])
        with torch.no_grad():
            scores = reader.host(torch.from_numpy(raw)[None]).logits[0, -LAYOUT.target :]
            mixture = mix(scores, collect(matches), gates[gate])
        targets = torch.from_numpy(row[LAYOUT.split :])
        assert loss == pytest.approx(-mixture.of(targets, scores).mean().item(), abs=1e-4)
