"""A part's host and another: this very copy, a twin, or a stranger."""

import dataclasses

import pytest
import torch

from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.errors import MismatchError
from hf_crouter.fitting import HostInUse, best_fit, check_fit, difference, fit_of, fitted
from hf_crouter.hosts.fingerprint import host_fingerprint
from hf_crouter.ngram.gate import GateConfig
from hf_crouter.types import Fitted, Setting

from .tiny import tiny_host
from .twins import TOKENIZER

torch.set_num_threads(1)

MADE = GateConfig(
    host_name="a", host_fingerprint="w", host_tokenizer="t",
    host_architecture="model_type=llama embeddings=9x4 hidden_size=4 num_hidden_layers=2",
)  # fmt: skip
HERE = dataclasses.replace(MADE, host_name="here", host_fingerprint="v")


def with_word(old, new):
    return {"host_architecture": HERE.host_architecture.replace(old, new)}


class TestFit:
    @pytest.mark.parametrize(
        ("made", "here", "fit", "words"),
        [
            ({}, {}, "twin", ""),
            ({}, {"host_fingerprint": "w"}, "exact", ""),
            ({"host_architecture": ""}, {"host_fingerprint": "w"}, "exact", "its file names no architecture"),
            ({}, {"host_fingerprint": ""}, "either", ""),
            ({"host_fingerprint": ""}, {}, "general", ""),
            ({"host_fingerprint": ""}, {"host_fingerprint": ""}, "general", ""),
            ({"host_architecture": ""}, {}, "other", "its file names no architecture, so it serves that very copy"),
            ({"host_tokenizer": ""}, {}, "other", "its file names no tokenizer"),
            ({"host_tokenizer": ""}, {"host_tokenizer": ""}, "other", "its file names no tokenizer"),
            ({}, {"host_tokenizer": ""}, "other", "this host's tokenizer is not known, pass tokenizer="),
            ({}, {"host_tokenizer": "u"}, "other", "expected tokenizer t, got u"),
            ({}, with_word("llama", "qwen2"), "other", "expected model_type llama, got qwen2"),
            ({}, with_word("9x4", "8x4"), "other", "expected embeddings 9x4, got 8x4"),
            ({}, with_word("layers=2", "layers=3"), "other", "expected num_hidden_layers 2, got 3"),
            ({}, {"host_architecture": ""}, "other", "expected model_type llama, got none"),
        ],
    )  # fmt: skip
    def test_of_two_hosts(self, made, here, fit, words):
        made, here = dataclasses.replace(MADE, **made), dataclasses.replace(HERE, **here)
        assert fit_of(made, here) == fit
        assert difference(made, here).startswith(words) and bool(words) == bool(difference(made, here))
        if fit == "other":
            with pytest.raises(MismatchError, match="gate: expected the host with fingerprint w or a twin of it") as e:
                check_fit("gate", made, here, advice="hf-crouter align")
            assert words in str(e.value) and str(e.value).endswith("make one with: hf-crouter align")
            assert "\n" not in str(e.value)
        else:
            assert check_fit("gate", made, here) == fitted("gate", made, here)

    def test_fields_that_a_part_does_not_depend_on(self):
        here = dataclasses.replace(HERE, **with_word("layers=2", "layers=3"))
        fields = ("model_type", "embeddings")
        assert fit_of(MADE, here, fields) == "twin"
        assert fitted("p", MADE, here, fields).shared == "embeddings' shape and tokenizer"
        assert fitted("p", MADE, HERE, fields).shared == "architecture and tokenizer"

    def test_this_very_copy_before_a_twin_and_the_first_twin_before_others(self):
        exact, stranger = (
            dataclasses.replace(MADE, host_fingerprint="v"),
            dataclasses.replace(MADE, host_tokenizer="u"),
        )
        generic = dataclasses.replace(MADE, host_fingerprint="")
        assert best_fit([stranger, MADE, exact], HERE) == 2
        assert best_fit([generic, stranger, MADE, MADE], HERE) == 2
        assert best_fit([generic, stranger], HERE) is None and best_fit([], HERE) is None
        assert best_fit([generic, MADE], dataclasses.replace(HERE, host_fingerprint="")) == 1

    def test_nothing_is_read_before_it_is_needed(self, monkeypatch):
        host, here = tiny_host(), HostInUse(tiny_host(), TOKENIZER)
        made = dataclasses.replace(MADE, host_fingerprint=host_fingerprint(host))
        monkeypatch.setattr("hf_crouter.fitting.tokenizer_fingerprint", lambda _: pytest.fail("read the tokenizer"))
        assert best_fit([MADE, made], here) == 1 and fitted("gate", made, here).fit == "exact"
        monkeypatch.setattr("hf_crouter.fitting.host_fingerprint", lambda _: pytest.fail("read weights again"))
        assert fit_of(made, here) == "exact"
        assert best_fit([], HostInUse(host)) is None

    def test_one_identity_for_all_modes_of_a_history(self):
        setting = Setting(tiny_host(), tokenizer=TOKENIZER)
        assert HostInUse.of(setting) is HostInUse.of(setting) is not HostInUse.of(Setting(setting.host))
        assert HostInUse.of(setting).host_tokenizer == tokenizer_fingerprint(TOKENIZER)

    @pytest.mark.parametrize(
        ("record", "line"),
        [
            (Fitted("gate", "exact", "a"), "gate: fitted to this very copy of a"),
            (Fitted("gate", "twin", "a", "shape"), "gate: fitted to a twin (a, other weights of the same shape)"),
            (
                Fitted("gate", "either", "a", "shape"),
                "gate: fitted to this host or a twin (a, of the same shape; no weights to compare)",
            ),
            (Fitted("gate", "general"), "gate: general, for any host"),
            (Fitted("gate", "other"), "gate: fitted to another host (a host without a name)"),
        ],
    )  # fmt: skip
    def test_lines(self, record, line):
        assert str(record) == line
