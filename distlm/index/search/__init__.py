"""An index is searched: as faiss does, list by list, over ranks, on a GPU."""
