import pytest
from transformers import BloomConfig, Gemma3Config, LlamaConfig

from hf_crouter.hosts.positions import max_positions
from tests.tiny import tiny_host


def test_positions_of_a_host_are_those_of_its_configuration():
    host = tiny_host()
    assert max_positions(host) == max_positions(host.config) == host.config.max_position_embeddings


def test_a_nested_configuration_gives_its_text_models():
    assert max_positions(Gemma3Config(text_config={"max_position_embeddings": 77})) == 77


@pytest.mark.parametrize("config", [BloomConfig(), LlamaConfig(max_position_embeddings=0)], ids=["none", "zero"])
def test_none_where_no_limit_is_named(config):
    assert max_positions(config) is None
