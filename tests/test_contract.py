"""What all scripts have in common: order, equal blocks, flags, packages, lengths, names."""

import ast
import difflib
import importlib
import re

import helpers
import pytest
from helpers import ROOT, SCRIPTS, parser_of, source

SECTIONS = ["Data", "Environment", "Model", "Algorithm", "Training", "Figures", "Command line"]
USERS = {  # of each block of the frame
    "Frame": SCRIPTS,
    "Frame, resume": [script for script in SCRIPTS if '"--resume"' in source(script)],
    "Frame, fit": ["gap_cats_dogs", "resnet_cifar10", "transfer_resnet50"],
    "Frame, episodes": [script for script in SCRIPTS if '"--runs"' in source(script)],
}
BLOCK_ENDS = dict(zip(USERS, (100, 16, 12, 50)))  # code lines at most, with the guard
FIRST_FLAGS = ["epochs", "device", "logdir", "seed"]
SHARED_FLAGS = [*FIRST_FLAGS, "steps_per_epoch", "max_steps", "synthetic", "resume"]
ENDS = {  # lines of each script at most
    "bayes_mle": 355,
    "double_q_cartpole": 428,
    "dueling_q_cartpole": 424,
    "dueling_q_spaceinvaders": 500,
    "gap_cats_dogs": 370,
    "keras_pg_weighted_ce": 420,
    "metrics_summaries": 350,
    "mnist_eager_mlp": 315,
    "reinforce_cartpole": 350,
    "resnet_cifar10": 355,
    "transfer_resnet50": 395,
}
NAMES = dict(  # {script: the names that it has from its article's program}
    line.split(":") for line in (ROOT / "tests" / "article_names.txt").read_text().splitlines()[2:]
)


def blocks(script):
    """Return {name: text} of the blocks of a script's frame; the guard belongs to the first."""
    frame, guard = source(script).split("\n\n\nif __name__ == ")
    parts = re.split(r"^# %% (Frame.*): ", frame, flags=re.M)[1:]
    found = {name: f"# {text.strip()}\n" for name, text in zip(parts[::2], parts[1::2])}
    assert found.keys() <= USERS.keys()
    found["Frame"] += f"if __name__ == {guard}"
    return found


def test_eleven_scripts_have_a_case_and_tests_of_their_own():
    assert len(SCRIPTS) == 11
    assert sorted(helpers.CASES) == sorted(ENDS) == sorted(NAMES) == SCRIPTS
    for script in SCRIPTS:
        assert (ROOT / "tests" / f"test_{script}.py").exists(), script


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_stand_in_order_and_soon(script):
    markers = re.findall(r"^# %% (.*)$", source(script), re.M)
    lesson = [marker for marker in markers if not marker.startswith("Frame")]
    assert markers[: len(lesson)] == lesson  # the frame comes last
    assert "Training" in lesson
    assert "Command line" in lesson[-2:]  # resnet_cifar10 ends with several machines
    lines = source(script).splitlines()
    assert lines.index(f"# %% {lesson[0]}") < 72
    for section in set(lesson) & set(SECTIONS) - {"Command line"}:  # a comment says what comes
        assert lines[lines.index(f"# %% {section}") + 1].startswith("# "), section


@pytest.mark.parametrize("block", USERS)
def test_blocks_are_equal_and_short(block):
    texts = {blocks(script)[block] for script in USERS[block]}
    assert len(texts) == 1
    assert count_code_lines(texts.pop()) <= BLOCK_ENDS[block]
    for script in set(SCRIPTS) - set(USERS[block]):
        assert block not in blocks(script), script


def count_code_lines(text):
    """Return how many lines are neither blank, nor a comment, nor in a docstring."""
    documented = set()
    for node in ast.walk(ast.parse(text)):
        documents = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documents and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = dict(enumerate(map(str.strip, text.splitlines()), 1))
    return sum(bool(lines[i]) and lines[i][0] != "#" for i in lines.keys() - documented)


@pytest.mark.parametrize("script", SCRIPTS)
def test_lengths(script):
    lines = len(source(script).splitlines())
    assert lines <= ENDS[script]
    assert count_code_lines(source(script)) <= 0.74 * lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_articles_names_are_there(script):
    missing = [n for n in NAMES[script].split() if not re.search(rf"\b{n}\b", source(script))]
    assert missing == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_runs_nothing_and_no_other(script):
    text = source(script)
    body = ast.parse(text).body
    assert isinstance(body[0], ast.Expr)  # the docstring
    calls = [ast.unparse(node) for node in body[1:] if isinstance(node, ast.Expr)]
    allowed = r"os\.environ\.setdefault\(.*|sys\.modules\.setdefault\(.*|warnings\.filter.*"
    assert [call for call in calls if not re.match(allowed, call)] == []
    assert ast.unparse(body[-1].test) == "__name__ == '__main__'"
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.M))
    assert not imported & set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings(script):
    module = importlib.import_module(script)
    lines = module.__doc__.strip().splitlines()
    assert lines[0].endswith(".")
    assert len(lines) <= 25
    for part in ("Article: ", "Result", "Differences from the article:\n1. "):
        assert f"\n{part}" in module.__doc__
    for node in ast.parse(source(script)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_stand_in_order(script, monkeypatch):
    parser = parser_of(script, monkeypatch)
    names = [action.dest for action in parser._actions if action.dest != "help"]
    assert names[:4] == FIRST_FLAGS
    shared = [name for name in SHARED_FLAGS if name in names]
    assert names[: len(shared)] == shared
    assert len(set(names) - {*SHARED_FLAGS, "runs", "arms", "gif"}) <= 4
    assert not parser.allow_abbrev
    if "max_steps" in names:
        assert "--episodes" in parser.format_help()
    if script in USERS["Frame, episodes"]:
        assert {"runs", "gif"} <= set(names)


def test_shared_flags_have_the_same_words(monkeypatch):
    words = {}
    for script in SCRIPTS:
        for action in parser_of(script, monkeypatch)._actions:
            if action.dest in {*SHARED_FLAGS[1:], "runs", "gif"} - {"steps_per_epoch"}:
                words.setdefault(action.dest, set()).add(action.help)
    assert {name: texts for name, texts in words.items() if len(texts) > 1} == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_pep_723_block_repeats_requirements(script):
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source(script), re.M).group(1)
    needed = re.findall(r'"([a-z][^"]+)"', block.split("dependencies", 1)[1])
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    known = {re.sub(r"\s*[;#].*", "", line) for line in lines}
    assert needed
    assert set(needed) <= known
    # On 3.14 TensorFlow's only release brings a nightly Keras into the folder of the real one
    assert '# requires-python = ">=3.10,<3.14"\n' in block
    names = {re.split(r"[\[><=]", package)[0].replace("-", "_") for package in needed}
    imported = set(re.findall(r"^ *import (\w+)", source(script), re.M))
    packages = {re.split(r"[\[><=]", line)[0].replace("-", "_") for line in known}
    assert imported & packages <= names


def test_the_two_q_scripts_differ_in_the_lesson_only():
    texts = [source(script).splitlines() for script in ("double_q_cartpole", "dueling_q_cartpole")]
    changed = [line for line in difflib.ndiff(*texts) if line[0] in "+-"]
    assert len(changed) <= 130
