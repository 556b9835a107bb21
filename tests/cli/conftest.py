import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_crouter.compressors.projector import new_projector
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.hosts.loading import load_host

from ..trained_crouter import make_tokenizer, trained_crouter

TEMPLATE = "{% for m in messages %}<|end|>{{ m['role'] }} {{ m['content'] }}{% endfor %}<|end|>"


@pytest.fixture
def crouter(tmp_path):
    """A crouter's folder of the test's own."""
    return Path(shutil.copytree(trained_crouter(), tmp_path / "crouter"))


@pytest.fixture(scope="session")
def tiny_host(tmp_path_factory):
    """An untrained Llama with the crouter's tokenizer."""
    folder = tmp_path_factory.mktemp("hosts") / "tiny-host"
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pair(crouter, tiny_host):
    """Folders of a crouter and of a host that have a projector for each other."""
    model, tokenizer = load_crouter(crouter)
    host, host_tokenizer = load_host(tiny_host)
    torch.manual_seed(0)
    projector = new_projector(host, model, hidden_size=32, host_tokenizer=host_tokenizer, crouter_tokenizer=tokenizer)
    projector.save(crouter / "projectors" / "tiny-host")
    return crouter, tiny_host
