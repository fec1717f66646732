"""Whether pruning pays on the running device: its pace and a method's are measured, and batches are judged by them."""
