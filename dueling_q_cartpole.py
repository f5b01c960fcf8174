"""Balance a pole with Double Q and Dueling Q networks, to see what a value stream is worth.

Article: "Dueling Q networks in TensorFlow 2" (Adventures in Machine Learning).

How good a state is often matters more than the action taken in it. A dueling network has a stream
for the value V of the state, another for the advantages A of the actions, and adds them up:
Q(s, a) = V(s) + A(s, a) - mean of A(s, a') over the actions a'. Both arms learn by Double Q.

    python dueling_q_cartpole.py
    python dueling_q_cartpole.py --epochs 300 --runs 5     # mean and spread of five runs

Measured (300 episodes, seeds 0 to 4): 163 and 170 steps from episode 100 on; no clear difference.

Differences from the article:
1. The mean of the advantages is over the actions of each state; the article's is over the whole
   batch, so that the Q values of a state depend on the others. Here that cost nothing: 171 steps.
2. The target network starts as a copy. The article copied weights before there were any.
3. Epsilon falls until step 300 + 5,000. The article's jumps down at step 5,000, from 0.07.
4. `avg loss` is the mean over the steps that trained; the article averaged a -1 for every other.
5. Only `terminated` is stored as a terminal, not the time limit, and as a column of the memory.
6. The memory is an array whose oldest row is overwritten; `pop(0)` moves a whole list at each step.
7. Choosing an action and training are one compiled function each, for tensors of one shape.
8. It ends, after 500 episodes.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3",
#     "gymnasium[classic-control]>=1.1,<2", "numpy>=2,<3", "matplotlib>=3.9,<4",
# ]
# ///

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import random
import statistics
import sys
import time

import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

# --- Constants ---
SCRIPT = "dueling_q_cartpole"
PACKAGES = ("tensorflow", "keras", "numpy", "gymnasium")
ARTICLE = {"double": {"reward": 190}, "dueling": {"reward": 190}}  # 180-200, in its figure
VERBOSE = 1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 2  # a bar, or plain lines
SAMPLE_PARTS = [4, 1, 1, 4, 1]  # columns of state, action, reward, next state, terminated
MAX_EPSILON, MIN_EPSILON, BATCH_SIZE = 1.0, 0.01, 32


# --- Command line ---
def build_parser():
    """Return the parser of this script's flags."""
    style = argparse.ArgumentDefaultsHelpFormatter
    first_line = str(__doc__).partition("\n")[0]
    parser = OneLineParser(description=first_line, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", "--episodes", type=number(int, 1), default=500, help="episodes of each run")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:N")
    add("--logdir", default="log", help="where each run makes a folder of its own")
    add("--seed", type=number(int, 0), default=0, help="seed of all random numbers")
    add("--max-steps", type=number(int, 1), help="stop after this many environment steps")
    add("--random-reward-std", type=number(float, 0, 1000), default=1.0, help="reward's deviation")
    add("--epsilon-min-iter", type=number(int, 1), default=5000, help="steps of epsilon's fall")
    add("--delay-training", type=number(int, BATCH_SIZE), default=300, help="steps before training")
    add("--gamma", type=number(float, 0, 1), default=0.95, help="discount of future rewards")
    add("--tau", type=number(float, 0, 1), default=0.08, help="how fast the target network follows")
    add("--runs", type=number(int, 1), default=1, help="runs of each arm, each with the next seed")
    add("--arms", nargs="+", choices=list(ARTICLE), default=list(ARTICLE), help="agents to train")
    add("--gif", action="store_true", help="save a greedy episode of each arm as an animation")
    return parser


def parse_args(argv):
    """Parse `argv` strictly; None stands for the command line, in a notebook cell for no flags."""
    if argv is None and "__file__" not in globals():
        argv = []  # there sys.argv belongs to the kernel
    return build_parser().parse_args(argv)


# --- Shared helpers: the same text in every script that has them ---
class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a bad flag in one line and exits with code 2."""

    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


def number(kind, low, high=2**31 - 1):
    """Return an argparse type: an int or float (`kind`) from `low` to `high`, both included."""

    def number(text):  # argparse takes "invalid number value" from this name
        if not low <= kind(text) <= high:  # nan is refused too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def select_device(device, several=False):
    """Let TensorFlow see only the device of --device ("all" if `several`); return its name."""
    gpus = tf.config.list_physical_devices("GPU")
    choices = {"auto": gpus[:1], "cpu": []} | {f"gpu:{i}": [gpu] for i, gpu in enumerate(gpus)}
    choices |= {"all": gpus} if several else {}
    chosen = choices.get("gpu:0" if device == "gpu" else device)
    if chosen is None:
        build_parser().error(f"argument --device: {device} is not one of {', '.join(choices)} here")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        tf.config.set_visible_devices(chosen, "GPU")
    except RuntimeError:  # TensorFlow has started in this process
        build_parser().error(f"argument --device: too late for {device}; restart Python first")
    return ", ".join(gpu.name.removeprefix("/physical_device:") for gpu in chosen) or "CPU"


def new_run_dir(args, data, device):
    """Make the folder of this run, <logdir>/<script>/<time>; return it and the results so far."""
    name = time.strftime("%Y%m%d-%H%M%S") + ("-synthetic" if data == "synthetic" else "")
    for count in itertools.count():  # two runs may start in the same second
        run_dir = pathlib.Path(args.logdir, SCRIPT, f"{name}-{count}" if count else name)
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir(parents=True)
            break
    results = {"script": SCRIPT, "config": vars(args), "device": device, "data": data, "arms": {}}
    results["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
    results |= {"article": {} if data == "synthetic" else ARTICLE, "complete": False}
    write_results(run_dir, results)
    print(f"{SCRIPT} on {data}, device {device}, writes to {run_dir}")
    return run_dir, results


def write_results(run_dir, results):
    """Replace results.json in one step; keep it, and raise FloatingPointError, for nan or inf."""
    try:
        text = json.dumps(results, indent=1, allow_nan=False)
    except ValueError:
        raise FloatingPointError("the loss is not finite; try another --seed") from None
    temporary = run_dir / "results.json.tmp"
    temporary.write_text(text)
    os.replace(temporary, run_dir / "results.json")


def save_figure(figure, path):
    """Save a figure as PNG; show it too where this runs in a notebook."""
    figure.savefig(path, dpi=100)
    if "inline" in plt.get_backend():
        plt.show()
    plt.close(figure)


def report(run_dir, results):
    """Print the final values beside the article's, the files, and how to see the events."""
    print(f"\n{SCRIPT} on {results['data']}, epochs: {results['config']['epochs']}")
    print(f"{'arm':<16}{'metric':<32}{'here':>12}{'article':>12}{'spread':>12}")
    for arm, record in results["arms"].items():
        final, article = record["final"], results["article"].get(arm, {})
        for metric in final | article:
            values = final.get(metric), article.get(metric), record.get("spread", {}).get(metric)
            cells = ("-" if value is None else f"{round(value, 4):,}" for value in values)
            print("{:<16}{:<32}{:>12}{:>12}{:>12}".format(arm, metric, *cells))
    print(*sorted(map(str, run_dir.glob("*.*"))), f"tensorboard --logdir {run_dir}", sep="\n")


def run_as_command(main):
    """Call `main`; a fault that can be foreseen ends in one line and an exit code."""
    try:
        return main()
    except (KeyboardInterrupt, SystemError):  # C code makes the second of the first
        code, message = 130, "interrupted: what had been finished is in the run's folder"
    except (OSError, FloatingPointError, tf.errors.ResourceExhaustedError) as error:
        reason = str(error).split("}} ")[-1].partition("\n")[0]  # TensorFlow's begin with {{...}}
        ours = not error.args[1:] and not hasattr(error, "op")
        code, message = 1, f"error: {reason}" + ("" if ours else "; see to that path and its disk")
    print(message, file=sys.stderr)
    if "__file__" in globals():  # a notebook's kernel stays usable
        sys.exit(code)


# --- Episodes: the same text in every script that plays ---
class EpisodeRecorder(contextlib.AbstractContextManager):
    """Records one run of an arm, in a `with` statement: an interrupted run is written, too."""

    def __init__(self, run_dir, results, arm, seed, episodes):
        self.run_dir, self.results, self.name = run_dir, results, f"{arm}, seed {seed}"
        self.history, self.every = {"reward": [], "avg loss": []}, max(1, episodes // 20)
        self.run = {"seed": seed, "history": self.history, "final": {}, "seconds": 0.0}
        new = {"history": self.history, "final": {}, "seconds": 0.0, "runs": []}
        runs = results["arms"].setdefault(arm, new)["runs"]
        runs.append(self.run)
        folder = run_dir / arm / (f"seed_{seed}" if runs[1:] else "")
        self.writer = tf.summary.create_file_writer(str(folder))
        self.bar = keras.utils.Progbar(episodes, verbose=VERBOSE % 2, stateful_metrics=["reward"])
        self.start = self.written = time.perf_counter()

    def add(self, reward, avg_loss):
        """Record an episode: its reward, and its mean loss or None before training."""
        episode = len(self.history["reward"]) + 1
        for tag, value in {"reward": reward, "avg loss": avg_loss}.items():
            self.history[tag].append(value)
            if value is not None:
                with self.writer.as_default(step=episode):
                    tf.summary.scalar(tag, value)
        self.bar.update(episode, [("reward", reward)])
        if VERBOSE == 2 and (episode == 1 or episode % self.every == 0):
            print(f"{self.name}, episode {episode}: reward {reward:.0f}")
        if time.perf_counter() - self.written > 3:
            self.__exit__()

    def __exit__(self, *error):
        self.written = time.perf_counter()
        self.run["seconds"] = self.written - self.start
        self.writer.flush()
        write_results(self.run_dir, self.results)


def summarise(record):
    """Make an arm's final values the means over its runs, its spread their standard deviations."""
    finals = [run["final"] for run in record["runs"]]
    for name, of in {"final": statistics.mean, "spread": statistics.stdev}.items():
        if name == "final" or finals[1:]:  # a single run has no spread
            record[name] = {key: of([final[key] for final in finals]) for key in finals[0]}
    record["seconds"] = sum(run["seconds"] for run in record["runs"])


def play(env, policy):
    """Play an episode with policy(state) -> action; return its reward."""
    (state, _), total, ended = env.reset(), 0.0, False
    while not ended:
        state, reward, terminated, truncated, _ = env.step(policy(state))
        total, ended = total + reward, terminated or truncated
    return total


# --- Algorithm ---
def DQModel(hidden_size, num_actions, dueling):
    """Return the network: states (batch, 4) to Q values (batch, num_actions).

    With `dueling`, Q(s, a) = V(s) + A(s, a) - mean of A(s, a') over a'; without the mean, V could
    trade any constant with A. All parts are Keras's own, so that `load_model` needs no custom code.
    """
    he = {"kernel_initializer": "he_normal"}
    inputs = keras.Input((4,))
    x = keras.layers.Dense(hidden_size, "relu", name="dense1", **he)(inputs)
    x = keras.layers.Dense(hidden_size, "relu", name="dense2", **he)(x)
    adv = keras.layers.Dense(hidden_size, "relu", name="adv_dense", **he)(x)
    adv = keras.layers.Dense(num_actions, name="adv_out", **he)(adv)  # (batch, num_actions)
    if not dueling:
        return keras.Model(inputs, adv)
    v = keras.layers.Dense(hidden_size, "relu", name="v_dense", **he)(x)
    v = keras.layers.Dense(1, name="v_out", **he)(v)  # (batch, 1)
    norm_adv = adv - keras.ops.mean(adv, axis=1, keepdims=True)  # axis 1: of each state
    return keras.Model(inputs, keras.layers.Add()([v, norm_adv]))


def show_dueling_example():
    """Print V and A of the article's state: three rewards, one of which is drawn at random."""
    q = np.array([10.0, 50.0, 100.0])
    print(f"Q = {q}: V = {q.mean():.2f}, A = {(q - q.mean()).round(2)}")


class Memory:
    """The newest `max_memory` steps, rows of one array in which a new one replaces the oldest."""

    def __init__(self, max_memory):
        self.rows, self.added = np.zeros((max_memory, sum(SAMPLE_PARTS)), "float32"), 0

    def add_sample(self, state, action, reward, next_state, terminated):
        self.rows[self.added % len(self.rows)] = (*state, action, reward, *next_state, terminated)
        self.added += 1

    def sample(self, no_samples):
        """Return rows (no_samples, 11), float32, drawn without replacement."""
        idxs = random.sample(range(min(self.added, len(self.rows))), no_samples)
        return self.rows[idxs]


def choose_action(state, best_action, eps):
    """Return a random action with probability `eps`, else the best one in a state (4,)."""
    if random.random() < eps:
        return random.randrange(2)
    return int(best_action(tf.constant(state[np.newaxis])))


def q_targets(rewards, terminals, q_choosing, q_judging, gamma):
    """Return r + gamma q_judging(s', argmax over a of q_choosing(s', a)), at a terminal r alone.

    The q are (batch, actions), all else (batch, 1). One q in both places makes it the max over a.
    """
    prim_action_tp1 = tf.argmax(q_choosing, axis=1)
    q_next = tf.gather(q_judging, prim_action_tp1, batch_dims=1)[:, tf.newaxis]
    return rewards + gamma * (1 - terminals) * q_next


def update_network(primary_network, target_network, tau):
    """Move the target's weights t the share tau to the primary's e: t (1 - tau) + e tau."""
    for t, e in zip(target_network.trainable_variables, primary_network.trainable_variables):
        t.assign_add(tau * (e - t))  # in this form nothing changes where both are one network


def q_learning_step(batch, primary_network, target_network, optimizer, gamma, tau):
    """Train the primary network on rows (batch, 11) of a Memory; return the loss before that."""
    states, actions, rewards, next_states, terminals = tf.split(batch, SAMPLE_PARTS, axis=1)
    taken = tf.one_hot(tf.cast(actions[:, 0], tf.int32), 2)  # (batch, 2): the other adds no loss
    with tf.GradientTape() as tape:  # states and next states in one pass: that is quicker
        q, prim_qtp1 = tf.split(primary_network(tf.concat([states, next_states], axis=0)), 2)
        targets = q_targets(rewards, terminals, prim_qtp1, target_network(next_states), gamma)
        loss = tf.reduce_mean(tf.square(taken * (tf.stop_gradient(targets) - q)))
    optimizer.apply(tape.gradient(loss, primary_network.trainable_variables))
    update_network(primary_network, target_network, tau)
    return loss


def compile_for_shape(function, shape):
    """Return function(tensor), compiled by XLA for float32 tensors of one shape."""
    compiled = tf.function(function, jit_compile=True, autograph=False)
    return compiled.get_concrete_function(tf.TensorSpec(shape))  # spares 0.1 ms of checks a call


def moving_average(rewards):
    """Return the mean of each of the rewards (episodes,) and of up to 19 before it."""
    totals = np.cumsum([0] * 20 + rewards)  # (20 + episodes,)
    return (totals[20:] - totals[:-20]) / np.minimum(np.arange(len(rewards)) + 1, 20)


# --- Training ---
def train(arm, seed, args, run_dir, results):
    """Train one run of an arm; record its episodes and final values; save the first run's model."""
    keras.utils.set_random_seed(seed)
    env = gymnasium.make("CartPole-v1", max_episode_steps=200, render_mode="rgb_array")
    memory, steps, eps = Memory(500000), 0, MAX_EPSILON
    primary_network = DQModel(30, 2, dueling=arm == "dueling")
    target_network = DQModel(30, 2, dueling=arm == "dueling")
    target_network.set_weights(primary_network.get_weights())
    optimizer = keras.optimizers.Adam()
    optimizer.build(primary_network.trainable_variables)  # its moments must exist before tracing
    agent = primary_network, target_network, optimizer, args.gamma, args.tau
    learn = compile_for_shape(lambda batch: q_learning_step(batch, *agent), (BATCH_SIZE, 11))
    best_action = compile_for_shape(lambda s: tf.argmax(primary_network(s), axis=1)[0], (1, 4))
    with EpisodeRecorder(run_dir, results, arm, seed, args.epochs) as recorder:
        rewards = recorder.history["reward"]
        while len(rewards) < args.epochs and steps != args.max_steps:
            state, _ = env.reset(seed=None if steps else seed)
            length, losses, ended = 0, [], False
            while not ended:
                action = choose_action(state, best_action, eps)
                next_state, _, terminated, truncated, _ = env.step(action)
                reward = np.random.normal(1.0, args.random_reward_std)
                memory.add_sample(state, action, reward, next_state, terminated)
                state, length, steps = next_state, length + 1, steps + 1
                if steps > args.delay_training:
                    losses.append(float(learn(tf.constant(memory.sample(BATCH_SIZE)))))
                to_fall = min(max(1 - (steps - args.delay_training) / args.epsilon_min_iter, 0), 1)
                eps = MIN_EPSILON + (MAX_EPSILON - MIN_EPSILON) * to_fall
                ended = terminated or truncated or steps == args.max_steps
            recorder.add(length, statistics.mean(losses) if losses else None)
    averages, policy = moving_average(rewards), lambda s: choose_action(s, best_action, eps=0)
    recorder.run["final"] = {
        "reward": averages[-1],
        "episodes_to_180": int(np.argmax([*(averages > 180), True])) + 1,  # one more: never
        "greedy_reward": statistics.mean(play(env, policy) for _ in range(10)),
        "parameters": primary_network.count_params(),
    }
    summarise(results["arms"][arm])
    if seed == args.seed:
        primary_network.save(run_dir / f"{arm}.keras")
        if args.gif:
            env = gymnasium.wrappers.RenderCollection(env)
            play(env, policy)
            gif, *rest = map(keras.utils.array_to_img, env.render())
            gif.save(run_dir / f"{arm}.gif", save_all=True, append_images=rest, duration=20, loop=0)


# --- Plots ---
def plot(run_dir, results):
    """Draw the arms' reward by episode: the mean of 20 episodes, its mean and spread over runs."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for arm, record in results["arms"].items():
        rewards = (run["history"]["reward"] for run in record["runs"])
        averages = np.array([*zip(*map(moving_average, rewards))])  # (episodes, runs)
        mean, spread = averages.mean(1), averages.std(1)
        axes.plot(mean, label={"dqn": "deep Q"}.get(arm, f"{arm.capitalize()} Q"))
        axes.fill_between(range(len(mean)), mean - spread, mean + spread, alpha=0.2)
    title = "CartPole, reward N(1, {random_reward_std:g}); runs: {runs}".format(**results["config"])
    axes.set(xlabel="episode", ylabel="reward (mean of 20 episodes)", title=title)
    axes.legend()
    save_figure(figure, run_dir / "reward.png")


# --- Main ---
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    args = parse_args(argv)
    with contextlib.suppress(RuntimeError):  # too late once TensorFlow has started: only slower
        tf.config.threading.set_intra_op_parallelism_threads(1)  # operations are too small for two
    run_dir, results = new_run_dir(args, "CartPole", select_device(args.device))
    show_dueling_example()
    for arm, run in itertools.product(args.arms, range(args.runs)):
        train(arm, args.seed + run, args, run_dir, results)
    plot(run_dir, results)
    results["complete"] = True
    write_results(run_dir, results)
    report(run_dir, results)
    return {arm: record["final"] for arm, record in results["arms"].items()}


if __name__ == "__main__":
    run_as_command(main)
