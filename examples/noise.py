"""A hook of one's own: noise on every step's gradient, a regulariser as old as back-propagation.

    cd examples && python -m fedmpi.run --rounds 2 --train.hooks noise.Noise

A hook is called at the points of a step that it defines. Each client's turn begins by seeding torch, so noise that comes from
torch's generator is the same wherever the client lives, and the run has the same bytes on any number of ranks.
"""

import torch

from fedmpi.training import Hook, Step

SHARE = 0.1  # of a gradient's own size


class Noise(Hook):
    """Adds noise after the gradients of the whole step are there, before they are clipped."""

    def after_backward(self, step: Step) -> None:
        """For each tensor, noise of a tenth of its gradient's root mean square."""
        for parameter in step.model.parameters():
            if parameter.grad is not None:
                size = parameter.grad.square().mean().sqrt()
                parameter.grad.add_(torch.randn(parameter.shape).to(parameter.grad) * size, alpha=SHARE)
