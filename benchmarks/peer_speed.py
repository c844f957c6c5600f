"""One peer's world model behind a line protocol, so that it can run in an environment of its own.

Self-contained on purpose: it is started by path with the peer's interpreter, where Detent is not installed. It writes
one JSON line, either `{"tasks": [...], "versions": {...}}` or `{"absent": reason}`; then, for each line that names a
task, it runs the task once and answers `[wall seconds, processor seconds]`, and third what the task returned where that
is a list. `benchmarks.world_model_speed` starts it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

# Before any peer is imported: all are measured on one thread.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"):
    os.environ[variable] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np  # noqa: E402

Tasks = dict[str, Callable[[], object]]
Shapes = dict[str, Any]


def mbrl_lib(shapes: Shapes) -> Tasks:
    """mbrl-lib's GaussianMLP, BootstrapIterator, ModelTrainer's update, and TS1 through `sample`."""
    import torch
    from mbrl.models import GaussianMLP, OneDTransitionRewardModel
    from mbrl.models.util import EnsembleLinearLayer
    from mbrl.types import TransitionBatch
    from mbrl.util.replay_buffer import BootstrapIterator

    torch.set_num_threads(1)
    obs_size, action_size, members = shapes["obs"], shapes["actions"], shapes["members"]
    network = GaussianMLP(
        obs_size + action_size,
        obs_size + 1,
        "cpu",
        ensemble_size=members,
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
        propagation_method="random_model",
    )
    # Its constructor knows one width for all hidden layers; the layers themselves are its own.
    widths = [obs_size + action_size, *shapes["hidden"]]
    network.hidden_layers = torch.nn.Sequential(
        *(
            torch.nn.Sequential(EnsembleLinearLayer(members, before, after), torch.nn.SiLU())
            for before, after in itertools.pairwise(widths)
        )
    )
    network.mean_and_logvar = EnsembleLinearLayer(members, widths[-1], 2 * (obs_size + 1))
    for parameter in network.parameters():
        if parameter.ndim == 3:
            torch.nn.init.normal_(parameter, std=0.05)
    model = OneDTransitionRewardModel(network, target_is_delta=True, normalize=True, learned_rewards=True)
    rng = np.random.default_rng(0)
    data = _transitions(shapes, rng)
    ends = np.zeros(len(data["reward"]), dtype=bool)
    batch = TransitionBatch(data["obs"], data["action"], data["next_obs"], data["reward"], ends, ends)
    model.update_normalizer(batch)
    batches = BootstrapIterator(
        batch, shapes["batch"], members, shuffle_each_epoch=True, permute_indices=False, rng=rng
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    # It refuses a batch that the members do not divide.
    rows = -(-shapes["rows"] // members) * members
    start = torch.randn(rows, obs_size)
    action = torch.zeros(rows, action_size)
    generator = torch.Generator().manual_seed(0)

    def epoch() -> None:
        for part in batches:
            model.update(part, optimiser)

    def sample() -> None:
        with torch.no_grad():
            state = {"obs": start, "propagation_indices": None}
            for _ in range(shapes["horizon"]):
                _, _, _, state = model.sample(action, state, rng=generator)

    return {"epoch": epoch, "sample": sample}


def offlinerl_kit(shapes: Shapes) -> Tasks:
    """OfflineRL-Kit's EnsembleDynamics: `learn` on bootstrapped rows, `step` with its default penalty.

    It is not on the package index: put a checkout of github.com/yihaosun1124/OfflineRL-Kit on PYTHONPATH.
    """
    import torch
    from offlinerlkit.dynamics.ensemble_dynamics import EnsembleDynamics
    from offlinerlkit.modules.dynamics_module import EnsembleDynamicsModel
    from offlinerlkit.utils.scaler import StandardScaler

    torch.set_num_threads(1)
    members = shapes["members"]
    network = EnsembleDynamicsModel(
        shapes["obs"],
        shapes["actions"],
        shapes["hidden"],
        num_ensemble=members,
        num_elites=members,
        weight_decays=[2.5e-5, 5e-5, 7.5e-5, 1e-4],
    )
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    dynamics = EnsembleDynamics(
        network,
        optimiser,
        StandardScaler(),
        lambda obs, action, next_obs: np.zeros((len(obs), 1), dtype=bool),  # noqa: ARG005 - its signature
        penalty_coef=1.0,
    )
    rng = np.random.default_rng(0)
    data = _transitions(shapes, rng)
    inputs = np.concatenate((data["obs"], data["action"]), axis=1)
    targets = np.concatenate((data["next_obs"] - data["obs"], data["reward"][:, None]), axis=1)
    dynamics.fit(inputs)
    inputs = dynamics.transform(inputs)
    index = rng.integers(len(inputs), size=(members, len(inputs)))
    start = rng.standard_normal((shapes["rows"], shapes["obs"])).astype(np.float32)
    action = np.zeros((shapes["rows"], shapes["actions"]), dtype=np.float32)

    def epoch() -> None:
        order = np.argsort(rng.random(index.shape), axis=1)
        picked = np.take_along_axis(index, order, axis=1)
        dynamics.learn(inputs[picked], targets[picked], shapes["batch"])

    def imagine() -> None:
        obs = start
        for _ in range(shapes["horizon"]):
            obs, _, _, _ = dynamics.step(obs, action)

    return {"epoch": epoch, "imagine": imagine}


def rl_blox(shapes: Shapes) -> Tasks:
    """rl-blox's GaussianMLPEnsemble on JAX: its compiled `train_epoch`; its PETS samples inside its planner only."""
    import jax
    import optax
    from flax import nnx
    from rl_blox.blox.probabilistic_ensemble import GaussianMLPEnsemble, bootstrap, train_epoch

    members, batch = shapes["members"], shapes["batch"]
    model = GaussianMLPEnsemble(
        n_ensemble=members,
        shared_head=True,
        n_features=shapes["obs"] + shapes["actions"],
        n_outputs=shapes["obs"] + 1,
        hidden_nodes=list(shapes["hidden"]),
        activation="swish",
        rngs=nnx.Rngs(0),
    )
    optimiser = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    data = _transitions(shapes, np.random.default_rng(0))
    inputs = jax.numpy.asarray(np.concatenate((data["obs"], data["action"]), axis=1))
    targets = jax.numpy.asarray(np.concatenate((data["next_obs"] - data["obs"], data["reward"][:, None]), axis=1))
    key = jax.random.key(0)
    key, sub = jax.random.split(key)
    index = bootstrap(members, 1.0, len(inputs), sub)
    num_batches = -(-len(inputs) // batch)
    even = len(inputs) // num_batches
    keys = iter(jax.random.split(key, 10_000))

    def epoch() -> None:
        shuffled = jax.random.permutation(next(keys), index, axis=1, independent=True)
        # As many rows in even batches, which is what its own trainer compiles for.
        parts = shuffled[:, : num_batches * even].reshape(members, num_batches, even).transpose(1, 0, 2)
        train_epoch(model, optimiser, inputs, targets, parts).block_until_ready()

    return {"epoch": epoch}


def torchrl(shapes: Shapes) -> Tasks:
    """TorchRL brings no ensemble: one of its MLPs per member, each on its share of the rows (TS1)."""
    import torch
    from tensordict import TensorDict
    from tensordict.nn import NormalParamExtractor, TensorDictModule
    from torchrl.modules import MLP

    torch.set_num_threads(1)
    members, rows, obs_size = shapes["members"], shapes["rows"], shapes["obs"]
    networks = [
        MLP(
            in_features=obs_size + shapes["actions"],
            out_features=2 * (obs_size + 1),
            num_cells=list(shapes["hidden"]),
            activation_class=torch.nn.SiLU,
        )
        for _ in range(members)
    ]
    heads = [
        TensorDictModule(torch.nn.Sequential(network, NormalParamExtractor()), ["input"], ["loc", "scale"])
        for network in networks
    ]
    start = torch.randn(rows, obs_size)
    action = torch.zeros(rows, shapes["actions"])

    def sample() -> None:
        with torch.no_grad():
            obs = start
            for _ in range(shapes["horizon"]):
                parts = torch.randperm(rows).chunk(members)
                following = torch.empty_like(obs)
                for head, part in zip(heads, parts, strict=True):
                    data = TensorDict({"input": torch.cat((obs[part], action[part]), dim=1)}, batch_size=[len(part)])
                    out = head(data)
                    drawn = out["loc"] + out["scale"] * torch.randn_like(out["loc"])
                    following[part] = obs[part] + drawn[:, :obs_size]
                obs = following

    return {"sample": sample}


PEERS: dict[str, tuple[Callable[[Shapes], Tasks], tuple[str, ...]]] = {
    "mbrl-lib": (mbrl_lib, ("mbrl", "torch")),
    "OfflineRL-Kit": (offlinerl_kit, ("torch",)),
    "rl-blox": (rl_blox, ("rl-blox", "jax")),
    "TorchRL": (torchrl, ("torchrl", "torch")),
}
"""By name: what builds the tasks, and the distributions whose versions matter."""


def serve(
    peers: Mapping[str, tuple[Callable[[Any], Tasks], tuple[str, ...]]], name: str, settings: dict[str, Any]
) -> None:
    """Build the tasks of one peer and run them on request.

    Args: peers as PEERS; name: one of them; settings: what its tasks are built of.
    """
    # Peers print to stdout as they like; the protocol keeps a descriptor of its own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    build, distributions = peers[name]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            tasks = build(settings)
    except Exception as error:  # whatever a foreign package fails with, the peer is absent and this is why
        answers.write(json.dumps({"absent": f"{type(error).__name__}: {error}".splitlines()[0]}) + "\n")
        return
    versions = {key: importlib.metadata.version(key) for key in distributions}
    answers.write(
        json.dumps({"tasks": sorted(tasks), "versions": {"python": platform.python_version(), **versions}}) + "\n"
    )
    for line in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        found = tasks[line.strip()]()
        seconds = [time.perf_counter() - wall, time.process_time() - processor]
        answers.write(json.dumps([*seconds, found] if isinstance(found, list) else seconds) + "\n")


def _transitions(shapes: Shapes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    rows = shapes["transitions"]
    obs = rng.standard_normal((rows, shapes["obs"])).astype(np.float32)
    return {
        "obs": obs,
        "action": rng.standard_normal((rows, shapes["actions"])).astype(np.float32),
        "next_obs": obs + rng.normal(scale=0.1, size=obs.shape).astype(np.float32),
        "reward": rng.normal(size=(rows,)).astype(np.float32),
    }


if __name__ == "__main__":
    serve(PEERS, sys.argv[1], json.loads(sys.argv[2]))
