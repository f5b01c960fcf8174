"""The contract that all scripts keep: layout, flags, copies, lengths, packages."""

import ast
import importlib
import itertools
import re

import helpers
import pytest
from helpers import ROOT, SCRIPTS, source

SECTIONS = [
    "Constants",
    "Command line",
    "Shared helpers: the same text in every script that has them",
    "Resuming: the same text in every script that has --resume",
    "Episodes: the same text in every script that plays",
    "Data",
    "Environment",
    "Model",
    "Algorithm",
    "Training",
    "Plots",
    "Main",
]
OPTIONAL = {SECTIONS[3], SECTIONS[4], "Data", "Environment", "Model", "Algorithm"}
FIRST_FLAGS = ["epochs", "device", "logdir", "seed"]
SHARED_FLAGS = [*FIRST_FLAGS, "steps_per_epoch", "max_steps", "synthetic", "resume"]
UNCOUNTED_FLAGS = ["runs", "arms", "gif"]
# What the scripts differ in: these may have one name and several texts.
NOT_COPIES = {"main", "build_parser", "load_data", "build_model", "train", "plot"}
NOT_COPIES |= {"Memory", "DQModel", "choose_action", "update_network"}


def definitions(script):
    """Return [(name, text)] of the functions and classes at the top level of a script."""
    text = source(script)
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in ast.parse(text).body if isinstance(node, kinds)]
    return [(node.name, ast.get_source_segment(text, node)) for node in nodes]


def flags(script):
    """Return {name: action} of a script's flags, in their order."""
    actions = importlib.import_module(script).build_parser()._actions
    return {action.dest: action for action in actions if action.dest != "help"}


def test_eleven_scripts_are_there_and_have_tests():
    assert len(SCRIPTS) == 11
    assert all((ROOT / "tests" / f"test_{script}.py").exists() for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_stand_in_order(script):
    found = re.findall(r"^# --- (.*) ---$", source(script), re.M)
    assert found == [section for section in SECTIONS if section in found]
    assert set(SECTIONS) - OPTIONAL <= set(found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_runs_nothing(script):
    body = ast.parse(source(script)).body
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.ClassDef)
    assert isinstance(body[0], ast.Expr)
    assert ast.unparse(body[-1]) == "if __name__ == '__main__':\n    run_as_command(main)"
    # Where TF_CONFIG is set, keras is another package
    body = [node for node in body if not ast.unparse(node).startswith("if 'TF_CONFIG' in")]
    assert all(isinstance(node, kinds) for node in body[1:-1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_lengths(script):
    text = source(script)
    lines = helpers.code_line_numbers(text)
    assert len(text.splitlines()) <= 420
    assert len(lines) <= (300 if script == "dueling_q_spaceinvaders" else 280)
    # The frame: the command line, without the article's own constants, and the shared helpers
    first = text[: text.index("# --- Command line ---")].count("\n")
    after = re.search(r"^# --- (Resuming|Episodes|Data|Environment|Model)", text, re.M).start()
    frame = sum(first < line <= text[:after].count("\n") for line in lines)
    assert frame - sum(name not in SHARED_FLAGS for name in flags(script)) < 90


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings(script):
    module = importlib.import_module(script)
    first_line = module.__doc__.splitlines()[0]
    assert first_line.endswith(".")
    assert module.build_parser().description == first_line
    assert "\nDifferences from the article:\n1. " in module.__doc__
    for name, _ in definitions(script):
        assert getattr(module, name).__doc__, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_stand_in_order(script):
    names = list(flags(script))
    assert names[:4] == FIRST_FLAGS
    shared = [name for name in names if name in SHARED_FLAGS]
    assert shared == [name for name in SHARED_FLAGS if name in names] == names[: len(shared)]
    own = [name for name in names if name not in SHARED_FLAGS + UNCOUNTED_FLAGS]
    assert len(own) <= 6
    parser = importlib.import_module(script).build_parser()
    assert not parser.allow_abbrev


def test_shared_flags_have_the_same_words():
    for name in SHARED_FLAGS:
        having = [flags(script)[name] for script in SCRIPTS if name in flags(script)]
        words = {action.help for action in having}
        if name == "device":  # "all" belongs to the scripts that fit
            words = {text.replace(", gpu:N or all", " or gpu:N") for text in words}
        if name in ("epochs", "steps_per_epoch"):
            continue
        assert len(words) <= 1, name


def test_copies_are_equal():
    texts = {}
    for script in SCRIPTS:
        for name, text in definitions(script):
            if name not in NOT_COPIES:
                other, known = texts.setdefault(name, (script, text))
                assert text == known, f"{name} differs between {other}.py and {script}.py"


def test_no_body_has_two_names():
    bodies = {}
    for script in SCRIPTS:
        for name, text in definitions(script):
            node = ast.parse(text).body[0]
            node.name = ""
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            body = ast.dump(node)
            assert bodies.setdefault(body, name) == name, f"{script}.py: {name} stands elsewhere"


def test_shared_constants_are_equal():
    for name in ["VERBOSE"]:
        texts = {line for s in SCRIPTS for line in re.findall(f"^{name} = .*$", source(s), re.M)}
        assert len(texts) == 1


def test_no_script_imports_another():
    for script, other in itertools.product(SCRIPTS, SCRIPTS):
        assert not re.search(rf"^\s*(from|import) {other}\b", source(script), re.M)


@pytest.mark.parametrize("script", SCRIPTS)
def test_pep_723_block_repeats_requirements(script):
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source(script), re.M).group(1)
    assert '# requires-python = ">=3.10"\n' in block
    needed = re.findall(r'"([a-z][^"]+)"', block.split("dependencies", 1)[1])
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    known = {re.sub(r"\s*#.*", "", line) for line in lines}
    assert needed
    assert set(needed) <= known
    modules = {"matplotlib", "keras", "numpy", "tensorflow", "gymnasium", "ale_py", "tf_keras"}
    modules |= {"tensorflow_probability", "tensorflow_datasets"}
    imported = set(re.findall(r"^import (\w+)", source(script), re.M)) & modules
    names = {re.split(r"[\[><=]", package)[0].replace("-", "_") for package in needed}
    assert imported <= names


def test_readme_names_every_script_and_its_first_line():
    readme = (ROOT / "README.md").read_text()
    for script in SCRIPTS:
        first_line = source(script).splitlines()[0].removeprefix('"""')
        assert f"`{script}.py`" in readme
        assert first_line in readme


def test_readme_repeats_the_articles_figures():
    rows = re.findall(r"^\| `(\w+)\.py` (\|.*\|)$", (ROOT / "README.md").read_text(), re.M)
    cells = {script: row.split("|") for script, row in rows if row.count("|") == 7}
    assert sorted(cells) == SCRIPTS
    for script in SCRIPTS:
        article = re.findall(r"[\d.]*\d", cells[script][3])
        known = importlib.import_module(script).ARTICLE
        values = {f"{value:g}" for metrics in known.values() for value in metrics.values()}
        assert values <= set(article), script
        assert cells[script][5].strip(), "a verdict"


def test_readme_shows_figures_that_are_there():
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r'src="(docs/.*?)"', readme):
        assert 5_000 < (ROOT / path).stat().st_size < 150_000
    assert readme.count("docs/figures/") == len(list(ROOT.glob("docs/figures/*.png")))
    for path in re.findall(r"`(\w+\.py)`", readme):
        assert (ROOT / path).exists(), path


def test_readme_and_ci_run_the_same_command():
    command = "pip install -r tests/requirements.txt && python -m pytest\n"
    assert command in (ROOT / "README.md").read_text()
    assert command in (ROOT / ".ci" / "run").read_text()
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "tests.yml").read_text()
