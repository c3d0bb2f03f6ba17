"""Parts become one stock faiss file, byte for byte what one process would have written."""
