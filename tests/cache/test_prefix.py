import pytest

from hf_crouter.cache.prefix import FirstTurn
from hf_crouter.hosts.tokenizers import local_tokenizer
from tests.test_chunking import byte_tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
HEADERS = "<|begin|>{% for m in messages %}<|header|>{{ m.role }}<|end_header|>\n\n{{ m.content }}<|eot|>{% endfor %}"
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}{% endfor %}"


def chat_tokenizer(template):
    tokenizer = byte_tokenizer(300)
    names = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|end_header|>", "<|eot|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = template
    return tokenizer


def render(tokenizer, *messages):
    turns = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)


@pytest.mark.parametrize("template", [CHATML, HEADERS], ids=["chatml", "headers"])
class TestSystemTurn:
    def test_is_kept_whole(self, template):
        tokenizer = chat_tokenizer(template)
        system = ("system", "Answer in one word.")
        ids, turn = (
            render(tokenizer, system, ("user", "What is that?"), ("assistant", "A test.")),
            render(tokenizer, system),
        )
        keep = FirstTurn(tokenizer)
        assert ids[: len(turn)] == turn
        assert [keep(ids[:n]) for n in (len(turn), len(turn) + 1, len(ids))] == [len(turn)] * 3

    def test_is_not_cut_before_it_ends(self, template):
        tokenizer = chat_tokenizer(template)
        turn = render(tokenizer, ("system", "Answer in one word."))
        assert FirstTurn(tokenizer)(turn[:-1]) is None

    def test_other_texts_keep_sinks(self, template):
        tokenizer = chat_tokenizer(template)
        assert FirstTurn(tokenizer)(tokenizer.encode("def f(x): return x")) == 4


def test_a_system_turn_that_the_template_adds_itself():
    tokenizer = chat_tokenizer(CHATML)
    ids = render(tokenizer, ("user", "Hi"))
    kept = FirstTurn(tokenizer)(ids)
    assert tokenizer.decode(ids[:kept]) == "<|im_start|>system\nBe kind<|im_end|>\n"


@pytest.mark.parametrize("template", [NO_SYSTEM, None])
def test_templates_without_a_system_turn_keep_sinks(template):
    tokenizer = chat_tokenizer(template)
    assert FirstTurn(tokenizer)(tokenizer.encode("<|im_start|>system\nx")) == 4
    assert FirstTurn()([1] * 10) == 4


def test_no_local_tokenizer(tmp_path):
    assert local_tokenizer("") is None and local_tokenizer(str(tmp_path)) is None
    byte_tokenizer(300).save_pretrained(tmp_path)
    assert len(local_tokenizer(str(tmp_path))) == 300
