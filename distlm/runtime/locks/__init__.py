"""Who holds a folder, where the file system's own locks do not say it for all nodes."""
