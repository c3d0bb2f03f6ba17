"""The transformer language model of Baevski & Auli (2019), with the regularisers of Ton et al. (2021)."""
