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
DATED = (  # as Llama 3.1's: lines of its own before the system message
    "<|begin|>{% for m in messages %}<|header|>{{ m.role }}<|end_header|>\n\n"
    "{% if m.role == 'system' %}Today: 1 May\n\n{% endif %}{{ m.content }}<|eot|>{% endfor %}"
)
SPECIAL_ROLES = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"  # as Phi-3's
TEXT_ROLES = "{% for m in messages %}#{{ m.role }}#\n{{ m.content }}<|im_end|>\n{% endfor %}"  # as Zephyr's
BARE = (  # as DeepSeek's
    "<|begin|>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<|user|>"
    "{{ m.content }}{% else %}<|assistant|>{{ m.content }}{% endif %}{% endfor %}"
)
WRAPPED = (  # as Llama 2's: text markers alone
    "{% for m in messages %}{% if m.role == 'system' %}[INST]<<SYS>>\n{{ m.content }}\n<</SYS>>\n\n{% else %}"
    "{{ m.content }} [/INST]{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}{% endfor %}"


def chat_tokenizer(template):
    tokenizer = byte_tokenizer(300)
    names = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|end_header|>", "<|eot|>", "<|system|>",
             "<|user|>", "<|assistant|>", "<|end|>"]  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = template
    tokenizer.bos_token = "<|begin|>"
    return tokenizer


def render(tokenizer, *messages):
    turns = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)


TEMPLATES = {
    "chatml": CHATML, "headers": HEADERS, "dated": DATED, "special roles": SPECIAL_ROLES, "text roles": TEXT_ROLES,
    "bare": BARE,
}  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
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
        assert [keep(ids[:n]) for n in (len(turn) + 1, len(ids))] == [len(turn)] * 2
        if template != BARE:  # whose end is the user's marker
            assert keep(ids[: len(turn)]) == len(turn)

    def test_one_that_never_ends_keeps_sinks(self, template):
        tokenizer = chat_tokenizer(template)
        turn = render(tokenizer, ("system", "Answer in one word."))
        end = next(n for n in range(len(turn), 0, -1) if FirstTurn(tokenizer)(turn[:n]) == 4)
        assert end >= len(turn) - 2

    @pytest.mark.parametrize("before", [["<|begin|>"], ["<|begin|>"] * 2, ["\n"], ["<|begin|>", "\n"], [" ", "\n\n"]])
    def test_what_stands_before_it_is_kept_with_it(self, template, before):
        tokenizer = chat_tokenizer(template)
        system = ("system", "Answer in one word.")
        ids, turn = render(tokenizer, system, ("user", "What is that?")), render(tokenizer, system)
        extra = [token for text in before for token in tokenizer.encode(text, add_special_tokens=False)]
        assert FirstTurn(tokenizer)(extra + ids) == len(extra) + len(turn)

    def test_a_long_one(self, template):
        tokenizer = chat_tokenizer(template)
        system = ("system", "Answer in one word. " * 400)
        ids, turn = render(tokenizer, system, ("user", "What?")), render(tokenizer, system)
        assert len(turn) > 5000 and FirstTurn(tokenizer)(ids) == len(turn)

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


@pytest.mark.parametrize("between", ["\n\n", "", "\r\n", " \n", "\n\n\n"])
def test_chatml_by_hand(between):
    tokenizer = chat_tokenizer(CHATML)
    text = "<|im_start|>system\nYou are terse.<|im_end|>" + between
    ids = tokenizer.encode(text + "<|im_start|>user\n" + "long " * 200 + "<|im_end|>", add_special_tokens=False)
    kept = FirstTurn(tokenizer)(ids)
    assert tokenizer.decode(ids[:kept]) == text


def test_text_markers_alone():
    tokenizer = chat_tokenizer(WRAPPED)
    ids = render(tokenizer, ("system", "Answer in one word."), ("user", "What is that?"))
    kept = FirstTurn(tokenizer)(ids)
    assert tokenizer.decode(ids[:kept]) == "[INST]<<SYS>>\nAnswer in one word.\n<</SYS>>\n\n"
    assert FirstTurn(tokenizer)(render(tokenizer, ("user", "What is that?"))) == 4


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_first_turn_of_the_user_keeps_sinks(template):
    tokenizer = chat_tokenizer(template.replace("Be kind", ""))
    ids = render(tokenizer, ("user", "What is that? " * 9), ("assistant", "A test."))
    if template == CHATML:
        ids = ids[ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>")) + 2 :]
    assert FirstTurn(tokenizer)(ids) == 4


@pytest.mark.host
def test_the_real_hosts_template(real_host):
    tokenizer = local_tokenizer(real_host)
    messages = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "word " * 50}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    turn = tokenizer.apply_chat_template(messages[:1], tokenize=True, return_dict=False)
    keep = FirstTurn(tokenizer)
    assert keep(ids) == len(turn) and ids[: len(turn)] == turn
    assert keep([tokenizer.bos_token_id, *ids]) == len(turn) + 1
    by_hand = "<|im_start|>system\nYou are terse.<|im_end|>\n\n<|im_start|>user\nword word<|im_end|>"
    ids = tokenizer.encode(by_hand)
    assert tokenizer.decode(ids[: keep(ids)]) == "<|im_start|>system\nYou are terse.<|im_end|>\n\n"
