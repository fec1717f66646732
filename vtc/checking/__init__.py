"""Is it right on this machine: pruning compared with pruning by hand."""
