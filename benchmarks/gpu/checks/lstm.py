"""The AWD-LSTM's step on the device: no warning of what cuDNN is given, and its speed beside the usual way.

It is compared with the processor in fp32 proper; how far TF32 moves it, which torch lets cuDNN use by default, is a
figure without a tolerance.
"""

import warnings

import lstm as benchmark
import torch

from distlm.models.awd_lstm.config import LstmConfig
from distlm.models.awd_lstm.lstm import WeightDropLstm
from distlm.runtime.ranks.device import default_device, synchronize
from gpu.part import Outcome, Place

GOAL = 1.0
APART = 1e-4


def run(place: Place) -> Outcome:
    """Correctness anywhere, speed on a GPU."""
    device = default_device()
    out = Outcome()
    with warnings.catch_warnings(record=True) as caught:
        # The filters that a user has, the package's own among them; each warning every time.
        wanted, as_it_is = _step(torch.device("cpu")), _step(device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = _step(device)
        synchronize(device)
    with warnings.catch_warnings(record=True) as hidden:
        warnings.simplefilter("always")
        _step(device)
    seen = _about_weights(caught)
    out.figures |= {"warnings of weights": len(seen), "cuDNN packs weights anew": bool(_about_weights(hidden))}
    out.must(not seen, f"a warning that a user sees: {seen[:1]}")
    apart = _apart(wanted, found)
    out.figures["outputs and gradients apart"] = float(f"{apart:.2e}")
    out.figures["with torch's defaults (TF32)"] = float(f"{_apart(wanted, as_it_is):.2e}")
    out.must(apart < APART, f"outputs and gradients differ from the processor's by {apart:.2e}, {APART:g} is right")
    if place.measures:
        options = benchmark.parser().options(["--quick"] if place.quick else [])
        config = LstmConfig(width=options.width, hidden_width=options.hidden_width)
        for batch in options.batch:
            rates = benchmark.compare(config, options, batch, device)
            out.figures[f"tokens/s at batch {batch}"] = rates["distlm_tokens_per_s"]
            out.goal(f"speed over the usual way at batch {batch}", rates["ratio"], least=GOAL)
    return out


def _about_weights(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if "contiguous" in str(warning.message)]


def _apart(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Largest 2-norm of a difference, relative to the wanted tensor's."""
    return max(float((a - b.cpu()).norm() / a.norm()) for a, b in zip(wanted, found, strict=True))


def _step(device: torch.device) -> list[torch.Tensor]:
    """Output and gradient of the input of one layer in fp32 with a given mask of the hidden weights: torch gets a new
    tensor of weights, as in training, and the same numbers on every device."""
    torch.manual_seed(3)
    layer = WeightDropLstm(48, 64, 0.5)
    hidden = torch.randn(20, 8, 48)
    layer, hidden = layer.to(device), hidden.to(device).requires_grad_()
    mask = (torch.rand(256, 64, generator=torch.Generator().manual_seed(4)) < 0.5).to(device) * 2.0
    weights = [layer.weight_ih, layer.weight_hh * mask, layer.bias_ih, layer.bias_hh]
    output, _, _ = torch._VF.lstm(hidden, list(layer.zero_state(8)), weights, True, 1, 0.0, True, False, False)
    output.square().mean().backward()
    # The layer itself, with masks of the device's own.
    layer.train()(hidden.detach(), layer.zero_state(8))[0].sum().backward()
    assert hidden.grad is not None
    return [output.detach(), hidden.grad]
