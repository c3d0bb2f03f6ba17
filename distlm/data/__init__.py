"""Text corpora → dictionary → memory-mapped token files → stateless block plan.

corpus      readers of text: a folder, the demo corpus, the Hugging Face hub
demo_text   the demo corpus: Wikipedia articles out of the gensim wheel
wikitext    wikitext markup to plain words
dictionary  words and their ids
subwords    the pieces of a Hugging Face tokenizer in place of words
editions    recognises WikiText-2, WikiText-103 and PTB by counts and hashes, and names near misses
prepare     the stage `distlm data prepare`: text → dictionary and token files
tokens      token files: writing, opening, fingerprint
blocks      which tokens are context and which are scored; batches of them
order       which training blocks an update takes
"""
