from eval.reading import manners

from .conftest import SHAPE


def test_free_generation_runs(bench):
    found = manners.temperatures(bench, SHAPE, ["window", "copy"], 2)
    assert "manners.temperature.young.t50.copy.minus_window.lo" in found
    found = manners.drafts(bench, SHAPE, ["copy"], 2, 8, ahead=4)
    assert found["drafts.copy.same"] == 1.0 <= found["drafts.copy.tokens_a_step"] and found["drafts.prompts"] > 0
    found = manners.loops(bench, SHAPE, ["window", "copy_generated"], 2, 8)
    assert "manners.loops.copy_generated.repetition" in found
