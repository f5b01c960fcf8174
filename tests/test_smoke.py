"""Every script, started as a user starts it, with tiny settings: what a run leaves."""

import importlib
import re

import helpers
import pytest
from helpers import SCRIPTS, case

LOAD_MODELS = """
import pathlib, sys
import keras, numpy as np
for path in map(pathlib.Path, sys.argv[1:]):
    if path.suffix == ".npz":
        arrays = dict(np.load(path))
        values = list(arrays.values())
    elif path.name.endswith(".weights.h5"):  # of a layer that makes distributions
        import bayes_mle
        arm = path.name.removesuffix(".weights.h5")
        model = bayes_mle.build_model(arm)
        model.load_weights(path)
        values = model.get_weights()
    else:
        model = keras.models.load_model(path)
        values = model.get_weights()
        shapes = [(2, *shape[1:]) for shape in [model.input_shape]]
        assert np.isfinite(model(np.zeros(shapes[0], "float32"))).all()
    assert values and all(np.isfinite(value).all() for value in values), path
    print(path.name, sum(value.size for value in values))
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_results(smoke_run, script):
    run = smoke_run(script)
    assert run.code == 0, run.stderr
    assert run.results["complete"] is True
    assert run.results["script"] == script
    assert run.results["device"] == "CPU"
    assert set(run.results["versions"]) >= {"tensorflow", "numpy"}
    flags = case(script).tiny
    if "--synthetic" in flags:
        assert (run.results["data"], run.results["article"]) == ("synthetic", {})
    assert run.results["config"]["epochs"] == int(flags[flags.index("--epochs") + 1])
    assert list(run.results["arms"]) == list(case(script).history)
    for arm, record in run.results["arms"].items():
        assert set(record["history"]) == set(case(script).history[arm])
        lengths = {len(values) for values in record["history"].values()}
        assert lengths <= {case(script).final_epochs[arm]}
        assert record["seconds"] > 0
    # Nothing is left beside the one folder, and no temporary file in it
    assert [path.name for path in run.folder.parent.parent.parent.glob("log/*/*")] == [
        run.folder.name
    ]
    assert not list(run.folder.rglob("*.tmp"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_output(smoke_run, script):
    run = smoke_run(script)
    lines = run.stdout.splitlines()
    assert re.fullmatch(r"\d{8}-\d{6}(-synthetic)?(-\d+)?", run.folder.name)
    assert lines[0].startswith(f"{script} on ")
    assert lines[-1].startswith("tensorboard --logdir ")
    assert any(re.match(r"arm +metric +here +article +spread$", line) for line in lines)
    assert "\r" not in run.stdout
    assert "\b" not in run.stdout
    if "--synthetic" in case(script).tiny:
        assert "synthetic" in lines[0]
        assert "synthetic" in run.folder.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_events(smoke_run, script):
    run = smoke_run(script)
    for folder, kinds in case(script).events.items():
        found = helpers.tags(run.folder / folder)
        for kind, tags in kinds.items():
            if kind == "graph":
                assert found["graph"], folder
            else:
                assert tags <= found[kind], (folder, kind)


@pytest.mark.parametrize("script", SCRIPTS)
def test_figures(smoke_run, script):
    run = smoke_run(script)
    assert sorted(path.name for path in run.folder.glob("*.png")) == case(script).figures
    for name in case(script).figures:
        content = (run.folder / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert 5_000 < len(content) < 150_000


def test_models_load_in_a_fresh_process(smoke_run, tmp_path):
    paths, parameters = [], {}
    for script in SCRIPTS:
        run = smoke_run(script)
        trained = {a: r for a, r in run.results["arms"].items() if "parameters" in r["final"]}
        assert trained
        for arm, record in trained.items():
            suffixes = (".keras", ".npz", ".h5")
            (path,) = [p for p in run.folder.glob(f"{arm}.*") if p.suffix in suffixes]
            paths.append(path)
            parameters[path.name] = record["final"]["parameters"]
    run = helpers.finish(helpers.start(["-c", LOAD_MODELS, *paths], tmp_path), tmp_path)
    assert run.code == 0, run.stderr
    assert dict(line.split() for line in run.stdout.splitlines()) == {
        name: str(count) for name, count in parameters.items()
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_the_first_line_of_the_docstring(script, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert helpers.source(script).splitlines()[0].removeprefix('"""') in text
