"""dueling_q_spaceinvaders.py: the memory against a list of episodes, the step, kills, resuming."""

import collections
import json
import shutil
import types

import gymnasium
import helpers
import numpy as np
import pytest
import tensorflow as tf
from helpers import Case, fails_in_one_line
from PIL import Image

import dueling_q_spaceinvaders as script

keras = script.keras

CASE = Case(
    tiny=[
        *("--epochs", "1", "--max-steps", "200", "--replay-size", "150"),
        *("--delay-training", "160", "--epsilon-min-iter", "20", "--gif-every", "1"),
    ],
    final_epochs={"dueling": 1},
    history={"dueling": ["reward", "avg loss"]},
    events={"dueling": {"scalars": {"reward", "avg loss"}}},
    figures=["reward.png"],
    started="episode 1,",
    again="episode 1,",
    bad_flags=[
        ["--episodes", "0"],
        ["--replay-size", "99"],
        ["--delay-training", "31"],
        ["--epsilon-min-iter", "0"],
        ["--gif-every", "0"],
        ["--max-steps", "0"],
        ["--resume", "no/such/run"],
        ["--device", "all"],
    ],
)


# --- The environment ---


def test_preprocessing_is_the_articles():
    env = script.make_space_invaders()
    env.reset(seed=0)
    for _ in range(30):
        states, *_ = env.step(env.action_space.sample())
    image = env.unwrapped.ale.getScreenRGB()
    assert image.shape == (210, 160, 3)
    assert image.std() > 10
    # Without the rounding to whole numbers, which tf.image does once, and we at the end
    grey = tf.image.rgb_to_grayscale(tf.cast(image, tf.float32))
    exact = tf.image.resize(grey, (105, 80)).numpy()[:, :, 0]
    np.testing.assert_allclose(states[-1], exact, atol=0.501)
    article = tf.image.resize(tf.image.rgb_to_grayscale(image), (105, 80)).numpy()[:, :, 0]
    np.testing.assert_allclose(states[-1], article, atol=1.01)
    assert states.dtype == np.uint8


def test_the_rhythm_is_that_of_the_articles_game():
    env = script.make_space_invaders()
    ale = env.unwrapped.ale
    assert env.unwrapped.spec.kwargs["repeat_action_probability"] == 0.25
    assert ale.getFloat("repeat_action_probability") == 0.25
    states, _ = env.reset(seed=0)
    assert states.shape == (script.NUM_FRAMES, 105, 80)
    assert (states == states[0]).all()
    skips, first = collections.Counter(), states[0]
    for step in range(300):
        before = ale.getEpisodeFrameNumber()
        previous = states
        states, _, terminated, _, _ = env.step(1)
        assert not terminated
        skips[ale.getEpisodeFrameNumber() - before] += 1
        np.testing.assert_array_equal(states[:-1], previous[1:])
        if step == 0:
            np.testing.assert_array_equal(states[:2], [first, first])
        if sum(skips.values()) == 100:
            break
    assert set(skips) == {2, 3, 4}
    assert min(skips.values()) > 20
    assert env.action_space.n == script.NUM_ACTIONS


# --- The memory ---


def frame(number):
    """Return a frame that can be told from 256 others."""
    return np.full(script.POST_PROCESS_IMAGE_SIZE, number % 256, "uint8")


class Oracle:
    """All that ever happened, as a plain list: what a memory may give, and what it must."""

    def __init__(self):
        self.number, self.steps = 0, []

    def start(self, memory):
        memory.add_sample(frame(self.number), start=True)
        self.number += 1
        self.episode = [self.number - 1]

    def step(self, memory, rng):
        action, reward, terminal = int(rng.integers(6)), float(rng.integers(9)), rng.random() < 0.3
        memory.add_sample(frame(self.number), action, reward, terminal)
        self.episode.append(self.number)
        self.number += 1
        window = ([self.episode[0]] * script.NUM_FRAMES + self.episode)[-script.NUM_FRAMES - 1 :]
        self.steps.append((tuple(window), action, reward, terminal))

    def expected(self, size):
        """Return the steps whose frames are among the newest size - 1."""
        return {
            (tuple(number % 256 for number in window), *rest)
            for window, *rest in self.steps
            if min(window) > self.number - size
        }


def draws(memory, count):
    """Return a Counter of the steps that a memory gives in so many draws of 32."""
    found = collections.Counter()
    for _ in range(count):
        frames, actions, rewards, terminals = memory.sample(32)
        assert (frames == frames[:, :, :1, :1]).all()
        assert (frames.dtype, frames.shape[1:]) == (np.uint8, (script.NUM_FRAMES + 1, 105, 80))
        columns = actions[:, 0].astype(int), rewards[:, 0], terminals[:, 0].astype(bool)
        windows = map(tuple, frames[:, :, 0, 0].tolist())
        found.update(zip(windows, *(column.tolist() for column in columns)))
    return found


@pytest.mark.parametrize("size", [100, 137, 200])
def test_memory_gives_what_happened_each_alike(tmp_path, size):
    """Differences 1 to 3: no frame late, no stack over a start, no slot out of reach."""
    rng = np.random.default_rng(size)
    np.random.seed(size)
    memory, oracle = script.Memory(tmp_path / "replay", size), Oracle()
    checked = 0
    while oracle.number < 4 * size:
        oracle.start(memory)
        for _ in range(rng.integers(1, 30)):
            oracle.step(memory, rng)
            if oracle.number in (40, size - 1, size, size + 1, 2 * size, 2 * size + 1, 3 * size):
                found, expected = draws(memory, 300), oracle.expected(size)
                assert set(found) == expected
                mean = 300 * 32 / len(expected)
                assert all(abs(n - mean) < 6 * mean**0.5 for n in found.values())
                checked += 1
        if oracle.number > 40:
            assert set(draws(memory, 1)) <= oracle.expected(size)
    assert checked >= 4
    assert memory.added == oracle.number


@pytest.mark.parametrize("filled", [60, 170, 300, 301])
def test_nothing_is_stale_after_a_kill(tmp_path, filled):
    rng, oracle = np.random.default_rng(0), Oracle()
    memory = script.Memory(tmp_path / "replay", 100)
    while oracle.number < filled:
        oracle.start(memory)
        for _ in range(min(20, filled - oracle.number)):
            oracle.step(memory, rng)
    # Killed within add_sample: fields are written in their order, the number last
    index = (memory.added + 1) % 100
    before = int(memory.slots["number"][index])
    with pytest.raises(ValueError, match="killed"):
        memory.slots[index] = (frame(255), 5, 77.0, True, False, "killed")
    assert (memory.slots["frame"][index] == 255).all()
    assert memory.slots["number"][index] == before
    del memory
    memory = script.Memory(tmp_path / "replay", 100)
    assert memory.added == filled
    assert set(draws(memory, 300)) == oracle.expected(100)
    for _ in range(7):  # the game goes on with an episode's start, over the write head
        oracle.start(memory)
        for _ in range(9):
            oracle.step(memory, rng)
        assert set(draws(memory, 300)) == oracle.expected(100)


def test_difference_4_bytes_of_a_frame(tmp_path, capsys):
    script.Memory(tmp_path / "replay", 100)
    size = (tmp_path / "replay").stat().st_size
    assert 8400 <= size / 100 < 8500
    assert str(tmp_path / "replay") in capsys.readouterr().out


# --- The network and its step ---


def test_difference_5_the_mean_is_over_the_actions():
    network = script.DQModel(256, 6)
    layers = {layer.name: layer for layer in network.layers}
    streams = keras.Model(network.inputs, [layers["v_out"].output, layers["adv_out"].output])
    states = np.random.default_rng(0).integers(0, 256, (5, 3, 105, 80), dtype="uint8")
    q, (v, adv) = network(states).numpy(), (part.numpy() for part in streams(states))
    np.testing.assert_allclose(q, v + adv - adv.mean(axis=1, keepdims=True), atol=1e-4)
    np.testing.assert_allclose(q.mean(axis=1), v[:, 0], atol=1e-4)
    assert np.ptp(adv.mean(axis=1)) > 1e-3
    # conv 16 8x8/4 and 32 4x4/2 on 105x80x3 leave 11x8x32
    streams = 2 * (11 * 8 * 32 + 1) * 256 + 257 * (6 + 1)
    assert network.count_params() == 16 * 193 + 32 * 257 + streams


def test_a_step_is_the_articles_with_the_right_frames():
    """Against the article's own way: targets set in NumPy, Huber, Adam, `train_on_batch`."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (32, 4, 105, 80), dtype="uint8")
    actions = rng.integers(0, 6, (32, 1)).astype("float32")
    rewards = rng.normal(scale=3, size=(32, 1)).astype("float32")
    terminals = (np.arange(32)[:, np.newaxis] % 4 == 0).astype("float32")
    primary, target, theirs = (script.DQModel(256, 6) for _ in range(3))
    theirs.set_weights(primary.get_weights())
    states, next_states = frames[:, :3], frames[:, 1:]
    target_q, rows = primary(states).numpy(), np.arange(32)
    best = primary(next_states).numpy().argmax(axis=1)
    assert (best != target(next_states).numpy().argmax(axis=1)).any()
    updates = rewards[:, 0].copy()
    valid = terminals[:, 0] == 0
    updates[valid] += 0.99 * target(next_states).numpy()[rows, best][valid]
    target_q[rows, actions[:, 0].astype(int)] = updates
    theirs.compile(optimizer=keras.optimizers.Adam(), loss=keras.losses.Huber())
    expected_loss = theirs.train_on_batch(states, target_q)
    old_target = target.get_weights()

    optimizer = keras.optimizers.Adam()
    optimizer.build(primary.trainable_variables)
    step = tf.function(script.dueling_q_step, jit_compile=True)
    loss = step(frames, actions, rewards, terminals, primary, target, optimizer)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)
    for ours, other, old, new in zip(
        primary.get_weights(), theirs.get_weights(), old_target, target.get_weights(), strict=True
    ):
        # Adam's first step is the sign of the gradient, whatever its size: where it is near zero,
        # rounding decides
        assert np.mean(np.abs(ours - other) > 1e-5) < 1e-3
        np.testing.assert_allclose(new, 0.92 * old + 0.08 * ours, atol=1e-6)


# --- Training ---


@pytest.fixture
def short_games(monkeypatch):
    """Make episodes of 40 steps."""
    original = script.make_space_invaders
    limited = lambda: gymnasium.wrappers.TimeLimit(original(), 40)  # noqa: E731
    monkeypatch.setattr(script, "make_space_invaders", limited)


@pytest.fixture
def short(short_games, monkeypatch):
    """Make episodes of 40 steps, and a training step that only returns a loss."""
    monkeypatch.setattr(script, "dueling_q_step", lambda *batch: tf.constant(2.0))


def test_differences_5_and_6_the_copy_epsilon_and_the_mean_loss(short, monkeypatch):
    seen, choose_action = [], script.choose_action
    networks, network = [], script.DQModel

    def build(*sizes):
        networks.append(network(*sizes))
        return networks[-1]

    monkeypatch.setattr(script, "DQModel", build)

    def watched(state, best_action, eps):
        seen.append(eps)
        return choose_action(state, best_action, eps)

    monkeypatch.setattr(script, "choose_action", watched)
    flags = ["--epochs", "4", "--delay-training", "50", "--epsilon-min-iter", "60"]
    final = script.main([*flags, "--replay-size", "120", "--gif-every", "2", "--max-steps", "150"])
    for primary, target in zip(*(network.get_weights() for network in networks), strict=True):
        np.testing.assert_array_equal(primary, target)  # nothing was trained here
    training, greedy = seen[:150], seen[150:]
    assert set(greedy) == {0}
    expected = [1.0] * 51 + [1 - 0.9 * i / 60 for i in range(1, 61)] + [0.1] * 39
    np.testing.assert_allclose(training, expected, atol=1e-9)
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    record = json.loads(path.read_text())["arms"]["dueling"]
    assert record["history"]["avg loss"] == [None, 2.0, 2.0, 2.0]
    assert len(record["history"]["reward"]) == 4  # the last one cut after 30 steps
    assert final["dueling"]["steps"] == 150
    names = {path.name for path in path.parent.glob("*.gif")}
    assert names == {"episode_2.gif", "episode_4.gif", "best.gif"}
    assert not (path.parent / "replay").exists()
    with Image.open(path.parent / "episode_2.gif") as gif:
        assert gif.size == (320, 480)
        pictures = {gif.seek(i) or gif.convert("RGB").tobytes() for i in range(gif.n_frames)}
    assert len(pictures) > 1  # a game begins slowly
    assert min(np.frombuffer(picture, "uint8").std() for picture in pictures) > 10


def test_too_little_room(short, monkeypatch, capsys):
    usage = types.SimpleNamespace(free=10**6)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: usage)
    code, line = fails_in_one_line(lambda: script.run_as_command(lambda: script.main([])), capsys)
    assert (code, "--replay-size" in line) == (1, True)
    assert not list(script.pathlib.Path("log").glob("*/*/replay"))


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(short, monkeypatch, capsys):
    monkeypatch.setattr(script, "CHECKPOINT_SECONDS", 0)
    steps = tf.Variable(0)
    loss = lambda *batch: tf.where(steps.assign_add(1) > 60, np.nan, 1.0)  # noqa: E731
    monkeypatch.setattr(script, "dueling_q_step", loss)
    flags = ["--delay-training", "40", "--replay-size", "200", "--epochs", "10"]
    code, line = fails_in_one_line(
        lambda: script.run_as_command(lambda: script.main(flags)), capsys
    )
    assert (code, "not finite" in line) == (1, True)
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    rewards = json.loads(path.read_text())["arms"]["dueling"]["history"]["reward"]
    assert len(rewards) == 2  # the third holds the NaN
    (index,) = path.parent.glob("checkpoint/*.index")
    reader = tf.train.load_checkpoint(str(index.with_suffix("")))
    assert reader.get_tensor("done/.ATTRIBUTES/VARIABLE_VALUE").tolist() == [2, 80]


# --- Resuming ---

# Forks children that train; kills them at random moments; prints what they did, as JSON lines.
KILLER = """
import json, os, random, signal, sys, time
import numpy as np
import dueling_q_spaceinvaders as script

log = open("log.jsonl", "a", buffering=1)
original_env, add_sample, write_results = (
    script.make_space_invaders, script.Memory.add_sample, script.write_results)

def child(flags):
    limit = script.gymnasium.wrappers.TimeLimit
    script.make_space_invaders = lambda: limit(original_env(), random.randint(5, 30))
    script.CHECKPOINT_SECONDS = 0.1
    script.dueling_q_step = lambda *batch: script.tf.reduce_mean(batch[2])
    script.save_gif = lambda frames, path: None
    network = script.DQModel
    script.DQModel = lambda hidden_size, num_actions: network(4, num_actions)
    script.choose_action = lambda state, best_action, eps: random.randrange(6)
    def add(self, frame, action=0, reward=0.0, terminal=False, start=False):
        row = [int(frame.sum()), int(action), float(reward), bool(terminal), bool(start)]
        log.write(json.dumps({"number": self.added + 1, "row": row}) + "\\n")
        add_sample(self, frame, action, reward, terminal, start)
    script.Memory.add_sample = add
    def write(run_dir, results):
        for arm in results["arms"].values():
            log.write(json.dumps({"history": arm["history"]["reward"]}) + "\\n")
        write_results(run_dir, results)
    script.write_results = write
    sys.stdout = open(os.devnull, "w")
    script.main(flags)
    os._exit(0)

flags, kills = sys.argv[1:], 0
random.seed(0)
while True:
    runs = sorted(script.pathlib.Path("log").glob("*/*/results.json"))
    size, last = os.path.getsize("log.jsonl"), kills >= 12
    pid = os.fork()
    if not pid:
        random.seed(kills)
        child(["--resume", str(runs[0].parent), "--epochs", "80"] if runs else flags)
    if not last:  # let it play for up to 150 frames; some are killed before the first
        size += random.randint(0, 12000)
        patience = time.monotonic() + (1.5 if kills % 6 == 5 else 60)
        while os.path.getsize("log.jsonl") <= size and time.monotonic() < patience:
            time.sleep(random.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        kills += 1
        log.write(json.dumps({"killed": kills}) + "\\n")
    if last or not os.WIFSIGNALED(status):
        print(kills, status)
        break
    if kills == 12:  # keep the ring for the test, as it was after the last kill
        (run,) = script.pathlib.Path("log").glob("*/*/replay")
        run.with_name("kept").write_bytes(run.read_bytes())
        log.write(json.dumps({"kept": True}) + "\\n")
"""


def test_resume_after_kills(tmp_path):
    """Twelve kills at random: no episode is lost or doubled, the ring holds what happened."""
    (tmp_path / "log.jsonl").touch()
    flags = [
        "--epochs",
        "4000",
        "--replay-size",
        "300",
        "--delay-training",
        "40",
        "--logdir",
        "log",
    ]
    run = helpers.finish(helpers.start(["-c", KILLER, *flags], tmp_path), tmp_path)
    assert run.code == 0, run.stderr
    assert run.stdout.split()[-2:] == ["12", "0"]
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (kept_at,) = [i for i, entry in enumerate(entries) if "kept" in entry]

    # The history only ever grows, but for what came after the last checkpoint, played again
    written = [entry["history"] for entry in entries if "history" in entry]
    assert max(map(len, written)) > 20
    for before, after in zip(written, written[1:]):
        if len(after) > len(before):
            assert after[: len(before)] == before
            assert len(after) == len(before) + 1
    final = run.results["arms"]["dueling"]["history"]["reward"]
    assert final == written[-1]
    assert len(final) == max(80, *map(len, written))
    assert run.results["complete"]

    # The ring: what was logged last under a number is what it holds under that number
    rows = {e["number"]: e["row"] for e in entries[:kept_at] if "number" in e}
    slots = np.fromfile(run.folder / "kept", script.SLOT)
    newest = int(slots["number"].max())
    assert newest in (max(rows), max(rows) - 1)
    assert newest > 2 * len(slots)
    held = [slot for slot in slots if slot["number"] > newest - len(slots) + 1]
    assert len(held) == len(slots) - 1
    for slot in held:
        row = [int(slot["frame"].sum()), *(slot[name].item() for name in slot.dtype.names[1:-1])]
        assert row == rows[int(slot["number"])]
    steps = [entry for entry in entries[:kept_at] if "number" in entry]
    resumed = [b for a, b in zip(entries, entries[1:]) if "killed" in a and "number" in b]
    assert resumed
    assert all(entry["row"][-1] for entry in resumed)  # a resumed game starts an episode
    assert len(steps) >= newest


def test_a_resumed_run_takes_the_same_next_step(short_games, monkeypatch):
    """Networks, optimizer and counters come back from the checkpoint, bit for bit."""
    agents = []

    def watched(*arguments):
        agents.append(arguments[4:])
        return tf.constant(0.5)

    monkeypatch.setattr(script, "dueling_q_step", watched)
    monkeypatch.setattr(script, "update_network", None)
    flags = ["--delay-training", "40", "--replay-size", "200", "--gif-every", "99"]

    def noise(*variables):
        for i, variable in enumerate(variables):
            generator = np.random.default_rng(i)
            variable.assign(generator.normal(size=variable.shape).astype("float32"))

    plot = script.plot
    monkeypatch.setattr(script, "plot", lambda *_: (_ for _ in ()).throw(OSError("stopped here")))
    real_save = tf.train.CheckpointManager.save

    def save(manager):
        if agents:
            primary, target, optimizer = agents[0]
            noise(*primary.variables, *target.variables, *optimizer.variables[2:])
            optimizer.iterations.assign(77)
        return real_save(manager)

    monkeypatch.setattr(tf.train.CheckpointManager, "save", save)
    with pytest.raises(OSError, match="stopped"):
        script.main([*flags, "--epochs", "3"])
    monkeypatch.setattr(tf.train.CheckpointManager, "save", real_save)
    monkeypatch.setattr(script, "plot", plot)
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    assert (path.parent / "replay").exists()
    script.main(["--resume", str(path.parent), "--epochs", "4"])
    (before, after) = agents[0], agents[-1]
    assert before[0] is not after[0]
    for one, other in zip(before, after):
        for a, b in zip(one.variables, other.variables, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert int(after[2].iterations) == 77
    results = json.loads(path.read_text())
    assert len(results["arms"]["dueling"]["history"]["reward"]) == 4
    assert results["arms"]["dueling"]["final"]["steps"] == 160


def test_a_trained_model_only_plays(smoke_run, tmp_path, short, monkeypatch):
    run_dir = tmp_path / "copy"
    shutil.copytree(smoke_run("dueling_q_spaceinvaders").folder, run_dir)
    (run_dir / "best.gif").unlink()
    monkeypatch.setattr(script, "Memory", None)  # neither filled nor drawn from
    before = json.loads((run_dir / "results.json").read_text())["arms"]["dueling"]
    model = keras.models.load_model(run_dir / "dueling.keras")
    script.main(["--resume", str(run_dir), "--epochs", "1"])
    after = json.loads((run_dir / "results.json").read_text())["arms"]["dueling"]
    assert after["history"] == before["history"]
    assert (run_dir / "best.gif").exists()
    again = keras.models.load_model(run_dir / "dueling.keras")
    for one, other in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["data-00000-of-00001", "index"])
def test_damaged_checkpoint(smoke_run, tmp_path, capsys, kind):
    code, line = helpers.resume_a_damaged_checkpoint(
        script, smoke_run("dueling_q_spaceinvaders"), kind, tmp_path, capsys
    )
    assert (code, "damaged" in line, "checkpoint" in line) == (1, True, True)


@pytest.mark.slow
def test_claim_the_reward_rises():
    """More points than random play's 140 to 160, after an hour or two on two cores.

    No proof of learning from the screen: fire, held for a whole game, gives 285 points.
    """
    flags = ["--epochs", "400", "--delay-training", "5000", "--epsilon-min-iter", "100000"]
    assert script.main(flags)["dueling"]["reward"] > 180
