"""Hosts whose rotary factors depend on the length: all slots stand under one set."""

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from hf_crouter.hosts.rope import rope_switch, rotated_as_of

from ..histories import assert_matches_reference, make, run
from ..tiny import VOCAB, prompt, tiny_crouter, tiny_host

torch.set_num_threads(1)
SWITCH = 64


@pytest.fixture
def host():
    torch.manual_seed(0)
    factors = {"short_factor": [1.0, 1.2, 1.4, 1.7], "long_factor": [2.0, 3.5, 6.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH, **factors}
    config = Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, original_max_position_embeddings=SWITCH,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2, rope_parameters=rope,
    )  # fmt: skip
    host = Phi3ForCausalLM(config).eval()
    host.generation_config.eos_token_id = None
    return host


def test_the_switch_is_read_from_the_configuration(host):
    assert rope_switch(host) == SWITCH and rope_switch(tiny_host()) is None


# slots stay above the switch, below it, cross it downwards at a compaction, and cross it in both directions
@pytest.mark.parametrize("window, length", [(80, 300), (8, 70), (50, 60), (40, 100), (8, 330)])
class TestLongrope:
    def test_every_step_equals_a_forward_from_scratch(self, host, window, length):
        history = make(host, tiny_crouter(), window=window)
        out = run(host, prompt(length)[0], new=60, logits_processor=[history])
        projector = history.policy.compressor.projector
        assert_matches_reference(out, (length,), host, tiny_crouter(), projector, window=window)

    def test_score_and_drafts_agree_with_steps(self, host, window, length):
        history = make(host, tiny_crouter(), window=window)
        out = run(host, prompt(length)[0], new=60, logits_processor=[history])
        steps = torch.stack(out.scores, 1).log_softmax(-1).gather(2, out.sequences[:, length:, None])[..., 0]
        torch.testing.assert_close(history.score(out.sequences, 60), steps, atol=1e-4, rtol=0)
        drafted = run(host, prompt(length)[0], new=60, logits_processor=[history], prompt_lookup_num_tokens=5)
        assert torch.equal(drafted.sequences, out.sequences)


def test_nothing_compressed_is_the_plain_host_across_its_switch(host):
    plain = run(host, prompt(50)[0], new=40)
    history = make(host, tiny_crouter(), window=200)
    out = run(host, prompt(50)[0], new=40, logits_processor=[history])
    with torch.no_grad():
        whole = [host(out.sequences[:, :end]).logits[0, -1] for end in range(50, 90)]
    torch.testing.assert_close(torch.stack(out.logits)[:, 0], torch.stack(whole), atol=1e-4, rtol=0)
    if torch.allclose(torch.stack(plain.logits)[:, 0], torch.stack(whole), atol=1e-4):  # not in transformers 5.17
        assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
    steps = torch.stack(out.logits, 1).log_softmax(-1).gather(2, out.sequences[:, 50:, None])[..., 0]
    torch.testing.assert_close(history.score(out.sequences, 40), steps, atol=1e-4, rtol=0)


def test_a_first_piece_is_rotated_as_the_whole(host):
    ids, positions = prompt(80)[0], torch.arange(80)[None]
    hooks = len(host.model.rotary_emb._forward_hooks)
    with torch.no_grad():
        cos, sin = host.model.rotary_emb(ids.float(), positions)
        with rotated_as_of(host, 80):
            first = host.model.rotary_emb(ids.float(), positions[:, :40])
        plain = host.model.rotary_emb(ids.float(), positions[:, :40])
    assert torch.equal(first[0], cos[:, :40]) and torch.equal(first[1], sin[:, :40])
    assert not torch.allclose(plain[0], cos[:, :40])
    assert len(host.model.rotary_emb._forward_hooks) == hooks
