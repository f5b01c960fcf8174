"""What all scripts have in common: order, equal blocks, flags, packages, lengths."""

import ast
import importlib
import re

import helpers
import pytest
from helpers import ROOT, SCRIPTS, parser_of, source

SECTIONS = ["Data", "Environment", "Model", "Algorithm", "Training", "Figures", "Command line"]
FRAME = {
    "core": "# --- Frame: flags, faults, folder and results; the same text in every script ---",
    "resume": "# --- Frame, resume: the same text in every script that can go on after an "
    "interruption ---",
    "fit": "# --- Frame, fit: the same text in every script that calls fit and can go on ---",
    "episodes": "# --- Frame, episodes: the same text in every CartPole script ---",
}
USERS = {  # of each block
    "core": SCRIPTS,
    "resume": [script for script in SCRIPTS if '"--resume"' in source(script)],
    "fit": ["gap_cats_dogs", "resnet_cifar10", "transfer_resnet50"],
    "episodes": [script for script in SCRIPTS if '"--runs"' in source(script)],
}
GUARD = 'if __name__ == "__main__":\n    main()\n'
FIRST_FLAGS = ["epochs", "device", "logdir", "seed"]
SHARED_FLAGS = [*FIRST_FLAGS, "steps_per_epoch", "max_steps", "synthetic", "resume"]
UNCOUNTED_FLAGS = ["runs", "arms", "gif"]
# The most lines of each; the aim is 315, or 345 for Space Invaders and keras_pg_weighted_ce
LENGTHS = dict(zip(SCRIPTS, [409, 486, 454, 571, 397, 538, 370, 332, 390, 378, 429]))
BLOCK_LENGTHS = {"core": 85, "resume": 16, "fit": 16, "episodes": 60}


def blocks(script):
    """Return {name: text} of the blocks of a script's frame."""
    frame = source(script)[source(script).index("# --- Frame") :].removesuffix(GUARD)
    parts = re.split(r"^(# --- Frame.*)$", frame, flags=re.M)[1:]
    names = {marker: name for name, marker in FRAME.items()}
    return {names[marker]: text.strip() for marker, text in zip(parts[::2], parts[1::2])}


def test_eleven_scripts_have_a_case_and_tests_of_their_own():
    assert len(SCRIPTS) == 11
    assert sorted(helpers.CASES) == SCRIPTS
    assert all((ROOT / "tests" / f"test_{script}.py").exists() for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_stand_in_order_and_soon(script):
    markers = re.findall(r"^# --- (.*) ---$", source(script), re.M)
    lesson = [marker for marker in markers if not marker.startswith("Frame")]
    assert lesson[-2:] == ["Figures", "Command line"]
    assert set(lesson) <= set(SECTIONS)
    assert {"Training"} <= set(lesson)
    assert markers[: len(lesson)] == lesson  # the frame comes last
    assert len(lesson) == len(set(lesson))
    lines = source(script).splitlines()
    assert lines.index(f"# --- {lesson[0]} ---") < 70
    for section in set(lesson) - {"Command line"}:  # a comment says what comes
        assert lines[lines.index(f"# --- {section} ---") + 1].startswith("# "), section


@pytest.mark.parametrize("block", FRAME)
def test_blocks_are_equal(block):
    texts = {blocks(script)[block] for script in USERS[block]}
    assert len(texts) == 1
    assert all(block not in blocks(script) for script in SCRIPTS if script not in USERS[block])


def count_code_lines(text):
    """Return how many lines are neither blank, nor a comment, nor in a docstring."""
    documented = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = dict(enumerate(map(str.strip, text.splitlines()), 1))
    return sum(bool(lines[i]) and lines[i][0] != "#" for i in lines.keys() - documented)


def test_lengths():
    for script in SCRIPTS:
        assert len(source(script).splitlines()) <= LENGTHS[script], script
    for block, most_code in BLOCK_LENGTHS.items():
        assert count_code_lines(blocks(USERS[block][0])[block]) <= most_code, block


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_runs_nothing_and_no_other(script):
    text = source(script)
    assert text.endswith(f"\n\n\n{GUARD}")
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.ClassDef, ast.If)
    body = ast.parse(text).body
    assert isinstance(body[0], ast.Expr)  # the docstring
    assert all(isinstance(node, (*allowed, ast.Try)) for node in body[1:])
    conditions = [ast.unparse(node.test) for node in body if isinstance(node, ast.If)]
    known = {
        "'ipykernel' not in sys.modules",
        "'TF_CONFIG' in os.environ",
        "__name__ == '__main__'",
    }
    assert set(conditions) <= known
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.M))
    assert not imported & set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings(script):
    module = importlib.import_module(script)
    lines = module.__doc__.strip().splitlines()
    assert lines[0].endswith(".")
    assert len(lines) <= 25
    assert "\nDifferences from the article:\n1. " in module.__doc__
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
    own = [name for name in names if name not in SHARED_FLAGS + UNCOUNTED_FLAGS]
    assert len(own) <= 6
    assert not parser.allow_abbrev
    if "max_steps" in names:
        assert "--episodes" in parser.format_help()
    if script in USERS["episodes"]:
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
