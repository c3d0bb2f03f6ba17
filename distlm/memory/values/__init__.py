"""The values of a product-key memory: sharded over the ranks by column, with their own sparse optimizer."""
