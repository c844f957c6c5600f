"""A point on a line: the smallest world with delta, reward, termination and masks to learn.

obs (x, button), actions 0 left, 1 right, 2 broken: never valid. x moves by 0.1 left or right; at |x| > 1 it ends. Left
of -0.75 only the way back is valid when `fenced`. The reward is -|x'|. The button never changes in an episode.
"""

import numpy as np

from world_model.experience import Experience

STEP = 0.1


def masks_at(obs, fenced=False):
    x = obs[:, 0]
    open_left = x > -0.75 if fenced else np.ones(len(x), bool)
    return np.stack((open_left, np.ones(len(x), bool), np.zeros(len(x), bool)), axis=1)


def line_experience(rows=600, seed=0, spread=1.0, noise=0.0, fenced=False, rows_per_episode=5):
    rng = np.random.default_rng(seed)
    obs = np.stack((rng.uniform(-spread, spread, rows), np.full(rows, 0.25)), axis=1)
    masks = masks_at(obs, fenced)
    action = np.where(masks[:, :2], rng.random((rows, 2)), -1.0).argmax(axis=1)
    following = obs.copy()
    following[:, 0] += STEP * (2 * action - 1) + noise * rng.standard_normal(rows)
    return Experience(
        obs=obs.astype(np.float32),
        action=action[:, None],
        reward=-np.abs(following[:, 0]).astype(np.float32),
        next_obs=following.astype(np.float32),
        terminated=np.abs(following[:, 0]) > 1.0,
        action_masks=masks,
        episode=np.arange(rows) // rows_per_episode,
        num_actions=(3,),
    )
