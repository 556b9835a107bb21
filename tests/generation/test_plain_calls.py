"""What transformers' own generation tests call, while a history is attached and nothing is compressed.

Every output, of every option, is exactly the plain host's.
"""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.utils import ModelOutput

from hf_crouter.history import attach

from ..hosts.tiny_families import tiny_family
from ..tiny import prompt

torch.set_num_threads(1)

FAMILIES = ("llama", "gemma3_text", "mistral", "gpt2", "gpt_oss", "bloom", "lfm2", "qwen3_5_text")
ALL = {
    "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": True,
    "output_hidden_states": True,
}  # fmt: skip
STATEFUL = ("qwen3_5_text",)  # transformers refuses assisted decoding for them


def pair(family):
    """Two equal hosts with eager attention, which can give its weights."""
    hosts = [tiny_family(family) for _ in range(2)]
    for host in hosts:
        host.set_attn_implementation("eager")
    return hosts


def right(length):
    ids, mask = prompt(length, length - 4)
    return ids.flip(1), mask.flip(1)


def holes(length):
    ids, mask = prompt(length, length)
    mask[0, 3:5] = 0
    return ids, mask


def same(found, expected, where=""):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, ModelOutput | dict):
        assert set(found) == set(expected), where
        for key in expected:
            same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, f"{where}[{number}]")
    elif isinstance(expected, DynamicCache):
        assert len(found.layers) == len(expected.layers)
        for one, other in zip(found.layers, expected.layers, strict=True):
            keys, others = getattr(one, "keys", None), getattr(other, "keys", None)
            assert (keys is None) == (others is None) and (keys is None or torch.equal(keys, others)), where


def compared(family, inputs, **options):
    """The same call of a plain host and of one with a history attached."""
    host, plain = pair(family)
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    torch.manual_seed(0)
    expected = plain.generate(**inputs(plain), **copy.deepcopy(options))
    with attach(host):
        torch.manual_seed(0)
        same(host.generate(**inputs(host), **copy.deepcopy(options)), expected)


def ids_and_mask(ids, mask):
    return lambda host: {"input_ids": ids.clone(), "attention_mask": mask.clone()}


PROMPTS = {
    "one": ids_and_mask(*prompt(15)),
    "left-padded": ids_and_mask(*prompt(15, 9)),
    "right-padded": ids_and_mask(*right(15)),
    "holes": ids_and_mask(*holes(15)),
    "no mask": lambda host: {"input_ids": prompt(15)[0]},
    "a pad token and no mask": lambda host: {"input_ids": prompt(15)[0].index_fill(1, torch.tensor([6]), 0)},
    "embeddings": lambda host: {"inputs_embeds": host.get_input_embeddings()(prompt(15)[0]).detach()},
    "embeddings and ids": lambda host: {
        "inputs_embeds": host.get_input_embeddings()(prompt(15)[0]).detach(),
        "input_ids": prompt(15)[0],
    },
    "embeddings and a mask": lambda host: {
        "inputs_embeds": host.get_input_embeddings()(prompt(15, 9)[0]).detach(),
        "attention_mask": prompt(15, 9)[1],
    },
    "nothing": lambda host: {},
}

WAYS = {
    "greedy": {},
    "greedy, all outputs": ALL,
    "greedy without cache, all outputs": {**ALL, "use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.7},
    "sampling, all outputs": {**ALL, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 2},
    "beams, all outputs": {**ALL, "num_beams": 2, "num_return_sequences": 2},
    "beams without cache, all outputs": {**ALL, "num_beams": 2, "use_cache": False},
    "sampled beams, all outputs": {**ALL, "num_beams": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "bad_words_ids": [[5]]},
    "guidance": {"guidance_scale": 1.5},
    "no new logits": {"max_new_tokens": 1, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ways(family, way):
    compared(family, PROMPTS["left-padded"], **WAYS[way])


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_prompts(family, kind):
    compared(family, PROMPTS[kind], return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {**ALL, "prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in STATEFUL])
def test_prompt_lookup(family, options):
    compared(family, PROMPTS["one"], **options)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_assistants(family):
    host, plain = pair(family)
    assistant = tiny_family(family, seed=2)
    options = {**prompt_of(15), "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    expected = plain.generate(**options, assistant_model=assistant)
    with attach(host):
        same(host.generate(**options, assistant_model=assistant), expected)


def prompt_of(length):
    ids, mask = prompt(length)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "gpt_oss"])
def test_static_cache(family):
    compared(family, PROMPTS["left-padded"], cache_implementation="static", return_dict_in_generate=True)


@pytest.mark.parametrize("kind", ["ids", "only the new ids", "embeddings"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_going_on_from_a_cache(family, kind):
    host, plain = pair(family)

    def turns(host):
        ids, mask = prompt(12)
        first = host.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        whole = torch.cat([first.sequences, prompt(3, seed=5)[0]], 1)
        if kind == "embeddings":
            inputs = {"inputs_embeds": host.get_input_embeddings()(whole).detach()}
        else:
            inputs = {"input_ids": whole if kind == "ids" else whole[:, -4:]}
        return host.generate(
            **inputs, attention_mask=torch.ones_like(whole), max_new_tokens=4, do_sample=False,
            return_dict_in_generate=True, output_logits=True, past_key_values=first.past_key_values,
        )  # fmt: skip

    expected = turns(plain)
    with attach(host):
        same(turns(host), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beams_of_a_cache_that_is_filled(family):
    host, plain = pair(family)

    def call(host):
        ids, mask = prompt(12, 12)
        cache = DynamicCache(config=host.config)
        with torch.no_grad():
            host(ids[:, :6], past_key_values=cache, use_cache=True)
        return host.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=True)

    torch.manual_seed(0)
    expected = call(plain)
    with attach(host):
        torch.manual_seed(0)
        same(call(host), expected)
