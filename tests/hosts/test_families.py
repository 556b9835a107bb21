"""Every family of `hosts/families.py`: nine checks of a tiny random host and one with `Compact`, or its refusals."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_crouter.errors import InputError
from hf_crouter.history import CompressedHistory
from hf_crouter.hosts import probe
from hf_crouter.hosts.families import CHECKS as TITLES
from hf_crouter.hosts.families import FAMILIES, family_of, is_tested
from hf_crouter.modes import Compact, Retrieve

from ..histories import PREFIX, WINDOW, assert_matches_reference, make, run
from ..tiny import prompt, tiny_crouter, tiny_host
from .family_checks import CHECKS, pairs_are_compacted_and_read_right
from .tiny_families import IMAGE, TEXT, VARIANTS, tiny_family

torch.set_num_threads(1)

HOSTS = {**TEXT, **IMAGE}  # of this transformers
NAMES = {**{name: family for name, (family, _) in VARIANTS.items()}, "emu3": "emu3_text_model"}
LISTED = {name: FAMILIES.get(NAMES.get(name, name)) for name in sorted(HOSTS)}
HERE = Version(transformers.__version__)
SERVED = [name for name, family in LISTED.items()
          if family is not None and not family.refused and Version(family.since or "0") <= HERE]  # fmt: skip
MISREAD = [name for name, family in LISTED.items() if family is not None and Version(family.since or "0") > HERE]
REFUSED = [name for name, family in LISTED.items() if family is not None and family.refused]
NOT_COMPACTED = [name for name in SERVED if LISTED[name].compact]
LOOKING_BACK = {"mistral": {"sliding_window": None}}  # tiny hosts all of whose layers slide otherwise
IMAGE_ID = 2  # that stands for a picture in prompts of tiny hosts
QUICK = ("llama", "qwen2", "gemma3_text", "phi3", "gpt_neox", "bloom", "lfm2", "deepseek_v3", "qwen2_vl")


def kind_of(name):
    """Checks that are left out, caches, positions and attention: families alike in these share their code's ways."""
    family, host = LISTED[name], HOSTS[name]()
    config = host.config.get_text_config(decoder=True)
    caches = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    rope = getattr(config, "rope_parameters", None) or {}
    scopes = [scope for scope in rope.values() if isinstance(scope, dict)] or [rope] * bool(rope)
    positions = {(scope.get("rope_type"), "mrope_section" in scope) for scope in scopes}
    tables = [m for m in host.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings >= 256]
    latent = bool(getattr(config, "kv_lora_rank", None))
    return (family.kind, family.without, *(tuple(sorted(map(str, part))) for part in (caches, positions)),
            bool(tables), latent)  # fmt: skip


def one_of_each_kind():
    """The first family, by its name, of every kind that no usual family is of."""
    seen, chosen = {kind_of(name) for name in QUICK}, []
    for name in SERVED:
        kind = kind_of(name)
        if kind not in seen:
            seen.add(kind)
            chosen.append(name)
    return chosen


def pytest_generate_tests(metafunc):
    if metafunc.function in (test_other_families, test_other_families_compacted):
        some = metafunc.config.getoption("one_of_each_kind")
        names = one_of_each_kind() if some else [name for name in SERVED if name not in QUICK]
        compacted = metafunc.function is test_other_families_compacted
        metafunc.parametrize("name", [name for name in names if not (compacted and LISTED[name].compact)])


# what a variant of a family does not pass as a plain host
WITHOUT = {"falcon_alibi": (7,)}
if Version("5.23") > HERE:  # faults of transformers' own that were mended later
    WITHOUT |= {"llama4": (7,), "llama4_text": (7,), "inkling_text": (6,), "deepseek_v4": (4,)}


def test_every_decoder_of_this_transformers_is_in_the_list():
    assert not [name for name, family in LISTED.items() if family is None]
    assert len(SERVED) > 130 and len(TITLES) == len(CHECKS) == 9


def checked(name, number):
    if number not in (*LISTED[name].without, *WITHOUT.get(name, ())):
        CHECKS[number](HOSTS[name]())
        return
    with pytest.raises(Exception):  # noqa: B017  # the plain host fails in ways of its own
        plain_does(HOSTS[name](), TITLES[number])


def beams_score_what_they_give_by_itself(host):
    out = run(host, prompt(45)[0], new=10, num_beams=3, length_penalty=0.0)
    with torch.no_grad():
        steps = torch.stack([host(out.sequences[:, :end]).logits[0, -1] for end in range(45, 55)]).log_softmax(-1)
    total = steps.gather(1, out.sequences[0, 45:, None]).sum()
    torch.testing.assert_close(out.sequences_scores[0], total, atol=1e-2, rtol=0)


def plain_does(host, title):
    """A plain host's call of a kind, against its usual one."""
    options = {"prompt lookup": {"prompt_lookup_num_tokens": 4}, "static caches": {"cache_implementation": "static"}}
    if title == "padded batches":
        ids, mask = prompt(45, 31)
        alone = run(host, ids[1:, 14:], new=10).logits
        torch.testing.assert_close(torch.stack(run(host, ids, mask, new=10).logits)[:, 1], torch.stack(alone)[:, 0])
        return
    if title == "beams":
        beams_score_what_they_give_by_itself(host)
        return
    ids = prompt(15)[0].repeat(1, 3)
    torch.testing.assert_close(
        torch.stack(run(host, ids, new=10, **options[title]).logits), torch.stack(run(host, ids, new=10).logits)
    )


@pytest.mark.parametrize("number", range(9), ids=[check.__name__ for check in CHECKS])
@pytest.mark.parametrize("name", QUICK)
def test_usual_families(name, number):
    checked(name, number)


@pytest.mark.families
@pytest.mark.parametrize("number", range(9), ids=[check.__name__ for check in CHECKS])
def test_other_families(name, number):
    checked(name, number)


def check_compacted(name):
    changes = LOOKING_BACK.get(name)
    pairs_are_compacted_and_read_right(HOSTS[name]() if changes is None else tiny_family(name, **changes))


@pytest.mark.parametrize("name", [name for name in QUICK if name not in NOT_COMPACTED])
def test_usual_families_compacted(name):
    check_compacted(name)


@pytest.mark.families
def test_other_families_compacted(name):
    check_compacted(name)


@pytest.mark.parametrize("name", NOT_COMPACTED)
def test_families_that_are_not_compacted(name):
    host = HOSTS[name]()
    cls = type(host)
    with pytest.raises(InputError, match=f"pairs can be compacted, got {cls.__name__}, which ") as error:
        CompressedHistory(host, modes=[Compact()])
    assert LISTED[name].compact in str(error.value) and "\n" not in str(error.value)
    assert type(host) is cls


@pytest.mark.parametrize("name", REFUSED)
def test_refused_families(name):
    host = HOSTS[name]()
    cls, keys = type(host), set(vars(host))
    with pytest.raises(InputError, match=f"got {cls.__name__}, which ") as error:
        CompressedHistory(host, modes=[Retrieve(1)])
    assert LISTED[name].refused in str(error.value)
    assert type(host) is cls and set(vars(host)) == keys


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text", "granitemoehybrid"])
def test_a_prefill_of_one_column_keeps_padding_out_of_a_recurrence(name):
    host, lengths = HOSTS[name](), (29, 14)
    history = CompressedHistory(host, tiny_crouter(), modes=[], window=8, keep_first=0)
    out = run(host, *prompt(*lengths, seed=997520), new=3, logits_processor=[history])
    for i, length in enumerate(lengths):
        row = out.sequences[i, 29 - length :]
        for step in range(3):
            kept = row[16 : length + step] if i == 0 else row[: length + step]
            with torch.no_grad():
                expected = host(kept[None]).logits[0, -1]
            torch.testing.assert_close(out.logits[step][i], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", MISREAD)
def test_families_that_this_transformers_misreads(name):
    host = HOSTS[name]()
    history = make(host, tiny_crouter())
    with pytest.raises(InputError, match="in two pieces as in one"):
        run(host, prompt(70)[0], new=3, logits_processor=[history])


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_hosts_whose_layers_look_ids_up_take_no_soft_prompts(name):
    with pytest.raises(InputError, match="SoftPrompts: expected a host that reads embeddings alone"):
        make(tiny_family(name, hidden_size_per_layer_input=8), tiny_crouter())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
class TestImages:
    def test_pictures_beside_a_long_prompt_are_refused(self, name):
        host = tiny_family(name)
        history = make(host, tiny_crouter())
        pictures = {"pixel_values": torch.zeros(1, 3, 8, 8)}
        with pytest.raises(InputError, match="pixel_values: expected text alone"):
            run(host, prompt(70)[0], new=3, logits_processor=[history], **pictures)

    def test_a_picture_in_an_earlier_turn_is_refused(self, name):
        host = tiny_family(name)
        history = make(host, tiny_crouter())
        ids = prompt(70)[0].index_fill(1, torch.tensor([66]), IMAGE_ID)
        with pytest.raises(InputError, match="images and sounds are not compressed"):
            run(host, ids, new=3, logits_processor=[history])


class Unknown(LlamaForCausalLM):
    """A user's own class."""


class Forgetful(Unknown):
    """Reads every piece as if nothing was before it."""

    def forward(self, input_ids=None, past_key_values=None, position_ids=None, **options):
        if input_ids is not None and past_key_values is not None and past_key_values.get_seq_length():
            past_key_values.reset()
        return super().forward(input_ids, past_key_values=past_key_values, position_ids=position_ids, **options)


class Ignorant(Unknown):
    """Keeps nothing in the cache that it is given."""

    def forward(self, input_ids=None, past_key_values=None, **options):
        return super().forward(input_ids, **{**options, "use_cache": False})


def unknown(cls):
    torch.manual_seed(0)
    config = tiny_host().config
    host = cls(LlamaConfig(**{**config.to_dict()}))
    host.generation_config.eos_token_id = None
    return host.eval()


class TestUnknownFamilies:
    def test_one_that_reads_like_a_decoder_is_served(self):
        host = unknown(Unknown)
        assert family_of(host) is not None and not is_tested(host)
        history = make(host, tiny_crouter(), copy=False)
        out = run(host, prompt(70)[0], new=5, logits_processor=[history])
        assert_matches_reference(out, (70,), host, tiny_crouter(), history.policy.compressor.projector)

    def test_it_is_tried_once_and_only_where_something_is_compressed(self, monkeypatch):
        host, tried = unknown(Unknown), []
        monkeypatch.setattr(probe, "is_tested", lambda host: tried.append(1) and False)
        history = make(host, tiny_crouter())
        run(host, prompt(12)[0], new=3, logits_processor=[history])
        assert not tried
        forwards = []
        host.model.register_forward_pre_hook(lambda module, args: forwards.append(1))
        run(host, prompt(70)[0], new=3, logits_processor=[history])
        first = len(forwards)
        run(host, prompt(70)[0], new=3, logits_processor=[history])
        assert tried and len(forwards) - first == first - 3  # one whole reading and two pieces

    @pytest.mark.parametrize(
        "cls, words", [(Forgetful, "in two pieces as in one"), (Ignorant, "in two pieces as in one")]
    )
    def test_one_that_does_not_is_refused(self, cls, words):
        host = unknown(cls)
        history = make(host, tiny_crouter())
        with pytest.raises(InputError, match=words):
            run(host, prompt(70)[0], new=3, logits_processor=[history])
        with pytest.raises(InputError, match=words):
            history.score(prompt(70)[0], 3)

    @pytest.mark.parametrize("name", ["jamba", "recurrent_gemma", "zamba"])
    def test_families_that_are_refused_by_name_fail_the_trial_as_well(self, name, monkeypatch):
        monkeypatch.setitem(FAMILIES, name, None)
        with pytest.raises(InputError, match="in two pieces as in one"):
            probe.check_reading(tiny_family(name))

    @pytest.mark.parametrize("name", ["llama", "gemma3n_text", "lfm2", "phi3", "deepseek_v3"])
    def test_families_of_the_list_pass_it(self, name, monkeypatch):
        monkeypatch.setattr(probe, "is_tested", lambda host: False)
        probe.check_reading(tiny_family(name))


def test_a_host_that_stops_storing_is_caught():
    """What the trial cannot see, the count of slots after every prefill does."""
    host = tiny_host()
    history = make(host, tiny_crouter())
    plain = type(host.model).forward

    def forward(input_ids=None, past_key_values=None, **options):
        long = input_ids is None or input_ids.shape[1] > 1
        return plain(host.model, input_ids, past_key_values=past_key_values if long else None, **options)

    host.model.forward = forward
    with pytest.raises(InputError, match="slots in the cache that it was given"):
        run(host, prompt(70)[0], new=5, logits_processor=[history])
    assert (PREFIX, WINDOW) == (3, 8)
