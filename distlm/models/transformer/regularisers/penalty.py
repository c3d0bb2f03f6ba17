"""What a word's queue does to a state that predicts the word."""

from typing import NamedTuple

from torch import Tensor


class Pull(NamedTuple):
    """The queues of the target words of n tokens, as far as the penalty and its gradient depend on them: fp32.

    Σ_i ‖sg(Q_i) − r‖² = m ‖r − Q̄‖² + Σ_i ‖Q_i − Q̄‖², so members, mean and spread stand for the queue.
    """

    members: Tensor
    """[n]: m, 0 where the queue does not count yet."""
    mean: Tensor
    """[n, D]: Q̄."""
    spread: Tensor
    """[n]: Σ_i ‖Q_i − Q̄‖²."""

    def penalty(self, states: Tensor, reduction: str) -> Tensor:
        """Σ_i ‖sg(Q_i) − r‖² of each token (Ton et al., eq. 1), summed or averaged over the width D: fp32 [n].

        states: [n, D]. A queue of L zeros gives L ‖r‖², L times eq. 2.
        """
        gaps = (states.float() - self.mean).square()
        if reduction == "mean":
            return self.members * gaps.mean(-1) + self.spread / states.shape[-1]
        return self.members * gaps.sum(-1) + self.spread
