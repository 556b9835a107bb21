"""Everything that the README shows: Python and commands run, what it names exists, its figures are generated."""

import graphlib
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections import namedtuple
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import hf_crouter
from eval.tables.readme import main as tables
from hf_crouter.modes import MODES

ROOT = Path(__file__).parent.parent
INSTALL = (
    "pip install -c constraints.txt -e . && hf-crouter demo",
    'pip install -c constraints.txt -e ".[test]" && pytest',
)
LONG_FILE = "long_file.py"  # of 2,100 tokens, the reader's own; every other file has to come from an earlier line
SHORTER = {"hf-crouter demo": ["--file", LONG_FILE]}  # a quarter of the file that it would read
SHOWN = {"text", "console", "bibtex"}
OWN_MODES = [cls for cls in MODES.values() if cls.__module__.startswith("hf_crouter.")]  # other tests may add theirs

Block = namedtuple("Block", "language line code not_run")


def blocks(markdown):
    """Fenced blocks with the number of their first line, and whether a comment says why they are not run."""
    found, lines, language, start = [], markdown.splitlines(), None, 0
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if language is None:
            language, start = line[3:].strip(), number
            continue
        above = lines[start - 2] if start > 1 else ""
        not_run = bool(re.fullmatch(r"<!-- not run: \S.* -->", above.strip()))
        found.append(Block(language, start + 1, "\n".join(lines[start : number - 1]), not_run))
        language = None
    assert language is None, f"the block of line {start} has no end"
    return found


def commands(code):
    """Lines of a shell block, continued ones joined, without comments."""
    lines = re.sub(r"\\\n\s*", "", code).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def prose(markdown):
    """The text outside fenced blocks."""
    return re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)


def anchor(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def missing_links(markdown, root):
    text = prose(markdown)
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, section = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        if (path and not (root / path).exists()) or (not path and section not in anchors):
            missing.append(target)
    return missing


def missing_paths(markdown, root):
    """Names in backticks, or arguments of commands, that begin with a folder of the repository but do not exist."""
    folders = "|".join(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    named = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*)", markdown)
    return sorted({name for name in named if not (root / name.rstrip("./")).exists()})


def tree(code):
    """Paths of an annotated file tree; none if the block is something else."""
    lines = [re.match(r"( *)([\w./-]+)(?:  .*)?$", line) for line in code.splitlines()]
    if not lines or not all(lines) or not lines[0][2].endswith("/"):
        return []
    paths, parents = [], {}
    for indent, name in ((len(line[1]), line[2]) for line in lines):
        parents = {depth: parent for depth, parent in parents.items() if depth < indent}
        path = "".join(parents.values()) + name
        if name.endswith("/"):
            parents[indent] = name
        paths.append(path)
    return paths


SAMPLE = textwrap.dedent("""\
    # A title: with punctuation!
    See [here](#a-title-with-punctuation), [there](pyproject.toml), [nowhere](missing.md#x) and [not](#nothing).

    ```bash
    # a comment
    hf-crouter compress long_file.py \\
      -o out.safetensors
    ```

    <!-- not run: hours -->
    ```bash
    hf-crouter train
    ```

    ```text
    hf_crouter/
      cli/         one module per command
        main.py
      history.py   the story
      nowhere/     not there
    tests/
    ```
    """)


def test_the_reader_of_the_readme_on_a_sample():
    first, second, third = blocks(SAMPLE)
    assert (first.language, first.line, first.not_run, second.not_run) == ("bash", 5, False, True)
    assert commands(first.code) == ["hf-crouter compress long_file.py -o out.safetensors"]
    assert missing_links(SAMPLE, ROOT) == ["missing.md#x", "#nothing"]
    paths = ["hf_crouter/", "hf_crouter/cli/", "hf_crouter/cli/main.py", "hf_crouter/history.py"]
    assert tree(third.code) == [*paths, "hf_crouter/nowhere/", "tests/"]
    assert missing_paths("`hf_crouter/cli/main.py`, python examples/99.py and my/tests/x", ROOT) == ["examples/99.py"]


README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks(README)
SHELL = [block for block in BLOCKS if block.language == "bash" and not block.not_run]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(graphlib.__file__, folder / LONG_FILE)
    return folder


def run(command, folder, **options):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=880, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_python_blocks_run_one_after_another(workplace):
    code = []
    for block in BLOCKS:
        if block.language == "python" and not block.not_run:
            code += [""] * (block.line - 1 - len(code))  # so that a traceback names the README's own lines
            code += block.code.splitlines()
    assert code
    (workplace / "readme.py").write_text("\n".join(code) + "\n", encoding="utf-8")
    run([sys.executable, "readme.py"], workplace)


def check_demo(said):
    """The ways to read stand in the order of their worth, and the chunks are rebuilt."""
    rows = [line for line in said.splitlines() if re.search(r" \d\.\d{4} ", line)]
    losses = (float(re.search(r" (\d\.\d{4}) ", row)[1]) for row in rows[:8])
    window, soft, copying, compact, both, routed, _, full = losses
    assert full < both < copying < soft < window and full < compact < soft and routed < both, said
    assert re.search(r"^served by: python \d+", said, re.MULTILINE), said
    chunks = re.findall(r"^ *\d+ .* (\d+\.\d)  +\d+\.\d+ ", said.split("the compressed chunks:")[1], re.MULTILINE)
    tokens = re.match(rf"{LONG_FILE}: ([\d,]+) tokens", said)[1]
    assert f" {tokens} " in rows[7] and len(chunks) >= 2 and min(map(float, chunks)) > 80, said


@pytest.fixture
def in_workplace(workplace, monkeypatch):
    """What a command finds: the reader's folder, and no network."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def call(command, capsys):
    """Calls what the installed script calls, without a new process, which tests/cli/test_main.py starts."""
    program, *words = [*shlex.split(command), *SHORTER.get(command, ())]
    (script,) = entry_points(group="console_scripts", name=program)
    code = script.load()(words)
    out, err = capsys.readouterr()
    assert not code, f"{command}\n{out[-2000:]}\n{err[-4000:]}"
    return out


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"line {block.line}")
def test_commands_run(block, workplace, in_workplace, capsys):
    for command in commands(block.code):
        if command.startswith("hf-crouter "):
            said = call(command, capsys)
            if command == "hf-crouter demo":
                check_demo(said)
        elif command.startswith("python -m "):
            run(command, workplace, shell=True)
        elif command.startswith("python "):  # tests/test_examples.py runs them
            assert re.fullmatch(r"examples/\w+\.py", command.split()[1]), command
        else:
            assert command in INSTALL, f"README line {block.line}: this test does not know how to try {command!r}"


def test_the_two_commands_are_those_of_the_project():
    shown = [c for block in BLOCKS if block.language == "bash" for c in commands(block.code) if "pip install" in c]
    assert sorted(set(shown)) == sorted(INSTALL)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in INSTALL:
        assert (ROOT / re.search(r"-c (\S+)", command)[1]).is_file()
        assert set(re.findall(r"\[(\w+)\]", command)) <= set(extras)


def test_at_most_two_blocks_are_not_run():
    assert sum(block.not_run for block in BLOCKS) <= 2
    assert README.count("<!-- not run") == sum(block.not_run for block in BLOCKS), "a comment without a block below"
    assert {block.language for block in BLOCKS} <= SHOWN | {"python", "bash"}, "a block that nothing runs"


def test_links_and_names_exist():
    assert missing_links(README, ROOT) == []
    runnable = "\n".join(block.code for block in BLOCKS if block.language != "text")
    assert missing_paths(prose(README) + runnable, ROOT) == []
    modules = re.findall(r"python -m ([\w.]+)", README)
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def test_the_file_tree_names_what_exists():
    paths = [path for block in BLOCKS if block.language == "text" for path in tree(block.code)]
    assert paths, "expected an annotated file tree"
    assert [path for path in paths if not (ROOT / path).exists()] == []


def options_shown(markdown):
    """`Class(option=)` in a markdown text, as pairs of names."""
    return set(re.findall(r"\b([A-Z]\w+)\((\w+)=", markdown))


def test_modes_and_options_shown_are_those_of_the_package():
    for name, option in options_shown(README):
        assert option in inspect.signature(getattr(hf_crouter, name)).parameters, f"{name}({option}=)"
    shown = options_shown(README) | {("CompressedHistory", name) for name in re.findall(r"`(\w+)=`", README)}
    for cls in (hf_crouter.CompressedHistory, *OWN_MODES):
        options = set(inspect.signature(cls).parameters) - {"host", "crouter", "modes"}
        missing = {option for option in options if (cls.__name__, option) not in shown}
        assert not missing, f"the README does not show {cls.__name__}'s {', '.join(sorted(missing))}"
    for cls in OWN_MODES:
        assert re.search(rf"^\| `{cls.__name__}\(\d*\)` \|", README, re.MULTILINE), f"no row for {cls.__name__}"


def test_the_changelog_says_what_options_are_called_now():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {hf_crouter.__version__} (" in changelog
    assert missing_links(changelog, ROOT) == []
    rows = [line.split("|")[1:-1] for line in changelog.splitlines() if line.startswith("| `")]
    new = options_shown("\n".join(row[-1] for row in rows))
    for name, option in new:
        if hasattr(hf_crouter, name):
            assert option in inspect.signature(getattr(hf_crouter, name)).parameters, f"{name}({option}=)"
    for cls in (cls for cls in OWN_MODES if cls.__name__ != "Compact"):  # which had no option before
        renamed = {(cls.__name__, option) for option in inspect.signature(cls).parameters}
        assert renamed <= new, f"the changelog does not name {renamed - new}"


def test_figures_are_generated():
    assert tables(["--check"]) == 0
