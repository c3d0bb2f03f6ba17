"""AWD-LSTM (Merity et al. 2017): model, training with NT-ASGD, import and export."""
