import pytest
import torch

from hf_crouter import Compact, Copy, Retrieve
from hf_crouter.cache.memory import bytes_of, memory
from hf_crouter.errors import CapacityError, InputError
from hf_crouter.history import CompressedHistory

from ..allocations import Allocations
from ..tiny import VOCAB, tiny_host

MODES = {
    "none": [],
    "retrieve": [Retrieve(2)],
    "compact": [Compact(8)],
    "both": [Compact(32, block=512), Retrieve(2)],
    "copy": [Compact(8), Retrieve(2), Copy()],
}


@pytest.fixture(scope="module")
def host():
    return tiny_host(positions=8192)


def used(host, history, rows, length, new=3, **options):
    """Bytes at the peak of a call."""
    ids = torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    with Allocations(host) as allocations:
        host.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0,
                      logits_processor=[history], **options)  # fmt: skip
    return allocations.peak


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize(("rows", "length"), [(1, 700), (1, 4000), (3, 2500), (12, 2000)])
def test_no_call_takes_more_than_is_said(host, name, rows, length):
    history = CompressedHistory(host, modes=MODES[name], keep_first=4)
    said = memory(host, history.policy, 4, length + 3, rows, copies=history.changes_scores).peak
    taken = used(host, history, rows, length)
    assert taken <= said <= 8 * taken
    history.detach()


def test_the_more_memory_the_more_is_kept():
    host, kept = tiny_host(positions=65536), []
    for size in (40, 60, 100, 150, 250):
        history = CompressedHistory(host, budget=f"{size} MiB", longest=60_000, keep_first=4)
        compact = next(mode for mode in history.modes if isinstance(mode, Compact))
        kept.append((history.policy.window, compact.slots, compact.block is None))
        if size == 60:
            assert used(host, history, 1, 59_990) <= size << 20
        history.detach()
    assert kept[0] == (512, 8, False) and kept[-2:] == [(512, 32, True), (60_000, 32, True)]
    assert kept[:-1] == sorted(kept[:-1]) and len(set(kept)) == 5


def test_modes_of_the_user_s_own_stay_and_the_window_is_chosen():
    host = tiny_host(positions=65536)
    history = CompressedHistory(host, modes=[Compact(16)], budget="150 MiB", longest=60_000, keep_first=4)
    assert [mode.slots for mode in history.modes] == [16] and 512 <= history.policy.window < 60_000
    assert history.policy.compressor.most == 16
    history.detach()
    fast = CompressedHistory(host, modes="fast", budget="25 MB", longest=60_000, keep_first=4)
    assert fast.policy.window in (256, 512, 1024, 2048) and fast.policy.compressor is None
    assert used(host, fast, 1, 20_000) <= 25_000_000


def test_what_does_not_fit_is_refused_before_it_begins(host):
    with pytest.raises(CapacityError, match=r"expected at least \d+\.\d MiB for 6,000 tokens, got 0\.3 MiB") as error:
        CompressedHistory(host, budget=300_000, longest=6000)
    fits = int(str(error.value).split("enough for ")[1].split(" ")[0].replace(",", ""))
    assert 0 < fits < 6000
    history = CompressedHistory(host, budget="30 MiB", longest=3000, keep_first=4)
    forwards = []
    handle = host.model.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(CapacityError, match=r"for 16 rows of 3,003 tokens.*enough for"):
        used(host, history, 16, 3000)
    with pytest.raises(CapacityError, match=r"for 16 rows of"):
        used(host, history, 4, 3000, num_beams=4)
    handle.remove()
    assert not forwards
    used(host, history, 1, 2900)


@pytest.mark.parametrize(
    ("words", "text"),
    [({"budget": "2 parsecs"}, "budget: expected bytes"), ({"budget": 0}, "budget: expected bytes"),
     ({"budget": "GiB"}, "budget: expected bytes"), ({"budget": True}, "budget: expected bytes"),
     ({"budget": "1GiB", "window": 512}, "expected no window beside it"),
     ({"longest": 5}, "longest: expected"), ({"budget": "1GiB", "longest": 0}, "longest: expected")],
)  # fmt: skip
def test_bad_input(host, words, text):
    with pytest.raises(InputError, match=text):
        CompressedHistory(host, **words)


def test_words_for_sizes():
    assert bytes_of("2GiB") == 2 << 30 and bytes_of("1.5 MB") == 1_500_000 and bytes_of(77) == 77
    assert bytes_of("512 kib") == 512 << 10 and bytes_of("100b") == bytes_of("100") == 100
