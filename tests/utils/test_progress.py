import io
import sys
from contextlib import redirect_stderr

import pytest

from hf_crouter.utils import progress as module
from hf_crouter.utils.progress import Progress, progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal


def test_plain_lines_come_now_and_then_with_rate_and_time_left(capsys, clock):
    with Progress() as shown:
        shown.start("reading", 20, "files", "bytes")
        for _ in range(6):
            clock[0] += 2
            shown.advance(2, 3e6)
        shown.finish("2 dropped")
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "reading  30.0%  6 files  9.0 MB  1.5 MB/s  14 s left",
        "reading  60.0%  12 files  18.0 MB  1.5 MB/s  8 s left",
        "reading  12 files  18.0 MB  1.5 MB/s  in 12.0 s  2 dropped",
    ]


def test_one_count_has_a_rate_of_its_own(capsys, clock):
    with progress("routing", "chunks") as update:
        clock[0] += 1
        update(8, 64)  # too early for a line
        clock[0] += 7
        update(20, 64)
    assert capsys.readouterr().err == "routing  31.2%  20 chunks  2.5 chunks/s  18 s left\n"


def test_what_is_quick_or_not_wanted_says_nothing(capsys, clock):
    with progress("routing", "chunks") as update:
        update(64, 64)
    with Progress(enabled=False) as shown:
        shown.start("reading", 2, "files")
        clock[0] += 60
        shown.advance(1)
        shown.finish()
    assert shown.done == 1 and capsys.readouterr().err == ""


def test_time_left_counts_from_where_the_step_began(capsys, clock):
    with Progress(interval=0) as shown:
        shown.start("toy", 1.0, done=0.5)
        shown.update(0.5, text="loss 2")
        clock[0] += 10
        shown.update(0.75, text="loss 1")
    assert capsys.readouterr().err == "toy  50.0%  loss 2\ntoy  75.0%  loss 1  10 s left\n"


def test_a_step_of_unknown_size_has_no_time_left(capsys, clock):
    with Progress() as shown:
        shown.start("converting")
        clock[0] += 6
        shown.advance()
        shown.finish()
    assert capsys.readouterr().err == "converting\nconverting  in 6.0 s\n"


def test_a_terminal_gets_a_bar_for_each_step(capsys, terminal):
    with Progress() as shown:
        shown.start("downloading", 90e6, "bytes")
        shown.update(45e6)
        shown.start("converting")
        shown.finish("done")
    err = capsys.readouterr().err
    assert "downloading" in err and " 50%" in err and "45.0 MB" in err and "converting" in err and "done" in err


def test_a_bar_stays_on_the_stream_of_its_beginning(capsys, terminal):
    hidden = io.StringIO()
    with Progress() as shown, redirect_stderr(hidden):
        shown.start("converting", 1)
        shown.advance()
        print("warning", file=sys.stderr)
    assert hidden.getvalue() == "warning\n" and "converting" in capsys.readouterr().err


def test_output_stays_on_stdout_beside_a_bar(capsys, terminal):
    with progress("routing") as update:
        update(1, 2)
        print("{}")
    assert capsys.readouterr().out == "{}\n"
