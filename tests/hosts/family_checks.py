"""Nine checks of a host, each against something that shares no code with the package; and one of compacted pairs."""

import torch

from hf_crouter.history import CompressedHistory
from hf_crouter.hosts.attention import attention_met
from hf_crouter.hosts.families import family_of, looks_ids_up
from hf_crouter.modes import Compact, Copy

from .. import reference
from ..histories import PREFIX, WINDOW, make, run
from ..modes.copying import eager_gate, expected_step
from ..tiny import CHUNK, prompt, tiny_crouter
from . import reference_compact as compact

LENGTH, NEW = 45, 14  # one chunk more is compressed while decoding
# whose own steps and whole forwards differ by more than others' in float32: recurrences and routing amplify rounding
LOOSE = {"hrm_text": 3e-3, "qwen3_5_moe_text": 1e-2, "qwen3_5_text": 1e-2, "qwen3_next": 2e-2, "qwen4_exp_text": 5e-4}


def close(found, expected, host):
    atol = LOOSE.get(host.config.get_text_config(decoder=True).model_type, 2e-4)
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def history_of(host, **options):
    """Soft prompts stand for chunks, or nothing on a host whose layers look ids up."""
    return make(host, tiny_crouter(), **{"copy": False, "soft_prompts": not looks_ids_up(host), **options})


@torch.no_grad()
def from_scratch(host, history, row):
    """Logits of the token after a row of ids, by one forward over its slots."""
    compressor = history.policy.compressor
    if compressor is not None:
        return reference.next_logits(host, tiny_crouter(), compressor.projector, row, PREFIX, WINDOW)
    kept, _, rest = reference.pieces(len(row), PREFIX, CHUNK, WINDOW)
    ids = row[kept + rest][None]
    return host(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].float()


def reference_steps(host, history, sequence, first):
    """Logits of a sequence's tokens from column `first` on, one forward from scratch each."""
    return torch.stack([from_scratch(host, history, sequence[:end]) for end in range(first, len(sequence))])


def short_prompts_are_bit_identical(host):
    plain = run(host, *prompt(9), new=8)
    history = history_of(host)
    out = run(host, *prompt(9), new=8, logits_processor=[history])
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
    assert not history.report().chunks


def long_prompts_equal_a_forward_from_scratch(host):
    history = history_of(host)
    out = run(host, *prompt(LENGTH), new=NEW, logits_processor=[history])
    expected = reference_steps(host, history, out.sequences[0], LENGTH)
    close(torch.stack(out.logits)[:, 0], expected, host)
    assert len(history.report().chunks) == (LENGTH + NEW - 1 - PREFIX - WINDOW) // CHUNK


def copying_equals_brute_force(host):
    gate = eager_gate()
    history = history_of(host, copy=True, copy_gate=gate)
    assert any(isinstance(mode, Copy) for mode in history.modes)
    ids = prompt(15)[0].repeat(1, 3)
    out = run(host, ids, new=NEW, logits_processor=[history])
    close(torch.stack(out.logits)[:, 0], reference_steps(host, history, out.sequences[0], LENGTH), host)
    for step in (0, NEW // 2, NEW - 1):
        row = out.sequences[0, : LENGTH + step]
        _, chunks, _ = reference.pieces(len(row), PREFIX, CHUNK, WINDOW)
        archive = [int(row[p]) for chunk in chunks for p in chunk if p < LENGTH]
        expected = expected_step(row.tolist(), archive, out.logits[step][0], gate, start=chunks[-1][-1] + 1)
        expected[host.generation_config.suppress_tokens or []] = -torch.inf
        torch.testing.assert_close(out.scores[step][0].softmax(-1), expected.softmax(-1), atol=1e-4, rtol=0)


def sampling_reads_what_was_drawn(host):
    history = history_of(host)
    torch.manual_seed(3)
    out = run(host, *prompt(LENGTH), new=NEW, logits_processor=[history], do_sample=True)
    expected = reference_steps(host, history, out.sequences[0], LENGTH)
    close(torch.stack(out.logits)[:, 0], expected, host)


def beams_score_what_they_give(host):
    history = history_of(host)
    out = run(host, *prompt(LENGTH), new=NEW, logits_processor=[history], num_beams=3, length_penalty=0.0)
    expected = reference_steps(host, history, out.sequences[0], LENGTH).log_softmax(-1)
    total = expected.gather(1, out.sequences[0, LENGTH:, None]).sum()
    torch.testing.assert_close(out.sequences_scores[0], total, atol=1e-2, rtol=0)


def padded_rows_are_what_they_are_alone(host):
    history, lengths = history_of(host), (LENGTH, 31, 6)
    out = run(host, *prompt(*lengths), new=NEW, logits_processor=[history])
    for i, length in enumerate(lengths):
        expected = reference_steps(host, history, out.sequences[i, LENGTH - length :], length)
        close(torch.stack(out.logits)[:, i], expected, host)


def drafts_change_no_token(host):
    history, ids = history_of(host), prompt(15)[0].repeat(1, 3)
    out = run(host, ids, new=NEW, logits_processor=[history])
    drafted = run(host, ids, new=NEW, logits_processor=[history], prompt_lookup_num_tokens=4)
    assert torch.equal(drafted.sequences, out.sequences)


def a_static_cache_gives_the_same(host):
    history, family = history_of(host), family_of(host)
    alone = family is not None and CHECKS.index(padded_rows_are_what_they_are_alone) in family.without
    lengths = (LENGTH,) if alone else (LENGTH, 31)
    out = run(host, *prompt(*lengths), new=NEW, logits_processor=[history], cache_implementation="static")
    for i, length in enumerate(lengths):
        expected = reference_steps(host, history, out.sequences[i, LENGTH - length :], length)
        close(torch.stack(out.logits)[:, i], expected, host)


def scores_equal_steps(host):
    history = history_of(host)
    ids = prompt(LENGTH + NEW)[0]
    expected = reference_steps(host, history, ids[0], LENGTH).log_softmax(-1)
    expected = expected.gather(1, ids[0, LENGTH:, None])[:, 0]
    close(history.score(ids, NEW)[0], expected, host)


CHECKS = (
    short_prompts_are_bit_identical,
    long_prompts_equal_a_forward_from_scratch,
    copying_equals_brute_force,
    sampling_reads_what_was_drawn,
    beams_score_what_they_give,
    padded_rows_are_what_they_are_alone,
    drafts_change_no_token,
    a_static_cache_gives_the_same,
    scores_equal_steps,
)


SLOTS, AT_ONCE = 4, 3  # chunks that the prompt of `COMPACTED` tokens has; one more leaves while decoding
COMPACTED = PREFIX + WINDOW + AT_ONCE * CHUNK + CHUNK // 2


def compacted(host, slots):
    """A call with compacted pairs, one chunk a block; its ids, logits and cache."""
    history = CompressedHistory(
        host, tiny_crouter(), modes=[Compact(slots, budgets="equal", block=CHUNK)], window=WINDOW, keep_first=PREFIX
    )
    out = run(host, prompt(COMPACTED)[0], new=NEW, logits_processor=[history])
    return out.sequences[0], torch.stack(out.logits)[:, 0], out.past_key_values


@torch.no_grad()
def pairs_are_compacted_and_read_right(host):
    """In float64: the mode is to be judged, not rounding."""
    host.double().set_experts_implementation("eager")
    kept, chunks, _ = reference.pieces(COMPACTED + NEW - 1, PREFIX, CHUNK, WINDOW)
    assert len(chunks) == AT_ONCE + 1
    ids, logits, cache = compacted(host, SLOTS)
    whole = list(range(COMPACTED))
    close(compact.forward(host, ids, whole, {})[0], host(ids[None, whole], use_cache=False).logits[0].float(), host)
    standing = compact.standing(cache, chunks)
    assert sorted(standing) == [number for number, window in enumerate(compact.slides(host)) if window is None]
    for step in range(NEW):
        row = ids[: COMPACTED + step]
        _, past, rest = reference.pieces(len(row), PREFIX, CHUNK, WINDOW)
        expected, _ = compact.forward(host, row, kept + rest, compact.of_chunks(standing, len(past)))
        close(logits[step], expected[-1], host)
    pairs_are_the_chunks_own(host, ids, kept, chunks, standing)
    if len(standing) == len(cache.layers):  # where layers slide, what leaves the window is gone in them
        ids, logits, _ = compacted(host, CHUNK)
        close(logits, host(ids[None], use_cache=False).logits[0, COMPACTED - 1 : -1].float(), host)
    layers_give_what_their_shares_say(host, ids[:COMPACTED])


def pairs_are_the_chunks_own(host, ids, kept, chunks, standing):
    """Each stands among the keys and values of a slow reading of its chunk, as often as it is kept, in their order."""
    prefix, raw = compact.forward(host, ids, kept, {})[1], None
    for n, chunk in enumerate(chunks):
        together = 0 < n < AT_ONCE  # the chunk before is raw while this one is read
        known = compact.of_chunks(standing, n - 1 if together else n)
        parts = [prefix, known, *([raw] if together else [])]
        given = {layer: compact.joined(*(part[layer] for part in parts if layer in part)) for layer in prefix}
        raw = compact.forward(host, ids, chunk, given)[1]
        for layer, (owner, pairs) in standing.items():
            assert int((owner == n).sum()) == SLOTS
            for head in range(len(pairs.keys)):
                apart = torch.cdist(pairs.keys[head, owner == n], raw[layer].keys[head])
                apart += torch.cdist(pairs.values[head, owner == n], raw[layer].values[head])
                places = apart.argmin(1).tolist()
                assert apart.amin(1).max() < 1e-4 and places == sorted({*places})


def layers_give_what_their_shares_say(host, ids):
    """What decides over pairs, shares of attention by what a layer shows, is what its output was made by."""
    shown, at = [], torch.arange(len(ids))
    with attention_met(host, seen=shown.append):
        host(ids[None], use_cache=False)
    assert [one.layer for one in shown] == list(range(len(shown)))
    for one, window in zip(shown, compact.slides(host), strict=True):
        seen = compact.seen_by(at, compact.tokens(one.keys[0], one.values[0], at.tolist()), window)
        expected = compact.attend(
            one.queries[0], one.keys[0], one.values[0], seen, one.scaling, one.softcap, one.sinks
        )
        torch.testing.assert_close(one.outputs[0].double(), expected, atol=1e-4, rtol=0)
