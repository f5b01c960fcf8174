"""Show that the policy gradient is that of a weighted cross-entropy, and train agents by it.

Article: "A simple policy gradient implementation with keras (part 1)".

An agent that draws its actions from a softmax should make actions that were rewarded more likely.
The article derives that plain Keras can do this: fit the network to the actions it took, each
weighted by its reward. It leaves open whether that works. The first arm compares the gradients;
the second trains with nothing but `train_on_batch(states, actions, sample_weight=advantages)`.

    python keras_pg_weighted_ce.py                                  # both arms, CartPole
    python keras_pg_weighted_ce.py --arms agent --env ALE/Pong-v5   # the article's Pong

Result (seeds 0 to 4): the weighted cross-entropy has the exact gradient, to 2e-7, and its estimate
from N samples is off by N^-0.49 to N^-0.50. On CartPole the last 100 of 1,500 episodes take 187 to
199 steps. After 900 games of Pong (seed 0) it still loses by 20.3 points; at first it was 20.5.

Differences from the article:
1. The loss is -L. The article minimises L = sum_i r_i log q(a_i | s_i), which teaches to lose.
2. The weights are divided by the number of samples. The article's sum grows with that number.
3. There is an agent; the article ends before its Pong. That is played here as in Andrej Karpathy's
   "Deep Reinforcement Learning: Pong from Pixels": two actions, differences of frames, a discount
   that starts anew after each point, and a step of RMSprop every ten games.
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
import statistics
import sys
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever a keras.json says
if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"  # only a notebook shows figures
import ale_py
import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

SCRIPT = "keras_pg_weighted_ce"
MODULES = (tf, keras, np, gymnasium, ale_py)  # results.json names their versions
ARTICLE = {"identity": {}, "agent": {}}  # it gives no figures
GAMMA = {"CartPole-v1": 0.95, "ALE/Pong-v5": 0.99}
BATCH_SIZE = 10  # episodes from one saving to the next, and in Pong to a step of the optimizer


# --- Algorithm ---
# The identity first. A policy q(a|s) earns f(a, s), and E is the mean over the actions it draws:
#     grad E[f] = sum_a f grad q = sum_a q f (grad q / q) = E[f grad log q].
# So the gradient can be estimated from actions that were drawn, and log q(a|s) is what the
# cross-entropy between a one-hot action a and the policy computes, with a minus.
def exact_gradient(q, states, rewards):
    """Return the gradient of mean_s sum_a q(a|s) f(a, s) for the kernel W of q = softmax(s W).

    States are (n, features), q and the rewards f (n, actions). By hand, where z = s W:
    dq_b / dz_a = q_b (1[a = b] - q_a), so the sum's derivative is q_a (f_a - sum_b q_b f_b).
    """
    gain = rewards - np.sum(q * rewards, axis=1, keepdims=True)  # over what the state promises
    return states.T @ (q * gain) / len(states)


def weighted_ce_gradient(policy, states, targets, weights):
    """Return the gradient of L = sum_i w_i log q(a_i|s_i) for the policy's first kernel.

    The N states, targets (one-hot actions) and weights have one row each.
    """
    cross_entropy = keras.losses.CategoricalCrossentropy(reduction="sum")
    with tf.GradientTape() as tape:
        loss = cross_entropy(targets, policy(states), sample_weight=weights)  # this is -L
    return -tape.gradient(loss, policy.trainable_variables[0]).numpy()


def monte_carlo_gradient(policy, states, rewards, num_samples):
    """Return the estimate from so many draws of one of the states (n, features) and an action."""
    drawn = np.random.randint(0, len(states), num_samples)
    actions = tf.random.categorical(tf.math.log(policy(states[drawn])), 1)[:, 0].numpy()
    targets = np.eye(rewards.shape[1])[actions]
    weights = rewards[drawn, actions] / num_samples
    return weighted_ce_gradient(policy, states[drawn], targets, weights)


def show_identity(run):
    """Record how far two gradients are from the exact one, in lengths of the exact one."""
    start = time.perf_counter()
    keras.utils.set_random_seed(run.args.seed)
    states = np.random.normal(size=(8, 3))
    rewards = np.random.normal(size=(8, 4))  # of each of four actions in each state
    policy = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "softmax", use_bias=False)])
    q = policy(states).numpy()
    exact = exact_gradient(q, states, rewards)
    length = np.linalg.norm(exact)
    # Every action in every state, weighted by how likely that pair is to be drawn
    every_state = np.repeat(states, 4, axis=0)  # (32, 3)
    every_action = np.tile(np.eye(4), (8, 1))  # (32, 4)
    weighted = weighted_ce_gradient(policy, every_state, every_action, np.ravel(q * rewards) / 8)
    final = {"weighted_error": float(np.linalg.norm(weighted - exact) / length)}
    history = {"samples": [10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000], "error": []}
    with tf.summary.create_file_writer(str(run.folder / "identity")).as_default():
        for n in history["samples"]:
            misses = [monte_carlo_gradient(policy, states, rewards, n) - exact for _ in range(30)]
            history["error"].append(float(np.linalg.norm(misses) / np.sqrt(30) / length))
            tf.summary.scalar("error", history["error"][-1], step=n)
    final["sampled_error"] = history["error"][-1]
    final["slope"] = float(np.polyfit(np.log(history["samples"]), np.log(history["error"]), 1)[0])
    print(f"every action, weighted: off by {final['weighted_error']:.0e}")  # in the table 0.0
    seconds = time.perf_counter() - start
    run.results["arms"]["identity"] = {"history": history, "final": final, "seconds": seconds}


# --- Environment ---
# Two games with two actions each: CartPole is learned in a minute, the article's Pong in days.
def preprocess(frames):
    """Return what moved between two frames (2, 210, 160, 3), uint8, as (6400,): -1, 0 or 1."""
    courts = frames[:, 34:194:2, ::2, 0]  # (2, 80, 80); red alone tells all colours apart
    courts = np.float32((courts != 144) & (courts != 109))  # the ground, in play and before it: 0
    return np.ravel(courts[1] - courts[0])


def make_env(game):
    """Return CartPole, or Pong with actions 0 (up), 1 (down) and differences of frames (6400,)."""
    if game == "CartPole-v1":  # as in the other scripts: the physics of v1, at most 200 steps
        return gymnasium.make(game, max_episode_steps=200, render_mode="rgb_array")
    env = gymnasium.make(game, render_mode="rgb_array")
    two_actions = gymnasium.spaces.Discrete(2)
    env = gymnasium.wrappers.TransformAction(env, lambda action: action + 2, two_actions)
    env = gymnasium.wrappers.FrameStackObservation(env, 2)  # after a reset the same frame twice
    differences = gymnasium.spaces.Box(-1, 1, (80 * 80,))
    return gymnasium.wrappers.TransformObservation(env, preprocess, differences)


# --- Model ---
# Softmax networks, compiled with Keras's own cross-entropy: that is all a policy gradient needs.
def build_cartpole_model():
    """Return the policy 4-30-30-2 of reinforce_cartpole.py: states (batch, 4) to (batch, 2)."""
    inputs = keras.Input((4,))
    x = keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal")(inputs)
    x = keras.layers.Dense(30, activation="relu", kernel_initializer="he_normal")(x)
    network = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(x))
    network.compile(keras.optimizers.Adam(), "categorical_crossentropy")
    return network


def build_pong_model():
    """Return Karpathy's policy 6400-200-2; its optimizer gathers the gradients of ten games."""
    inputs = keras.Input((80 * 80,))
    x = keras.layers.Dense(200, activation="relu", kernel_initializer="he_normal")(inputs)
    network = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(x))
    rmsprop = keras.optimizers.RMSprop(1e-4, rho=0.99, gradient_accumulation_steps=BATCH_SIZE)
    network.compile(rmsprop, "categorical_crossentropy")
    return network


def compile_policy(network):
    """Return the function state (n,) -> action probabilities, compiled for one state at a time."""
    policy = tf.function(lambda state: network(state[tf.newaxis])[0], jit_compile=True)
    return policy.get_concrete_function(tf.TensorSpec(network.input_shape[1:]))


# --- Training ---
# An episode at a time: play it, weight its actions by what followed them, call train_on_batch.
def collect_episode(env, policy, max_steps):
    """Play an episode; return its states (length, n), actions (length,) and rewards (length,)."""
    (state, _), steps, ended = env.reset(), [], False
    while not ended:
        softmax_out = policy(tf.constant(state)).numpy()
        # Draws an action with these probabilities, in less time than np.random.choice
        action = np.argmax(np.cumsum(softmax_out) > np.random.random())
        next_state, reward, terminated, truncated, _ = env.step(action)
        steps.append((state, action, reward))
        state = next_state
        ended = terminated or truncated or len(steps) == max_steps
    return [np.array(column) for column in zip(*steps)]


def discounted_returns(rewards, gamma, pong):
    """Return G_t = r_t + gamma r_(t+1) + gamma^2 r_(t+2) + ... of the rewards (length,).

    Each point of Pong, a reward of 1 or -1, starts a new rally: no return reaches beyond it.
    """
    returns, reward_sum = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        if pong and rewards[t] != 0:
            reward_sum = 0.0
        reward_sum = rewards[t] + gamma * reward_sum
        returns[t] = reward_sum
    return returns


def standardise(returns):
    """Return (returns - mean) / standard deviation, shape (length,); zeros where all are equal."""
    return (returns - np.mean(returns)) / max(np.std(returns), 1e-8)


def take_over(log, episodes):
    """Let a training that goes on start from the first `episodes` episodes of the run."""
    del log.arm["runs"][1:]  # the record that `log` has just begun
    log.record = log.arm["runs"][0]
    log.arm["history"] = log.record["history"]  # one again: in results.json it stands twice
    for values in log.record["history"].values():
        del values[episodes:]  # what was played after the network had been saved is played again
    log.episodes = episodes
    log.start -= log.record["seconds"]


def save_agent(network, run):
    """Replace results.json, then the saved network: it never has an episode that the file lacks."""
    run.write()
    temporary = run.folder / "agent.tmp.keras"
    network.save(temporary)
    os.replace(temporary, run.folder / "agent.keras")


def train_agent(seed, run):
    """Train an agent; record its episodes and final numbers; save the first one's network."""
    args, path = run.args, run.folder / "agent.keras"
    pong = args.env == "ALE/Pong-v5"
    keras.utils.set_random_seed(seed)
    env = make_env(args.env)
    network = build_pong_model() if pong else build_cartpole_model()
    log = EpisodeLog(run, "agent", seed)
    if args.resume:
        network = keras.models.load_model(path) if path.exists() else network
        # The calls of train_on_batch; `iterations` would be the steps, one in ten games of Pong
        take_over(log, int(network.optimizer.variables[0]))
    policy = compile_policy(network)
    steps = sum(log.record["history"].get("steps", []))
    max_steps = args.max_steps or np.inf
    env.reset(seed=seed + log.episodes)
    while log.episodes < args.epochs and steps < max_steps:
        states, actions, rewards = collect_episode(env, policy, max_steps - steps)
        advantages = standardise(discounted_returns(rewards, GAMMA[args.env], pong))
        loss = network.train_on_batch(states, np.eye(2)[actions], sample_weight=advantages)
        steps += len(rewards)
        log.add({"reward": [sum(rewards)], "avg loss": [float(loss)], "steps": [len(rewards)]})
        if log.episodes % BATCH_SIZE == 0 and seed == args.seed:
            save_agent(network, run)
    if seed == args.seed:
        save_agent(network, run)
    env.reset(seed=seed)  # so the greedy games do not depend on how often the training went on
    log.finish(evaluate(env, policy, log, network))
    if args.gif and seed == args.seed:
        save_gif(env, lambda s: np.argmax(policy(tf.constant(s))), run.folder / "agent.gif")


def evaluate(env, policy, log, network):
    """Play ten greedy episodes; return the final numbers of a training."""
    rewards = [play(env, lambda s: np.argmax(policy(tf.constant(s)))) for _ in range(10)]
    history = log.record["history"]
    return {
        "reward": statistics.mean(history["reward"][-100:]),
        "greedy_reward": statistics.mean(rewards),
        "parameters": network.count_params(),
        "steps_per_second": sum(history["steps"]) / log.record["seconds"],
    }


# --- Figures ---
# One for each arm; the article has none.
def plot_identity(run):
    """Draw the error of the sampled gradient by the number of samples."""
    record = run.results["arms"]["identity"]
    samples, errors = np.array(record["history"]["samples"]), np.array(record["history"]["error"])
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.loglog(samples, errors, "o", label=f"measured: N^{record['final']['slope']:.3f}")
    axes.loglog(samples, errors[0] * (samples[0] / samples) ** 0.5, label="theory: N^-0.5")
    axes.set(title="The sampled gradient", xlabel="samples N", ylabel="relative error")
    axes.legend()
    figure.savefig(run.folder / "identity.png")


def plot_agent(run):
    """Draw the rewards of the agent by episode."""
    arms = {"agent": run.results["arms"]["agent"]}  # the identity has no episodes
    figure, axes = plot_episodes(argparse.Namespace(results={"arms": arms}), "reward")
    axes.set_title(f"The agent on {run.args.env}")
    figure.savefig(run.folder / "agent.png")


# --- Command line ---
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    parser = make_parser("--epochs", "--episodes", default=1500)
    add = parser.add_argument
    add("--max-steps", type=int, help="end a training after this many environment steps")
    add("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    add("--env", choices=GAMMA, default="CartPole-v1", help="what the agent plays")
    add("--runs", type=int, default=1, help="trainings of each arm, with seeds that follow")
    add("--arms", nargs="+", choices=ARTICLE, default=list(ARTICLE), help="parts to run")
    add("--gif", action="store_true", help="save an episode of each arm as an animation")
    args, results = read_run(parser, argv)
    if args.resume and args.runs > 1:
        parser.error("argument --resume: only a run with --runs 1 can go on")
    with Run(args, args.env, results=results) as run:
        if "identity" in args.arms and "identity" not in run.results["arms"]:
            show_identity(run)
            plot_identity(run)
        if "agent" in args.arms:
            for seed in range(args.seed, args.seed + args.runs):
                train_agent(seed, run)
            plot_agent(run)
        return run.report()


# --- Frame: flags, faults, folder and results; the same text in every script ---
def make_parser(*names, default, several=False):
    """Return a parser with the flags of every script; `names` are those of the first one."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    device = functools.partial(select_device, several=several)
    add = parser.add_argument
    add(*names, type=int, default=default, help=f"{names[-1][2:]} of each training")
    add("--device", type=device, default="auto", help="auto, cpu, gpu, gpu:N; all where fit trains")
    add("--logdir", default="log", help="where each run makes a folder of its own")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    return parser


def select_device(name, several):
    """Let TensorFlow see only the GPUs that --device names; return the name."""
    gpus = tf.config.list_physical_devices("GPU")
    choices = {"auto": gpus[:1], "cpu": []} | ({"all": gpus} if several else {})
    choices |= {f"gpu:{number}": [gpu] for number, gpu in enumerate(gpus)}
    chosen = choices.get("gpu:0" if name == "gpu" else name)
    if chosen is None:
        raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(choices)} here")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        tf.config.set_visible_devices(chosen, "GPU")
    except RuntimeError:  # TensorFlow has already started in this process
        raise argparse.ArgumentTypeError(f"too late for {name}; restart Python first") from None
    return name


def parse_flags(parser, argv):
    """Return the flags `argv`; None means the command line, unless that is a notebook kernel's."""
    if argv is None and sys.argv[0].endswith(("kernel_launcher.py", "ipykernel/__main__.py")):
        argv = []
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        raise SystemExit(end.code) from None  # Colab's IPython fails on a chain of errors
    for name, value in vars(args).items():
        if type(value) is int and value < (0 if name == "seed" else 1):
            parser.error(f"argument --{name.replace('_', '-')}: {value} is too small")
    if "://" in args.logdir:
        parser.error(f"argument --logdir: {args.logdir} is not a folder on this computer")
    return args


class Run:
    """One run: its flags in `args`, its `folder`, and the `results` that results.json keeps."""

    def __init__(self, args, data, results=None):
        """Make a folder for a run on `data`, or go on in that of --resume with its `results`."""
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
        with self:  # this writes results.json
            self.folder.mkdir(parents=True, exist_ok=True)
        print(f"{SCRIPT} on {data}, device {self.results['device']}, writes to {self.folder}")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Keep what was computed; end an interruption, or a fault of disk or network, in a line."""
        if isinstance(error, BrokenPipeError):
            sys.stdout = None  # its reader is gone, and Python would flush it at the end
        if isinstance(error, OSError) or kind is Exception:  # Keras's own where a download fails
            raise SystemExit(f"error: {kind.__name__}: {error}") from None
        if kind is not SystemExit:
            self.write()
        if KeyboardInterrupt in (kind, type(getattr(error, "__cause__", None))):
            print(f"interrupted; what was finished is in {self.folder}", file=sys.stderr)
            raise SystemExit(130) from None

    def write(self):
        """Replace results.json in one step, unless a number in it is not finite."""
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
        print(f"\n{'arm':<16}{'metric':<34}{'here':>14}{'article':>14}{'spread':>14}")
        for arm, record in self.results["arms"].items():
            article = self.results["article"].get(arm, {})
            columns = record["final"], article, record.get("spread", {})
            for metric in record["final"]:
                cells = [f"{round(c[metric], 4):,}" if metric in c else "-" for c in columns]
                print("{:<16}{:<34}{:>14}{:>14}{:>14}".format(arm, metric, *cells))
        for path in sorted(self.folder.glob("*.*")):
            print(f'model = keras.models.load_model("{path}")' if ".keras" in path.name else path)
        print(f'tensorboard --logdir "{self.folder}"')
        return {arm: record["final"] for arm, record in self.results["arms"].items()}


# --- Frame, resume: the same text in every script that can go on after an interruption ---
def read_run(parser, argv):
    """Return the flags, and the results of the run that --resume names, or None.

    That run's flags hold. Only --epochs, --max-steps and --device may be given anew.
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
            parser.error(f"argument --{name.replace('_', '-')}: not as in the run to go on with")
    return args, results


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
        """Record an episode, {tag: list of numbers}: their mean, or None where there are none."""
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
        runs = self.arm["runs"]
        self.arm["seconds"] = sum(run["seconds"] for run in runs)
        for metric in final:
            values = [run["final"][metric] for run in runs]
            self.arm["final"][metric] = statistics.mean(values)
            if len(runs) > 1:
                self.arm.setdefault("spread", {})[metric] = statistics.stdev(values)
        self.run.write()


def play(env, policy):
    """Play an episode with policy(state) -> action; return the sum of its rewards."""
    (state, _), total, ended = env.reset(), 0.0, False
    while not ended:
        state, reward, terminated, truncated, _ = env.step(policy(state))
        total += reward
        ended = terminated or truncated
    return total


def save_gif(env, policy, path):
    """Play an episode and save it as an animation."""
    env = gymnasium.wrappers.RenderCollection(env)
    play(env, policy)
    first, *others = [keras.utils.array_to_img(picture) for picture in env.render()]
    first.save(path, save_all=True, append_images=others, duration=20, loop=0)


def moving_average(values):
    """Return the mean of each value and of up to 19 before it; None is not a number."""
    values = np.array(values, "float64")
    return np.array([values[max(0, i - 19) : i + 1].mean() for i in range(len(values))])


def plot_episodes(run, metric):
    """Return a figure and its axes: a metric of each arm, its mean and spread over the runs."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for arm, record in run.results["arms"].items():
        histories = [training["history"][metric] for training in record["runs"]]
        length = min(len(history) for history in histories)
        averages = np.array([moving_average(history[:length]) for history in histories])
        mean, spread = averages.mean(axis=0), averages.std(axis=0)  # (length,)
        axes.plot(mean, label=arm)
        axes.fill_between(range(length), mean - spread, mean + spread, alpha=0.2)
    axes.set(xlabel="episode", ylabel=f"{metric} (mean of 20 episodes)")
    axes.legend()
    return figure, axes


if __name__ == "__main__":
    main()
