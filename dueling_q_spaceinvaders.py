"""Teach a dueling Q network Space Invaders from its screen, with a memory of 200,000 frames.

Article: "Atari Space Invaders and Dueling Q RL in TensorFlow 2" (Adventures in Machine Learning).

The agent sees the last three frames in grey, so that it can tell what moves where. One stream of
layers judges the situation, another one the six actions. For 50,000 steps it plays at random. Then
it chooses more and more actions itself, and after each step it learns from 32 stored ones.

    python dueling_q_spaceinvaders.py                     # takes hours on a CPU; Ctrl-C stops it
    python dueling_q_spaceinvaders.py --resume RUN_DIR    # goes on with a stopped run

Result (seed 0, the first 703 of 1,500 games): 161 points a game at random, 289 in games 604 to 703.
The network of game 703 gets 308 greedily. What comes after is not yet measured.

Differences from the article:
1. TAU is 0.001, not 0.08; Adam's rate is 6.25e-5 and its epsilon 1.5e-4, not 1e-7. The article's
   values kill ReLU units: of the advantage stream's 256 units 121 answer with its TAU at step
   80,000, 74 with its Adam at step 65,000. The agent learns from the signs of the rewards.
2. A sampled state ends with the frame that the agent acted on; the article's is one frame older. It
   never mixes two games. A full memory is drawn from as a whole, the article's from its head.
3. Frames are kept in a file as uint8, 8,400 bytes each. The article's float32 frames take 33,600.
4. The mean of the advantages is taken over a state's actions. The article's is over the batch.
5. The target network starts as a copy. Epsilon falls until step 550,000; the article's jumps.
6. The step is compiled. `avg loss` leaves out steps without training. DQModel is a function.
7. The game is ALE/SpaceInvaders-v5, with v0's 2 to 4 frames a step. 1,500 games, not a million.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3", "numpy>=2,<3",
#     "gymnasium[classic-control]>=1.1,<2", "ale-py>=0.10.2,<1", "matplotlib>=3.9,<4"]
# ///

import argparse
import contextlib
import functools
import json
import os
import pathlib
import sys
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # even where keras.json names another one
import ale_py
import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

SCRIPT = "dueling_q_spaceinvaders"
MODULES = (tf, keras, np, gymnasium, ale_py)  # results.json names their versions
ARTICLE = {"dueling": {}}  # it shows a figure, and names 60 points in game 50
MAX_EPSILON = 1
MIN_EPSILON = 0.1
EPSILON_MIN_ITER = 500000
GAMMA = 0.99
BATCH_SIZE = 32
TAU = 0.001
POST_PROCESS_IMAGE_SIZE = (105, 80)
DELAY_TRAINING = 50000
NUM_FRAMES = 3
GIF_RECORDING_FREQ = 50
num_actions = 6
double_q = True  # False: the article's plain deep Q learning


# %% Environment
# The screen is made grey and halved. Three such frames in a row are what the agent sees.
def make_env(max_steps=None):
    """Return the game with the rhythm of the article's SpaceInvaders-v0: 2 to 4 frames a step.

    In v5 a step is always 4 frames, and the frames that the agent then sees show no enemy bomb.
    """
    gymnasium.register_envs(ale_py)
    rhythm = {"frameskip": (2, 5), "repeat_action_probability": 0.25}
    return gymnasium.make("ALE/SpaceInvaders-v5", max_episode_steps=max_steps, **rhythm)


def image_preprocess(image):
    """Return a screen (210, 160, 3), uint8, in grey and halved, (105, 80), uint8."""
    # As tf.image.rgb_to_grayscale and tf.image.resize do, but in 0.04 ms instead of 1.5 ms
    grey = image @ np.float32([0.2989, 0.5870, 0.1140])
    rows = grey[::2] + grey[1::2]  # (105, 160)
    sums = rows[:, ::2] + rows[:, 1::2]  # (105, 80)
    return np.uint8(sums / 4 + 0.5)  # rounded


def start_game(env, seed=None):
    """Return the first state of a new game: its first frame, NUM_FRAMES times."""
    image, _ = env.reset(seed=seed)
    return np.stack([image_preprocess(image)] * NUM_FRAMES)  # (NUM_FRAMES, 105, 80)


def process_state_stack(state_stack, frame):
    """Return the stack without its oldest frame, and with the new one (105, 80) at its end."""
    return np.concatenate([state_stack[1:], frame[np.newaxis]])


# %% Model
# As in dueling_q_cartpole.py, Q is a value plus an advantage. Two convolutions read the frames.
def DQModel(hidden_size, num_actions):
    """Return the network: states (batch, NUM_FRAMES, 105, 80), uint8, to Q (batch, num_actions)."""
    dense = functools.partial(keras.layers.Dense, kernel_initializer="he_normal")
    inputs = keras.Input((NUM_FRAMES, *POST_PROCESS_IMAGE_SIZE), dtype="uint8")
    x = keras.ops.transpose(inputs, (0, 2, 3, 1))  # (batch, 105, 80, NUM_FRAMES)
    x = keras.ops.cast(x, "float32") / 255
    x = keras.layers.Conv2D(16, (8, 8), (4, 4), activation="relu", name="conv1")(x)
    x = keras.layers.Conv2D(32, (4, 4), (2, 2), activation="relu", name="conv2")(x)
    x = keras.layers.Flatten()(x)  # (batch, 2816)
    adv = dense(hidden_size, activation="relu", name="adv_dense")(x)
    adv = dense(num_actions, name="adv_out")(adv)  # (batch, num_actions)
    v = dense(hidden_size, activation="relu", name="v_dense")(x)
    v = dense(1, name="v_out")(v)  # (batch, 1)
    norm_adv = adv - keras.ops.mean(adv, axis=1, keepdims=True)  # over the actions of each state
    combined = keras.layers.Add()([v, norm_adv])
    return keras.Model(inputs, combined)


# %% Algorithm
# The memory holds single frames, each once; states are put together when they are drawn.
SLOT = [
    ("frame", "u1", POST_PROCESS_IMAGE_SIZE),
    ("action", "u1"),
    ("reward", "f4"),
    ("terminal", "?"),
    ("start", "?"),
    ("number", "i8"),  # written last: a frame without it does not count
]


class Memory:
    """The newest frames, each with the step that led to it, in a file that survives a kill."""

    def __init__(self, path, max_memory):
        size = max_memory * np.dtype(SLOT).itemsize
        if not path.exists() or path.stat().st_size != size:
            print(f"{path}: {size / 1e9:.2f} GB for the {max_memory:,} frames of --replay-size")
            path.write_bytes(bytes(size))  # all of it now: a full disk would kill the run later
        self.slots = np.memmap(path, SLOT, "r+")
        self.added = int(self.slots["number"].max())

    def add_sample(self, frame, action=0, reward=0.0, terminal=False, start=False):
        """Store a frame and the step that led to it. No step leads to the `start` of a game."""
        self.added += 1
        place = self.added % len(self.slots)  # that of the oldest frame
        self.slots[place] = frame, action, reward, terminal, start, self.added

    def sample(self, no_samples):
        """Draw stored steps, each equally likely; return frames, actions, rewards, terminals.

        A step is drawn by the number of the frame that it led to. That frame and the three before
        it are its window: the first three are the state, the last three the next state. If a game
        begins within a window, its first frame stands for those before it. Refused are a first
        frame, as no step led to it, and a window that reaches back to overwritten frames.
        """
        size = len(self.slots)
        is_start = np.asarray(self.slots["start"])
        oldest = max(1, self.added - size + 2)  # a kill may have left the next slot half written
        windows = []
        while len(windows) < no_samples:
            last = np.random.randint(oldest, self.added + 1)
            window = np.arange(last - NUM_FRAMES, last + 1)
            starts = window[is_start[window % size]]
            if last in starts:
                continue
            if len(starts) > 0:
                window = np.maximum(window, starts[-1])
            if window[0] >= oldest:
                windows.append(window)
        rand_idxs = np.array(windows) % size  # (no_samples, NUM_FRAMES + 1)
        steps = self.slots[rand_idxs[:, -1]]
        actions, rewards, terminals = steps["action"], steps["reward"], steps["terminal"]
        return self.slots["frame"][rand_idxs], actions, rewards, np.float32(terminals)


def choose_action(state, predict, eps):
    """Return a random action with probability `eps`, else the one with the largest Q value."""
    if np.random.random() < eps:
        return np.random.randint(num_actions)
    return int(np.argmax(predict(state[np.newaxis])))


@tf.function(jit_compile=True)  # without XLA a step takes a fourth longer
def update_network(primary_network, target_network, optimizer, gradients):
    """Apply the gradients; then move each weight t of the target towards the primary's weight e."""
    optimizer.apply(gradients)
    for t, e in zip(target_network.trainable_variables, primary_network.trainable_variables):
        t.assign(t * (1 - TAU) + e * TAU)


def train(primary_network, target_network, optimizer, frames, actions, rewards, terminals):
    """Take a gradient step on what Memory.sample returns; return its loss.

    Q_target = r + GAMMA Q_target_network(s', a*), a* = argmax_a Q(s', a), in Double Q learning.
    """
    states = frames[:, :-1]  # (batch, NUM_FRAMES, 105, 80)
    next_states = frames[:, 1:]
    prim_qtp1 = primary_network(next_states)  # (batch, num_actions)
    if double_q:
        prim_action_tp1 = tf.argmax(prim_qtp1, axis=1)
        q_from_target = target_network(next_states)
        q_next = tf.gather(q_from_target, prim_action_tp1, batch_dims=1)
    else:
        q_next = tf.reduce_max(prim_qtp1, axis=1)
    updates = rewards + GAMMA * (1 - terminals) * q_next  # (batch,)
    taken = tf.one_hot(actions, num_actions)  # (batch, num_actions)
    target_q = taken * updates[:, tf.newaxis]  # the other actions add no loss
    with tf.GradientTape() as tape:
        prim_qt = primary_network(states)
        loss = keras.losses.Huber()(target_q, taken * prim_qt)
    gradients = tape.gradient(loss, primary_network.trainable_variables)
    update_network(primary_network, target_network, optimizer, gradients)
    return loss


def save_checkpoint(path, counts, variables):
    """Write a checkpoint beside the old one and rename it: a kill never leaves half of it."""
    values = [variable.numpy() for variable in variables]
    np.savez(path.with_suffix(".new.npz"), np.array(counts), *values)
    os.replace(path.with_suffix(".new.npz"), path)


def restore_checkpoint(path, variables):
    """Give the variables the values of the last checkpoint; return its counts."""
    with np.load(path) as arrays:
        counts, *values = arrays.values()
    for variable, value in zip(variables, values):
        variable.assign(value)
    return counts.tolist()


# %% Training
# In each step the agent acts, stores what it has seen, and learns from a batch of old steps.
# It learns from the sign of a reward, 0 or 1: with the points it stood still at 240 a game.
def train_agent(run):
    """Play up to --epochs games or --max-steps steps, from the last checkpoint if there is one."""
    args = run.args
    keras.utils.set_random_seed(args.seed)
    primary_network = DQModel(256, num_actions)
    target_network = DQModel(256, num_actions)
    target_network.set_weights(primary_network.get_weights())
    optimizer = keras.optimizers.Adam(6.25e-5, epsilon=1.5e-4)
    primary_network.compile(optimizer, keras.losses.Huber())  # the saved one can be evaluated
    optimizer.build(primary_network.trainable_variables)  # compiled code cannot make its variables
    variables = primary_network.variables + target_network.variables + optimizer.variables
    predict = tf.function(primary_network, jit_compile=True)  # without XLA nearly twice as long
    learn = functools.partial(train, primary_network, target_network, optimizer)
    learn = tf.function(learn)  # XLA's convolutions would take nearly three times as long on a CPU
    episode = steps = 0
    if (run.folder / "checkpoint.npz").exists():
        episode, steps = restore_checkpoint(run.folder / "checkpoint.npz", variables)
    keras.utils.set_random_seed(args.seed + episode)  # a resumed run draws other numbers
    env = make_env(args.max_steps)  # a limit for the greedy games too
    env.reset(seed=args.seed + episode)
    memory = Memory(run.folder / "replay", args.replay_size)
    train_writer = tf.summary.create_file_writer(str(run.events / "dueling"))
    num_episodes = args.epochs
    while episode < num_episodes and steps < (args.max_steps or np.inf):
        episode += 1
        state = start_game(env)
        memory.add_sample(state[-1], start=True)
        tot_reward = 0.0
        losses = []
        frame_list = []
        done = False
        while not done:
            progress = (steps - args.delay_training) / args.epsilon_min_iter
            eps = MAX_EPSILON - np.clip(progress, 0, 1) * (MAX_EPSILON - MIN_EPSILON)
            action = choose_action(state, predict, eps)
            image, reward, terminated, truncated, _ = env.step(action)
            state = process_state_stack(state, image_preprocess(image))
            memory.add_sample(state[-1], action, np.sign(reward), terminated)
            tot_reward += reward
            steps += 1
            samples = min(steps, memory.added)  # fewer than steps if the replay was lost
            if samples > args.delay_training:
                loss = learn(*memory.sample(BATCH_SIZE))
                losses.append(float(loss))
            if episode % args.gif_every == 0:
                frame_list.append(image)
            done = terminated or truncated or steps == args.max_steps
        avg_loss = np.mean(losses).item() if losses else None
        line = f"Episode: {episode}, step: {steps}, Reward: {tot_reward:.0f}"
        with train_writer.as_default(step=episode):
            tf.summary.scalar("reward", tot_reward)
            if losses:
                tf.summary.scalar("avg loss", avg_loss)
                line += f", avg loss: {avg_loss:.5f}, eps: {eps:.3f}"
        print(line if losses else f"Pre-training... {line}")
        run.record("dueling", episode, {"reward": tot_reward, "avg loss": avg_loss})
        if frame_list:
            save_gif(frame_list, run.folder / f"episode_{episode}.gif")
        run.write()  # first, so that results.json has every game of the checkpoint
        save_checkpoint(run.folder / "checkpoint.npz", [episode, steps], variables)
    primary_network.save(run.folder / "dueling.keras")
    final = evaluate(env, predict, args.seed, run.records["dueling"]["history"])
    run.conclude("dueling", {"steps": steps, **final})


def evaluate(env, predict, seed, history):
    """Play ten greedy games, each from its own seed; return the final numbers of a training."""
    learned = [loss is not None for loss in history["avg loss"]]
    random_games = learned.index(True) if any(learned) else len(learned)
    final = {"reward": np.mean(history["reward"][-20:]).item()}
    if random_games > 0:
        final["random_reward"] = np.mean(history["reward"][:random_games]).item()
    print("ten greedy games ...")
    tot_reward = 0.0
    for game_seed in range(seed + 1000, seed + 1010):
        state = start_game(env, game_seed)
        done = False
        while not done:
            action = choose_action(state, predict, eps=0)
            image, reward, terminated, truncated, _ = env.step(action)
            state = process_state_stack(state, image_preprocess(image))
            tot_reward += reward
            done = terminated or truncated
    return {**final, "greedy_reward": tot_reward / 10}


# %% Figures
# The article's: the reward by game, and some of the games themselves.
def save_gif(frame_list, path):
    """Save screens (210, 160, 3) as an animation of the article's size, as fast as the game is."""
    pictures = [keras.utils.array_to_img(image, scale=False) for image in frame_list]
    first, *others = [picture.quantize().resize((320, 480)) for picture in pictures]
    first.save(path, save_all=True, append_images=others, duration=50, loop=0)


def plot(run):
    """Draw the reward by game, its mean over twenty games, and that of random play."""
    record = run.records["dueling"]
    rewards = record["history"]["reward"]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    episodes = range(1, len(rewards) + 1)
    averages = [np.mean(rewards[max(0, episode - 20) : episode]) for episode in episodes]
    axes.plot(episodes, rewards, alpha=0.3, label="a game")
    axes.plot(episodes, averages, label="mean of 20 games")
    if "random_reward" in record["final"]:
        axes.axhline(record["final"]["random_reward"], color="k", ls="--", label="random play")
    axes.set(xlabel="episode", ylabel="reward (points)", title="Space Invaders, Dueling Q")
    axes.legend()
    figure.savefig(run.folder / "reward.png")


# %% Command line
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of its arm."""
    parser = make_parser("--epochs", "--episodes", default=1500)
    add = parser.add_argument
    add("--max-steps", type=int, help="end a training after this many environment steps")
    add("--resume", type=os.path.expanduser, metavar="RUN_DIR", help="go on with this run")
    add("--replay-size", type=int, default=200000, help="frames in memory")
    add("--delay-training", type=int, default=DELAY_TRAINING, help="random steps before training")
    add("--epsilon-min-iter", type=int, default=EPSILON_MIN_ITER, help="steps while epsilon falls")
    add("--gif-every", type=int, default=GIF_RECORDING_FREQ, help="a GIF of one game in so many")
    args, earlier = read_run(parser, argv)
    if args.replay_size <= BATCH_SIZE:
        parser.error(f"argument --replay-size: a batch needs more than {BATCH_SIZE}")
    run = Run(args, "ALE/SpaceInvaders-v5", earlier)
    train_agent(run)
    plot(run)
    (run.folder / "replay").unlink(missing_ok=True)  # only an unfinished run needs it
    return run.report()


# %% Frame: flags, run folder and results; the same text in every script
def make_parser(*names, default, devices=("auto", "cpu", "gpu")):
    """Return a parser with the flags of every script; `names` are the names of the first flag."""
    lines = str(__doc__).splitlines()
    parser = argparse.ArgumentParser(description=lines[0], allow_abbrev=False)
    parser.epilog = "; ".join(line.split("#")[0].strip() for line in lines if "   python" in line)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add(*names, type=int, default=default, help=f"{names[-1][2:]} of each training")
    add("--device", choices=devices, default="auto", help="auto is a GPU where there is one")
    add("--logdir", type=os.path.expanduser, default="log", help="each run makes a folder in it")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    return parser


def parse_flags(parser, argv):
    """Return the flags `argv`; None means those of the command line, or no flags in a notebook."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - pythonw has none
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
        sys.stdout.reconfigure(line_buffering=True)
    if argv is None and sys.argv[0].endswith(("kernel_launcher.py", "ipykernel/__main__.py")):
        argv = []
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        raise SystemExit(end.code) from None  # Colab's IPython cannot show an error within an error
    for name, value in vars(args).items():
        least = 1 if type(value) is int and name != "seed" else 0
        if value == "" or (type(value) in (int, float) and not least <= value < 2**32):
            parser.error(f"argument --{name.replace('_', '-')}: {value!r} is not allowed")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    gpus = [] if args.device == "cpu" else tf.config.list_physical_devices("GPU")
    if args.device == "gpu" and not gpus:
        parser.error("argument --device: TensorFlow finds no GPU; use auto or cpu")
    with contextlib.suppress(RuntimeError):  # TensorFlow has already started in this process
        tf.config.set_visible_devices(gpus, "GPU")
        return args
    parser.error(f"argument --device: too late for {args.device}; restart Python first")


class Run:
    """A run, new or going on with an `earlier` one: its flags, folder and results.json."""

    def __init__(self, args, data, earlier=None):
        name = time.strftime("%Y%m%d-%H%M%S") + "-synthetic" * (data == "synthetic")
        self.args = args
        self.folder = pathlib.Path(args.logdir, SCRIPT, name)
        while self.folder.exists():  # two runs may start in one second
            self.folder = self.folder.with_name(f"{self.folder.name}-2")
        if earlier:
            self.folder = pathlib.Path(args.resume)
        self.events = self.folder / f"resumed-{name}" if earlier else self.folder  # TensorBoard's
        device = ", ".join(gpu.name for gpu in tf.config.get_visible_devices("GPU")) or "CPU"
        self.results = {"script": SCRIPT, "config": vars(args), "device": device, "data": data}
        self.results["versions"] = {module.__name__: module.__version__ for module in MODULES}
        self.results["article"] = {} if data == "synthetic" else ARTICLE
        self.results["arms"] = earlier["arms"] if earlier else {}
        self.records = self.results["arms"]  # {arm: what record() and conclude() fill}
        self.clock = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()
        print(f"{SCRIPT} on {data}, device {device}, writes to {self.folder.as_posix()}")

    def record(self, arm, epoch, metrics):
        """Keep the metrics of an epoch, counted from 1; a repeated one replaces its record."""
        record = self.records.setdefault(arm, {"history": {}, "final": {}, "seconds": 0.0})
        for metric, value in metrics.items():
            record["history"].setdefault(metric, [])[epoch - 1 :] = [value]
        record["seconds"] += time.perf_counter() - self.clock
        self.clock = time.perf_counter()
        if self.clock > self.written + 1:
            self.write()

    def conclude(self, arm, numbers):
        """Keep final numbers of an arm."""
        self.records[arm]["final"].update(numbers)
        self.write()

    def write(self, complete=False):
        """Write results.json beside the old one and rename it, so that it is never half written."""
        text = json.dumps(self.results | {"complete": complete}, indent=1)
        (self.folder / "results.tmp").write_text(text)
        os.replace(self.folder / "results.tmp", self.folder / "results.json")
        self.written = time.perf_counter()

    def report(self, *lines):
        """Print the final numbers, the figures, and lines to paste; return the final numbers."""
        self.write(complete=True)
        print(f"\n{'arm':<16}{'metric':<34}{'here':>14}{'article':>14}")
        for arm, record in self.results["arms"].items():
            article = self.results["article"].get(arm, {})
            for metric, value in record["final"].items():
                form = "," if isinstance(value, int) else ",.4g"
                here = "never" if value is None else format(value, form)
                print(f"{arm:<16}{metric:<34}{here:>14}{article.get(metric, '-'):>14}")
        print(*sorted(path.as_posix() for path in self.folder.glob("*.[gp]*")), "", sep="\n")
        name = keras.__name__
        for path in sorted(self.folder.glob("*.keras")):
            print(f'import {name}; model = {name}.models.load_model("{path.as_posix()}")')
        print(*lines, f'tensorboard --logdir "{self.folder.as_posix()}"', sep="\n")
        return {arm: record["final"] for arm, record in self.results["arms"].items()}


# %% Frame, resume: the same text in every script that can go on after an interruption
def read_run(parser, argv):
    """Return the flags, and the results of the run that --resume names, whose flags they are."""
    args = parse_flags(parser, argv)
    if args.resume is None:
        return args, None
    earlier = json.loads(pathlib.Path(args.resume, "results.json").read_text())
    if earlier["script"] != SCRIPT:
        parser.error(f"argument --resume: {args.resume} is a run of {earlier['script']}.py")
    parser.set_defaults(**earlier["config"])
    args = parse_flags(parser, argv)
    for name in earlier["config"].keys() - {"epochs", "max_steps", "device", "resume", "weights"}:
        if getattr(args, name) != earlier["config"][name]:
            parser.error(f"argument --{name.replace('_', '-')}: must be as in the run to resume")
    return args, earlier


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, OSError) or type(error) is Exception:  # Keras, if a download fails
            raise SystemExit(f"error: {type(error).__name__}: {error}") from None
        raise
