"""What all tests share: where they run, and one tiny run of each script, made once."""

import functools
import subprocess

import helpers
import pytest


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Run each test in a folder of its own, which also holds the data sets' caches."""
    monkeypatch.chdir(tmp_path)
    for name, value in helpers.environment(tmp_path).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """Return a function that starts a script as a user does, once a session: a helpers.Run."""

    @functools.cache
    def run(script):
        folder = tmp_path_factory.mktemp(script)
        return helpers.run_script(script, helpers.case(script).tiny, folder)

    return run


@pytest.fixture(scope="session")
def run_fork(tmp_path_factory):
    """Return helpers.run_fork with a server, which starts scripts without importing TensorFlow."""
    folder = tmp_path_factory.mktemp("fork_server")
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with helpers.start(["-c", helpers.FORK_SERVER], folder, **pipes) as server:
        yield functools.partial(helpers.run_fork, server)
        server.stdin.close()
