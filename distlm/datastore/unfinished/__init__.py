"""A store while it is written: what lies in its folder, and how units become shards."""
