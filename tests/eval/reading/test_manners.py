import numpy as np

from eval.reading import manners
from eval.reading.bench import PREFIX

from .conftest import SHAPE


def test_near_matches_have_a_stale_record(wide):
    hay = np.tile(wide.sets["young"].ids[0].astype(np.int64), 12)
    for form in manners.FORMS:
        sample = manners.near_match(wide, hay, 1400, form, np.random.default_rng(1))
        assert sample.ids.shape == (1400,) and sample.answer != sample.stale
        start, end = sample.record
        assert start >= PREFIX and end <= wide.compressed_end(1400)
        assert wide.text(sample.stale).strip() in wide.text(sample.ids[start:end])
        text = wide.text(sample.ids[-250:])
        assert wide.text(sample.answer).strip() in text and wide.text(sample.stale).strip() not in text


def test_manners_run(wide):
    found = manners.near_matches(wide, ["window", "copy"], 1000, 2)
    assert {"manners.near.copy.wrong_copied", "manners.near.window.right"} <= found.keys()


def test_free_generation_runs(bench):
    found = manners.temperatures(bench, SHAPE, ["window", "copy"], 2)
    assert "manners.temperature.young.t50.copy.minus_window.lo" in found
    found = manners.drafts(bench, SHAPE, ["copy"], 2, 8, ahead=4)
    assert found["drafts.copy.same"] == 1.0 <= found["drafts.copy.tokens_a_step"] and found["drafts.prompts"] > 0
    found = manners.loops(bench, SHAPE, ["window", "copy_generated"], 2, 8)
    assert "manners.loops.copy_generated.repetition" in found
