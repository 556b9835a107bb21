import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_crouter import CompressedHistory, Copy
from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.data.tokens import TokenArray
from hf_crouter.errors import CapacityError, InputError
from hf_crouter.hosts.fingerprint import host_architecture
from hf_crouter.hosts.loading import load_host
from hf_crouter.ngram.archive import Archive
from hf_crouter.ngram.candidates import collect
from hf_crouter.ngram.gate import FEATURES, SOURCES, Gate, GateConfig, find_gate
from hf_crouter.training import copying
from hf_crouter.training.align import AlignArguments
from hf_crouter.training.copying import (
    GateReader,
    copied_by_source,
    gate_rows,
    read_examples,
    train_copying,
    train_gate,
)
from hf_crouter.training.gate import mixture_log_likelihood
from hf_crouter.training.records import record_row

from ..modes.copying import evidence
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
    return GateReader(host, None, crouter, None, tiny_projector(host, crouter), WINDOW, FIRST)


def row(length=90, seed=0):
    return text(length, seed)


def test_recorded_examples_give_the_likelihood_of_the_mixture(reader):
    torch.manual_seed(0)
    gate = Gate()
    torch.nn.init.normal_(gate.down.weight, std=0.5)
    ids = torch.from_numpy(row())[None]
    for way, modes in reader.ways.items():
        examples = reader.examples(row(), TARGET, way, longer=20)
        with torch.no_grad():
            found = mixture_log_likelihood(gate, examples.features, examples.available, examples.copied, examples.host)
        window = WINDOW + 20 * (way == "longer")
        said = []
        for more in ([Copy(gate=gate)], []):
            history = CompressedHistory(
                reader.host, reader.crouter, modes=[*modes, *more], window=window, keep_first=FIRST
            )
            said.append(history.score(ids, last=TARGET))
            history.detach()
        # where nothing matches the host is left alone, and there is no example
        gain, wanted = float((found - examples.host).sum()), float((said[0] - said[1]).sum())
        assert gain == pytest.approx(wanted, abs=2e-2), way  # features in half precision


def test_the_ways_are_those_of_use(reader):
    assert list(reader.ways) == ["window", "longer", "retrieve", "default", "soft"]
    assert [type(mode).__name__ for mode in reader.ways["default"]] == ["Compact", "Retrieve"]
    alone = GateReader(reader.host, None, window=WINDOW, keep_first=FIRST)
    assert "soft" not in alone.ways and alone.chunk_length == 512
    assert alone.examples(row(), TARGET, "window") is None, "nothing is compressed: there is nothing to copy from"


def test_a_way_that_does_not_fit_the_hosts_positions_gives_way_to_the_window(reader):
    host = tiny_host(positions=64)
    short = GateReader(host, None, reader.crouter, window=WINDOW, keep_first=FIRST)
    window = short.examples(row(160), TARGET, "window")
    longer = short.examples(row(160), TARGET, "longer", longer=60)
    assert torch.equal(window.host, longer.host) and torch.equal(window.features, longer.features)
    with pytest.raises(CapacityError):
        GateReader(tiny_host(positions=20), None, reader.crouter, window=WINDOW, keep_first=FIRST).examples(
            row(160), TARGET, "longer", longer=60
        )


def test_copied_by_source_is_the_share_of_the_target():
    archive = Archive.empty(VOCAB).extended(text(60))
    candidates = collect([evidence(archive, text(60)[:20]), evidence(archive, text(30, 3))])
    for token in range(0, VOCAB, 7):
        found = copied_by_source(candidates, torch.tensor([token, token]))
        for position in range(2):
            for source in range(SOURCES):
                here = (candidates.positions == position) & (candidates.sources == source)
                here &= candidates.tokens == token
                assert found[position, source].item() == pytest.approx(candidates.probabilities[here].sum().item())


def test_a_gate_learns_to_copy_repetitive_text_and_leaves_random_text_alone(reader):
    said = [(text(122, seed), f"g{seed % 8}") for seed in range(24)]
    gate, record = train_gate(read_examples(reader, said, 30), GateConfig(host_name="tiny"), seed=0)
    assert record["held_out_gain"] > 0.3 and record["copies"] and record["groups"] == 8
    drawn = np.random.default_rng(1)
    noise = [(drawn.integers(5, VOCAB, 122), f"g{n % 8}") for n in range(24)]
    _, record = train_gate(read_examples(reader, noise, 30), GateConfig(host_name="tiny"), seed=0)
    assert 0 <= record["held_out_gain"] < 0.05
    with pytest.raises(InputError, match="at least two groups"):
        train_gate(
            [*read_examples(reader, said[:1], 30), (reader.examples(said[0][0], 30, "window"), "records gate 0 0")],
            GateConfig(),
            seed=0,
        )


def test_records_are_hidden_in_longer_texts(reader, monkeypatch):
    made = []

    class Words:
        added_tokens_decoder, all_special_ids, chat_template = {}, [], None

        def encode(self, words, add_special_tokens):
            return [5 + ord(letter) % 90 for letter in words]

    monkeypatch.setattr(copying, "record_row", lambda *args: made.append(record_row(*args)) or made[-1])
    alone = GateReader(tiny_host(positions=2048), Words(), reader.crouter, window=WINDOW, keep_first=FIRST)
    found = read_examples(alone, [(text(900, seed), f"g{seed}") for seed in range(12)], 200, seed=1)
    hidden = sum(group.startswith("records") for _, group in found)
    assert 1 <= hidden <= len(made) < 12  # read with a long window nothing of one may be compressed
    assert len({group for _, group in found if group.startswith("records")}) == hidden
    assert all(len(ids) == 900 and 0 < listed <= 420 for ids, listed in made)


def test_samples_come_from_all_groups_in_turn():
    drawn = array(*[130] * 12)
    tokens = TokenArray(drawn.ids, drawn.starts, drawn.names, tuple("aaaaaaaaabbc"), 2, VOCAB)
    groups = [group for _, group in gate_rows(tokens, CHUNK, options(), 6)]
    assert sorted(groups) == ["a", "a", "a", "b", "b", "c"]
    with pytest.raises(InputError, match="expected documents"):
        gate_rows(array(20, 20), CHUNK, options(), 6)


def test_the_gate_is_written_beside_the_crouter_and_found(pair):  # noqa: F811
    arguments = AlignArguments(**{**pair.__dict__, "only": "gate", "steps": None, "gate_documents": 6})
    record = train_copying(arguments)
    folder = Path(pair.crouter) / "gates/tiny-host"
    assert record["path"] == str(folder) and record["documents"] == 6
    assert record["ways"] == ["window", "longer", "retrieve", "default"]
    written = json.loads((folder / "gate.json").read_text())
    assert written["training"]["stage"] == "gate" and not any("/" in str(v) for v in written["training"].values())
    host, crouter = load_host(pair.host)[0], load_crouter(pair.crouter)[0]
    assert find_gate(crouter, host).config.host_name == "tiny-host"
    assert find_gate(None, host, folder).config.features == FEATURES
    assert written["host_architecture"] == host_architecture(host)
    assert written["host_tokenizer"] == tokenizer_fingerprint(load_host(pair.host)[1])
    CompressedHistory(host, modes=[Copy(gate=folder)], window=WINDOW, keep_first=FIRST).detach()


@pytest.mark.parametrize(("changes", "match"), [({"only": "encoder"}, "--only: expected"),
                                                ({"gate_documents": 0}, "--gate-documents: expected")])  # fmt: skip
def test_arguments_that_make_no_gate(pair, changes, match):  # noqa: F811
    with pytest.raises(InputError, match=match):
        train_copying(AlignArguments(**{**pair.__dict__, **changes}))
