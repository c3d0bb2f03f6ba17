"""What weights, gradients and optimizer states take on one rank."""


def states_bytes(parameters: int, states: int, half: bool, stage: int, ranks: int) -> int:
    """Weights, gradients, masters and optimizer states of one rank, in bytes (Rajbhandari et al. 2020, section 5)."""
    width = 2 if half else 4
    weights, gradients = width * parameters, width * parameters
    # ZeRO keeps fp32 masters beside the weights in every precision; ZeRO 0 only in half precision.
    masters = 4 * parameters * (states + (1 if half or stage > 0 else 0))
    return (
        weights // (ranks if stage == 3 else 1)
        + gradients // (ranks if stage >= 2 else 1)
        + masters // (ranks if stage >= 1 else 1)
    )
