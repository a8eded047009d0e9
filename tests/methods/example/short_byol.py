"""BYOL in few lines: a predictor guesses what a slowly moving copy of the encoder makes of the other view.

Source: Grill et al. 2020, arXiv:2006.07733, equations 1 and 2.
"""

import copy
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from edgecl.config.recipe import MethodConfig
from edgecl.config.settings import Fraction
from edgecl.methods.losses import correlation_of
from edgecl.methods.method import Method


class Config(MethodConfig):
    """The [method] table."""

    name: Literal["short-byol"] = "short-byol"
    momentum: Fraction = 0.99


class Byol(Method):
    """One encoder, a predictor that is trained with it, and a target that follows it."""

    def __init__(self, config, net, context):
        super().__init__(config, net, context)
        self.predictor = nn.Linear(context.dimensions, context.dimensions)
        self.target = copy.deepcopy(net.host).requires_grad_(False)

    def embed(self, views, step):
        return {name: self.predictor(z) for name, z in super().embed(views, step).items()}

    def embed_targets(self, views, step):
        return {"target_0": self.target(views[0]), "target_1": self.target(views[1])}

    def loss(self, embeddings, step):
        (guess_0, guess_1), (target_0, target_1) = (z.values() for z in embeddings)
        cosines = torch.cat([cosine_similarity(guess_0, target_1), cosine_similarity(guess_1, target_0)])
        return 2 - 2 * cosines.mean(), correlation_of(guess_0, guess_1)

    @torch.no_grad()
    def after_step(self, step):
        for slow, fast in zip(self.target.parameters(), self.net.host.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.config.momentum)


METHOD = Byol
