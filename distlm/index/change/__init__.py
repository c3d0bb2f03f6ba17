"""A finished index is changed: keys are added, or dropped."""
