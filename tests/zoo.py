"""`vtc.zoo` under the short name that the tests use: `import zoo`, `from zoo.models import IMAGE`."""

import sys

from vtc import zoo

sys.modules |= {"zoo": zoo, **{f"zoo.{name}": getattr(zoo, name) for name in ("inputs", "models", "parts")}}
