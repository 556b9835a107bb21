"""The pattern of reconstruction NLLs, on made-up ones."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from hf_crouter.errors import InputError
from hf_crouter.routing.profile import FLOOR, LOG_NLL, NLL, Evidence, Profile, distances_across, summary

AMONG = ("x", "y")


def reconstruction_nlls(count=200, seed=0, own=0):
    """Texts `[N, 3, 2]` of an expert that rebuilds them better than the other one and the crouter alone."""
    generator = np.random.default_rng(seed)
    hard = generator.normal(1.0, 0.3, (count, 1))
    logs = hard + generator.normal(0.0, 0.05, (count, 3))
    logs[:, own] -= 1.0
    return np.stack([np.exp(logs), logs], axis=-1).astype(np.float32)


def fit(values, documents=None):
    documents = np.arange(len(values)) // 10 if documents is None else documents
    return Profile.fit(AMONG, 0, {64: values}, {64: documents})


def test_summary_of_tokens():
    found = summary(torch.tensor([[0.0, 1.0], [2.0, 2.0]]))
    assert found[:, NLL].tolist() == [0.5, 2.0]
    assert found[1, LOG_NLL].item() == pytest.approx(np.log(2.0 + FLOOR))


def test_its_own_texts_are_near_and_others_far():
    profile = fit(reconstruction_nlls())
    near = [profile.distance(row[:, LOG_NLL], 64) for row in reconstruction_nlls(seed=1)]
    far = [profile.distance(row[:, LOG_NLL], 64) for row in reconstruction_nlls(seed=1, own=1)]
    assert np.mean(np.array(near) <= 1) == pytest.approx(0.9, abs=0.06) and min(far) > max(near)
    assert profile.limit(64, 0.9) == 1 < profile.limit(64, 0.99)
    easy = np.full(3, np.log(FLOOR))
    assert profile.distance(easy, 64) > 10, "ease alone makes nobody's text"


def test_margins_are_those_to_the_best_other():
    values = reconstruction_nlls()
    assert fit(values).margin(64, 0.5) == pytest.approx(np.median(values[:, 1, LOG_NLL] - values[:, 0, LOG_NLL]))


def test_what_was_not_measured_is_no_axis():
    values = reconstruction_nlls()
    values[:, 1] = np.nan
    profile = fit(values)
    assert profile.axes == (0, 2) and profile.margins == {} and profile.margin(64, 0.1) == -np.inf
    assert profile.distance(np.array([0.0, np.nan, 1.0]), 64) < 3
    values[:, 2] = np.nan
    with pytest.raises(InputError, match="under the crouter alone"):
        fit(values)


def test_few_texts_of_one_length_cost_that_length_alone():
    count = {64: 200, 512: 6}
    rows = {length: reconstruction_nlls(n) for length, n in count.items()}
    documents = {length: np.arange(n) // 3 for length, n in count.items()}
    assert set(Profile.fit(AMONG, 0, rows, documents).means) == {64}
    assert fit(reconstruction_nlls(), documents=np.zeros(200)) is None, "one document says nothing about others"
    assert distances_across(np.zeros((6, 3)), np.arange(6) // 3) is None


def test_distances_come_from_other_documents():
    """A document unlike the rest is far from them, however many texts it gives."""
    points = np.random.default_rng(0).normal(size=(100, 2))
    points[:20] += 50.0
    away = distances_across(points, np.arange(100) // 20)
    assert away[:20].min() > 100 > np.median(away[20:])


def test_evidence_belongs_to_its_weights(tmp_path):
    rows = {"a": {64: reconstruction_nlls()}, "b": {64: reconstruction_nlls(own=1)}}
    documents = {name: {64: np.arange(200) // 10} for name in rows}
    Evidence({"a": "x", "b": "y"}, {}, rows, documents).save(tmp_path)
    evidence = Evidence.load(tmp_path)
    both = evidence.profiles({"a": "x", "b": "y"})
    assert both["a"].axes == both["b"].axes == (0, 1, 2)
    turned = evidence.profiles({"b": "y", "a": "x"})
    assert turned["a"].distance(reconstruction_nlls(1)[0][[1, 0, 2], LOG_NLL], 64) == pytest.approx(
        both["a"].distance(reconstruction_nlls(1)[0][:, LOG_NLL], 64)
    )
    other = evidence.profiles({"a": "z", "b": "y"})
    assert other["a"] is None and other["b"].axes == (1, 2)
    assert Evidence.load(tmp_path / "none") is None
    Evidence({}, {}, {}, {}).save(tmp_path)
    assert Evidence.load(tmp_path).profiles({}) == {}


def test_evidence_of_the_first_version(tmp_path):
    values, documents = reconstruction_nlls(40), np.arange(40) // 10
    tensors = {"a/16/residuals": values, "a/16/documents": documents.astype(np.int64)}
    measured = {"weights": {"a": "x", "b": "y"}, "texts": {"a": "t"}}
    save_file(tensors, tmp_path / "evidence.safetensors", {"measured": json.dumps(measured)})
    before = (tmp_path / "evidence.safetensors").read_bytes()
    found = Evidence.load(tmp_path)
    assert found is not None and found.weights == measured["weights"]
    assert np.array_equal(found.reconstruction_nlls["a"][16], values)
    found.save(tmp_path)
    assert (tmp_path / "evidence.safetensors").read_bytes() == before, "and is written as before"
