"""Show that the policy gradient is that of a weighted cross-entropy, and train agents by it.

Article: "A simple policy gradient implementation with keras (part 1)".

The gradient of a softmax policy's expected reward is that of a cross-entropy between the policy and
the actions it took, each weighted by its reward. Part 1 computes both sides; part 2 trains by
nothing but `train_on_batch(states, one_hot(actions), sample_weight=advantages)`.

    python keras_pg_weighted_ce.py                                  # both parts, CartPole
    python keras_pg_weighted_ce.py --arms agent --env ALE/Pong-v5   # the article's Pong

Measured, seeds 0 to 4: the weighted cross-entropy has the exact gradient, to 2e-7; the error of
samples falls as N^-0.49 to N^-0.50. CartPole: 187 to 199 steps in the last 100 of 1,500 episodes.
Pong, a short run (900 games, seed 0): it still loses by 20.3 points (the first 100 by 20.5).

Differences from the article:
1. The loss is -L: minimising L = sum_i r_i log q(a_i | s_i), as in the article, teaches to lose.
2. The estimate of the expectation is a mean: the article's sum grows with the number of samples.
3. There is an agent; the article ends before its Pong. That is played here as in Andrej Karpathy's
"Deep Reinforcement Learning: Pong from Pixels": two actions, differences of frames, a discount that
starts anew after each point, RMSprop's one step in ten games (whose mean losses count alike).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3", "ale-py>=0.10.2,<1",
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
import sys
import time

import gymnasium
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from gymnasium import spaces, wrappers

# --- Constants ---
SCRIPT = "keras_pg_weighted_ce"
PACKAGES = ("tensorflow", "keras", "numpy", "gymnasium", "ale-py")
ARTICLE = {"identity": {}, "agent": {}}  # it holds no figures
LINE_END = "\r" if sys.stdout.isatty() or "ipykernel" in sys.modules else "\n"  # of progress
GAMMA = {"CartPole-v1": 0.95, "ALE/Pong-v5": 0.99}
BATCH_SIZE = 10  # episodes: an update of Pong's agent, and between two checkpoints


# --- Command line ---
def build_parser():
    """Return the parser of this script's flags."""
    style = argparse.ArgumentDefaultsHelpFormatter
    first_line = str(__doc__).partition("\n")[0]
    parser = OneLineParser(description=first_line, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", "--episodes", type=number(int, 1), default=1500, help="episodes of the agent")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:N")
    add("--logdir", default="log", help="where each run makes a folder of its own")
    add("--seed", type=number(int, 0), default=0, help="seed of all random numbers")
    add("--max-steps", type=number(int, 1), help="stop after this many environment steps")
    add("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    add("--env", choices=list(GAMMA), default="CartPole-v1", help="what the agent plays")
    add("--arms", nargs="+", choices=list(ARTICLE), default=list(ARTICLE), help="parts to run")
    add("--gif", action="store_true", help="save a greedy episode as an animation")
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


# --- Resuming: the same text in every script that has --resume ---
def resume_run(args, argv):
    """Return (args, run_dir, results) of the run in --resume: only --epochs and --device change."""
    parser, run_dir, results = build_parser(), pathlib.Path(args.resume), {}
    with contextlib.suppress(OSError, ValueError):
        results = json.loads((run_dir / "results.json").read_text())
    if results.get("script") != SCRIPT:
        parser.error(f"argument --resume: {run_dir} holds no run of {SCRIPT}.py that can be read")
    args = parser.parse_args(argv, argparse.Namespace(**results["config"]))
    for name in results["config"].keys() - {"epochs", "device", "resume"}:
        if getattr(args, name) != results["config"][name]:
            parser.error(f"argument --{name.replace('_', '-')}: not as in the run to resume")
    results |= {"config": vars(args), "complete": False}
    old = [f"{p} {v}" for p, v in results["versions"].items() if importlib.metadata.version(p) != v]
    print(f"{SCRIPT} goes on in {run_dir}" + (f"; warning: it was begun with {old}" if old else ""))
    return args, run_dir, results


# --- Environment ---
def make_env(render_mode=None):
    """Return the article's CartPole: the physics of v1 with a limit of 200 steps."""
    return gymnasium.make("CartPole-v1", max_episode_steps=200, render_mode=render_mode)


def preprocess(frames):
    """Return what moved between two frames (2, 210, 160, 3), uint8, as (6400,): -1, 0 or 1."""
    courts = frames[:, 34:194:2, ::2, 0]  # (2, 80, 80); red alone tells all colours apart
    courts = np.float32((courts != 144) & (courts != 109))  # the ground, in play and before it: 0
    return np.ravel(courts[1] - courts[0])


def make_pong(render_mode=None):
    """Return Pong with actions 0 (up), 1 (down) and differences of frames (6400,) as states."""
    env = gymnasium.make("ale_py:ALE/Pong-v5", render_mode=render_mode)
    env = wrappers.TransformAction(env, lambda action: action + 2, spaces.Discrete(2))
    env = wrappers.FrameStackObservation(env, 2)  # after a reset the same frame twice
    return wrappers.TransformObservation(env, preprocess, spaces.Box(-1, 1, (80 * 80,)))


# --- Model ---
def build_model(pong, state_size):
    """Return the policy of Pong or CartPole: states (batch, state_size) to (batch, 2)."""
    x = inputs = keras.Input((state_size,))
    for size in [200] if pong else [30, 30]:
        x = keras.layers.Dense(size, activation="relu", kernel_initializer="he_normal")(x)
    network = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(x))
    rmsprop = keras.optimizers.RMSprop(1e-4, 0.99, gradient_accumulation_steps=BATCH_SIZE)
    network.compile(rmsprop if pong else "adam", "categorical_crossentropy")
    network.optimizer.build(network.trainable_variables)  # a checkpoint wants its moments
    return network


# --- Algorithm ---
def exact_gradient(q, states, rewards):
    """Return the gradient of mean_s sum_a q(a|s) f(a, s) for the kernel W of q = softmax(s W).

    States (n, features), q and rewards f (n, actions). dq_b / d(s W)_a = q_a (1[a = b] - q_b).
    """
    gain = rewards - np.sum(q * rewards, axis=1, keepdims=True)  # over what the state promises
    return states.T @ (q * gain) / len(states)


def weighted_ce_gradient(policy, states, targets, weights):
    """Return the gradient of mean_i w_i log q(a_i|s_i); all have N rows, the targets' one-hot."""
    with tf.GradientTape() as tape:
        loss = keras.losses.CategoricalCrossentropy()(targets, policy(states), weights)
    return -tape.gradient(loss, policy.trainable_variables[0]).numpy()


def monte_carlo_gradient(policy, states, rewards, num_samples):
    """Return the estimate from so many draws of one of the states (n, features) and an action."""
    drawn = np.random.randint(0, len(states), num_samples)
    actions = tf.random.categorical(tf.math.log(policy(states[drawn])), 1)[:, 0].numpy()
    targets = np.eye(rewards.shape[1])[actions]
    return weighted_ce_gradient(policy, states[drawn], targets, rewards[drawn, actions])


def compile_policy(network):
    """Return the function state (n,) -> action probabilities, compiled for one state at a time."""
    policy = tf.function(lambda state: network(state[tf.newaxis])[0], jit_compile=True)
    return policy.get_concrete_function(tf.TensorSpec(network.input_shape[1:]))  # fewer checks


def get_action(policy, state):
    """Draw an action for a state (n,), float32, with the probabilities of the policy."""
    softmax_out = policy(tf.constant(state)).numpy()
    return np.argmax(np.cumsum(softmax_out) > np.random.random())  # 0 where they are nan


def discounted_returns(rewards, gamma):
    """Return G_t = r_t + gamma r_(t+1) + gamma^2 r_(t+2) + ... of the rewards (length,)."""
    returns, reward_sum = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        returns[t] = reward_sum = rewards[t] + gamma * reward_sum
    return returns


def standardise(returns):
    """Return (returns - mean) / standard deviation, shape (length,); zeros where all are equal."""
    return (returns - np.mean(returns)) / max(np.std(returns), 1e-8)


def play_episode(env, act, limit=None):
    """Play at most `limit` steps with act(state) -> action; return states, actions, rewards."""
    (state, _), steps, ended = env.reset(), [], False
    while not ended:
        action = act(state)
        new_state, reward, terminated, truncated, _ = env.step(action)
        steps.append((state, action, reward))
        state, ended = new_state, terminated or truncated or len(steps) == limit
    return [np.array(values) for values in zip(*steps)]  # (length, n), (length,), (length,)


# --- Training ---
def show_identity(args, run_dir, results):
    """Part 1: record the errors of two estimates, in lengths of the exact gradient."""
    start = time.perf_counter()
    keras.utils.set_random_seed(args.seed)
    states, rewards = np.random.normal(size=(8, 3)), np.random.normal(size=(8, 4))
    policy = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "softmax", use_bias=False)])
    q = policy(states).numpy()
    exact = exact_gradient(q, states, rewards)
    # Every action in every state, by its probability. Keras divides by 8 * 4, not by 8
    all_states, all_actions = np.repeat(states, 4, axis=0), np.tile(np.eye(4), (8, 1))
    weighted = weighted_ce_gradient(policy, all_states, all_actions, 4 * np.ravel(q * rewards))
    weighted_error = np.linalg.norm(weighted - exact) / np.linalg.norm(exact)
    history = {"samples": [10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000], "error": []}
    for n in history["samples"]:
        draws = [monte_carlo_gradient(policy, states, rewards, n) - exact for _ in range(30)]
        error = np.linalg.norm(draws) / np.sqrt(30) / np.linalg.norm(exact)  # root of mean square
        history["error"].append(error)
        tf.summary.scalar("error", error, step=n)
    slope = np.polyfit(np.log(history["samples"]), np.log(history["error"]), 1)[0]
    print(f"weighted: off by {weighted_error:.0e}; N samples: by N^{slope:.3f}, expected N^-0.5")
    final = {"weighted_error": weighted_error, "sampled_error": error, "slope": slope}
    seconds = time.perf_counter() - start
    results["arms"]["identity"] = {"history": history, "final": final, "seconds": seconds}


def open_checkpoint(run_dir, **objects):
    """Restore the objects from the run's last checkpoint, if it has one; return its manager.

    Raises OSError if it is damaged.
    """
    directory = run_dir / "checkpoint"
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(**objects), str(directory), 1)
    try:
        manager.restore_or_initialize()
    except Exception as error:  # half a file raises whatever its bytes lead to
        raise OSError(f"{directory} is damaged; delete it to train anew") from error
    return manager


def train(args, run_dir, results):
    """Part 2: train the agent to args.epochs episodes, from its checkpoint if it has one."""
    keras.utils.set_random_seed(args.seed)
    pong = args.env == "ALE/Pong-v5"
    env = (make_pong if pong else make_env)("rgb_array")
    network = build_model(pong, env.observation_space.shape[0])
    policy, done = compile_policy(network), tf.Variable(0, dtype=tf.int64)
    manager = open_checkpoint(run_dir, model=network, optimizer=network.optimizer, episodes=done)
    record = results["arms"].setdefault("agent", {"history": {}, "final": {}, "seconds": 0.0})
    names = "reward", "avg loss", "steps"  # what came after the checkpoint is played again
    history = record["history"] = {n: record["history"].get(n, [])[: int(done)] for n in names}
    start = time.perf_counter() - record["seconds"]
    left = (args.max_steps or np.inf) - sum(history["steps"])
    env.reset(seed=args.seed + int(done))
    while done < args.epochs and left:
        states, actions, rewards = play_episode(env, lambda s: get_action(policy, s), left)
        points = np.split(rewards, np.flatnonzero(rewards) + 1) if pong else [rewards]
        returns = [discounted_returns(point, GAMMA[args.env]) for point in points]
        advantages = standardise(np.concatenate(returns))
        loss = network.train_on_batch(states, np.eye(2)[actions], sample_weight=advantages)
        left -= len(rewards)
        done.assign_add(1)
        for name, value in zip(history, (sum(rewards), float(loss), len(rewards))):
            history[name].append(value)
            tf.summary.scalar(name, value, step=done)
        if done % BATCH_SIZE == 0 or done == args.epochs or not left:
            record["seconds"] = time.perf_counter() - start
            write_results(run_dir, results)
            manager.save()
            print(f"episode {int(done)}/{args.epochs}: reward {sum(rewards):<4g}", end=LINE_END)
    env.reset(seed=args.seed)  # the greedy games do not depend on how often training went on
    if args.gif:
        env = wrappers.RenderCollection(env)  # of the latest game
    greedy = [sum(play_episode(env, lambda s: np.argmax(policy(s)))[-1]) for _ in range(10)]
    if args.gif:
        gif, *rest = (keras.utils.array_to_img(frame, scale=False) for frame in env.render())
        gif.save(run_dir / "agent.gif", save_all=True, append_images=rest, duration=40, loop=0)
    final = {"reward": np.mean(history["reward"][-100:]), "greedy_reward": np.mean(greedy)}
    speed = sum(history["steps"]) / record["seconds"]
    record["final"] = final | {"parameters": network.count_params(), "steps_per_second": speed}
    network.save(run_dir / "agent.keras")


# --- Plots ---
def plot(run_dir, results):
    """Draw the error of the sampled gradient (part 1) and the agent's rewards (part 2)."""
    for arm, record in results["arms"].items():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        if arm == "identity":
            samples, errors = map(np.array, record["history"].values())
            axes.loglog(samples, errors, "o", label=f"found: N^{record['final']['slope']:.3f}")
            axes.loglog(samples, errors[0] * (samples[0] / samples) ** 0.5, label="theory: N^-0.5")
            axes.set(title="The sampled gradient", xlabel="samples N", ylabel="relative error")
        else:
            rewards = record["history"]["reward"]
            averages = [np.mean(rewards[: i + 1][-20:]) for i in range(len(rewards))]
            axes.plot(rewards, alpha=0.3, label="an episode")
            axes.plot(averages, label="mean of 20")
            axes.set(title=f"The agent on {results['data']}", xlabel="episode", ylabel="reward")
        axes.legend()
        save_figure(figure, run_dir / f"{arm}.png")


# --- Main ---
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    args = parse_args(argv)
    if args.resume:
        args, run_dir, results = resume_run(args, argv)
    device = select_device(args.device)
    if not args.resume:
        run_dir, results = new_run_dir(args, args.env, device)
    for arm, part in {"identity": show_identity, "agent": train}.items():
        if arm in args.arms and (arm == "agent" or arm not in results["arms"]):
            with tf.summary.create_file_writer(str(run_dir / arm)).as_default():
                part(args, run_dir, results)
    plot(run_dir, results)
    results["complete"] = True
    write_results(run_dir, results)
    report(run_dir, results)
    return {arm: record["final"] for arm, record in results["arms"].items()}


if __name__ == "__main__":
    run_as_command(main)
