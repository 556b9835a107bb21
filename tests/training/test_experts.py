import argparse
import ast
import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from eval.routing import host_experts
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.data.prepare import prepare
from hf_crouter.data.split import SplitRules
from hf_crouter.data.tokens import TokenArray
from hf_crouter.errors import InputError, MismatchError
from hf_crouter.hosts.loading import load_host
from hf_crouter.routing.adapters import AdapterStack
from hf_crouter.routing.experts import Expert, ExpertSet
from hf_crouter.routing.router import Router
from hf_crouter.training.experts import (
    ExpertArguments,
    HostLoss,
    chunk_latents,
    cut,
    host_nll,
    host_tokens,
    join,
    load_models,
    lora,
    read_domain,
    route_domains,
    select,
    train_expert,
)
from hf_crouter.training.reconstruct import ReconstructArguments, train_reconstruction

from ..data.samples import LIBRARY, byte_tokenizer
from ..tiny import tiny_host
from ..trained_crouter import make_tokenizer
from .prepared import SOURCES

LENGTH = 64
CONFIG = [
    f"chunk_length={LENGTH}", "num_latents=2", "latent_size=24", "embedding_size=128", "hidden_size=48",
    "intermediate_size=64", "num_attention_heads=2", "num_encoder_layers=1", "num_decoder_layers=1",
]  # fmt: skip
KINDS = ("code", "prose")


def kinds(text):
    """A module without its docstrings, and the docstrings."""
    tree, prose = ast.parse(text), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            prose.append(ast.get_docstring(node))
            node.body = node.body[1:] or [ast.Pass()]
    return {"code": ast.unparse(tree)[:20000], "prose": "\n\n".join(prose)[:20000]}


@dataclass(frozen=True)
class World:
    """A crouter and a host that know nothing of domains, prepared data by kind, and a set with an expert for each."""

    root: Path
    records: dict[str, dict]

    @property
    def crouter(self):
        return self.root / "run" / "crouter"

    @property
    def host(self):
        return self.root / "tiny-host"

    @property
    def experts(self):
        return self.root / "experts"

    def data(self, kind):
        return self.root / "data" / kind

    def arguments(self, kind="code", **changes):
        given = {"crouter": str(self.crouter), "host": str(self.host), "data": str(self.data(kind)),
                 "experts": str(self.experts), **QUICK, **changes}  # fmt: skip
        return ExpertArguments(**given)

    def models(self):
        return load_models(self.arguments())

    def held_out(self, kind):
        return TokenArray.load(self.data(kind) / "files.safetensors")


TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "output_proj"]
QUICK = {"compressor_steps": 120, "host_steps": 60, "compressor_learning_rate": 1e-2,
         "compressor_targets": TARGETS, "host_learning_rate": 5e-3,
         "compressor_batch_size": 16, "host_batch_size": 4, "window": 64, "calibration_chunks": 48,
         "warmup_steps": 5, "log_every": 50}  # fmt: skip


@functools.cache
def world() -> World:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # far faster than many threads on matrices this small
    root = Path(tempfile.mkdtemp(prefix="experts-"))
    texts = {}
    for name in SOURCES:
        if (LIBRARY / f"{name}.py").exists():
            for kind, text in kinds((LIBRARY / f"{name}.py").read_text(encoding="utf-8")).items():
                if len(text) > 600:
                    texts[kind, name] = text
                    path = root / "texts" / kind / f"{name}.txt"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8")
    tokenizer = make_tokenizer(300, text="".join(texts.values()))
    tokenizer.save_pretrained(root / "tokenizer")
    tiny_host(vocab_size=len(tokenizer)).save_pretrained(root / "tiny-host")
    tokenizer.save_pretrained(root / "tiny-host")
    rules = SplitRules(files_share=0.25, calibration_share=0.2)
    for name, parts in (("code", ["code"]), ("prose", ["prose"]), ("both", KINDS)):
        specs = [f"text-files:{root / 'texts' / part}" for part in parts]
        prepare(specs, tokenizer, root / "data" / name, rules=rules, workers=1, progress=False)
    train_reconstruction(
        ReconstructArguments(
            output=str(root / "run"), data=str(root / "data" / "both"), tokenizer=str(root / "tokenizer"),
            config=CONFIG, steps=20, batch_size=16, warmup_steps=10, learning_rate=1e-2,
        )
    )  # fmt: skip
    made = World(root, {})
    models = made.models()
    before = snapshot(models)
    for kind in KINDS:
        made.records[kind] = train_expert(kind, made.arguments(kind), models)
    made.records["untouched"] = {"same": snapshot(models) == before}
    torch.set_num_threads(threads)
    return made


def snapshot(models):
    """Everything that training must leave as it was."""
    return [
        (name, value.detach().numpy().tobytes(), value.requires_grad, model.training)
        for model in (models.crouter, models.host)
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    ]


def test_both_adapters_help_on_documents_kept_out():
    for kind in KINDS:
        found = world().records[kind]["held_out"]
        assert found["residual"]["adapter"] < found["residual"]["base"] - 0.02
        assert found["host_loss"]["adapter"] < found["host_loss"]["base"] - 0.2
        assert found["documents"] >= 2 and found["chunks"] > 10 and 0 <= found["tra"]["base"] <= 1


def test_the_models_come_back_as_they_were():
    assert world().records["untouched"]["same"]


def test_a_centroid_is_of_whole_chunks_where_there_are_any():
    models, ids = world().models(), np.arange(3 * LENGTH + 6, dtype=np.uint16) % 100
    starts = np.array([0, 5, 2 * LENGTH + 6, 3 * LENGTH + 6])  # a separator ends each document
    tokens = TokenArray(ids, starts, ("a", "b", "c"), ("a", "b", "c"), 0, 200)
    whole = torch.from_numpy(ids[5 : 5 + 2 * LENGTH].astype(np.int64)).view(2, LENGTH)
    with torch.no_grad():
        assert torch.allclose(chunk_latents(models.crouter, tokens, 9, 4), models.crouter.encode(whole), atol=1e-5)
        short = TokenArray(ids[:12], np.array([0, 5, 12]), ("a", "b"), ("a", "b"), 0, 200)
        alone = [
            models.crouter.encode(torch.from_numpy(ids[a:b].astype(np.int64))[None]) for a, b in ((0, 4), (5, 11))
        ]
        assert torch.allclose(chunk_latents(models.crouter, short, 9, 4), torch.cat(alone), atol=1e-5)


def test_an_expert_on_disk_is_whole_and_names_no_path():
    expert = Expert.load(world().experts / "prose")
    assert expert.config.host_name == "tiny-host" and expert.centroid is not None
    assert list(expert.calibration.reconstruction_nlls) == [8, 16, 32, 64]
    profiles = [expert.profile for expert in ExpertSet.load(world().experts)]
    assert all(profile and set(profile.margins) == {8, 16, 32, 64} for profile in profiles)
    record = expert.config.training
    assert record["compressor"]["steps"] == 120 and record["host"]["tokens"] == 60 * 4 * 64
    assert record["arguments"]["compressor_rank"] == 16 and "data" not in record["arguments"]
    for path in world().experts.rglob("*"):
        assert not path.name.startswith(".")
        if path.is_file():
            assert str(world().root).encode() not in path.read_bytes(), path


def test_peft_reads_the_adapter_and_computes_what_the_stack_does():
    folder, ids = world().experts / "code", torch.arange(40)[None]
    host = load_host(world().host)[0]
    stack = AdapterStack(host, {"code": Expert.load(folder).host})
    with torch.no_grad(), stack.using([0]):
        expected = host(ids).logits
    peft = PeftModel.from_pretrained(load_host(world().host)[0], str(folder / "host")).eval()
    with torch.no_grad():
        assert torch.allclose(peft(ids).logits, expected, atol=1e-4)


def test_held_out_documents_go_to_their_expert():
    models = world().models()
    router = Router(models.crouter, ExpertSet.load(world().experts), fewest=4)
    texts = {**{kind: world().held_out(kind) for kind in KINDS}, "other": world().held_out("code")}
    found = route_domains(models, router, texts, limit=60)
    router.remove()
    for kind in KINDS:
        domain = found[kind]
        assert domain.accuracy > 0.75 and sum(domain.routes.values()) == domain.pieces > 20
        assert domain.loss["own"] < domain.loss["base"] and domain.loss["routed"] < domain.loss["base"]
        assert domain.loss["oracle"] <= min(domain.loss[key] for key in ("base", "routed", "own")) + 1e-6
    # texts of no expert should go to none
    assert found["other"].accuracy == found["code"].routes.get("", 0) / found["code"].pieces
    assert "own" not in found["other"].loss and found["other"].loss["base"] == found["code"].loss["base"]
    assert found["other"].loss["oracle"] == found["code"].loss["oracle"]  # the best of all, whatever the name


def test_what_a_set_is_worth_is_measured_and_written(tmp_path, monkeypatch):
    """`python -m eval.run experts`; here because the world is."""
    monkeypatch.setenv("CROUTER_RESULTS", str(tmp_path))
    words = ["--host", str(world().host), "--crouter", str(world().crouter), "--experts", str(world().experts),
             "--limit", "12", "--data", *(f"{kind}={world().data(kind)}" for kind in KINDS)]  # fmt: skip
    parser = argparse.ArgumentParser()
    host_experts.configure(parser)
    host_experts.run(parser.parse_args([*words, f"other={world().data('both')}"]))
    result = json.loads((tmp_path / "experts-tiny-host.json").read_text())
    metrics = result["metrics"]
    assert result["config"] == {"limit": 12, "experts": list(KINDS)}
    for name in (*KINDS, "other"):
        losses = {key: metrics[f"{name}.{key}"] for key in ("base", "routed", "oracle")}
        assert losses["oracle"] <= min(losses.values()) + 1e-6 and metrics[f"{name}.chunks"] == 12
        assert 0 <= metrics[f"{name}.accuracy"] <= 1
        share = (losses["base"] - losses["routed"]) / (losses["base"] - losses["oracle"])
        assert metrics[f"{name}.oracle_share"] == pytest.approx(share, abs=1e-3) and share <= 1
    assert "other.own" not in metrics
    for key in ("base", "routed", "own", "oracle"):  # over the kinds that have an expert
        mean = sum(metrics[f"{kind}.{key}"] for kind in KINDS) / len(KINDS)
        assert metrics[f"known.{key}"] == pytest.approx(mean, abs=1e-5)
    with pytest.raises(InputError, match="--data: expected NAME=PATH, got 'odd'"):
        host_experts.run(parser.parse_args([*words, "odd"]))


def test_the_same_seed_trains_the_same_expert(tmp_path):
    sums = []
    for name in ("a", "b"):
        arguments = world().arguments(experts=str(tmp_path / name), compressor_steps=2, host_steps=2)
        train_expert("code", arguments, world().models())
        sums.append(json.loads((tmp_path / name / "code/expert.json").read_text())["sha256"])
    assert sums[0] == sums[1]
    train_expert("code", replace(arguments, experts=str(tmp_path / "c"), seed=1))
    assert json.loads((tmp_path / "c/code/expert.json").read_text())["sha256"] != sums[0]


def test_compiled_layers_train_the_same_expert(tmp_path, quickly_compiled):
    found = []
    for name in ("plain", "compiled"):
        arguments = world().arguments(experts=str(tmp_path / name), compressor_steps=3, host_steps=3)
        record = train_expert("code", replace(arguments, compile=name == "compiled"), world().models())
        found.append([record["compressor"]["final"]["loss"], record["host"]["final"]["loss"]])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_bfloat16_trains_on_a_host_in_bfloat16(tmp_path):
    arguments = world().arguments(experts=str(tmp_path / "e"), compressor_steps=4, host_steps=20, bf16=True)
    models = load_models(arguments)
    before = {name: value.clone() for name, value in models.host.state_dict().items()}
    loss = train_expert("code", arguments, models)["held_out"]["host_loss"]
    assert models.host.dtype == torch.bfloat16 and loss["adapter"] < loss["base"]
    assert all(torch.equal(value, before[name]) for name, value in models.host.state_dict().items())


TWO = """
import json, sys, torch
from hf_crouter.training.experts import ExpertArguments, load_models, train_expert
torch.set_num_threads(1)
arguments = ExpertArguments(**json.loads(sys.argv[1]))
models = load_models(arguments)
for name in ("one", "two"):
    record = train_expert(name, arguments, models)
    assert record["host"]["processes"] == 2
"""


@pytest.mark.slow
def test_two_processes_train_one_expert_after_the_other(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    arguments = world().arguments(experts=str(tmp_path / "e"), compressor_steps=3, host_steps=3)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "two.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, json.dumps(asdict(arguments))], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    experts = ExpertSet.load(tmp_path / "e")
    assert experts.names == ("one", "two") and (tmp_path / "e" / "evidence.safetensors").exists()
    assert experts["one"].compressor.checksum == experts["two"].compressor.checksum


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"compressor_steps": 0}, "--compressor-steps: expected more than 0, got 0"),
     ({"host_seconds": 3.0}, "--host-steps, --host-seconds: expected one of them"),
     ({"host_rank": 0}, "--host-rank"), ({"ragged_share": 2.0}, "--ragged-share"), ({"window": 1}, "--window"),
     ({"window": 1000}, "the host's 256 positions"), ({"host_targets": []}, "--host-targets"),
     ({"data": "nowhere"}, "no such token file"), ({"host": ""}, "--host: expected"),
     ({"compressor_targets": ["nonsense"]}, "expected linear layers nonsense"),
     ({"host_targets": ["embed_tokens"]}, "got a Embedding at"),
     ({"crouter": "nowhere/at/all"}, "no such crouter folder")],
)  # fmt: skip
def test_bad_arguments_are_one_line_and_leave_nothing(tmp_path, changes, text):
    experts = tmp_path / "experts"
    arguments = replace(world().arguments(experts=str(experts), compressor_steps=1, host_steps=1), **changes)
    with pytest.raises(InputError, match="expected|no such") as error:
        train_expert("code", arguments)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not experts.exists()


@pytest.mark.parametrize(("name", "text"), [("code", "an expert of this name already"), ("../x", "expected a name")])
def test_names_that_cannot_be_added(name, text):
    with pytest.raises(InputError, match=text):
        train_expert(name, world().arguments())


def test_another_crouter_or_host_is_refused_before_training():
    models = world().models()
    other = replace(models, crouter=load_crouter(world().crouter)[0])
    with torch.no_grad():
        other.crouter.slots.add_(1.0)
    with pytest.raises(MismatchError, match="expected the crouter"):
        train_expert("third", world().arguments(), other)
    other = replace(models, host=tiny_host("qwen2", vocab_size=len(models.host_tokenizer)))  # no twin
    with pytest.raises(MismatchError, match="expected the host"):
        train_expert("third", world().arguments(), other)
    assert ExpertSet.load(world().experts).names == KINDS


def test_layers_come_back_when_training_fails():
    host = tiny_host()
    before = {name: id(value) for name, value in host.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), lora(host, 2, 4.0, ["q_proj"]):
        assert sum(p.requires_grad for p in host.parameters()) == 4
        raise RuntimeError("stop")
    assert {name: id(value) for name, value in host.named_parameters()} == before
    assert all(p.requires_grad for p in host.parameters()) and not hasattr(host, "peft_config")


def test_few_documents_kept_out_are_filled_up_from_training(tmp_path):
    models = world().models()
    whole = read_domain(world().data("code"), models)
    train = TokenArray.load(world().data("code") / "train.safetensors")
    calibration = TokenArray.load(world().data("code") / "calibration.safetensors")
    assert {*whole.train.names, *whole.held_out.names} == {*train.names, *calibration.names}
    assert not {*whole.train.names} & {*whole.held_out.names} and len(whole.held_out.names) >= 8
    assert {*calibration.names} <= {*whole.held_out.names}
    for name, _, ids in whole.train.documents():
        assert np.array_equal(ids, next(i for n, _, i in train.documents() if n == name))
    select(train, np.arange(3)).save(tmp_path / "train.safetensors")
    assert len(read_domain(tmp_path, models).held_out.names) == 1  # at most half
    select(train, np.arange(1)).save(tmp_path / "train.safetensors")
    with pytest.raises(InputError, match="at least 2 documents"):
        read_domain(tmp_path, models)


def test_a_host_with_another_tokenizer_reads_the_same_text():
    models = replace(world().models(), host_tokenizer=byte_tokenizer())
    tokens = world().held_out("prose")
    found = host_tokens(tokens, models)
    assert found.names == tokens.names and found.vocab_size == 257
    for (_, _, own), (_, _, other) in zip(tokens.documents(), found.documents(), strict=True):
        assert models.crouter_tokenizer.decode(own) == models.host_tokenizer.decode(other)


def test_losses_of_texts_are_those_of_one_at_a_time():
    host, tokens = tiny_host(vocab_size=300), world().held_out("prose")
    pieces = [piece[: 5 + 9 * i] for i, piece in enumerate(cut(tokens, 40, 3, 40)[0])]
    nll, counts = host_nll(host, pieces, rows=2)
    for piece, total, count in zip(pieces, nll, counts, strict=True):
        mean = HostLoss(host)(piece[None])["loss"].item()
        assert count == len(piece) - 1 and total.item() == pytest.approx(mean * count.item(), rel=1e-4)


def test_pieces_are_spread_and_whole():
    tokens = join([world().held_out(kind) for kind in KINDS])
    pieces, documents = cut(tokens, 16, 10, 16)
    for piece, number in zip(pieces, documents, strict=True):
        document = tokens.ids[tokens.starts[number] : tokens.starts[number + 1]].tolist()
        assert piece.tolist() in [document[i : i + 16] for i in range(0, len(document), 16)]
    assert len(pieces) == 10 and all(len(piece) == 16 for piece in pieces)
    assert len(cut(tokens, 16, 10**6, 1)[0]) == len(tokens.chunks(16)[0])
    assert tokens.ids.tolist() == [*world().held_out("code").ids, *world().held_out("prose").ids]
    assert len(tokens.starts) == len(tokens.names) + 1 and tokens.starts[-1] == len(tokens)
