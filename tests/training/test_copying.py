import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_crouter import CompressedHistory, Copy
from hf_crouter.chunking import make_chunker, tokenizer_fingerprint
from hf_crouter.compressors.rebuild import Rebuilder
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.data.tokens import TokenArray
from hf_crouter.errors import InputError
from hf_crouter.hosts.fingerprint import host_architecture
from hf_crouter.hosts.loading import load_host
from hf_crouter.ngram.archive import ORDERS, Archive
from hf_crouter.ngram.gate import Gate, find_gate
from hf_crouter.ngram.mixture import collect, gate_features, mix, view_host
from hf_crouter.training.align import AlignArguments, compressed_logits, cut_sample
from hf_crouter.training.copying import (
    WAYS,
    GateReader,
    copied_by_order,
    gate_samples,
    record_examples,
    train_copying,
    train_gate,
)
from hf_crouter.training.gate import mixture_log_likelihood

from ..tiny import CHUNK, VOCAB, tiny_crouter, tiny_host, tiny_projector
from .test_align import FIRST, TARGET, WINDOW, array, options, pair  # noqa: F401  (pair is a fixture)

torch.set_num_threads(1)


def text(length, seed=0):
    """Ids that repeat a few phrases in changing order."""
    drawn = np.random.default_rng(seed)
    phrases = [drawn.integers(5, VOCAB, 6) for _ in range(5)]
    return np.concatenate([phrases[i] for i in drawn.integers(0, 5, length // 6 + 1)])[:length]


@pytest.fixture(scope="module")
def reader():
    host, crouter = tiny_host(), tiny_crouter()
    return GateReader(host, crouter, tiny_projector(host, crouter), Rebuilder(crouter), (0, 1, 2))


def sample_of(length=90, chunks=3, seed=0):
    return cut_sample(text(length, seed), make_chunker(CHUNK), chunks, options())


def test_recorded_examples_give_the_likelihood_of_the_mixture(reader):
    sample = sample_of()
    torch.manual_seed(0)
    gate = Gate()
    torch.nn.init.normal_(gate.down.weight, std=0.5)
    examples = reader.examples(sample, "window", False)
    found = mixture_log_likelihood(gate, examples.features.float(), examples.available, examples.copied, examples.host)
    ids = np.concatenate([sample.history, sample.target])
    archive = Archive.empty(VOCAB, (0, 1, 2)).extended(sample.history[FIRST : len(sample.history) - WINDOW])
    raw = torch.from_numpy(np.concatenate([sample.window, sample.target[:-1]]))[None]
    logits = compressed_logits(
        reader.host, torch.zeros(1, 0, 32), torch.from_numpy(sample.prefix)[None], raw, TARGET
    )[0]  # fmt: skip
    split = len(sample.history)
    with torch.no_grad():
        for position in range(TARGET):
            candidates = collect([archive.match(ids[: split + position][-64:])])
            mixture = mix(logits[position][None], candidates, gate)
            wanted = mixture.of(torch.tensor([int(ids[split + position])]), logits[position][None])
            assert found[position].item() == pytest.approx(wanted.item(), abs=5e-3)  # features in half precision


def test_every_way_reads_what_it_says(reader, monkeypatch):
    seen = []

    def spied(host, soft, prefix, raw, keep):
        seen.append((soft.shape[1], raw.shape[1] - keep + 1))
        return compressed_logits(host, soft, prefix, raw, keep)

    monkeypatch.setattr("hf_crouter.training.copying.compressed_logits", spied)
    sample = sample_of()
    for way in WAYS:
        for rebuilt in (False, True):
            examples = reader.examples(sample, way, rebuilt, longer=20)
            assert examples.host.shape == (TARGET,) and examples.copied.shape == (TARGET, len(ORDERS))
            assert torch.isfinite(examples.host).all() and (examples.copied.sum(1) <= len(ORDERS)).all()
    latents = 3 * tiny_projector(reader.host, reader.crouter).config.num_latents
    older = 3 * CHUNK
    assert seen[::2] == seen[1::2] == [(0, WINDOW), (latents, WINDOW), (0, WINDOW + 20), (0, WINDOW + older)]


def test_beyond_the_hosts_positions_full_history_is_not_asked_for(reader, monkeypatch):
    monkeypatch.setattr(reader, "positions", 40)
    short = reader.examples(sample_of(), "full", False, longer=5)
    longer = reader.examples(sample_of(), "longer", False, longer=5)
    assert torch.equal(short.host, longer.host)


def test_no_way_reads_beyond_the_hosts_positions(reader, monkeypatch):
    seen = []

    def spied(host, soft, prefix, raw, keep):
        seen.append(soft.shape[1] + prefix.shape[1] + raw.shape[1] + 1)
        return compressed_logits(host, soft, prefix, raw, keep)

    monkeypatch.setattr("hf_crouter.training.copying.compressed_logits", spied)
    for positions in (FIRST + WINDOW + TARGET, 30):
        monkeypatch.setattr(reader, "positions", positions)
        for way in WAYS:
            reader.examples(sample_of(), way, False, longer=1536)
        assert max(seen) <= positions
        seen.clear()
    monkeypatch.setattr(reader, "positions", 12)
    with pytest.raises(InputError, match="within the host's 12 positions"):
        reader.examples(sample_of(), "window", False)


def test_copied_by_order_is_the_share_of_the_target():
    archive = Archive.empty(VOCAB).extended(text(60))
    candidates = collect([archive.match(text(60)[:20]), archive.match(text(30, 3))])
    for token in range(0, VOCAB, 7):
        found = copied_by_order(candidates, torch.tensor([token, token]))
        for position in range(2):
            for order in range(len(ORDERS)):
                here = (candidates.positions == position) & (candidates.orders == order) & (candidates.tokens == token)
                assert found[position, order].item() == pytest.approx(candidates.probabilities[here].sum().item())


def test_half_precision_keeps_the_features(reader):
    archive = Archive.empty(VOCAB).extended(text(60))
    candidates = collect([archive.match(text(60)[:20])])
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    features = gate_features(candidates, view_host(logits, candidates)[0])
    examples = record_examples(logits, torch.tensor([7]), text(60)[:20], archive)
    torch.testing.assert_close(examples.features.float(), features, atol=1e-3, rtol=1e-3)


def test_a_gate_learns_to_copy_repetitive_text_and_leaves_random_text_alone(reader):
    chunker = make_chunker(CHUNK)
    said = [(cut_sample(text(120, seed), chunker, 4, options(target=30)), f"g{seed % 8}") for seed in range(24)]
    gate, record = train_gate(reader, said, seed=0)
    assert record["held_out_gain"] > 0.3 and record["copies"] and record["documents"] == 24
    drawn = np.random.default_rng(1)
    noise = [
        (cut_sample(drawn.integers(5, VOCAB, 120), chunker, 4, options(target=30)), f"g{n % 8}") for n in range(24)
    ]
    _, record = train_gate(reader, noise, seed=0)
    assert 0 <= record["held_out_gain"] < 0.05
    with pytest.raises(InputError, match="at least two groups"):
        train_gate(reader, said[:1])


def test_samples_come_from_all_groups_in_turn():
    drawn = array(*[130] * 12)
    tokens = TokenArray(drawn.ids, drawn.starts, drawn.names, tuple("aaaaaaaaabbc"), 2, VOCAB)
    groups = [group for _, group in gate_samples(tokens, make_chunker(CHUNK), options(), 6)]
    assert sorted(groups) == ["a", "a", "a", "b", "b", "c"]
    with pytest.raises(InputError, match="expected documents"):
        gate_samples(array(20, 20), make_chunker(CHUNK), options(), 6)


def test_the_gate_is_written_beside_the_crouter_and_found(pair):  # noqa: F811
    arguments = AlignArguments(**{**pair.__dict__, "only": "gate", "steps": None, "gate_documents": 6})
    record = train_copying(arguments)
    folder = Path(pair.crouter) / "gates/tiny-host"
    assert (
        record["path"] == str(folder) and record["documents"] == 6 and record["ways"] == ["window", "longer", "full"]
    )
    written = json.loads((folder / "gate.json").read_text())
    assert written["training"]["stage"] == "gate" and not any("/" in str(v) for v in written["training"].values())
    host, crouter = load_host(pair.host)[0], load_crouter(pair.crouter)[0]
    assert find_gate(crouter, host).config.host_name == "tiny-host"
    assert find_gate(None, host, folder).config.sees_host
    assert written["host_architecture"] == host_architecture(host)
    assert written["host_tokenizer"] == tokenizer_fingerprint(load_host(pair.host)[1])
    CompressedHistory(host, modes=[Copy(gate=folder)], window=WINDOW, keep_first=FIRST).detach()


@pytest.mark.parametrize(("changes", "match"), [({"only": "encoder"}, "--only: expected"),
                                                ({"gate_documents": 0}, "--gate-documents: expected")])  # fmt: skip
def test_arguments_that_make_no_gate(pair, changes, match):  # noqa: F811
    with pytest.raises(InputError, match=match):
        train_copying(AlignArguments(**{**pair.__dict__, **changes}))
