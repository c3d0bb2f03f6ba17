"""An index in memory, without a folder: for a store that one process made for itself."""

import numpy as np

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.build.add import read_batches
from distlm.index.build.encode import Encoder
from distlm.index.build.sample import check_finite
from distlm.index.build.torch_lists import gpu_device
from distlm.index.factory import fit_factory
from distlm.index.faiss_module import require_faiss
from distlm.index.layout import deserialise, serialise
from distlm.index.search.searcher import SearchIndex, Shape
from distlm.index.train.sample import StoreSample
from distlm.index.train.team import Team
from distlm.index.train.template import trained
from distlm.runtime.progress import say
from distlm.runtime.ranks.cores import usable_cores


def build_in_memory(datastore: Datastore, factory: str, sample: int, seed: int) -> SearchIndex:
    """Train on at most `sample` keys and add all: the index that `distlm index build` makes of the same store.

    Memory: the codes, twice while they are copied, and the sample in the keys' type. Raises DistlmError for a refused
    factory (fit_factory says which) and for keys that are not finite.
    """
    plan = fit_factory(factory, datastore.width, datastore.rows, sample)
    for message in plan.messages:
        say(f"index: {message}")
    team = Team(threads=usable_cores(), device=gpu_device())
    index = deserialise(trained(plan, StoreSample(datastore, plan.sample, seed), seed, team))
    with Encoder(index, device=gpu_device(), keys=datastore.rows) as encoder:
        for shard in datastore.shards:
            for start, part in read_batches(datastore.keys(shard.index), encoder.batch):
                check_finite(part, datastore, shard.index, np.arange(start, start + len(part)))
                first = shard.first_row + start
                encoder.add(part, np.arange(first, first + len(part), dtype=np.int64))
    if index.ntotal != datastore.rows:
        raise DistlmError(f"the index took {index.ntotal} of {datastore.rows} keys; report this")
    # Read again whole: only then does an IVFPQ have the table that search uses, and distances their last bits.
    whole = require_faiss().deserialize_index(np.frombuffer(serialise(index), np.uint8))
    return SearchIndex(whole, Shape(datastore.rows, datastore.width, plan.nlist), datastore.folder)
