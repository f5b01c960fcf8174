"""Teach a dueling Q network Space Invaders from its screen, with a memory of 200,000 frames.

Article: "Atari Space Invaders and Dueling Q RL in TensorFlow 2" (Adventures in Machine Learning).

The agent sees the last three frames in grey, so that it can tell what moves where. One stream of
layers judges the situation, another one the six actions. For 50,000 steps it plays at random. Then
it chooses more and more actions itself, and after each step it learns from 32 stored ones.

    python dueling_q_spaceinvaders.py                     # takes hours on a CPU; Ctrl-C stops it
    python dueling_q_spaceinvaders.py --resume RUN_DIR    # goes on with a stopped run

Result (seed 0): the reward rises from 161 points a game at random to 265 in games 697 to 796. Ten
greedy games then make 256. After game 1,050 it falls again, to 186 in the last 100 of 1,206 games.

Differences from the article:
1. A sampled state ends with the frame that the agent acted on. The article's is one frame older.
2. No state mixes two games. A game's first frame, which the article never stores, is repeated.
3. A full memory is drawn from as a whole. The article draws from 32 frames of it, then from 33, ...
4. Frames are kept in a file as uint8, 8,400 bytes each. The article's float32 frames take 33,600.
5. The advantages' mean is taken over the actions, not the batch. The target starts as a copy.
6. Epsilon falls until step 550,000; the article's jumps. `avg loss` counts only trained steps.
7. Adam has a learning rate of 2.5e-4 and an epsilon of 3e-4. With its default epsilon of 1e-7 even
   tiny gradients move the weights by full steps and kill ReLU units: after 300 steps 44 to 93 of
   the advantage stream's 256 still answer, with ours 203 to 228 (seeds 0 to 4).
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3", "numpy>=2,<3",
#     "gymnasium[classic-control]>=1.1,<2", "ale-py>=0.10.2,<1", "matplotlib>=3.9,<4"]
# ///

import argparse
import functools
import json
import os
import pathlib
import sys
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # even where keras.json names another one
if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"  # only a notebook shows figures
import ale_py
import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

SCRIPT = "dueling_q_spaceinvaders"
MODULES = (tf, keras, np, gymnasium, ale_py)  # results.json names their versions
ARTICLE = {"dueling": {}}  # its figure rises over 1,500 games; it names 60 points in game 50
POST_PROCESS_IMAGE_SIZE = (105, 80)
NUM_FRAMES = 3
NUM_ACTIONS = 6
HIDDEN_SIZE = 256
DOUBLE_Q = True  # False: the article's plain deep Q learning
MAX_EPSILON = 1.0
MIN_EPSILON = 0.1
GAMMA = 0.99
TAU = 0.08
BATCH_SIZE = 32
LEARNING_RATE = 2.5e-4
ADAM_EPSILON = 3e-4
EVALUATION_GAMES = 10


# --- Environment ---
# The screen is made grey and halved. Three such frames in a row are what the agent sees.
def make_env():
    """Return the game with the dynamics of the article's SpaceInvaders-v0: 2 to 4 frames a step.

    In v5 a step is always 4 frames, and the frames that the agent then sees show no enemy bomb.
    """
    gymnasium.register_envs(ale_py)
    game = "ALE/SpaceInvaders-v5"
    return gymnasium.make(game, frameskip=(2, 5), repeat_action_probability=0.25)


def image_preprocess(image):
    """Return a screen (210, 160, 3), uint8, in grey and halved, (105, 80), uint8.

    It does what tf.image.rgb_to_grayscale and tf.image.resize do, the mean of 2 x 2 points. Those
    take 1.5 ms of processor time for a frame, or 0.6 ms compiled; this takes 0.04 ms.
    """
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


# --- Model ---
# As in dueling_q_cartpole.py, Q is a value plus an advantage. Two convolutions read the frames.
@tf.function(jit_compile=True)
def network_input(frames):
    """Return frames (batch, n, 105, 80), uint8, as Conv2D's (batch, 105, 80, n), from 0 to 1."""
    return tf.cast(tf.transpose(frames, (0, 2, 3, 1)), tf.float32) / 255


def DQModel(hidden_size, num_actions):
    """Return the network: states (batch, 105, 80, NUM_FRAMES) to Q (batch, num_actions).

    It is a function and not a class, so that Keras can load a saved network without this file.
    """
    he = {"kernel_initializer": "he_normal"}
    inputs = keras.Input((*POST_PROCESS_IMAGE_SIZE, NUM_FRAMES))
    x = keras.layers.Conv2D(16, (8, 8), (4, 4), activation="relu", name="conv1")(inputs)
    x = keras.layers.Conv2D(32, (4, 4), (2, 2), activation="relu", name="conv2")(x)
    x = keras.layers.Flatten()(x)  # (batch, 2816)
    adv = keras.layers.Dense(hidden_size, "relu", name="adv_dense", **he)(x)
    adv = keras.layers.Dense(num_actions, name="adv_out", **he)(adv)  # (batch, num_actions)
    v = keras.layers.Dense(hidden_size, "relu", name="v_dense", **he)(x)
    v = keras.layers.Dense(1, name="v_out", **he)(v)  # (batch, 1)
    mean_adv = keras.ops.mean(adv, axis=1, keepdims=True)  # over the actions of each state
    return keras.Model(inputs, keras.layers.Add()([v, adv - mean_adv]))


# --- Algorithm ---
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

        A step needs four frames in a row: the first three are its state, the last three its next
        state. So draw the number of the last frame and count back. The first frame of a game stands
        for those before it. Draw again if no step led to the last frame, because it is the first of
        a game, or if one of the four has been overwritten.
        """
        size, starts = len(self.slots), self.slots["start"]
        oldest = max(1, self.added - size + 2)  # a kill may have left the next slot half written
        windows = []
        while len(windows) < no_samples:
            number = np.random.randint(oldest, self.added + 1)
            if starts[number % size]:
                continue
            window = [number]
            for _ in range(NUM_FRAMES):
                if not starts[number % size]:
                    number -= 1
                window.insert(0, number)
            if number >= oldest:
                windows.append(window)
        places = np.array(windows) % size  # (no_samples, NUM_FRAMES + 1)
        steps = self.slots[places[:, -1]]  # those that led to the last frames
        columns = [steps[name].astype("float32") for name in ("action", "reward", "terminal")]
        return self.slots["frame"][places], *columns


def choose_action(state, q_values, eps):
    """Return a random action with probability `eps`, else the one with the largest Q value."""
    if np.random.random() < eps:
        return np.random.randint(NUM_ACTIONS)
    return int(np.argmax(q_values(state[np.newaxis])))


def train(batch, primary_network, apply_gradients, target_network=None):
    """Take a gradient step; return its loss, and the mean of the largest Q of each next state.

    `batch` is what Memory.sample returns. Without a target network this is deep Q learning.
    """
    frames, actions, rewards, terminals = batch
    states = network_input(frames[:, :-1])  # (batch, 105, 80, NUM_FRAMES)
    next_states = network_input(frames[:, 1:])
    prim_qtp1 = primary_network(next_states)  # (batch, NUM_ACTIONS)
    if target_network is None:
        q_judge = prim_qtp1
        q_next = tf.reduce_max(prim_qtp1, axis=1)
    else:
        q_judge = target_network(next_states)
        prim_action_tp1 = tf.argmax(prim_qtp1, axis=1)
        q_next = tf.gather(q_judge, prim_action_tp1, batch_dims=1)
    target_q = rewards + GAMMA * (1 - terminals) * q_next  # (batch,)
    taken = tf.one_hot(tf.cast(actions, tf.int32), NUM_ACTIONS)  # the others add no loss
    with tf.GradientTape() as tape:
        q = primary_network(states)
        loss = keras.losses.Huber()(taken * target_q[:, tf.newaxis], taken * q)
    apply_gradients(tape.gradient(loss, primary_network.trainable_variables))
    return loss, tf.reduce_mean(tf.reduce_max(q_judge, axis=1))


@tf.function(jit_compile=True)
def update_network(primary_network, target_network):
    """Move each weight t of the target towards the primary's e: t becomes t (1 - TAU) + e TAU."""
    for t, e in zip(target_network.trainable_variables, primary_network.trainable_variables):
        t.assign_add(TAU * (e - t))


class Agent:
    """Two networks, an optimizer, and the games and steps played: what a checkpoint keeps."""

    def __init__(self, seed):
        keras.utils.set_random_seed(seed)
        self.primary_network = DQModel(HIDDEN_SIZE, NUM_ACTIONS)
        self.target_network = DQModel(HIDDEN_SIZE, NUM_ACTIONS)
        self.target_network.set_weights(self.primary_network.get_weights())
        optimizer = keras.optimizers.Adam(LEARNING_RATE, epsilon=ADAM_EPSILON)
        optimizer.build(self.primary_network.trainable_variables)  # compiled code cannot do it
        self.apply_gradients = tf.function(optimizer.apply, jit_compile=True)
        weights = self.primary_network.variables + self.target_network.variables
        self.variables = weights + optimizer.variables
        self.episodes = self.steps = 0

    @tf.function  # without XLA: on a CPU TensorFlow's own convolutions are faster
    def learn(self, *batch):
        """Train the primary network, let the target network follow; return the results of train."""
        target_network = self.target_network if DOUBLE_Q else None
        results = train(batch, self.primary_network, self.apply_gradients, target_network)
        update_network(self.primary_network, self.target_network)
        return results

    @tf.function(jit_compile=True)
    def q_values(self, states):
        """Return Q (batch, NUM_ACTIONS) of states (batch, NUM_FRAMES, 105, 80), uint8."""
        return self.primary_network(network_input(states))

    def save(self, folder):
        """Write the checkpoint beside the old one and rename it: a kill never leaves half of it."""
        counts = np.array([self.episodes, self.steps])
        values = [variable.numpy() for variable in self.variables]
        np.savez(folder / "checkpoint.new.npz", counts, *values)
        os.replace(folder / "checkpoint.new.npz", folder / "checkpoint.npz")

    def restore(self, folder):
        """Go on from the last checkpoint, if there is one; later games are played again."""
        if (folder / "checkpoint.npz").exists():
            with np.load(folder / "checkpoint.npz") as arrays:
                counts, *values = arrays.values()
            self.episodes, self.steps = counts.tolist()
            for variable, value in zip(self.variables, values):
                variable.assign(value)


# --- Training ---
# One game after the other. Once the random phase is over, each step is followed by a gradient step.
def play_and_learn(env, agent, memory, args):
    """Play a game and learn from it; print the article's line; return its values and pictures."""
    losses, mean_qs, pictures = [], [], []
    keep_pictures = (agent.episodes + 1) % args.gif_every == 0
    state = start_game(env)
    memory.add_sample(state[-1], start=True)
    total, ended = 0.0, False
    while not ended:
        trained_steps = agent.steps - args.delay_training  # below 0 in the random phase
        eps = np.interp(trained_steps, [0, args.epsilon_min_iter], [MAX_EPSILON, MIN_EPSILON])
        action = choose_action(state, agent.q_values, eps)
        image, reward, terminated, truncated, _ = env.step(action)
        state = process_state_stack(state, image_preprocess(image))
        memory.add_sample(state[-1], action, reward, terminated)
        total += reward
        agent.steps += 1
        if min(agent.steps, memory.added) > args.delay_training:  # a lost memory is refilled first
            loss, mean_q = agent.learn(*memory.sample(BATCH_SIZE))
            losses.append(float(loss))
            mean_qs.append(float(mean_q))
        if keep_pictures:
            pictures.append(image)
        ended = terminated or truncated or agent.steps == args.max_steps
    agent.episodes += 1
    line = f"episode {agent.episodes}, step {agent.steps}: {total:.0f} points"
    if not losses:
        print(f"Pre-training... {line}")
        return {"reward": total, "avg loss": None, "mean q": None}, pictures
    avg_loss, mean_q = np.mean(losses).item(), np.mean(mean_qs).item()
    print(f"{line}, avg loss {avg_loss:.5f}, eps {eps:.3f}")
    return {"reward": total, "avg loss": avg_loss, "mean q": mean_q}, pictures


def train_agent(env, agent, run):
    """Play up to --epochs games or --max-steps steps, from the last checkpoint if there is one."""
    args = run.args
    agent.restore(run.folder)
    new = {"history": {"reward": [], "avg loss": [], "mean q": []}, "final": {}, "seconds": 0.0}
    record = run.results["arms"].setdefault("dueling", new)
    for values in record["history"].values():
        del values[agent.episodes :]  # what came after the checkpoint is played again
    env.reset(seed=args.seed + agent.episodes)  # only here: a seed reloads the game, which is slow
    memory = Memory(run.folder / "replay", args.replay_size)
    writer = tf.summary.create_file_writer(str(run.folder / "dueling"))
    start = time.perf_counter() - record["seconds"]
    while agent.episodes < args.epochs and agent.steps < (args.max_steps or np.inf):
        values, pictures = play_and_learn(env, agent, memory, args)
        if pictures:
            save_gif(pictures, run.folder / f"episode_{agent.episodes}.gif")
        with writer.as_default(step=agent.episodes):
            for tag, value in values.items():
                record["history"][tag].append(value)
                if value is not None:
                    tf.summary.scalar(tag, value)
        record["seconds"] = time.perf_counter() - start
        run.write()
        agent.save(run.folder)  # after results.json, which then has every game of the checkpoint


def evaluate(env, agent, eps, seed, path):
    """Play ten games, each from its own seed, and save the best one as an animation.

    Returns the mean reward, the actions of all steps, and every tenth state.
    """
    rewards, actions, states, best_game = [], [], [], []
    for game_seed in range(seed + 1000, seed + 1000 + EVALUATION_GAMES):
        keras.utils.set_random_seed(game_seed)  # for the random actions
        state = start_game(env, game_seed)
        pictures = []
        total, ended = 0.0, False
        while not ended:
            if len(actions) % 10 == 0:
                states.append(state)
            actions.append(choose_action(state, agent.q_values, eps))
            image, reward, terminated, truncated, _ = env.step(actions[-1])
            state = process_state_stack(state, image_preprocess(image))
            pictures.append(image)
            total += reward
            ended = terminated or truncated
        rewards.append(total)
        if total == max(rewards):
            best_game = pictures
    save_gif(best_game, path)
    return np.mean(rewards).item(), actions, states


def active_units(network, states):
    """Return which ReLU units of the advantage stream answer to any of the states, (256,)."""
    stream = keras.Model(network.input, network.get_layer("adv_dense").output)
    return np.any(stream(network_input(np.stack(states))) > 0, axis=0)


def finish(env, agent, run):
    """Evaluate the agent, save its network, and record the final numbers."""
    network, seed = agent.primary_network, run.args.seed
    if run.args.max_steps:  # then no game takes longer than the training did
        env = gymnasium.wrappers.TimeLimit(env, run.args.max_steps)
    greedy_reward, actions, states = evaluate(env, agent, 0, seed, run.folder / "best.gif")
    epsilon_reward, _, _ = evaluate(env, agent, MIN_EPSILON, seed, run.folder / "best_epsilon.gif")
    record = run.results["arms"]["dueling"]
    rewards, losses = record["history"]["reward"], record["history"]["avg loss"]
    record["final"] = {
        "reward": np.mean(rewards[-20:]).item(),
        "steps": agent.steps,
        "parameters": network.count_params(),
        "greedy_reward": greedy_reward,
        "commonest_action": np.bincount(actions).max().item() / len(actions),
        "active_units": active_units(network, states).mean().item(),
        "epsilon_reward": epsilon_reward,
    }
    trained = [number for number, loss in enumerate(losses) if loss is not None]
    random_games = trained[0] if trained else len(losses)
    if random_games:
        record["final"]["random_reward"] = np.mean(rewards[:random_games]).item()
    network.save(run.folder / "dueling.keras")


# --- Figures ---
# The article's: the reward by game, and some of the games themselves.
def save_gif(pictures, path):
    """Save screens (210, 160, 3) as an animation of the article's size, as fast as the game is."""
    pictures = [keras.utils.array_to_img(picture, scale=False) for picture in pictures]
    first, *others = [picture.quantize().resize((320, 480)) for picture in pictures]
    first.save(path, save_all=True, append_images=others, duration=50, loop=0)


def plot(run):
    """Draw the reward by game, its moving average, and the mean of the random phase."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    record = run.results["arms"]["dueling"]
    rewards, final = record["history"]["reward"], record["final"]
    episodes = range(1, len(rewards) + 1)
    averages = [np.mean(rewards[max(0, episode - 20) : episode]) for episode in episodes]
    axes.plot(episodes, rewards, alpha=0.3, label="a game")
    axes.plot(episodes, averages, label="mean of 20 games")
    if "random_reward" in final:
        axes.axhline(final["random_reward"], color="black", linestyle="--", label="random play")
    axes.set(xlabel="episode", ylabel="reward (points)", title="Space Invaders, Dueling Q")
    axes.legend()
    figure.savefig(run.folder / "reward.png")


# --- Command line ---
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    parser = make_parser("--epochs", "--episodes", default=1500)
    add = parser.add_argument
    add("--max-steps", type=int, help="end a training after this many environment steps")
    add("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    add("--replay-size", type=int, default=200000, help="frames in memory")
    add("--delay-training", type=int, default=50000, help="random steps before training starts")
    add("--epsilon-min-iter", type=int, default=500000, help="steps over which epsilon falls")
    add("--gif-every", type=int, default=50, help="save a GIF of one episode in this many")
    args, results = read_run(parser, argv)
    if args.replay_size <= BATCH_SIZE:
        parser.error(f"argument --replay-size: {args.replay_size} is too small")
    with Run(args, "ALE/SpaceInvaders-v5", results=results) as run:
        env, agent = make_env(), Agent(args.seed)
        train_agent(env, agent, run)
        finish(env, agent, run)
        plot(run)
        final = run.report()
        (run.folder / "replay").unlink(missing_ok=True)  # only an unfinished run needs it
        return final


# --- Frame: flags, faults, folder and results; the same text in every script ---
def make_parser(*names, default, several=False):
    """Return a parser with the flags of every script; `names` are the names of the first flag."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    device = functools.partial(select_device, several=several)
    add = parser.add_argument
    add(*names, type=int, default=default, help=f"{names[-1][2:]} of each training")
    add("--device", type=device, default="auto", help="auto, cpu, gpu, gpu:N; all only for fit")
    add("--logdir", default="log", help="each run makes a folder of its own in this one")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    return parser


def select_device(name, several):
    """Let TensorFlow see only the GPUs that --device names; return the name."""
    gpus = tf.config.list_physical_devices("GPU")
    choices = {"auto": gpus[:1], "cpu": []} | ({"all": gpus} if several else {})
    choices |= {f"gpu:{number}": [gpu] for number, gpu in enumerate(gpus)}
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        tf.config.set_visible_devices(choices["gpu:0" if name == "gpu" else name], "GPU")
    except KeyError:
        raise argparse.ArgumentTypeError(f"{name} is not here; use {', '.join(choices)}") from None
    except RuntimeError:  # TensorFlow has already started in this process
        raise argparse.ArgumentTypeError(f"too late for {name}; restart Python first") from None
    return name


def parse_flags(parser, argv):
    """Return the flags `argv`; None means those of the command line, or no flags in a notebook."""
    if argv is None and sys.argv[0].endswith(("kernel_launcher.py", "ipykernel/__main__.py")):
        argv = []
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        raise SystemExit(end.code) from None  # Colab's IPython cannot show an error within an error
    for name, value in vars(args).items():
        if type(value) is int and value < (0 if name == "seed" else 1):
            parser.error(f"argument --{name.replace('_', '-')}: {value} is too small")
    if "://" in args.logdir:
        parser.error(f"argument --logdir: {args.logdir} is not a folder on this computer")
    return args


class Run:
    """One run: its flags in `args`, its `folder`, and the `results` that results.json keeps."""

    def __init__(self, args, data, results=None):
        """Make the folder of a new run on `data`, or go on with the `results` of --resume."""
        if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
            sys.stdout.reconfigure(line_buffering=True)
        name = time.strftime("%Y%m%d-%H%M%S") + "-synthetic" * (data == "synthetic")
        self.args, self.folder = args, pathlib.Path(args.logdir).expanduser() / SCRIPT / name
        while self.folder.exists():  # two runs may start in one second
            self.folder = self.folder.with_name(f"{self.folder.name}-2")
        self.results = {"script": SCRIPT, "config": vars(args), "data": data, "arms": {}}
        if results:
            self.folder, self.results["arms"] = pathlib.Path(args.resume), results["arms"]
        self.results["versions"] = {module.__name__: module.__version__ for module in MODULES}
        gpus = [gpu.name for gpu in tf.config.get_visible_devices("GPU")]
        self.results["device"] = ", ".join(gpus) or "CPU"
        self.results["article"] = {} if data == "synthetic" else ARTICLE
        self.results["complete"] = False
        with self:  # its end writes results.json
            self.folder.mkdir(parents=True, exist_ok=True)
        print(f"{SCRIPT} on {data}, device {self.results['device']}, writes to {self.folder}")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Keep what was computed; end with one line after Ctrl-C or a fault of disk or network."""
        if isinstance(error, BrokenPipeError):
            sys.stdout = None  # its reader is gone, and Python would flush it at the end
        if isinstance(error, OSError) or kind is Exception:  # from Keras, if a download fails
            raise SystemExit(f"error: {kind.__name__}: {error}") from None
        if kind is not SystemExit:
            self.write()
        # NumPy may turn Ctrl-C into a SystemError; KeyboardInterrupt is then its cause.
        if KeyboardInterrupt in (kind, type(getattr(error, "__cause__", None))):
            print(f"interrupted; what was finished is in {self.folder}", file=sys.stderr)
            raise SystemExit(130) from None

    def write(self):
        """Write results.json beside the old one and rename it, so that it is never half written."""
        try:
            text = json.dumps(self.results, indent=1, allow_nan=False)
        except ValueError:
            raise SystemExit("error: a number is not finite; try another --seed") from None
        (self.folder / "results.json.tmp").write_text(text)
        os.replace(self.folder / "results.json.tmp", self.folder / "results.json")

    def report(self):
        """Print the results beside the article's and how to go on; return the final numbers."""
        self.results["complete"] = True
        self.write()
        print(f"\n{'arm':<16}{'metric':<34}{'here':>14}{'article':>14}")
        for arm, record in self.results["arms"].items():
            article = self.results["article"].get(arm, {})
            for metric, value in record["final"].items():
                print(f"{arm:<16}{metric:<34}{round(value, 4):>14,}{article.get(metric, '-'):>14}")
        for path in sorted(self.folder.glob("*.*")):
            print(f'model = keras.models.load_model("{path}")' if ".keras" in path.name else path)
        print(f'tensorboard --logdir "{self.folder}"')
        return {arm: record["final"] for arm, record in self.results["arms"].items()}


# --- Frame, resume: the same text in every script that can go on after an interruption ---
def read_run(parser, argv):
    """Return the flags, and the results of the run that --resume names (else None).

    The flags are those of that run. Only --epochs, --max-steps and --device may change.
    """
    args = parse_flags(parser, argv)
    if args.resume is None:
        return args, None
    try:
        results = json.loads(pathlib.Path(args.resume, "results.json").read_text())
    except (OSError, ValueError) as error:
        parser.error(f"argument --resume: {error}")
    if results["script"] != SCRIPT:
        parser.error(f"argument --resume: {args.resume} is a run of {results['script']}.py")
    parser.set_defaults(**results["config"])
    args = parse_flags(parser, argv)
    for name in results["config"].keys() - {"epochs", "max_steps", "device", "resume"}:
        if getattr(args, name) != results["config"][name]:
            parser.error(f"argument --{name.replace('_', '-')}: must be as in the run to resume")
    return args, results


if __name__ == "__main__":
    main()
