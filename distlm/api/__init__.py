"""A finished run from Python, read-only and in one process.

run        what a run directory holds, each part opened when it is first asked for
words      ids and the words or sub-words that they stand for
search     an index that answers with words
next_word  the most probable next words, and the training contexts behind each
"""
