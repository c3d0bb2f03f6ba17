"""Language models over words as models of Hugging Face; `distlm export hf` copies this module's definitions.

Without a cache: `generate` runs the model over the whole text for each word.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class CausalWords(PreTrainedModel, GenerationMixin):
    """A model that predicts the next word of a text; its logits are log-probabilities.

    A class made from it sets `model`, which takes ids int64 [B, T] and returns states [B, T, D] first, and has
    full_log_probs: states [n, D] → log-probabilities fp32 [n, V].
    """

    main_input_name = "input_ids"
    model: Any

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """input_ids int64 [B, T] → logits fp32 [B, T, V], or of the last `logits_to_keep` tokens.

        attention_mask [B, T]: 0 at padding, which may stand before a row's text or behind it. labels int64 [B, T]: as
        input_ids, −100 where nothing is to be predicted; loss is then the mean −ln p of a row's labels from its second
        one on, or, with `num_items_in_batch`, their sum over that number: Trainer gives the labels of all batches of an
        update, and adds up their losses.
        """
        tokens = input_ids.shape[1]
        places = torch.arange(tokens, device=input_ids.device)
        if attention_mask is None:
            states = self.model(input_ids)[0]
        else:
            # The model counts positions from a row's first token, and sees nothing of what is right of a token: padding
            # is put there.
            before = attention_mask.long().argmax(1, keepdim=True)
            states = self.model(input_ids.gather(1, (places + before) % tokens))[0]
            back = (places - before) % tokens
            states = states.gather(1, back[:, :, None].expand(states.shape))
        states = states[:, -logits_to_keep:] if logits_to_keep and labels is None else states
        logits = self.model.full_log_probs(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        loss = None
        if labels is not None:
            total = "mean" if num_items_in_batch is None else "sum"
            loss = F.nll_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=total)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *_: Any, attention_mask: Tensor | None = None, **__: Any
    ) -> dict[str, Any]:
        """The whole text: there is no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    def _init_weights(self, module: nn.Module) -> None:
        """Modules draw their own first weights when they are made."""
