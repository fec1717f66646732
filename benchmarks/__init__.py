"""Scripts and their parts, run from a source tree; none of this is installed but `tinyvlm` and `tinyvlm_next`."""
