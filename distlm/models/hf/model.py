"""Any causal language model of Hugging Face behind the interface of the others: no table of model types.

A hidden state is named by the path of a module and its side, e.g. transformer.h.11.mlp:input (the input of GPT-2's
last feed-forward layer, after its layer norm: the key of Khandelwal et al., section 5) or model.layers.15:output; the
name "output" is what the softmax layer is given. Ids are those of sub-word token files (distlm.data.subwords): row i
of the model's embedding is id FIRST_PIECE + i, and </s> is the row of the piece that ends a line.
"""

import difflib
import inspect
import json
import threading
from collections.abc import Callable
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlm.data.dictionary import Dictionary
from distlm.data.subwords import FIRST_PIECE, Subwords
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError, UsageError
from distlm.installed import install
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.values.exchange import Exchange
from distlm.models.empty import empty_model
from distlm.models.hf.description import OUTPUT, SIDES, HfModel
from distlm.models.hf.exported import refuse_exported
from distlm.models.hf.looks_ahead import looks_ahead
from distlm.models.hf.memory import equip
from distlm.models.language_model import LanguageModel, LMOutput
from distlm.models.linear_cross_entropy import chunk_rows
from distlm.models.row_dropout import Rows
from distlm.models.tensor_file import require_finite

_NO_LIMIT = 65536
"""max_positions of a model whose configuration names none (ALiBi, recurrent models): it bounds memory only."""
_DROPPED = ("model_type", "dtype", "torch_dtype", "id2label", "label2id", "transformers_version")
_OF_PASSES = ("_thread", "_hooking", "_hooked", "_logits")
"""Attributes of a model that are no part of it."""


class HfLM(LanguageModel):
    """A model of Hugging Face over the dictionary of a tokenizer; parameters keep their names, below `hf.`."""

    def __init__(self, config: HfModel, vocabulary: int, hf: Any = None, exchange: Exchange | None = None) -> None:
        """`hf`: the model with its weights, which has no memory yet; None: a fresh one, from torch's global generator.
        `exchange` joins the ranks that train its memories; None: this process has all of them."""
        super().__init__()
        self.begins = config.begins
        self.config, self.vocabulary, self.width = config, vocabulary, config.width
        self.hf: Any = _fresh(config) if hf is None else hf
        self._begin_passes()
        self.rows: Rows | None = None
        self.memories: dict[int, ProductKeyMemory] = {}
        self.ffn_names: dict[int, tuple[str, ...]] = {}
        if config.memory:
            self.add_memories(config, exchange)

    def _begin_passes(self) -> None:
        # Forward passes of several threads share the modules and their hooks.
        self._thread = threading.local()
        self._hooking, self._hooked = threading.Lock(), dict[str, Any]()
        self._logits: list[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies, pickles and torch.save. Not while another pass runs: its hooks hold this model and are taken off;
        the next pass sets them again."""
        self.unhook()
        return {name: value for name, value in vars(self).items() if name not in _OF_PASSES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin_passes()

    def add_memories(self, config: HfModel, exchange: Exchange | None) -> None:
        """Fresh memories for a model that has none: `config` is its own with a memory; see distlm.models.hf.memory."""
        found = equip(self.hf, config.memory, config.width, config.seed, exchange)
        self.config, self.rows, self.memories = config, found.rows, found.memories
        self.ffn_names = {layer: tuple(f"hf.{name}" for name in names) for layer, names in found.ffn_names.items()}

    def forward(self, inputs: Tensor, tap: str | None = None, stop_at_tap: bool = False, past: Any = None) -> LMOutput:
        """inputs int64 [B, T], right-padded → what the softmax layer is given and the tapped state, both [B, T, D].

        `past`: of new_past, then of the passes over the tokens before these, which it takes in. With `stop_at_tap`
        `hidden` is None; the pass goes on to the last layer all the same. Raises DistlmError for an unknown tap, one of
        another width than D, and for more than max_positions tokens, those of `past` counted.
        """
        if stop_at_tap and tap is None:
            raise ValueError("stop_at_tap needs a tap")
        length = inputs.shape[1] + (0 if past is None else past.get_seq_length())
        if length > self.config.max_positions:
            raise DistlmError(
                f"a sequence of {length} tokens is longer than the model's max_positions="
                f"{self.config.max_positions}; shorten the context window or the block"
            )
        if tap is not None and tap != OUTPUT:
            self._hook(tap)
        self._thread.tap, self._thread.state = tap, None
        kept = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
        hidden = self.hf.base_model(input_ids=self._rows(inputs), **kept)[0]
        tapped = hidden if tap == OUTPUT else self._thread.state
        self._thread.state = None
        if tap is not None and (tapped is None or tapped.numel() != hidden.numel()):
            found = "is not run, or has no such side" if tapped is None else f"gives a state of {list(tapped.shape)}"
            raise DistlmError(
                f"tap={tap!r}: the module {found}, not one of width {self.width} for every token; choose another"
            )
        if tapped is not None:
            # Some models compute on all rows in one.
            tapped = tapped.reshape(hidden.shape)
        return LMOutput(None if stop_at_tap else hidden, tapped)

    def new_past(self) -> Any:
        # Models with a recurrent state keep it in a cache of their own.
        if self.hf._is_stateful or "past_key_values" not in inspect.signature(self.hf.base_model.forward).parameters:
            return None
        return _library().DynamicCache(config=self.hf.config.get_text_config())

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden [n, D], targets int64 [n] → log p(target), fp32 [n].

        Many models are padded with rows that stand for no piece; these have their share of the probability. Memory: the
        logits of `chunk_rows` tokens, or, where gradients are wanted, twice those of all n.
        """
        head = self._head
        step = len(hidden) if torch.is_grad_enabled() else chunk_rows(self.config.rows, hidden.device)
        pairs = zip(hidden.split(max(1, step)), self._rows(targets).split(max(1, step)), strict=True)
        return torch.cat([-F.cross_entropy(head(some).float(), rows, reduction="none") for some, rows in pairs])

    def full_log_probs(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] → log-probabilities of every id, fp32 [n, V]: −∞ for <s>, <pad>, <unk> and, because </s> has
        its probability, for the piece that ends a line."""
        scores = self._head(hidden).log_softmax(1, dtype=torch.float32)
        full = scores.new_full((len(hidden), self.vocabulary), -torch.inf)
        full[:, FIRST_PIECE:] = scores[:, : self.vocabulary - FIRST_PIECE]
        full[:, FIRST_PIECE + self.config.line_end] = -torch.inf
        full[:, Dictionary.EOS] = scores[:, self.config.line_end]
        return full

    @property
    def _head(self) -> Any:
        """hidden [n, D] → logits [n, rows]."""
        if self._logits is None:
            from distlm.models.hf.logits import logits_of

            # Not a submodule: it has no parameters of its own.
            self._logits = [logits_of(self.hf)]
        return self._logits[0]

    def require_tap(self, tap: str, key: str) -> None:
        """Raises UsageError, naming `key` and states that there are, for an unknown tap."""
        if tap != OUTPUT:
            _find(self.hf, tap, key)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HfLM":
        """Half precision is for parameters: DeepSpeed would round rotary angles, which are buffers, as well."""
        # A memory looks after its own.
        others = {id(buffer) for memory in self.memories.values() for buffer in memory.buffers()}
        floats = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        kept = {name: buffer for name, buffer in floats.items() if id(buffer) not in others}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            path, _, leaf = name.rpartition(".")
            module = self.get_submodule(path)
            setattr(module, leaf, buffer.to(getattr(module, leaf).device))
        return self

    def _rows(self, ids: Tensor) -> Tensor:
        # Padding stands only after the last token that is scored; any row does for it.
        rows = (ids - FIRST_PIECE).clamp_(min=0)
        rows = rows.masked_fill_(ids == Dictionary.EOS, self.config.line_end)
        return rows.masked_fill_(ids == Dictionary.BOS, self.config.begin) if self.begins else rows

    def _hook(self, tap: str) -> None:
        """From now on passes of a thread that has this tap keep the state."""
        with self._hooking:
            if tap in self._hooked:
                return
            path, side = _find(self.hf, tap, "tap")

            def keep(found: Any) -> None:
                if getattr(self._thread, "tap", None) == tap:
                    states = (item for item in found if torch.is_tensor(item) and item.is_floating_point())
                    self._thread.state = next(states, None)

            module = self.hf.get_submodule(path)
            if side == "input":
                handle = module.register_forward_pre_hook(
                    lambda _module, positional, named: keep([*positional, *named.values()]), with_kwargs=True
                )
            else:
                handle = module.register_forward_hook(lambda _module, _inputs, output: keep(
                    [output] if torch.is_tensor(output) else [*output]
                ))  # fmt: skip
            self._hooked[tap] = handle

    def unhook(self) -> None:
        """Leave no hook on the model; the next pass with a tap sets its own again. Not while another pass runs."""
        with self._hooking:
            for handle in self._hooked.values():
                handle.remove()
            self._hooked.clear()


def hf_model(name: str, tokens: TokenFiles | None = None, begin: str = "auto") -> HfModel:
    """The model of a folder or of a name on the hub, for sub-word token files. Only its configuration is read, and,
    for the piece in front of a text (`begin`: hf.begin), the tokenizer that lies with the tokens.

    Raises DistlmError when there is none, when it is no causal language model, when it was exported with a memory or
    is one over words, when the tokens are words, when the tokenizer has more pieces than the model has rows, or no
    piece `begin`.
    """
    if not name:
        raise UsageError("hf.name is empty; set it to a folder or a name on the hub, e.g. hf.name=gpt2")
    library = _library()
    try:
        refuse_exported(name, library.PretrainedConfig.get_config_dict(name)[0])
        # Code in a folder is never run, nor is anybody asked whether it may be.
        found = library.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(name, error) from error
    if found.is_encoder_decoder:
        raise DistlmError(f"hf.name={name}: a {found.model_type}, an encoder with a decoder; name a causal model")
    text = found.get_text_config()
    model = HfModel(found.to_dict(), text.hidden_size, getattr(text, "max_position_embeddings", None) or _NO_LIMIT)
    model.generation = _generation(name, found)
    if tokens is None:
        return model
    if tokens.tokenizer is None:
        raise DistlmError(
            f"{tokens.folder}: token files of words, hf.name={name} has sub-words; prepare the text with its tokenizer "
            f"in a new folder: data.tokenizer={name}"
        )
    if tokens.tokenizer.pieces > model.rows:
        raise DistlmError(
            f"{tokens.folder}: vocabulary mismatch: made with a tokenizer of {tokens.tokenizer.pieces} pieces, "
            f"hf.name={name} has {model.rows} rows; set data.tokenizer to the model's own"
        )
    model.line_end = tokens.tokenizer.line_end
    if begin != "none":
        subwords = Subwords.load(str(tokens.folder), tokens.tokenizer.line_end_piece)
        model.begin = begin_piece(begin, subwords, f"hf.begin={begin}: the tokenizer of hf.name={name}")
    return model


def begin_piece(setting: str, subwords: Subwords, asked: str) -> int:
    """Number of the piece in front of each block, by `setting`: auto, none or a piece; −1: there is none.

    Raises UsageError, which begins with `asked`, for a piece that the tokenizer has not.
    """
    if setting == "none":
        return -1
    found = subwords.begin if setting == "auto" else subwords.tokenizer.token_to_id(setting)
    if found is None and setting != "auto":
        raise UsageError(f"{asked} has no such piece; set it to auto or none")
    return -1 if found is None else int(found)


def pretrained(name: str, config: HfModel, vocabulary: int) -> HfLM:
    """The model with its weights, fp32.

    Raises DistlmError when weights are missing, when the logits cannot be had from the last hidden states, and when
    they depend on later tokens.
    """
    library = _library()
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        hf, facts = library.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise _unreadable(name, error) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(facts["missing_keys"]):
        raise DistlmError(f"hf.name={name}: no weights of {', '.join(missing[:3])}; get the whole model")
    model = HfLM(config, vocabulary, hf.eval())
    _check_head(model, name)
    require_finite(dict(model.named_parameters()), f"hf.name={name}")
    return model


def wrapped(hf: Any, pieces: int, line_end: int, begin: int = -1) -> HfLM:
    """A model that is loaded already, on the device where it is; it is not changed.

    `pieces`: number of pieces of its tokenizer; `line_end`: the one that ends a line; `begin`: the one in front of each
    block (−1: none). Raises DistlmError for an encoder with a decoder, for fewer rows than pieces, and as `pretrained`
    for logits.
    """
    if hf.config.is_encoder_decoder:
        raise DistlmError(f"a {hf.config.model_type}, an encoder with a decoder; give a causal language model")
    text = hf.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or _NO_LIMIT
    config = HfModel(hf.config.to_dict(), text.hidden_size, longest, line_end, begin)
    if pieces > config.rows:
        raise DistlmError(
            f"the tokenizer has {pieces} pieces, the model {config.rows} rows: give the model's own tokenizer"
        )
    model = HfLM(config, FIRST_PIECE + pieces, hf)
    _check_head(model, hf.config.name_or_path or hf.config.model_type)
    return model


def require_tap(config: HfModel, tap: str, key: str) -> None:
    """Raises UsageError, naming the setting `key` and states that there are, for an unknown tap."""
    if tap != OUTPUT:
        with empty_model():
            hf = _fresh(config)
        _find(hf, tap, key)


def _find(hf: nn.Module, tap: str, key: str) -> tuple[str, str]:
    """Path of a module, and its side."""
    path, _, side = tap.rpartition(":")
    names = [name for name, _ in hf.named_modules() if name]
    if side in SIDES and path in names:
        return path, side
    lists = [name for name, module in hf.named_modules() if isinstance(module, nn.ModuleList)]
    last = f"{lists[0]}.{len(hf.get_submodule(lists[0])) - 1}" if lists else ""  # type: ignore[arg-type]
    near = difflib.get_close_matches(path, names, 3, 0.6) or [name for name in names if name.startswith(last)][:20]
    raise UsageError(
        f"{key}={tap!r}: no such hidden state; choose {OUTPUT}, or MODULE:input or MODULE:output with a module of the "
        f"model, e.g. {', '.join(near)}"
    )


def _fresh(config: HfModel) -> Any:
    library = _library()
    rest = {key: value for key, value in config.backbone.items() if key not in _DROPPED}
    described = library.AutoConfig.for_model(config.backbone["model_type"], **rest)
    model = library.AutoModelForCausalLM.from_config(described)
    if config.generation:
        model.generation_config = library.GenerationConfig(**config.generation)
    return model


def _generation(name: str, described: Any) -> dict[str, Any]:
    """What the generation_config.json of a folder, or of a name on the hub, says that follows from no configuration;
    empty where there is none that can be read, which transformers takes for none, too."""
    library = _library()

    def says(settings: Any) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(settings.to_json_string(ignore_metadata=True))
        return found

    try:
        own = says(library.GenerationConfig.from_pretrained(name))
    except (OSError, ValueError, TypeError):
        return {}
    return {} if own == says(library.GenerationConfig.from_model_config(described)) else own


def _check_head(model: HfLM, name: str) -> None:
    """Log-probabilities of a few tokens as the model itself gives them, and of each from those before it alone."""
    rows = torch.arange(4, device=next(model.parameters()).device)[None] % model.config.rows
    with torch.inference_mode():
        expected = model.hf(input_ids=rows, use_cache=False).logits[0]
        hidden = model.hf.base_model(input_ids=rows, use_cache=False)[0][0]
        try:
            found = model._head(hidden) if hidden.shape[-1] == model.width else None
        # Whatever the end of another model's forward raises when it is given hidden states alone.
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError):
            found = None
    if found is None or found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise DistlmError(
            f"hf.name={name}: a {model.hf.config.model_type}, whose logits are not a function of its last hidden state "
            f"of width {model.width} alone; such models are not supported"
        )
    if looks_ahead(model.hf, rows, expected):
        raise DistlmError(
            f"hf.name={name}: a {model.hf.config.model_type} that sees the tokens behind the one it predicts from, and "
            "so what it is to predict; name a causal model, or, where its architecture can be a decoder, set "
            "is_decoder=true in its config.json"
        )


def _unreadable(name: str, error: Exception) -> DistlmError:
    return DistlmError(
        f"hf.name={name}: no folder or name on the hub that transformers can read as a causal model ({error})"
    )


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise DistlmError(f"model.kind=hf needs transformers: {install('hf')} ({error})") from error
    return transformers
