"""Where text comes from, for token files and for shards alike.

choice        what the settings of either say about their text
folder        the files of each split in a folder
hub           tables of the `datasets` library
packed        compressed files as one stream of bytes
stream        that stream as lines: no byte order mark, CR-only line ends, UTF-16 named
check         UTF-8, NUL bytes, endless words, special tokens spelled in the text
source        what every source of text answers; text files
rows          sources whose text comes in rows: tables
record_files  .jsonl and .csv
parquet       .parquet
held_out      which documents of train are valid and test
opened        settings → sources
sample        how much text a file holds, from its start
"""
