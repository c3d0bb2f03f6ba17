"""All parts, in the order in which they run: what is right first, then how fast it is."""

from gpu.part import Part

BUDGET_S = 540
"""Seconds of all parts together on a GPU, one minute less than ten: that one is for the installation of wheels."""

PARTS = (
    Part("machine", "device, builds, what it copies and multiplies at most", 25),
    Part("equality", "20 updates, a memory, an AWD-LSTM, datastore keys: as the processor", 65, needs=("deepspeed",)),
    Part("precision", "fp16 with loss scaling, and bf16, beside fp32", 45, needs=("deepspeed",)),
    Part("zero", "DeepSpeed's stages 0 to 3 with NCCL", 50, needs=("deepspeed",)),
    Part("stages", "tokens to report: perplexities as on the processor", 65, needs=("deepspeed", "faiss")),
    Part("lstm", "LSTM with dropped weights: no warning, and its speed beside the usual way", 35),
    Part("memory", "memory lookup: right, and its share of the bandwidth", 30),
    Part("resm", "two ResM layers on BERT-base: time over the dense model", 40, needs=("transformers",), speed=True),
    Part("speed", "tokens/s of the 247 M model beside plain torch", 95, needs=("deepspeed",), speed=True),
    Part("datastore", "writing the datastore beside the forward pass alone", 35, speed=True),
    Part("index", "k-means and adding of keys on the device: as on the processor", 35, needs=("faiss",)),
    Part("scan", "knn.scan=gpu: neighbours as on the processor", 20, needs=("faiss",)),
)  # fmt: skip


def chosen(names: str) -> list[Part]:
    """Parts by their names with commas between; empty: all. Raises ValueError for a name that there is not."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {part.name: part for part in PARTS}
    for name in wanted:
        if name not in known:
            raise ValueError(f"no part is called {name!r}; there are {', '.join(known)}")
    return [part for part in PARTS if not wanted or part.name in wanted]
