"""Keys and values of a split: a directory of fixed-size shards and a manifest.

plan          which blocks, rows and tokens are in which shard
manifest      what is on disk, as text: settings, shards, checksums
extract       hidden states of one batch of blocks (queries use it too)
shard_writer  one shard to disk while the model computes
writer        the stage
estimate      what the stage will need
reader        a finished store, memory-mapped
rows          its rows by global number
exchange      stores of other programs: arrays, memory maps
verify        every byte against its checksum
"""
