import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_crouter.errors import InputError
from hf_crouter.training import loop
from hf_crouter.training.checkpointing import latest_checkpoint
from hf_crouter.training.loop import Batch, LoopArguments, LoopResult, compiled_layers, make_accelerator, run_loop

from ..tiny import prompt, tiny_host

WIDTH, ROWS = 6, 4


class Toy(nn.Module):
    """A matrix for Muon and an offset for AdamW that learn to copy."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.offset = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        loss = (self.matrix(x) + self.offset - x).square().mean()
        return {"loss": loss, "size": x.abs().mean()}


def toy():
    torch.manual_seed(0)
    return Toy()


def batch(index):
    generator = torch.Generator().manual_seed(1000 + index)
    return Batch((torch.randn(ROWS, WIDTH, generator=generator),), ROWS * WIDTH)


def train(output, module=None, batches=batch, **options):
    arguments = LoopArguments(
        **{"output": str(output), "batch_size": ROWS, "log_every": 1, "warmup_steps": 3, **options}
    )
    module = module or toy()
    result = run_loop(module, batches, arguments, make_accelerator(arguments),
                      positions_per_sequence=WIDTH, title="toy")  # fmt: skip
    return module, result


def read_log(output):
    return [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]


def curve(output):
    return [(row["step"], row["tokens"], row["rate"], row["loss"], row["size"]) for row in read_log(output)]


def interrupted_at(number, error=KeyboardInterrupt):
    def batches(index):
        if index == number:
            raise error
        return batch(index)

    return batches


@pytest.mark.parametrize(
    "box", [{}, {"steps": 1, "tokens": 1}, {"steps": 1, "seconds": 1.0}, {"steps": 1, "tokens": 1, "seconds": 1.0}]
)
def test_exactly_one_box(tmp_path, box):
    with pytest.raises(InputError, match="expected exactly one of --steps, --tokens and --seconds"):
        train(tmp_path / "out", **box)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"tokens": -5}, {"seconds": 0.0}, {"seconds": math.nan},
                                   {"steps": 1, "batch_size": 0}, {"steps": 1, "log_every": 0}])  # fmt: skip
def test_a_box_is_positive(tmp_path, wrong):
    with pytest.raises(InputError, match="expected more than 0"):
        train(tmp_path, **wrong)


def test_a_box_of_steps_and_its_last_step_is_logged(tmp_path):
    module, result = train(tmp_path, steps=7, log_every=5)
    assert (result.steps, result.tokens, result.processes) == (7, 7 * ROWS * WIDTH, 1)
    assert [row["step"] for row in read_log(tmp_path)] == [5, 7]
    assert result.final["loss"] == read_log(tmp_path)[-1]["loss"] and set(result.final) == {"loss", "size"}
    assert latest_checkpoint(tmp_path).name == "checkpoint-00000007"


def test_training_learns(tmp_path):
    train(tmp_path, steps=200, learning_rate=0.03)
    losses = [row["loss"] for row in read_log(tmp_path)]
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])


def test_a_box_of_tokens_is_rounded_to_steps(tmp_path):
    assert train(tmp_path / "a", tokens=ROWS * WIDTH * 4.4)[1].steps == 4
    assert train(tmp_path / "b", tokens=1)[1].steps == 1


def test_a_box_of_seconds(tmp_path, monkeypatch):
    start = time.monotonic()
    _, result = train(tmp_path, seconds=0.5, log_every=1000)
    assert 0.5 <= result.seconds <= time.monotonic() - start
    assert result.steps > 3 and result.timed_tokens == (result.steps - 3) * ROWS * WIDTH
    assert result.tokens_per_second == pytest.approx(result.timed_tokens / result.seconds)
    assert read_log(tmp_path)[-1]["rate"] < 0.5  # the schedule followed the clock to its end


def test_a_resumed_run_in_seconds_runs_only_what_is_left(tmp_path):
    def stops(index):
        if time.monotonic() - start > 0.7:
            raise KeyboardInterrupt
        return batch(index)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, batches=stops, seconds=1.0, save_minutes=0.001)
    saved = json.loads((latest_checkpoint(tmp_path) / "progress.json").read_text())["result"]
    assert 0.2 < saved["seconds"] < 0.8
    start = time.monotonic()
    _, result = train(tmp_path, seconds=1.0, resume=True)
    assert time.monotonic() - start < 0.9 and 1.0 <= result.seconds < 1.2
    assert read_log(tmp_path)[-1]["rate"] < 0.5
    steps = result.steps
    assert train(tmp_path, seconds=1.0, resume=True)[1].steps == steps  # a finished one has nothing left


@pytest.mark.parametrize("stop", [4, 5, 9])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(tmp_path, stop):
    whole, result = train(tmp_path / "whole", steps=10)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", batches=interrupted_at(stop), steps=10, save_minutes=0)
    assert latest_checkpoint(tmp_path / "parts").name == f"checkpoint-{stop:08d}"
    with (tmp_path / "parts/log.jsonl").open("a") as file:
        file.write('{"step": 99, "loss": 1.0}\n{"step": 5, "los')  # written after the checkpoint, the last by half
    parts, again = train(tmp_path / "parts", module=Toy(), steps=10, resume=True)
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts") and len(curve(tmp_path / "whole")) == 10
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert (result.steps, result.tokens, result.final) == (again.steps, again.tokens, again.final)


def test_resuming_goes_on_from_the_last_checkpoint_not_from_the_last_step(tmp_path, monkeypatch):
    whole, _ = train(tmp_path / "whole", steps=8)
    save, calls = loop.save_checkpoint, []

    def only_third(*arguments):
        calls.append(arguments)
        return save(*arguments) if len(calls) == 3 else None

    monkeypatch.setattr(loop, "save_checkpoint", only_third)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "parts", batches=interrupted_at(6, ZeroDivisionError), steps=8, save_minutes=0)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path / "parts").name == "checkpoint-00000003"
    parts, _ = train(tmp_path / "parts", steps=8, resume=True)
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    assert train(tmp_path, steps=2, resume=True)[1].steps == 2


def test_a_finished_run_resumed_does_nothing(tmp_path):
    module, result = train(tmp_path, steps=3)
    again, same = train(tmp_path, steps=3, resume=True)
    assert same == result and len(read_log(tmp_path)) == 3
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_a_larger_box_goes_on(tmp_path):
    train(tmp_path, steps=3)
    assert train(tmp_path, steps=5, resume=True)[1].steps == 5


def test_an_earlier_run_is_not_overwritten(tmp_path):
    train(tmp_path, steps=3)
    with pytest.raises(InputError, match="holds checkpoint-00000003: expected --resume or another output folder"):
        train(tmp_path, steps=3)
    assert len(read_log(tmp_path)) == 3


@pytest.mark.parametrize("change", [{"batch_size": 8}, {"seed": 1}])
def test_another_run_cannot_be_resumed(tmp_path, change):
    train(tmp_path, steps=3)
    with pytest.raises(InputError, match="expected to go on with processes 1, batch_size 4, seed 0, got"):
        train(tmp_path, steps=5, resume=True, **change)


@pytest.mark.parametrize("progress", [{"step": 3}, {"step": 3, "result": {"nonsense": 1}, "run": {}}])
def test_progress_of_something_else_is_refused(tmp_path, progress):
    train(tmp_path, steps=3)
    (latest_checkpoint(tmp_path) / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(InputError, match="expected the progress of a training run"):
        train(tmp_path, steps=5, resume=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stays(tmp_path, value, log_every):
    def batches(index):
        data = batch(index)
        return Batch((data.arguments[0] * value,), 1) if index == 5 else data

    with pytest.raises(InputError, match=r"expected a finite loss, got (nan|inf) .* at step \d"):
        train(tmp_path, batches=batches, steps=20, save_minutes=0, log_every=log_every)
    assert latest_checkpoint(tmp_path).name == "checkpoint-00000005"
    module, result = train(tmp_path, steps=8, resume=True)
    assert result.steps == 8 and all(torch.isfinite(p).all() for p in module.parameters())


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    save, calls = loop.save_checkpoint, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise InputError("cannot write: the disk is full")
        return save(*arguments)

    monkeypatch.setattr(loop, "save_checkpoint", full)
    with pytest.raises(InputError, match="disk is full"):
        train(tmp_path, steps=9, save_minutes=0)
    assert latest_checkpoint(tmp_path).name == "checkpoint-00000002"


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        train(tmp_path / "file", steps=1)


def test_the_progress_line_shows_metrics_rate_and_time_left_beside_stdout(tmp_path, capsys):
    train(tmp_path, steps=8, log_every=4)
    out, err = capsys.readouterr()
    assert out == ""
    first, last = (line for line in err.splitlines() if line.startswith("toy"))
    assert re.fullmatch(r"toy +50\.0%  loss \d\.\d{4}  size \d\.\d{4}  [\d,]+ tokens/s  [\d,]+ s left", first), first
    assert last.startswith("toy 100.0%") and last.endswith(" 0 s left")


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    train(tmp_path, steps=2)


def test_a_result_survives_json():
    result = LoopResult(steps=3, tokens=40, seconds=1.25, timed_tokens=20, processes=2, final={"loss": 0.1 + 0.2})
    assert LoopResult(**json.loads(json.dumps(result.__dict__))) == result
    assert result.tokens_per_second == 16 and LoopResult().tokens_per_second == 0


def test_precision_may_change_between_runs_of_one_process(tmp_path):
    for bf16 in (True, False, True):
        arguments = LoopArguments(output=str(tmp_path), steps=1, bf16=bf16)
        assert make_accelerator(arguments).mixed_precision == ("bf16" if bf16 else "no")


def two_processes(tmp_path):
    """What each of them wrote."""
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    started = subprocess.Popen([*command, str(script), str(tmp_path)], stderr=subprocess.PIPE, text=True,
                               env=environment, start_new_session=True)  # fmt: skip
    try:
        _, errors = started.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # torchrun alone would leave its processes behind
        raise
    assert started.returncode == 0, errors[-3000:]
    return [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_train_one_model(tmp_path):
    first, second = two_processes(tmp_path)
    for name, run in first.items():
        other = second[name]
        assert run["world"] == other["world"] == 2 and {run["rank"], other["rank"]} == {0, 1}
        assert run["weights"] == other["weights"] and run["steps"] == other["steps"]
    assert not set(first["steps"]["asked"]) & set(second["steps"]["asked"])  # each has batches of its own
    assert sorted(first["steps"]["asked"] + second["steps"]["asked"]) == list(range(12))
    assert first["steps"]["tokens"] == 12 * ROWS * WIDTH
    assert first["resumed"]["weights"] == first["steps"]["weights"]
    assert first["seconds"]["steps"] % 10 == 0 and first["seconds"]["seconds"] >= 0.3
    assert first["seconds again"]["steps"] == first["seconds"]["steps"]
    assert "gloo" in first["steps"]["backend"]
    assert first["nan"]["error"] == second["nan"]["error"] and "expected a finite loss" in first["nan"]["error"]


def test_compiled_layers_compute_and_learn_the_same_and_are_plain_again(quickly_compiled):
    host, ids = tiny_host(), prompt(40)[0]
    host.model.layers.extend(tiny_host(seed=1).model.layers)
    host.config.num_hidden_layers = len(host.model.layers)
    layers = [module for module in host.modules() if type(module).__name__ in host._no_split_modules]

    def gradients():
        host.zero_grad()
        out = host(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        return out.logits.detach(), [p.grad.clone() for p in host.parameters()]

    plain = gradients()
    with pytest.raises(RuntimeError, match="inside"), compiled_layers(host):
        assert len(layers) == 4 and all(layer._compiled_call_impl is not None for layer in layers)
        torch._dynamo.utils.counters.clear()
        logits, grads = gradients()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (1, 2, 3)  # equal layers share one
        torch.testing.assert_close(logits, plain[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grads, plain[1], atol=1e-5, rtol=1e-4)
        raise RuntimeError("inside")
    assert all(layer._compiled_call_impl is None for layer in layers)
    assert torch.equal(gradients()[0], plain[0])
