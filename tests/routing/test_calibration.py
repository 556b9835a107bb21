import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from hf_crouter.errors import InputError
from hf_crouter.routing.calibration import QUANTILES, Calibration, LengthCalibration, reconstruction_grade


@pytest.fixture
def calibration():
    return Calibration.fit(np.linspace(0.0, 1.0, 1001), documents=7, fingerprint="abc")


def test_quantiles_are_those_of_the_values(calibration):
    assert calibration.quantiles[0.5] == pytest.approx(0.5)
    assert calibration.quantiles[0.99] == pytest.approx(0.99)
    assert (calibration.chunks, calibration.documents, calibration.fingerprint) == (1001, 7, "abc")
    with pytest.raises(FrozenInstanceError):
        calibration.chunks = 3


@pytest.mark.parametrize(
    ("reconstruction_nll", "expected"),
    [(0.0, "rebuildable"), (0.9, "rebuildable"), (0.91, "uncertain"), (0.99, "uncertain"), (0.995, "foreign"),
     (float("nan"), "foreign"), (float("inf"), "foreign")],
)  # fmt: skip
def test_grade_comes_from_the_quantiles(calibration, reconstruction_nll, expected):
    assert calibration.reconstruction_grade(reconstruction_nll) == expected


def test_thresholds_are_the_crouters_own():
    easy = Calibration.fit([0.01] * 100, 1, "a")
    hard = Calibration.fit([3.0] * 100, 1, "b")
    assert easy.reconstruction_grade(1.0) == "foreign"
    assert hard.reconstruction_grade(1.0) == "rebuildable"


def test_without_calibration(tmp_path):
    assert Calibration.load(tmp_path) is None
    assert reconstruction_grade(None, 0.0) == "uncalibrated"


def test_round_trip_is_exact(calibration, tmp_path):
    assert calibration.save(tmp_path).name == "calibration.json"
    assert Calibration.load(tmp_path) == calibration


@pytest.mark.parametrize(
    "reconstruction_nlls", [[], [0.1, float("nan")], [float("inf")]], ids=["none", "nan", "infinite"]
)
def test_fit_refuses(reconstruction_nlls):
    with pytest.raises(InputError, match="finite reconstruction NLLs"):
        Calibration.fit(reconstruction_nlls, 1, "x")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"quantiles": {"0.9": 1}, "chunks": 1, "documents": 1, "fingerprint": "x"}',
     '{"quantiles": 3, "chunks": 1, "documents": 1, "fingerprint": "x"}'],
)  # fmt: skip
def test_load_refuses_a_damaged_file(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(InputError, match="calibration.json"):
        Calibration.load(tmp_path)


def test_load_refuses_falling_quantiles(calibration, tmp_path):
    path = calibration.save(tmp_path)
    fields = json.loads(path.read_text())
    fields["quantiles"]["0.9"] = 5.0
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="rising"):
        Calibration.load(tmp_path)


class TestLengths:
    @pytest.fixture
    def lengths(self):
        rows = {512: np.linspace(2.0, 3.0, 1001), 64: np.linspace(0.0, 1.0, 1001), 128: np.linspace(1.0, 2.0, 1001)}
        return LengthCalibration.fit(rows, 5, "abc", "def")

    @pytest.mark.parametrize(
        ("tokens", "median"), [(1, 0.5), (64, 0.5), (90, 0.5), (91, 1.5), (255, 1.5), (257, 2.5), (9999, 2.5)]
    )
    def test_the_nearest_measured_length_speaks(self, lengths, tokens, median):
        assert lengths.reconstruction_nll(tokens, 0.5) == pytest.approx(median)

    def test_any_quantile(self, lengths):
        for quantile in (0.0, 0.01, 0.3, 0.97, 0.99, 1.0):
            assert lengths.reconstruction_nll(64, quantile) == pytest.approx(quantile)

    def test_round_trip_is_exact(self, lengths, tmp_path):
        lengths.save(tmp_path)
        assert LengthCalibration.load(tmp_path) == lengths
        assert (lengths.pieces, lengths.documents) == ({64: 1001, 128: 1001, 512: 1001}, 5)

    def test_a_file_of_the_first_version(self, lengths, tmp_path):
        quantiles = {"0.0": 0.0, **{str(q): q for q in QUANTILES}, "1.0": 1.0}
        record = {
            "residuals": {"64": quantiles},
            "pieces": {"64": 9},
            "documents": 3,
            "fingerprint": "f",
            "weights": "w",
        }
        (tmp_path / "calibration.json").write_text(json.dumps(record))
        found = LengthCalibration.load(tmp_path)
        assert found.reconstruction_nll(64, 0.25) == 0.25 and (found.documents, found.weights) == (3, "w")
        found.save(tmp_path)
        assert json.loads((tmp_path / "calibration.json").read_text()) == record, "and is written as before"

    @pytest.mark.parametrize("reconstruction_nlls", [{}, {64: []}, {64: [float("nan")]}, {0: [1.0]}], ids=str)
    def test_fit_refuses(self, reconstruction_nlls):
        with pytest.raises(InputError, match="calibration: expected"):
            LengthCalibration.fit(reconstruction_nlls, 1, "a", "b")

    def test_one_is_not_the_other(self, calibration, lengths, tmp_path):
        calibration.save(tmp_path)
        with pytest.raises(InputError, match="not an expert's calibration"):
            LengthCalibration.load(tmp_path)
        lengths.save(tmp_path)
        with pytest.raises(InputError, match="not a calibration"):
            Calibration.load(tmp_path)
