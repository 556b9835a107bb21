import json
from pathlib import Path

from hf_crouter.cli.main import main
from hf_crouter.routing.calibration import Calibration

STDLIB = Path(json.__file__).parent


def test_calibration_comes_from_the_given_documents(crouter, capsys):
    (crouter / "calibration.json").unlink(missing_ok=True)
    assert main(["calibrate", "--crouter", str(crouter), "--corpus", f"text-files:{STDLIB}", "--chunks", "6"]) == 0
    assert "6 chunks" in capsys.readouterr().out
    calibration = Calibration.load(crouter)
    assert calibration is not None and calibration.chunks == 6
    assert calibration.documents == len(list(STDLIB.glob("*.py")))

    main(["calibrate", "--crouter", str(crouter), "--corpus", f"text-files:{STDLIB}", "--chunks", "6", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["quantiles"]["0.9"] == calibration.quantiles[0.9]


def test_documents_are_needed(crouter, tmp_path, capsys):
    before = (crouter / "calibration.json").read_bytes() if (crouter / "calibration.json").exists() else None
    assert main(["calibrate", "--crouter", str(crouter), "--corpus", f"text-files:{tmp_path / 'none'}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    after = (crouter / "calibration.json").read_bytes() if (crouter / "calibration.json").exists() else None
    assert before == after
