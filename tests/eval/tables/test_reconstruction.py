from eval.tables.readme import render

from .results import write


def test_tra_mini(tmp_path):
    metrics = {"code.files.tra": 0.98724, "code.files.nll": 0.05734, "code.files.chunks": 2048.0}
    write(tmp_path, "tra-mini", {"params": 15968160.0, "train.seconds": 470.0, "train.tokens": 1e6, **metrics})
    lines = render("tra-mini", tmp_path).splitlines()
    assert lines[2] == "| held-out files | 98.72% | 0.057 | 2,048 |"
    assert lines[3] == "| held-out packages | – | – | – |" and len(lines[2:]) == 6 + 4
    assert lines[9] == "15,968,160 parameters; trained for 470 seconds on 1,000,000 tokens, MFU –."
