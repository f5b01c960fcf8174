"""Balance a pole by Double Q, with a plain network and with a dueling one, and compare the two.

Article: "Dueling Q networks in TensorFlow 2" (Adventures in Machine Learning).

How good a state is often matters more than which action is taken in it. So a dueling network
estimates the value of the state and the advantage of each action separately, and adds them. Both
arms learn by Double Q, as in double_q_cartpole.py. Only the network differs.

    python dueling_q_cartpole.py
    python dueling_q_cartpole.py --epochs 300 --runs 5    # mean and spread of five runs

Result (300 episodes, seeds 0 to 4): from episode 100 on the pole stood for 166 steps on average
with Double Q, and for 167 with Dueling Q. The article, too, finds no clear difference.

Differences from the article:
1. The mean of the advantages is taken over the actions of each state. The article takes it over the
   whole batch, so a state's Q values depend on the other states. We saw no harm from it.
2. The target network starts as a copy. The article copies before the networks have any weights.
3. Epsilon falls until step 300 + 5,000. The article's jumps at step 5,000, from 0.07 to 0.01.
4. `avg loss` leaves out steps without training. The article counts each of them as a loss of -1.
5. Only a fallen pole is terminal, not the time limit. The memory has a column for it.
6. The memory is one array with named columns, in which a new step replaces the oldest one.
7. DQModel is a function, so a saved model loads without it. Learning and Q values are compiled.
8. Training ends after 500 episodes. The article's loop runs for a million.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3",
#     "gymnasium[classic-control]>=1.1,<2", "numpy>=2,<3", "matplotlib>=3.9,<4"]
# ///

import argparse
import contextlib
import functools
import json
import os
import pathlib
import random
import statistics
import sys
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # even where keras.json names another one
if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"  # only a notebook shows figures
import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

SCRIPT = "dueling_q_cartpole"
MODULES = (tf, keras, np, gymnasium)  # results.json names their versions
ARTICLE = {"double": {"reward": 190}, "dueling": {"reward": 190}}  # 180 to 200
MAX_EPSILON = 1.0
MIN_EPSILON = 0.01
BATCH_SIZE = 32
NUM_ACTIONS = 2


# --- Algorithm ---
# First what a value and an advantage are; then the network, and Double Q to train it.
def show_dueling_example():
    """Print V and A = Q - V of the article's state, for a random policy and for the best one."""
    Q = np.array([10.0, 50.0, 100.0])  # what three actions pay; each of them ends the game
    for policy, V in {"a random policy": Q.mean(), "the best policy": Q.max()}.items():
        print(f"Q = {Q}; under {policy} V = {V:.2f}, A = {np.round(Q - V, 2)}")


def DQModel(hidden_size, num_actions, dueling):
    """Return the network: states (batch, 4) to a Q value for each action (batch, num_actions).

    With `dueling`, Q(s, a) = V(s) + A(s, a) - mean of A(s, a') over the actions a'. Without that
    mean, a Q of 60 could be 50 + 10, 0 + 60 or -1000 + 1060, and V could be any number.
    """
    dense = functools.partial(keras.layers.Dense, kernel_initializer="he_normal")
    inputs = keras.Input((4,))
    x = dense(hidden_size, "relu", name="dense1")(inputs)
    x = dense(hidden_size, "relu", name="dense2")(x)
    adv = dense(hidden_size, "relu", name="adv_dense")(x)
    adv = dense(num_actions, name="adv_out")(adv)  # (batch, num_actions)
    if not dueling:
        return keras.Model(inputs, adv)  # plain Q values
    v = dense(hidden_size, "relu", name="v_dense")(x)
    v = dense(1, name="v_out")(v)  # (batch, 1)
    mean_adv = keras.ops.mean(adv, axis=1, keepdims=True)  # over the actions of each state
    return keras.Model(inputs, keras.layers.Add()([v, adv - mean_adv]))


class Memory:
    """The newest `max_memory` steps; once it is full, a new step replaces the oldest one."""

    def __init__(self, max_memory):
        self.max_memory = max_memory
        self.rows = np.zeros((max_memory, 11), "float32")  # one table, so that a batch is one copy
        self.states = self.rows[:, 0:4]
        self.actions = self.rows[:, 4]
        self.rewards = self.rows[:, 5]
        self.next_states = self.rows[:, 6:10]
        self.terminals = self.rows[:, 10]
        self.added = 0

    def add_sample(self, state, action, reward, next_state, terminal):
        place = self.added % self.max_memory
        self.states[place] = state
        self.actions[place] = action
        self.rewards[place] = reward
        self.next_states[place] = next_state
        self.terminals[place] = terminal
        self.added += 1

    def sample(self, no_samples):
        """Return rows (no_samples, 11) of the memory, none of them drawn twice."""
        places = random.sample(range(min(self.added, self.max_memory)), no_samples)
        return tf.constant(self.rows[places])


def split_rows(rows):
    """Return the states, actions, rewards, next states and terminals of rows (n, 11)."""
    return rows[:, 0:4], rows[:, 4], rows[:, 5], rows[:, 6:10], rows[:, 10]


def choose_action(state, q_values, eps):
    """Return a random action with probability `eps`, else the one with the largest Q value."""
    if random.random() < eps:
        return random.randrange(NUM_ACTIONS)
    return int(np.argmax(q_values(tf.constant(state[np.newaxis]))))


def train(batch, primary_network, target_network, optimizer, gamma):
    """Take a gradient step of Double Q, and return its loss.

    The primary network chooses the next action, and the target network says what it is worth.
    """
    states, actions, rewards, next_states, terminals = batch
    prim_action_tp1 = tf.argmax(primary_network(next_states), axis=1)
    q_from_target = target_network(next_states)  # (batch, 2)
    q_next = tf.gather(q_from_target, prim_action_tp1, batch_dims=1)
    target_q = rewards + gamma * (1 - terminals) * q_next
    taken = tf.one_hot(tf.cast(actions, tf.int32), NUM_ACTIONS)  # the other action adds no loss
    with tf.GradientTape() as tape:
        error = taken * (target_q[:, tf.newaxis] - primary_network(states))
        loss = tf.reduce_mean(tf.square(error))
    optimizer.apply(tape.gradient(loss, primary_network.trainable_variables))
    return loss


def update_network(primary_network, target_network, tau):
    """Move each weight t of the target towards the primary's e: t becomes t (1 - tau) + e tau."""
    for t, e in zip(target_network.trainable_variables, primary_network.trainable_variables):
        t.assign_add(tau * (e - t))


# --- Training ---
# One loop for both arms: act, store the step, learn, let the target network follow.
def compile_agent(primary_network, target_network, args):
    """Return the functions learn(rows) and q_values(states), compiled for one shape each."""
    optimizer = keras.optimizers.Adam()
    optimizer.build(primary_network.trainable_variables)  # compiled code cannot make its variables

    def learn(rows):
        batch = split_rows(rows)
        loss = train(batch, primary_network, target_network, optimizer, args.gamma)
        update_network(primary_network, target_network, args.tau)
        return loss

    compiled = functools.partial(tf.function, jit_compile=True, autograph=False)
    learn = compiled(learn).get_concrete_function(tf.TensorSpec((BATCH_SIZE, 11)))
    q_values = compiled(primary_network).get_concrete_function(tf.TensorSpec((1, 4)))
    return learn, q_values


def train_agent(arm, seed, run):
    """Train one agent; record its episodes and final numbers; save the first seed's network."""
    args = run.args
    keras.utils.set_random_seed(seed)
    env = gymnasium.make("CartPole-v1", max_episode_steps=200, render_mode="rgb_array")
    memory = Memory(500000)
    primary_network = DQModel(30, NUM_ACTIONS, dueling=arm == "dueling")
    target_network = DQModel(30, NUM_ACTIONS, dueling=arm == "dueling")
    target_network.set_weights(primary_network.get_weights())
    learn, q_values = compile_agent(primary_network, target_network, args)
    log = EpisodeLog(run, arm, seed)
    print(f"{log.name}: pre-training, {args.delay_training} random steps")
    steps = 0
    while log.episodes < args.epochs and steps != args.max_steps:
        state, _ = env.reset(seed=None if steps else seed)  # only the first episode is seeded
        length, losses = 0, []
        ended = False
        while not ended:
            progress = max(0, steps - args.delay_training) / args.epsilon_min_iter
            eps = MAX_EPSILON - min(progress, 1) * (MAX_EPSILON - MIN_EPSILON)
            action = choose_action(state, q_values, eps)
            next_state, _, terminated, truncated, _ = env.step(action)
            reward = np.random.normal(1.0, args.random_reward_std)
            memory.add_sample(state, action, reward, next_state, terminated)
            state = next_state
            length += 1
            steps += 1
            if steps > args.delay_training:
                losses.append(float(learn(memory.sample(BATCH_SIZE))))
            ended = terminated or truncated or steps == args.max_steps
        log.add({"reward": [length], "avg loss": losses}, f", eps {eps:.3f}")

    def best_action(state):
        return choose_action(state, q_values, eps=0)

    log.finish(evaluate(env, best_action, log, primary_network))
    if seed == args.seed:
        primary_network.save(run.folder / f"{arm}.keras")
        if args.gif:
            save_gif(env, best_action, run.folder / f"{arm}.gif")


def evaluate(env, policy, log, network):
    """Play ten greedy episodes; return the final numbers of a training."""
    averages = moving_average(log.record["history"]["reward"])
    return {
        "reward": averages[-1].item(),
        "episodes_to_180": int(np.argmax(np.append(averages > 180, True))) + 1,  # never: all + 1
        "greedy_reward": statistics.mean(play(env, policy) for _ in range(10)),
        "parameters": network.count_params(),
    }


# --- Figures ---
# The article's figure, the reward by episode.
def plot(run):
    """Draw the reward of each arm by episode."""
    figure, axes = plot_episodes(run.results["arms"], "reward")
    axes.set_title(f"CartPole, each step pays N(1, {run.args.random_reward_std:g})")
    figure.savefig(run.folder / "reward.png")


# --- Command line ---
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    parser = make_parser("--epochs", "--episodes", default=500)
    add = parser.add_argument
    add("--max-steps", type=int, help="end a training after this many environment steps")
    add("--random-reward-std", type=float, default=1.0, help="standard deviation of a reward")
    add("--epsilon-min-iter", type=int, default=5000, help="steps over which epsilon falls")
    add("--delay-training", type=int, default=300, help="random steps before the first training")
    add("--gamma", type=float, default=0.95, help="what a reward one step later is worth")
    add("--tau", type=float, default=0.08, help="how fast the target network follows")
    add("--runs", type=int, default=1, help="trainings of each arm, seeded from --seed onwards")
    add("--arms", nargs="+", choices=list(ARTICLE), default=list(ARTICLE), help="agents to train")
    add("--gif", action="store_true", help="save an episode of each arm as an animation")
    args = parse_flags(parser, argv)
    if args.delay_training < BATCH_SIZE:
        parser.error(f"argument --delay-training: a batch needs {BATCH_SIZE} steps")
    with Run(args, "CartPole") as run:
        with contextlib.suppress(RuntimeError):  # too late in a process that has trained before
            tf.config.threading.set_intra_op_parallelism_threads(1)  # faster: the network is small
        show_dueling_example()
        for arm in dict.fromkeys(run.args.arms):  # each of them once
            for seed in range(run.args.seed, run.args.seed + run.args.runs):
                train_agent(arm, seed, run)
        plot(run)
        return run.report()


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


# --- Frame, episodes: the same text in every CartPole script ---
class EpisodeLog:
    """Keeps the episodes of one training, in results.json, in TensorBoard and on the screen."""

    def __init__(self, run, arm, seed):
        self.run, self.name, self.episodes = run, f"{arm}, seed {seed}", 0
        self.record = {"seed": seed, "history": {}, "final": {}, "seconds": 0.0}
        new = {"history": self.record["history"], "final": {}, "seconds": 0.0, "runs": []}
        self.arm = run.results["arms"].setdefault(arm, new)
        self.arm["runs"].append(self.record)
        self.writer = tf.summary.create_file_writer(str(run.folder / arm / f"seed_{seed}"))
        self.start = time.perf_counter()

    def add(self, values, note=""):
        """Record an episode, {tag: list of numbers}: the mean of each list, None if it is empty."""
        self.episodes += 1
        means = {tag: statistics.mean(v) if v else None for tag, v in values.items()}
        with self.writer.as_default(step=self.episodes):
            for tag, mean in means.items():
                self.record["history"].setdefault(tag, []).append(mean)
                if mean is not None:
                    tf.summary.scalar(tag, mean)
        self.record["seconds"] = time.perf_counter() - self.start
        if self.episodes % max(1, self.run.args.epochs // 20) == 0:
            line = ", ".join(f"{tag} {mean:.4g}" for tag, mean in means.items() if values[tag])
            print(f"{self.name}, episode {self.episodes}: {line}{note}")
            self.run.write()

    def finish(self, final):
        """Record the final numbers of this training; the arm's are the means over its runs."""
        self.record["final"] = final
        self.arm["seconds"] = sum(run["seconds"] for run in self.arm["runs"])
        for metric in final:
            values = [run["final"][metric] for run in self.arm["runs"]]
            self.arm["final"][metric] = statistics.mean(values)
            if len(values) > 1:
                self.arm.setdefault("spread", {})[metric] = statistics.stdev(values)
        self.run.write()


def play(env, policy):
    """Play an episode with policy(state) -> action; return the sum of its rewards."""
    state, _ = env.reset()
    total = 0.0
    while True:
        state, reward, terminated, truncated, _ = env.step(policy(state))
        total += reward
        if terminated or truncated:
            return total


def save_gif(env, policy, path):
    """Play an episode and save it as an animation."""
    env = gymnasium.wrappers.RenderCollection(env)
    play(env, policy)
    first, *others = [keras.utils.array_to_img(picture) for picture in env.render()]
    first.save(path, save_all=True, append_images=others, duration=20, loop=0)


def moving_average(values):
    """Return the mean of each value and up to 19 before it; NaN where one of them is None."""
    values = np.array(values, "float64")
    return np.array([values[max(0, i - 19) : i + 1].mean() for i in range(len(values))])


def plot_episodes(arms, metric):
    """Draw a metric by episode, each arm's mean and spread over runs; return figure and axes."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for arm, record in arms.items():
        histories = [training["history"][metric] for training in record["runs"]]
        length = min(len(history) for history in histories)
        averages = np.array([moving_average(history[:length]) for history in histories])
        mean, spread = averages.mean(axis=0), averages.std(axis=0)  # (length,)
        episodes = range(1, length + 1)
        axes.plot(episodes, mean, label=arm)
        axes.fill_between(episodes, mean - spread, mean + spread, alpha=0.2)
    axes.set(xlabel="episode", ylabel=f"{metric} (mean of 20 episodes)")
    axes.legend()
    return figure, axes


if __name__ == "__main__":
    main()
