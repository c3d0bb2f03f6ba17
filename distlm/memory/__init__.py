"""Product-key memory: retrieval, values sharded over the ranks, their sparse optimizer, measures of use."""
