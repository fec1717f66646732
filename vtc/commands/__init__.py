"""Commands of the `vtc` command line, one a file; vtc/cli.py registers them."""
