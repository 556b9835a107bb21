import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_crouter.cache.prefix import FirstTurn
from hf_crouter.hosts.tokenizers import local_tokenizer
from tests.test_chunking import byte_tokenizer, metaspace_tokenizer

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
HASHES = (  # as Alpaca's: text markers that begin alike
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
)
OWN_TURN = (  # as gpt-oss': a system turn of the template's own, and the system message in a turn behind it
    "<|header|>system<|end_header|>I am kind<|eot|>{% for m in messages %}<|header|>"
    "{{ 'developer' if m.role == 'system' else m.role }}<|end_header|># Text\n\n{{ m.content }}<|eot|>{% endfor %}"
)
PREFIXED = (  # as GLM's: two special tokens before all, and turns that nothing closes
    "<|im_start|><|header|>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
)
PARTS = (  # as those of hosts of images
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}{% endfor %}"


def merging_tokenizer(*corpus):
    """Tokens across white space and marks: a role and what follows it are one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text for text in corpus for _ in range(4)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def chat_tokenizer(template, tokenizer=None):
    tokenizer = tokenizer or byte_tokenizer(300)
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


@pytest.mark.parametrize("template", [WRAPPED, "<|begin|>" + WRAPPED])
def test_text_markers_alone(template):
    tokenizer = chat_tokenizer(template)
    text = "[INST]<<SYS>>\nAnswer in one word.\n<</SYS>>\n\n"
    for before in ("", "<|begin|>", "<|begin|><|begin|>"):
        ids = tokenizer.encode(before + text + "What is that? [/INST]", add_special_tokens=False)
        assert tokenizer.decode(ids[: FirstTurn(tokenizer)(ids)]) == before + text
    assert FirstTurn(tokenizer)(render(tokenizer, ("user", "What is that?"))) == 4


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_first_turn_of_the_user_keeps_sinks(template):
    tokenizer = chat_tokenizer(template.replace("Be kind", ""))
    ids = render(tokenizer, ("user", "What is that? " * 9), ("assistant", "A test."))
    if template == CHATML:
        ids = ids[ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>")) + 2 :]
    assert FirstTurn(tokenizer)(ids) == 4


class TestTextMarkers:
    def test_the_next_turns_marker_is_not_kept(self):
        tokenizer = chat_tokenizer(HASHES)
        tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
        message = "Answer in one word.\n\nNever write ### user: yourself."
        ids = render(tokenizer, ("system", message), ("user", "What is that?"))
        assert tokenizer.decode(ids[: FirstTurn(tokenizer)(ids)]) == f"### system:\n{message}\n\n"

    def test_turns_that_begin_alike_are_told_apart(self):
        tokenizer = chat_tokenizer(HASHES)
        ids = render(tokenizer, ("user", "A long text. " * 99), ("assistant", "Yes."), ("user", "What is that?"))
        assert FirstTurn(tokenizer)(ids) == 4

    @pytest.mark.parametrize(
        "template, merged",
        [(HASHES, ["system:\nYou"]), (TEXT_ROLES, ["#system#\nYou"]), (CHATML, ["system\nYou"]),
         (WRAPPED, ["<<SYS>>\nYou", ".\n<</SYS>>\n\n"])],
        ids=["hashes", "text roles", "chatml", "wrapped"],
    )  # fmt: skip
    @pytest.mark.parametrize("message", ["You are terse.", "You. " * 500])
    def test_tokens_that_take_in_neighbours(self, template, merged, message):
        tokenizer = chat_tokenizer(template, merging_tokenizer(*merged))
        ids, turn = (render(tokenizer, ("system", message), *rest) for rest in ([("user", "Hi")], []))
        tokens = set(map(tokenizer.decode, ids))
        assert tokens >= set(merged) or message != "You are terse."
        assert FirstTurn(tokenizer)(ids) == len(turn) and ids[: len(turn)] == turn

    def test_words_that_take_a_space_at_a_texts_start(self):
        tokenizer = chat_tokenizer(TEXT_ROLES, metaspace_tokenizer())
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        text = "#system#\nYou are terse.<|im_end|>\n"
        alone, behind = (tokenizer.encode(before + text, add_special_tokens=False) for before in ("", "<|begin|>"))
        rest = tokenizer.encode("#user#\nHi<|im_end|>\n", add_special_tokens=False)
        assert alone != behind[1:]
        assert FirstTurn(tokenizer)(alone + rest) == len(alone)
        assert FirstTurn(tokenizer)(behind + rest) == len(behind)


class TestTurnsOfTheTemplatesOwn:
    def test_both_are_kept(self):
        tokenizer = chat_tokenizer(OWN_TURN)
        system, user = ("system", "Answer in one word."), ("user", "What is that?")
        ids, turns = render(tokenizer, system, user), render(tokenizer, system)
        assert FirstTurn(tokenizer)(ids) == len(turns) and ids[: len(turns)] == turns
        ids = render(tokenizer, user, user)
        own = "<|header|>system<|end_header|>I am kind<|eot|>"
        assert tokenizer.decode(ids[: FirstTurn(tokenizer)(ids)]) == own

    def test_each_alone(self):
        tokenizer = chat_tokenizer(OWN_TURN)
        for role in ("system", "developer"):
            text = f"<|header|>{role}<|end_header|>Be brief<|eot|>"
            ids = tokenizer.encode(text + "<|header|>user<|end_header|>Hi<|eot|>", add_special_tokens=False)
            assert tokenizer.decode(ids[: FirstTurn(tokenizer)(ids)]) == text


@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.parametrize(
    "start", ["", "{% if messages[0].role != 'system' %}{{ raise_exception('none') }}{% endif %}"]
)
def test_what_a_template_begins_with_may_be_absent_or_doubled(times, start):
    tokenizer = chat_tokenizer(start + PREFIXED)
    ids, turn = (render(tokenizer, ("system", "Be brief."), *rest) for rest in ([("user", "Hi there")], []))
    prefix = tokenizer.encode("<|im_start|><|header|>", add_special_tokens=False)
    assert ids[:2] == prefix
    assert FirstTurn(tokenizer)(prefix * times + ids[2:]) == 2 * times + len(turn) - 2


def test_templates_of_parts():
    tokenizer = chat_tokenizer(PARTS)
    by_parts = [(role, [{"type": "text", "text": text}]) for role, text in (("system", "Be brief."), ("user", "Hi"))]
    assert FirstTurn(tokenizer)(render(tokenizer, *by_parts)) == len(render(tokenizer, by_parts[0]))


@pytest.mark.parametrize(
    "system, user",
    [
        ("<|begin|>{{ m.content }}", "<|header|>user\n{{ m.content }}"),  # bare, and words in the user's marker
        ("<|header|>{{ m.content }}<|eot|>", "<|user|>{{ m.content }}<|eot|>"),  # no role
        ("<|system|><|eot|>{{ m.content }}<|eot|>", "<|user|><|eot|>{{ m.content }}<|eot|>"),  # closed as the role is
        ("<|header|>system\n{{ m.content }}\n", "<|header|>user\n{{ m.content }}\n"),  # closed by the next turn
    ],
)
def test_other_markers(system, user):
    template = "{% for m in messages %}{% if m.role == 'system' %}" + system + "{% else %}" + user
    tokenizer = chat_tokenizer(template + "{% endif %}{% endfor %}")
    turn, rest = (render(tokenizer, message) for message in (("system", "Be brief."), ("user", "Hi " * 30)))
    assert FirstTurn(tokenizer)(turn + rest) == len(turn) and FirstTurn(tokenizer)(rest) == 4


@pytest.mark.parametrize("text", ["<|im_start|>systemic faults\nx<|im_end|>\n", "system\nof many words<|im_end|>\n"])
def test_text_that_looks_like_a_system_turn(text):
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.bos_token = "<|im_start|>"
    assert FirstTurn(tokenizer)(tokenizer.encode(text + "and more", add_special_tokens=False)) == 4


def test_special_tokens_that_begin_alike():
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_"]}, replace_extra_special_tokens=False)
    ids, turn = (render(tokenizer, ("system", "Be brief."), *rest) for rest in ([("user", "Hi")], []))
    assert FirstTurn(tokenizer)(ids) == len(turn)


def test_a_first_turn_of_the_assistant_keeps_sinks():
    tokenizer = chat_tokenizer(BARE)
    assert FirstTurn(tokenizer)(render(tokenizer, ("assistant", "Welcome. " * 50), ("user", "Hi"))) == 4


def test_added_tokens_of_white_space():
    tokenizer = chat_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content }}\n\n"))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("    ", "\n\n")])
    text = "    \n\n<|im_start|>system\nYou are terse.\n\nAnd kind.<|im_end|>\n\n"
    ids = tokenizer.encode(text + "<|im_start|>user\nHi<|im_end|>", add_special_tokens=False)
    assert tokenizer.decode(ids[: FirstTurn(tokenizer)(ids)]) == text


@pytest.mark.parametrize("template", [CHATML, HASHES, BARE])
def test_a_million_tokens_take_few_conversions(template, monkeypatch):
    tokenizer = chat_tokenizer(template)
    keep, decode, seen = FirstTurn(tokenizer), tokenizer.decode, []
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: seen.append(len(ids)) or decode(ids, **options))
    start, letter = render(tokenizer, ("system", "Be brief.")), tokenizer.encode("x")
    start = start[: -len(tokenizer.encode("<|im_end|>\n"))] if template == CHATML else start
    for ids in ([*start, *letter * 1_000_000], tokenizer.encode("\n") * 1_000_000):
        assert keep(ids) in (4, len(ids))
    assert len(seen) < 200 and sum(seen) < 2_000_000


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
