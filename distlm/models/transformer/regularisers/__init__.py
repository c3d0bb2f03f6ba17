"""Eq. 1 of Ton et al. (2021): every state is pulled towards the recent states that predicted the same word.

The recent states of a word are its queue: states of a momentum encoder (an exponential moving average of the model,
its copy at first), with the gradient stopped. penalty.py has the formula, tables.py the queues and their running-mean
form, exchange.py what the ranks send each other, encoder.py the momentum encoder, word_pull.py an update's sequence of
it all, files.py its part of a checkpoint.
"""
