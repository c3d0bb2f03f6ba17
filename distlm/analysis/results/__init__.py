"""What was measured, as data: results/NAME.json, and docs/results.md, which is made of them."""
