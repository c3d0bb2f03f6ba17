"""Text corpora → dictionary → memory-mapped token files → stateless block plan.

text/       readers of text, for token files and shards: files of all forms, tables, the Hugging Face hub
shards/     rows of tokens for masked language models
corpus      the text of token files: three splits of lines
documents   where documents end
demo_text   the demo corpus: Wikipedia articles out of the gensim wheel
wikitext    wikitext markup to plain words
dictionary  words and their ids
subwords    the pieces of a Hugging Face tokenizer in place of words
editions    recognises WikiText-2, WikiText-103 and PTB by counts and hashes, and names near misses
settings    which settings decide the token files
estimate    what making them needs
prepare     the stage `distlm data prepare`: text → dictionary and token files
tokens      token files: writing, opening, fingerprint
blocks      which tokens are context and which are scored; batches of them
order       which training blocks an update takes
"""
