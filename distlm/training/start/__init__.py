"""Where training starts from, when not from fresh weights."""
