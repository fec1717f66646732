"""`locked.py LOCK [NAME==VERSION ...]`: end with an error unless all that is installed in this environment has its
version from the lock, or is one of those named beside it.

A package that a lock forgets is installed at its newest release, and nothing else would say so.
"""

import re
import sys
from importlib.metadata import distributions

OURS = {"visual-token-compression", "pip", "setuptools"}  # the latter two come with an environment, or are built with


def main(lock: str, *beside: str) -> str | None:
    """What is wrong, or nothing."""
    with open(lock) as file:
        pins = re.findall(r"^([\w.-]+)==([^\s+]+)", "\n".join([file.read(), *beside]), flags=re.M)  # without +cpu
    wrong = []
    for found in distributions():
        name, version = re.sub(r"[-_.]+", "-", found.name).lower(), found.version.split("+")[0]
        if name not in OURS and (name, version) not in pins:
            wrong.append(f"{name} {version}")
    return f"not from {lock}: {', '.join(sorted(wrong))}" if wrong else None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
