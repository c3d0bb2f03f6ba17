"""The kNN-LM: neighbours of every evaluation token (search, exact re-scoring), interpolation, tuning, evaluation.

Khandelwal et al., "Generalization through Memorization" (ICLR 2020): p = λ p_kNN + (1 − λ) p_LM (eq. 3), with
p_kNN(y) ∝ Σ over neighbours with value y of exp(−d / T) (eq. 2), d the squared L2 distance.
"""
