"""What pruning should cost and save by arithmetic, and what it does when measured."""
