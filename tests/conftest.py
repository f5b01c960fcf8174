"""What all tests share: where they run, the scripts' tiny runs, a server that forks."""

import functools
import pickle
import signal
import subprocess
import time

import helpers
import pytest

# A shell's background job ignores Ctrl-C, and so would all that the tests start. (Done here, not
# between fork and exec: there Python can die without a word, as TensorFlow's threads hold locks.)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Run each test in a folder of its own, which also holds the data sets' caches."""
    monkeypatch.chdir(tmp_path)
    for name, value in helpers.environment(tmp_path).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory, worker_id):
    """Return a function that starts a script as a user does, once a session: a helpers.Run.

    The processes that share the tests (pytest-xdist) share these runs as well.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "smoke"
    shared.mkdir(exist_ok=True)

    @functools.cache
    def run(script):
        folder, kept = shared / script, shared / f"{script}.pickle"
        try:
            folder.mkdir()
        except FileExistsError:  # the other process has begun it
            deadline = time.monotonic() + 300
            while not kept.exists():
                assert time.monotonic() < deadline, f"{script} has no run"
                time.sleep(0.1)
            return pickle.loads(kept.read_bytes())
        made = helpers.run_script(script, helpers.case(script).tiny, folder)
        kept.with_suffix(".tmp").write_bytes(pickle.dumps(made))
        kept.with_suffix(".tmp").rename(kept)
        return made

    return run


@pytest.fixture(scope="session")
def run_fork(tmp_path_factory):
    """Return helpers.run_fork with a server, which starts scripts without importing TensorFlow."""
    folder = tmp_path_factory.mktemp("fork_server")
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with helpers.start(["-c", helpers.FORK_SERVER], folder, **pipes) as server:
        yield functools.partial(helpers.run_fork, server)
        server.stdin.close()
